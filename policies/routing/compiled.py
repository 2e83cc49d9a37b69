"""`jit`: numba's njit with a disk cache that notices when a rule changes.

Numba caches a compiled function by its own file only, so an edit in `rules.py` would leave the simulator running
the old rule. The cache folder is therefore named by a hash of every source that the simulator compiles.
"""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

from policies.routing.compile_cache import cache_folder

F = TypeVar("F", bound=Callable[..., Any])

_HERE = Path(__file__).parent


def _cache_folder() -> str:
    digest = hashlib.sha256()
    for name in (
        "compiled",
        "contract",
        "rules",
        "estimation",
        "features",
        "set_features",
        "per_request",
        "randomness",
        "queueing_model",
        "arrival_process",
        "instance_queue",
        "gateway_views",
        "simulator",
    ):
        source = _HERE / f"{name}.py"
        if source.exists():
            digest.update(source.read_bytes())
    return str(cache_folder(digest.hexdigest()[:16], os.environ, time.time()))


# Compiled code here allocates nothing, so it needs no reference counts; their atomic increments took two thirds of
# the simulator's time.
_NO_COUNTING: Any = {"_nrt": False}

config: Any = numba.config
config.CACHE_DIR = _cache_folder()


def jit(function: F) -> F:
    """The function compiled on first call, without the GIL, cached on disk, inlined into compiled callers."""
    return cast(F, numba.njit(cache=True, nogil=True, forceinline=True, **_NO_COUNTING)(function))


def kernel(function: F) -> F:
    """Like `jit`, for the functions that Python calls: several threads may run them side by side."""
    return cast(F, numba.njit(cache=True, nogil=True, **_NO_COUNTING)(function))
