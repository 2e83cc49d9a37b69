"""Resizing by an entry's `preprocess`: Pillow's pixels bit for bit, no gigabytes for thin pictures."""

import importlib.util
import resource
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from models.catalog import Preprocess
from models.compiled_resizing import passes
from models.resizing import resized

PHOTOGRAPHS = sorted(Path(str(importlib.util.find_spec("sklearn").origin)).parent.glob("datasets/images/*.jpg"))  # type: ignore[union-attr]
HOW = Preprocess(resize=64, crop="centre", interpolation="bicubic")
NEEDS_PASSES = pytest.mark.skipif(passes() is None, reason="needs resize_passes.c compiled: install a C compiler")
BOTH_WAYS = pytest.mark.parametrize(
    "compiled", [pytest.param(True, marks=NEEDS_PASSES), False], ids=["compiled", "pillow"]
)
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def photograph(height: int, width: int, which: int = 0) -> npt.NDArray[np.uint8]:
    """A real photograph in any size, nearest pixels, so that its edges stay sharp."""
    return np.asarray(Image.open(PHOTOGRAPHS[which]).resize((width, height), Image.Resampling.NEAREST))


def in_two_steps(pixels: npt.NDArray[np.uint8], how: Preprocess, height: int, width: int) -> npt.NDArray[np.uint8]:
    """What torchvision does with a PIL image: resize the whole of it, then cut the centre out."""
    source_height, source_width = pixels.shape[:2]
    if source_width <= source_height:
        whole = how.resize, int(how.resize * source_height / source_width)
    else:
        whole = int(how.resize * source_width / source_height), how.resize
    left, top = round((whole[0] - width) / 2), round((whole[1] - height) / 2)
    scaled = Image.fromarray(pixels).resize(whole, FILTERS[how.interpolation])
    return np.asarray(scaled.crop((left, top, left + width, top + height)))


@BOTH_WAYS
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("gray", [False, True])
def test_pillows_pixels_bit_for_bit(interpolation: str, gray: bool, compiled: bool) -> None:
    how = msgspec.structs.replace(HOW, interpolation=interpolation)
    rng = np.random.default_rng(0)
    for _ in range(40):
        height, width = (int(side) for side in rng.integers(100, 400, 2))
        pixels = photograph(height, width, which=int(rng.integers(2)))
        pixels = pixels[:, :, 0].copy() if gray else pixels
        to = int(rng.integers(48, 65)), int(rng.integers(48, 65))
        got = resized(pixels, how, *to, compiled=compiled)
        assert np.array_equal(got, in_two_steps(pixels, how, *to)), (height, width, to)


# Sides whose scale is a fraction of powers of two (a part is exact), that need no scaling, that grow, and pictures so
# tall that Pillow begins with their columns (the one of 700 x 70).
@BOTH_WAYS
@pytest.mark.parametrize(
    "shape",
    [(375, 500), (500, 375), (256, 384), (64, 300), (64, 64), (300, 64), (40, 50), (50, 40), (700, 70), (96, 65)],
)
def test_leaving_out_what_the_cut_does_not_need_turns_no_value(shape: tuple[int, int], compiled: bool) -> None:
    rng = np.random.default_rng(2)
    for to in ((56, 56), (64, 64), (64, 33), (33, 64), (1, 1)):
        for interpolation in ("bilinear", "bicubic"):
            how = msgspec.structs.replace(HOW, interpolation=interpolation)
            pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
            # Where the whole would be many times the cut, Pillow is asked for the cut alone: not exact.
            if (compiled and shape != (700, 70)) or max(shape) / min(shape) * 64 * 64 <= 8 * to[0] * to[1]:
                got = resized(pixels, how, *to, compiled=compiled)
                assert np.array_equal(got, in_two_steps(pixels, how, *to)), (to, interpolation)


@BOTH_WAYS
@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 1), (3, 20_000), (20_000, 3)])
def test_a_thin_picture_is_resized_in_part(compiled: bool, shape: tuple[int, int]) -> None:
    pixels = photograph(*shape)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got = resized(pixels, HOW, 60, 50, compiled=compiled)
    # Resized whole it would have 64 x 30,000 times its rows or columns: hundreds of megabytes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 60_000
    # The cut shows a pixel or a few of the long side.
    at = [max(0, length // 2 - 4) for length in shape]
    middle = pixels[at[0] : shape[0] // 2 + 5, at[1] : shape[1] // 2 + 5].reshape(-1, 3)
    assert got.shape == (60, 50, 3)
    assert (got >= middle.min(axis=0).astype(int) - 30).all()
    assert (got <= middle.max(axis=0).astype(int) + 30).all()


@BOTH_WAYS
def test_stretching(compiled: bool) -> None:
    how = Preprocess(interpolation="bicubic")
    pixels = photograph(90, 130)
    expected = Image.fromarray(pixels).resize((50, 60), FILTERS[how.interpolation])
    assert np.array_equal(resized(pixels, how, 60, 50, compiled=compiled), np.asarray(expected))
    assert resized(pixels, how, 90, 130, compiled=compiled) is pixels
