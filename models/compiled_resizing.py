"""Pillow's resizing in vector instructions: the weights of each axis, and the call of the compiled passes.

`resize_passes.c` is built at installation, if there is a C compiler. Without it `resizing.py` takes Pillow: the same
pixels, more slowly. The law is Pillow's for 8 bits a channel: weights in float64, held as integers in units of 2^-22,
and whole levels between the two passes.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
"""[height, width] or [height, width, 3]."""

LONGEST_SIDE = 65_536
"""Of a picture, in pixels, so that its scratch memory stays below a few megabytes."""

_LONGEST_KEPT = 8192  # longer sides' weights, up to a megabyte, are made anew each time
_ONE = float(1 << 22)
_FOLDER = Path(__file__).parent


class Axis(NamedTuple):
    """Target pixel i of an axis is the sum over t of `weights[i, t]` times source pixel `first[i]` + t."""

    source: int
    """Pixels of the whole source."""
    first: npt.NDArray[np.int32]
    """[count], never falling."""
    weights: npt.NDArray[np.int32]
    """[count, taps], in units of 2^-22."""


@functools.cache
def passes() -> Callable[..., int] | None:
    """The compiled function; None where it was not built, or not for this machine or these sources."""
    for suffix in EXTENSION_SUFFIXES:
        file = _FOLDER / f"resize_passes{suffix}"
        if file.is_file():
            try:
                function = ctypes.CDLL(str(file)).tidegate_resize_1
            except (OSError, AttributeError):
                continue
            side = (ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)
            function.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int32, *side, *side, ctypes.c_void_p)
            function.restype = ctypes.c_int
            return function
    return None


def axis(source: int, scaled: int, interpolation: str, first: int, count: int) -> Axis:
    """Pixels `first` to `first + count` of an axis of `source` pixels that is scaled to `scaled`.

    `interpolation` is "bilinear" or "bicubic". Raises `ValueError` for a part that is not within the whole.
    """
    if not (1 <= source <= LONGEST_SIDE and 0 <= first < first + count <= scaled):
        raise ValueError(f"pixels {first} to {first + count} of {source} scaled to {scaled}")
    make = _axis if source <= _LONGEST_KEPT else _axis.__wrapped__
    return make(source, scaled, interpolation, first, count)


@functools.lru_cache(maxsize=256)
def _axis(source: int, scaled: int, interpolation: str, first: int, count: int) -> Axis:
    law, reach = _LAWS[interpolation]
    scale = source / scaled
    stretch = max(scale, 1.0)  # of the filter, which shrinks nothing
    centres = (np.arange(first, first + count) + 0.5) * scale
    begins = np.maximum(centres - reach * stretch + 0.5, 0.0).astype(np.int64)
    ends = np.minimum((centres + reach * stretch + 0.5).astype(np.int64), source)
    taps = int((ends - begins).max())
    # All windows get the same length, within the picture; what Pillow's does not have weighs nothing.
    starts = np.minimum(begins, source - taps)
    at = starts[:, np.newaxis] + np.arange(taps)
    within = (at >= begins[:, np.newaxis]) & (at < ends[:, np.newaxis])
    shares = np.where(within, law((at - centres[:, np.newaxis] + 0.5) * (1.0 / stretch)), 0.0)
    # From left to right, as Pillow adds: another order may differ in the last bit.
    shares /= np.add.accumulate(shares, axis=1)[:, -1:]
    weights = np.trunc(shares * _ONE + np.copysign(0.5, shares)).astype(np.int32)
    found = Axis(source, starts.astype(np.int32), weights)
    for array in (found.first, found.weights):
        array.flags.writeable = False  # shared by everybody who asks
    return found


def _bilinear(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _bicubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys' cubic convolution with a = -1/2."""
    a = -0.5
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


_LAWS = {"bilinear": (_bilinear, 1.0), "bicubic": (_bicubic, 2.0)}  # and how far they reach to either side


def run_passes(pixels: Pixels, columns: Axis, rows: Axis) -> Pixels:
    """`pixels` scaled along the rows by `columns`, then along the columns by `rows`, without the interpreter's lock.

    Raises `ValueError` for axes that are not of these pixels and `RuntimeError` where nothing is compiled.
    """
    compiled = passes()
    if compiled is None:
        raise RuntimeError("resize_passes.c is not compiled: install a C compiler and reinstall")
    pixels = np.ascontiguousarray(pixels)
    if pixels.dtype != np.uint8 or pixels.shape not in [(rows.source, columns.source, *end) for end in ((), (3,))]:
        raise ValueError(f"pixels {pixels.dtype} {pixels.shape} for axes of {rows.source} x {columns.source}")
    target = np.empty((len(rows.first), len(columns.first), *pixels.shape[2:]), dtype=np.uint8)
    sides = [
        value
        for side in (columns, rows)
        for value in (*side.weights.shape, side.first.ctypes.data, side.weights.ctypes.data)
    ]
    if compiled(pixels.ctypes.data, pixels.strides[0], math.prod(pixels.shape[2:]), *sides, target.ctypes.data):
        raise MemoryError("no memory for resizing")
    return target
