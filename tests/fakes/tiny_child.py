"""`python tiny_child.py FILE MODE`: a process for the supervisor's tests. Appends its pid to FILE, then by MODE:

die: ends with 3 at once; serve: until SIGTERM, then 0; deaf: ignores SIGTERM.
"""

import os
import signal
import sys


def main() -> None:
    """See above."""
    file, mode = sys.argv[1:]
    if mode == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif mode == "serve":
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    with open(file, "a") as output:
        output.write(f"{os.getpid()}\n")
    print(f"child in mode {mode}", file=sys.stderr, flush=True)
    if mode == "die":
        sys.exit(3)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
