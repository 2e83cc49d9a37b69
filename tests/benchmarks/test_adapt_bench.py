"""How long the local node's work on a frame takes.

    pytest -m benchmark -s tests/benchmarks/test_adapt_bench.py

Counted is the processor time of the one thread that does it, which others' work on the machine hardly changes. The
pictures are smooth with grain, as photographs are.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from models.adapt import Configuration, Media, adapt, adapt_clip, decode
from models.clip_limits import Frame, Limits
from models.clips import encode_jpeg, open_clip
from models.mp4 import write_mp4


def photograph(width: int, height: int, seed: int) -> Frame:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grainy: Frame = np.clip(smooth.astype(np.int16) + rng.integers(-5, 6, smooth.shape), 0, 255).astype(np.uint8)
    return grainy


def median_ms(work: Callable[[], object], times: int) -> float:
    work()
    spent = []
    for _ in range(times):
        started = time.thread_time()
        work()
        spent.append(time.thread_time() - started)
    return 1000 * statistics.median(spent)


@pytest.mark.benchmark
@pytest.mark.timeout(300)
def test_a_1080p_frame_is_halved_and_encoded_in_less_than_10_ms() -> None:
    frame = photograph(1920, 1080, 0)
    media = Media((frame,), 0.0, 1920, 1080)
    found = {}
    for resolution in (1.0, 0.75, 0.5, 0.25):
        how = Configuration(resolution=resolution, jpeg_quality=95)
        found[resolution] = median_ms(lambda how=how: adapt(media, how), 40)  # type: ignore[misc]
        print(f"1080p frame to {resolution:g}, JPEG quality 95: {found[resolution]:.2f} ms")
    assert found[0.5] < 10


@pytest.mark.benchmark
@pytest.mark.timeout(300)
def test_what_a_clip_costs_the_local_node() -> None:
    frames = [photograph(1920, 1080, 1)[:, shift : shift + 1600] for shift in range(0, 120, 4)]
    clip = write_mp4(frames, 30)
    megabytes = len(clip) / 1e6
    facts = median_ms(lambda: open_clip(clip, "video/mp4", Limits()), 5)
    print(f"MP4 of 30 frames 1600 x 1080, {megabytes:.1f} MB: headers {facts:.2f} ms")
    every = median_ms(lambda: adapt_clip(open_clip(clip, "video/mp4", Limits()), Configuration(resolution=0.5)), 3)
    few = Configuration(resolution=0.5, frame_rate=5)
    some = median_ms(lambda: adapt_clip(open_clip(clip, "video/mp4", Limits()), few), 3)
    print(f"decoded, halved, encoded: {every / 30:.2f} ms a frame; with every sixth kept: {some / 30:.2f} ms a frame")
    image = encode_jpeg(photograph(1920, 1080, 2), 90)
    print(f"1080p JPEG decoded: {median_ms(lambda: decode(image, 'image/jpeg'), 20):.2f} ms")
    assert every / 30 < 60
