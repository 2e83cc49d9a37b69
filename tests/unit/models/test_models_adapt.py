"""A configuration applied to bytes: sizes, kept frames, coordinates."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.adapt import (
    AdaptedFrames,
    Configuration,
    Media,
    adapt,
    adapt_clip,
    decode,
    keeps,
    read_adapted,
    resize,
    scale_of,
)
from models.clip_limits import Frame, Limits
from models.clips import encode_jpeg, open_clip, write_mjpeg
from models.preprocess import InvalidInput


def smooth(height: int, width: int, phase: float = 0.0) -> Frame:
    rows, columns = np.mgrid[0:height, 0:width]
    wave = 127 + 80 * np.sin(rows / 9 + phase) * np.cos(columns / 11)
    return np.stack([wave, 255 - wave, 0.5 * wave + 30], axis=2).astype(np.uint8)


def test_an_image_comes_back_as_it_was_at_full_resolution() -> None:
    frame = smooth(120, 160)
    media = Media((frame,), 0.0, 160, 120)
    adapted = adapt(media, Configuration(jpeg_quality=95))
    assert (adapted.scale, adapted.frame_numbers, adapted.width, adapted.height) == (1.0, (1,), 160, 120)
    (found,) = read_adapted(adapted.payload)
    assert found.shape == frame.shape
    assert np.abs(found.astype(int) - frame).mean() < 3


def test_lower_quality_and_resolution_take_fewer_bytes() -> None:
    media = Media((smooth(240, 320),), 0.0, 320, 240)
    sizes = [
        [len(adapt(media, Configuration(resolution=r, jpeg_quality=q)).payload) for q in (100, 90, 70, 40)]
        for r in (1.0, 0.75, 0.5, 0.25)
    ]
    assert np.all(np.diff(sizes, axis=0) < 0)
    assert np.all(np.diff(sizes, axis=1) < 0)


@pytest.mark.parametrize("resolution", [0.5, 0.25])
def test_halves_and_quarters_average_boxes(resolution: float) -> None:
    frame = np.random.default_rng(3).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    n = round(1 / resolution)
    expected = frame.reshape(24 // n, n, 32 // n, n, 3).mean(axis=(1, 3))
    assert np.abs(resize(frame, resolution) - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("resolution", [1.0, 0.75, 0.6, 0.5, 0.25, 0.1])
@pytest.mark.parametrize("size", [(97, 131), (480, 640), (7, 5)])
def test_a_box_found_in_the_small_frame_is_where_it_was_in_the_large(resolution: float, size: tuple[int, int]) -> None:
    height, width = size
    frame = np.zeros((height, width, 3), dtype=np.uint8)
    frame[height // 4 :, width // 3 :] = 255
    small = resize(frame, resolution)
    scale = scale_of(width, height, resolution)
    if resolution in (1.0, 0.5, 0.25):
        assert scale == resolution  # boxes of whole pixels: no rounding, whatever the size
    # Mean brightness gives the edges' place to a fraction of a pixel.
    lit = small[..., 0] / 255.0
    left = (lit.shape[1] - lit[-1].sum()) / scale
    top = (lit.shape[0] - lit[:, -1].sum()) / scale
    slack = 1.0 / scale  # one pixel of the small frame
    assert abs(left - width // 3) <= slack
    assert abs(top - height // 4) <= slack


def test_one_pixel_stays_one_pixel() -> None:
    media = decode(encode_jpeg(smooth(1, 1), 90), "image/jpeg")
    for resolution in (1.0, 0.75, 0.5, 0.25):
        assert read_adapted(adapt(media, Configuration(resolution=resolution)).payload)[0].shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("fps", "rate", "kept"),
    [
        (30, 0, tuple(range(1, 31))),
        (30, 60, tuple(range(1, 31))),
        (30, 15, tuple(range(1, 31, 2))),
        (30, 10, tuple(range(1, 31, 3))),
        (30, 5, tuple(range(1, 31, 6))),
        (15, 10, (1, 3, 4, 6, 7, 9, 10, 12, 13, 15)),
        (15, 3, (1, 6, 11)),
        (24, 0.3 * 24, (1, 5, 8, 11, 15)),  # a rate a little below 7.2 by rounding: the tenth frame still opens a tick
    ],
)
def test_kept_frames_are_the_first_of_each_tick(fps: float, rate: float, kept: tuple[int, ...]) -> None:
    count = 30 if fps == 30 else 15
    assert tuple(i + 1 for i in range(count) if keeps(i, fps, rate)) == kept


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 120), st.floats(0.1, 130), st.integers(1, 300))
def test_as_many_frames_are_kept_as_the_rate_says(fps: int, rate: float, count: int) -> None:
    kept = sum(keeps(i, fps, rate) for i in range(count))
    expected = count * min(1.0, rate / fps)
    assert abs(kept - expected) <= 1.0 + 1e-6
    assert keeps(0, fps, rate)


def test_a_clip_is_adapted_alike_whole_and_frame_by_frame() -> None:
    payload = write_mjpeg([smooth(60, 80, phase) for phase in range(12)], 95)
    configuration = Configuration(resolution=0.5, jpeg_quality=80, frame_rate=10)
    content_type = "video/x-motion-jpeg; fps=30"
    whole = adapt(decode(payload, content_type), configuration)
    assert whole == adapt_clip(open_clip(payload, content_type, Limits()), configuration)
    assert (whole.frame_numbers, whole.frame_count, whole.scale) == ((1, 4, 7, 10), 12, 0.5)
    frames = read_adapted(whole.payload)
    assert [frame.shape for frame in frames] == [(30, 40, 3)] * 4
    assert np.abs(frames[2].astype(int) - resize(smooth(60, 80, 6), 0.5)).mean() < 6


def test_frames_of_several_sizes_are_refused() -> None:
    payload = encode_jpeg(smooth(40, 40), 90) + encode_jpeg(smooth(40, 48), 90)
    with pytest.raises(InvalidInput, match="another size"):
        decode(payload, "video/x-mjpeg")


def test_held_frames_are_limited_and_streamed_ones_are_not() -> None:
    payload = write_mjpeg([smooth(40, 40)] * 5)
    limits = Limits(max_held_pixels=4 * 1600)
    with pytest.raises(InvalidInput) as caught:
        decode(payload, "video/x-mjpeg", limits)
    assert caught.value.status == 413
    assert adapt_clip(open_clip(payload, "video/x-mjpeg", limits), Configuration()).frame_count == 5


def test_what_is_not_ours_cannot_be_read() -> None:
    with pytest.raises(InvalidInput):
        read_adapted(b"nothing")


@pytest.mark.parametrize(
    ("key", "value"),
    [("resolution", 0.0), ("resolution", 1.5), ("jpeg_quality", 0), ("jpeg_quality", 101), ("frame_rate", -1.0)],
)
def test_configurations_out_of_range_are_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        Configuration(**{key: value})  # type: ignore[arg-type]


def test_adapted_frames_are_decoded_when_they_are_asked_for() -> None:
    """The same frames as at once, in any order and as a slice; a damaged one raises only itself."""
    frames = [np.full((12, 16, 3), level, dtype=np.uint8) for level in (0, 90, 180)]
    adapted = adapt(Media(tuple(frames), 30.0, 16, 12), Configuration())
    lazy = AdaptedFrames(adapted.payload)
    assert lazy.decode_s == 0.0
    whole = read_adapted(adapted.payload)
    assert len(lazy) == 3
    assert np.array_equal(lazy[2], whole[2])
    assert [int(frame.mean()) for frame in lazy[:2]] == [int(frame.mean()) for frame in whole[:2]]
    assert sum(1 for _ in lazy) == 3
    assert lazy.decode_s > 0.0
    with pytest.raises(InvalidInput):
        AdaptedFrames(b"no JPEG")
