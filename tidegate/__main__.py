"""`tidegate` and `python -m tidegate`: Ctrl-C while the commands are still being imported ends in words, too."""

import sys

INTERRUPTED_EXIT = 130


def main() -> None:
    """Runs the command line. Importing all commands takes a moment, in which people change their minds."""
    try:
        from tidegate.main import app
    except KeyboardInterrupt:
        print("tidegate: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT)
    app()


if __name__ == "__main__":
    main()
