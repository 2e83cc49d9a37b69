"""`python -m tidegate.probe URL`: exit status 0 if URL answers 200 within 2 s. For health checks of containers.

The standard library only: it runs every few seconds beside the process that it looks at.
"""

import sys
import urllib.error
import urllib.request

PATIENCE_S = 2.0


def answers(url: str, patience_s: float = PATIENCE_S) -> bool:
    """Whether a GET of `url` is answered with 200 in time."""
    try:
        with urllib.request.urlopen(url, timeout=patience_s) as response:
            return int(response.status) == 200
    except (urllib.error.URLError, OSError, ValueError):
        return False


if __name__ == "__main__":
    sys.exit(0 if len(sys.argv) == 2 and answers(sys.argv[1]) else 1)
