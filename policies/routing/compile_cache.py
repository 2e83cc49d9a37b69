"""Where compiled code is kept between runs: below the user's cache directory, which survives a reboot.

First compilation takes about 20 s. A folder in a shared temporary directory would be lost at every boot, and others
could put code there that this process would then run.
"""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Final

KEPT_S: Final = 30 * 86_400.0
_PREFIX: Final = "numba-"


def cache_folder(digest: str, environment: Mapping[str, str], now_s: float) -> Path:
    """The folder for code of this `digest`: below NUMBA_CACHE_DIR, XDG_CACHE_HOME or ~/.cache, the first that can be
    written to; else below a folder of our own in the temporary directory. Folders unused for 30 days are removed."""
    bases = [Path(environment["NUMBA_CACHE_DIR"])] if environment.get("NUMBA_CACHE_DIR") else []
    if environment.get("XDG_CACHE_HOME"):
        bases.append(Path(environment["XDG_CACHE_HOME"]) / "tidegate")
    elif environment.get("HOME"):
        bases.append(Path(environment["HOME"]) / ".cache" / "tidegate")
    bases.append(Path(gettempdir()) / f"tidegate-{os.getuid()}")
    for base in bases:
        folder = base / f"{_PREFIX}{digest}"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
                os.utime(folder, (now_s, now_s))
                _forget_old(base, now_s)
                return folder
    return bases[-1] / f"{_PREFIX}{digest}"


def _forget_old(base: Path, now_s: float) -> None:
    for folder in base.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if now_s - folder.stat().st_mtime > KEPT_S:
                shutil.rmtree(folder)
