"""Preprocessing: bad bodies are refused with a reason before they cost anything, good ones match Pillow."""

import io
import struct
import time
import tracemalloc
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from models.catalog import TENSOR_CONTENT_TYPE, Input, Preprocess, Variant
from models.preprocess import InvalidInput, decode, prepare, to_input
from models.resizing import resized

RNG = np.random.default_rng(7)
PHOTO = RNG.integers(0, 256, (60, 90, 3), dtype=np.uint8)


def encoded(pixels: npt.NDArray[np.uint8], image_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A valid black gray PNG of side x side pixels in a few hundred kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_png_bomb_is_refused_before_it_unfolds() -> None:
    body = bomb(20_000)
    assert len(body) < 1_000_000
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(InvalidInput, match="20000 x 20000") as caught:
        decode(body, "image/png", "rgb")
    elapsed_s = time.perf_counter() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.status == 413
    assert elapsed_s < 0.05
    assert peak < 1_000_000


def test_a_jpeg_that_claims_too_many_pixels_is_refused_by_its_header() -> None:
    body = bytearray(encoded(PHOTO, "JPEG"))
    frame = body.index(b"\xff\xc0") + 5
    body[frame : frame + 4] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(InvalidInput) as caught:
        decode(bytes(body), "image/jpeg", "rgb")
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("body", "content_type", "status", "reason"),
    [
        (b"", "image/jpeg", 400, "empty"),
        (b"", "text/plain", 415, "text/plain"),
        (b"once upon a time", "image/jpeg", 400, "neither"),
        (encoded(PHOTO, "GIF"), "image/gif", 415, "image/gif"),
        (encoded(PHOTO, "GIF"), "image/png", 400, "neither"),
        (encoded(PHOTO, "JPEG"), "application/json", 415, "json"),
        (encoded(PHOTO, "JPEG")[:1000], "image/jpeg", 400, "cut short"),
        (encoded(PHOTO, "JPEG")[:12], "image/jpeg", 400, "JPEG"),
        (encoded(PHOTO, "PNG")[:2000], "image/png", 400, "cut short"),
        (encoded(PHOTO, "PNG")[:20], "image/png", 400, "header"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "image/png", 400, "header"),
        (b"\xff\xd8\xff" + bytes(100), "image/jpeg", 400, "JPEG"),
    ],
)
def test_a_bad_body_is_refused_with_a_reason(body: bytes, content_type: str, status: int, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason) as caught:
        decode(body, content_type, "rgb")
    assert caught.value.status == status
    assert caught.value.reason == str(caught.value)


@pytest.mark.parametrize("content_type", ["image/jpeg", "image/png; charset=binary", "", "IMAGE/JPEG"])
def test_the_bytes_decide_what_the_image_is(content_type: str) -> None:
    assert decode(encoded(PHOTO, "JPEG"), content_type, "rgb").shape == (60, 90, 3)
    assert np.array_equal(decode(encoded(PHOTO, "PNG"), content_type, "rgb"), PHOTO)


@pytest.mark.parametrize("colour", ["rgb", "gray"])
def test_jpeg_pixels_equal_pillows(colour: str) -> None:
    body = encoded(PHOTO, "JPEG", quality=90)
    mode = "L" if colour == "gray" else "RGB"
    expected = np.asarray(Image.open(io.BytesIO(body)).convert("RGB").convert(mode), dtype=int)
    got = decode(body, "image/jpeg", colour).astype(int)
    # Gray is the file's own luma here and a sum of rounded colours in Pillow.
    assert np.abs(got - expected).mean() < (3.0 if colour == "gray" else 0.5)
    assert got.shape == expected.shape


def test_png_kinds_are_brought_to_the_colour_asked_for() -> None:
    gray = PHOTO[:, :, 0]
    assert np.array_equal(decode(encoded(gray, "PNG"), "image/png", "rgb"), np.stack([gray] * 3, axis=2))
    assert decode(encoded(PHOTO, "PNG"), "image/png", "gray").shape == (60, 90)
    deep = io.BytesIO()
    Image.fromarray(gray.astype(np.uint16) * 256 + 9).save(deep, "PNG")
    assert np.array_equal(decode(deep.getvalue(), "image/png", "gray"), gray)
    clear = io.BytesIO()
    Image.fromarray(np.dstack([PHOTO, gray])).save(clear, "PNG")
    assert np.array_equal(decode(clear.getvalue(), "image/png", "rgb"), PHOTO)


def test_normalising_is_per_channel_and_contiguous() -> None:
    how = Preprocess(resize=37, crop="centre", mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), interpolation="bicubic")
    got = to_input(PHOTO, how, (3, 32, 24))
    expected = (resized(PHOTO, how, 32, 24) / 255.0 - how.mean) / how.std
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    assert np.abs(got - expected.transpose(2, 0, 1)).max() < 1e-5


def test_stretch_gray_and_bgr() -> None:
    gray = PHOTO[:, :, 0]
    same = to_input(gray, Preprocess(colour="gray", mean=(0.5,), std=(0.5,)), (1, 60, 90))
    assert np.allclose(same[0], gray / 127.5 - 1, atol=1e-6)
    flipped = to_input(PHOTO, Preprocess(colour="bgr"), (3, 60, 90))
    assert np.allclose(flipped, PHOTO[:, :, ::-1].transpose(2, 0, 1) / 255, atol=1e-6)
    stretched = to_input(PHOTO, Preprocess(interpolation="nearest"), (3, 30, 45))
    expected = np.asarray(Image.fromarray(PHOTO).resize((45, 30), Image.Resampling.NEAREST)) / 255
    assert np.allclose(stretched, expected.transpose(2, 0, 1), atol=1e-6)


def variant(dtype: str = "float32") -> Variant:
    shape = Input(shape=(3, 4, 5), dtype="float16" if dtype == "float16" else "float32")
    return Variant(name="x", service="x", runtime="onnxruntime", path="x", labels=("a",), input=shape)


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_a_tensor_body_is_taken_as_it_is_and_checked(name: str) -> None:
    values = RNG.normal(size=(3, 4, 5)).astype(name)
    got = prepare(values.tobytes(), TENSOR_CONTENT_TYPE, variant(name)).tensor
    assert got is not None
    assert np.array_equal(got, values)
    with pytest.raises(InvalidInput, match="needs"):
        prepare(values.tobytes()[1:], TENSOR_CONTENT_TYPE, variant(name))
    for wrong in (np.nan, np.inf):
        values[1, 2, 3] = wrong
        with pytest.raises(InvalidInput, match="not finite"):
            prepare(values.tobytes(), TENSOR_CONTENT_TYPE, variant(name))


def test_an_image_for_a_half_precision_input_is_half_precision() -> None:
    got = prepare(encoded(PHOTO, "PNG"), "image/png", variant("float16")).tensor
    assert got is not None
    assert got.dtype == np.float16
    assert got.shape == (3, 4, 5)
