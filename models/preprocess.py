"""From request bytes to the input array: check, decode, resize, crop, normalise.

Pure functions over bytes and arrays, safe to call from many threads at once. Sizes are read from the file's
header and limited *before* any pixel is decoded, so that a small file cannot unfold into gigabytes.
"""

import io
import math
import struct

import msgspec
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from models.catalog import TENSOR_CONTENT_TYPE, Preprocess, Variant
from models.compiled_resizing import Pixels
from models.device_decode import DeviceDecoder
from models.resizing import resized

MAX_PIXELS = 32_000_000  # larger than most cameras' pictures; about 100 MB as RGB

_ACCEPTED = frozenset({"", "image/jpeg", "image/jpg", "image/png", "image/*", "application/octet-stream"})
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
Tensor = npt.NDArray[np.float32] | npt.NDArray[np.float16]


class InvalidInput(ValueError):
    """A request body that cannot be served: `reason` for the client, `status` 400, 413 or 415."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status


class Prepared(msgspec.Struct, frozen=True, eq=False):
    """One request's input: `tensor` [channels, height, width], or the label that emulation reads."""

    tensor: Tensor | None = None
    label: int = 0


def prepare(
    payload: bytes,
    content_type: str,
    variant: Variant,
    max_pixels: int = MAX_PIXELS,
    decoder: DeviceDecoder | None = None,
) -> Prepared:
    """Decode (JPEGs by `decoder` if there is one) and preprocess one body for `variant`. Raises `InvalidInput`."""
    if content_type.partition(";")[0].strip().lower() == TENSOR_CONTENT_TYPE:
        return Prepared(tensor=_tensor(payload, variant))
    pixels = decode(payload, content_type, variant.preprocess.colour, max_pixels, decoder)
    array = to_input(pixels, variant.preprocess, variant.input.shape)
    if variant.input.dtype == "float16":
        return Prepared(tensor=array.astype(np.float16))
    return Prepared(tensor=array)


def decode(
    payload: bytes,
    content_type: str,
    colour: str,
    max_pixels: int = MAX_PIXELS,
    decoder: DeviceDecoder | None = None,
) -> Pixels:
    """Pixels of a JPEG or PNG, [height, width, 3], or [height, width] when `colour` is "gray".

    The bytes decide between JPEG and PNG; the content type only has to be one that can carry them.
    Raises `InvalidInput`: 415 wrong type, 413 more than `max_pixels`, 400 anything else.
    """
    if content_type.partition(";")[0].strip().lower() not in _ACCEPTED:
        raise InvalidInput(f"content type {content_type[:80]!r}: send image/jpeg or image/png", 415)
    if not payload:
        raise InvalidInput("the body is empty: send a JPEG or PNG image")
    if payload.startswith(_JPEG):
        return _decode_jpeg(payload, colour, max_pixels, decoder)
    if payload.startswith(_PNG):
        return _decode_png(payload, colour, max_pixels)
    raise InvalidInput("the body is neither a JPEG nor a PNG image")


def to_input(pixels: Pixels, how: Preprocess, shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    """Resize, crop and normalise `pixels` ([h, w] or [h, w, 3], uint8) to a contiguous float32 `shape`."""
    pixels = resized(pixels, how, *shape[1:])
    if pixels.ndim == 2:
        pixels = pixels[:, :, np.newaxis]
    if how.colour == "bgr":
        pixels = pixels[:, :, ::-1]
    std = np.asarray(how.std, dtype=np.float32).reshape(-1, 1, 1)
    mean = np.asarray(how.mean, dtype=np.float32).reshape(-1, 1, 1)
    array = np.empty(shape, dtype=np.float32)
    np.multiply(pixels.transpose(2, 0, 1), np.float32(1.0) / (np.float32(255.0) * std), out=array)
    np.subtract(array, mean / std, out=array)
    return array


def _limit(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise InvalidInput(f"the image is {width} x {height} pixels: it has no content")
    if width * height > max_pixels:
        raise InvalidInput(f"the image is {width} x {height} pixels: at most {max_pixels} are accepted", 413)


def _decode_jpeg(payload: bytes, colour: str, max_pixels: int, decoder: DeviceDecoder | None) -> Pixels:
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(payload)
    except ValueError as error:
        raise InvalidInput(f"the JPEG image cannot be read ({error})") from error
    _limit(width, height, max_pixels)
    if space not in ("YCbCr", "Gray", "RGB"):  # CMYK, from print work: rare
        return _decode_with_pillow(payload, "JPEG", colour)
    if decoder is not None and (found := decoder.decode(payload, colour)) is not None:
        return found
    try:
        wanted = "GRAY" if colour == "gray" else "RGB"
        pixels: Pixels = simplejpeg.decode_jpeg(payload, colorspace=wanted)
    except ValueError as error:
        raise InvalidInput(f"the JPEG image is damaged or cut short ({error})") from error
    return pixels[:, :, 0] if colour == "gray" else pixels


def _decode_png(payload: bytes, colour: str, max_pixels: int) -> Pixels:
    if len(payload) < 24 or payload[12:16] != b"IHDR":
        raise InvalidInput("the PNG image has no header")
    width, height = struct.unpack(">II", payload[16:24])
    _limit(width, height, max_pixels)
    return _decode_with_pillow(payload, "PNG", colour)


def _decode_with_pillow(payload: bytes, kind: str, colour: str) -> Pixels:
    try:
        with Image.open(io.BytesIO(payload), formats=(kind,)) as image:
            whole: Image.Image = image
            if image.mode.startswith("I"):  # 16-bit gray: keep the high byte
                whole = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.asarray(whole.convert("L" if colour == "gray" else "RGB"))
    # Pillow's decoders raise many kinds for broken files (SyntaxError and struct.error among them).
    except Exception as error:
        raise InvalidInput(f"the {kind} image is damaged or cut short ({error})") from error


def _tensor(payload: bytes, variant: Variant) -> Tensor:
    half = variant.input.dtype == "float16"
    expected = (2 if half else 4) * math.prod(variant.input.shape)
    if len(payload) != expected:
        shape = f"{list(variant.input.shape)} {variant.input.dtype}"
        raise InvalidInput(f"the tensor has {len(payload)} bytes: {shape} needs {expected}")
    values: Tensor
    if half:
        values = np.frombuffer(payload, dtype=np.float16).reshape(variant.input.shape)
    else:
        values = np.frombuffer(payload, dtype=np.float32).reshape(variant.input.shape)
    if not np.isfinite(values).all():
        raise InvalidInput("the tensor has values that are not finite numbers")
    return values
