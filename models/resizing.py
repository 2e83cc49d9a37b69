"""From a picture to the model's height and width: stretch, or resize and cut out the centre.

The pixels are those of the very operations that torchvision and timm do by Pillow, bit for bit: from a compiled part
of this project (`compiled_resizing.py`) where the installation could build it, else from Pillow.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from models.catalog import Preprocess
from models.compiled_resizing import LONGEST_SIDE, Pixels, axis, passes, run_passes

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_LARGEST_WHOLE = 8  # times the cut's pixels
_REACH = 2.0  # of the widest filter, in scaled pixels to either side


class Frame(NamedTuple):
    """The whole picture's size after scaling, and where in it the cut begins (all in pixels)."""

    width: int
    height: int
    left: int
    top: int


def resized(pixels: Pixels, how: Preprocess, height: int, width: int, *, compiled: bool = True) -> Pixels:
    """`pixels` brought to `height` x `width` as `how` says.

    Without `compiled` Pillow itself is taken in any case: for comparisons.
    """
    if how.crop == "none" and pixels.shape[:2] == (height, width):
        return pixels
    frame = frame_of(pixels.shape[1], pixels.shape[0], how, height, width)
    if compiled and passes() is not None and _passes_do(pixels.shape[1], pixels.shape[0], how, frame):
        columns = axis(pixels.shape[1], frame.width, how.interpolation, frame.left, width)
        rows = axis(pixels.shape[0], frame.height, how.interpolation, frame.top, height)
        return run_passes(pixels, columns, rows)
    return _with_pillow(pixels, how, frame, height, width)


def frame_of(source_width: int, source_height: int, how: Preprocess, height: int, width: int) -> Frame:
    """Sizes and places rounded as torchvision and timm round them."""
    if how.crop == "none":
        return Frame(width, height, 0, 0)
    if source_width <= source_height:
        scaled_width, scaled_height = how.resize, int(how.resize * source_height / source_width)
    else:
        scaled_width, scaled_height = int(how.resize * source_width / source_height), how.resize
    return Frame(
        scaled_width,
        scaled_height,
        round((scaled_width - width) / 2.0),
        round((scaled_height - height) / 2.0),
    )


def _passes_do(source_width: int, source_height: int, how: Preprocess, frame: Frame) -> bool:
    """Whether the compiled passes are for this: filters of Pillow's that begin with the rows, of pictures in bounds."""
    rows_first = not _columns_first(source_width, source_height, frame)
    return how.interpolation != "nearest" and rows_first and max(source_width, source_height) <= LONGEST_SIDE


def _columns_first(source_width: int, source_height: int, frame: Frame) -> bool:
    """Whether a picture is so tall, and shrinks so much, that Pillow goes along its columns first (from 13 on)."""
    return source_height - frame.height > max(0, 2 * (source_width - frame.width))


def _rows_needed(frame: Frame, source_height: int, height: int) -> tuple[int, int]:
    """The source's rows that the cut depends on, as [first, last)."""
    scale = source_height / frame.height  # source pixels per scaled pixel
    reach = _REACH * max(scale, 1.0) + 1.0
    first = max(0, math.floor(frame.top * scale - reach))
    return first, min(source_height, math.ceil((frame.top + height) * scale + reach))


def _with_pillow(pixels: Pixels, how: Preprocess, frame: Frame, height: int, width: int) -> Pixels:
    """Pillow's pixels: those of its resize of the whole picture, of which the cut is taken.

    Pillow goes along the rows, then along the columns, so two calls of one pass each may leave out what the cut does
    not need, where that turns no value (a fifth of the time). Whole calls are left for tall pictures that shrink much,
    along whose columns Pillow goes first. And where the whole would be many times the cut, one
    call with a `box` must do, although it turns some values by a level: one pixel by a million must not become
    gigabytes.
    """
    chosen = _FILTERS[how.interpolation]
    source_height, source_width = pixels.shape[:2]
    if frame.width * frame.height > _LARGEST_WHOLE * width * height:
        first, last = _rows_needed(frame, source_height, height)
        x, y = source_width / frame.width, source_height / frame.height  # source pixels per scaled pixel
        box = (frame.left * x, frame.top * y - first, (frame.left + width) * x, (frame.top + height) * y - first)
        return np.asarray(Image.fromarray(pixels[first:last]).resize((width, height), chosen, box=box))
    if _columns_first(source_width, source_height, frame) or how.interpolation == "nearest":
        whole = Image.fromarray(pixels).resize((frame.width, frame.height), chosen)
        return np.asarray(whole)[frame.top : frame.top + height, frame.left : frame.left + width]
    first, last = _rows_needed(frame, source_height, height)
    across = Image.fromarray(pixels[first:last])
    if _exact_in_part(source_width, frame.width):
        x = source_width / frame.width
        across = across.resize(
            (width, last - first), chosen, box=(frame.left * x, 0, (frame.left + width) * x, last - first)
        )
    else:
        across = across.resize((frame.width, last - first), chosen)
        across = across.crop((frame.left, 0, frame.left + width, last - first))
    if _exact_in_part(source_height, frame.height):
        y = source_height / frame.height
        box = (0, frame.top * y - first, width, (frame.top + height) * y - first)
        return np.asarray(across.resize((width, height), chosen, box=box))
    # Rows that the cut does not need are left black.
    padded = across.crop((0, -first, width, source_height - first)).resize((width, frame.height), chosen)
    return np.asarray(padded)[frame.top : frame.top + height]


def _exact_in_part(source: int, scaled: int) -> bool:
    """Whether Pillow's `box` can say any part of an axis without rounding: source pixels per scaled one are n/2^k.

    A `box` is kept as float32, with 24 bits: enough for any multiple of the step that lies within the picture.
    """
    parts = scaled // math.gcd(source, scaled)
    return parts & (parts - 1) == 0 and source * parts < 1 << 24
