"""The local node's work on bytes, and the answer's way back to the original's coordinates."""

import asyncio
import json
import threading

import numpy as np
import pytest

from models.adapt import AdaptedFrames, Configuration
from models.clip_limits import Limits
from models.clips import write_mjpeg
from models.detection import Detections
from models.preprocess import InvalidInput
from models.tracking import Tracks
from protocol.edge_records import EdgeRun
from protocol.outcomes import Attempt
from tests.fakes.edge_models import bright_box, picture
from workers.edge_answers import encode_found
from workers.edge_journey import Body, Refused
from workers.edge_prepare import adapted_request, prepare_request
from workers.preparing import Preparer

CLIP = write_mjpeg([np.full((24, 32, 3), level, dtype=np.uint8) for level in range(0, 240, 8)], 90)


def test_an_image_is_resized_and_its_times_are_told() -> None:
    ready = adapted_request(picture(), "image/jpeg", Configuration(resolution=0.5), Limits(), threading.Event())
    assert (ready.adapted.width, ready.adapted.height, ready.adapted.scale, ready.fps) == (160, 120, 0.5, 0.0)
    (frame,) = AdaptedFrames(ready.adapted.payload)
    assert frame.shape == (60, 80, 3)
    assert bright_box(frame) == pytest.approx((16, 8, 32, 24), abs=1)
    assert ready.decode_s > 0.0
    assert ready.adapt_s > 0.0


def test_who_stops_waiting_ends_the_decoding() -> None:
    """In the pool, before its turn and while it is at work; the pool is free for the next."""

    async def scenario() -> None:
        pool = Preparer(1)
        one = Configuration(frame_rate=5)
        waiting = [
            asyncio.create_task(prepare_request(pool, Body(CLIP), "video/x-motion-jpeg", one, Limits()))
            for _ in range(3)
        ]
        await asyncio.sleep(0)
        waiting[0].cancel()
        waiting[1].cancel()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(ended[0], asyncio.CancelledError)
        assert isinstance(ended[1], asyncio.CancelledError)
        assert not isinstance(ended[2], BaseException)
        assert ended[2].adapted.frame_numbers == (1, 7, 13, 19, 25)
        assert ended[2].fps == 30.0
        with pytest.raises(Refused) as refused:
            await prepare_request(pool, Body(b""), "image/png", one, Limits())
        assert (refused.value.attempt, refused.value.http_status) == (Attempt.INVALID, 400)
        pool.close()

    asyncio.run(scenario())
    abandoned = threading.Event()
    abandoned.set()
    with pytest.raises(Exception, match=r"^$") as raised:
        adapted_request(CLIP, "video/x-motion-jpeg", Configuration(), Limits(), abandoned)
    assert not isinstance(raised.value, InvalidInput)


def run_of(scale: float, frame_numbers: tuple[int, ...] = (1,)) -> EdgeRun:
    """A request for an original of 100 x 80."""
    return EdgeRun("detection", 0, 0, 0, 1.0, 100, 80, scale, 0.0, frame_numbers)


def test_detections_are_given_as_coco_does_in_the_originals_pixels() -> None:
    found = Detections(
        boxes=np.array([[5, 10, 25, 20], [30, 0, 51, 40]], dtype=np.float32),
        scores=np.array([0.75, 0.5], dtype=np.float32),
        classes=np.array([1, 0]),
    )
    answer = json.loads(encode_found(found, ("cat", "dog"), run_of(0.5)))
    assert answer == {
        "detections": [
            {"label": "dog", "class": 1, "score": 0.75, "box": [10.0, 20.0, 40.0, 20.0]},
            {"label": "cat", "class": 0, "score": 0.5, "box": [60.0, 0.0, 40.0, 80.0]},
        ]
    }, "the second is cut at the right edge"


def test_tracks_are_given_in_motchallenges_order() -> None:
    found = Tracks(np.array([[1, 7, 5, 10, 20, 10, 0.5], [2, 7, 6, 10, 20, 10, 0.25]]), np.array([1, 1]))
    answer = json.loads(encode_found(found, ("cat", "dog"), run_of(0.5, (1, 13))))
    assert answer == {
        "tracks": [[1, 7, 10.0, 20.0, 40.0, 20.0, 0.5, 1], [13, 7, 12.0, 20.0, 40.0, 20.0, 0.25, 1]],
        "labels": ["cat", "dog"],
    }


def test_nothing_found_is_an_answer() -> None:
    nothing = Detections(np.empty((0, 4), np.float32), np.empty(0, np.float32), np.empty(0, np.int64))
    assert encode_found(nothing, ("cat",), run_of(1.0)) == b'{"detections":[]}'
    assert json.loads(encode_found(Tracks(np.empty((0, 7)), np.empty(0, np.int64)), ("cat",), run_of(1.0))) == {
        "tracks": [],
        "labels": ["cat"],
    }
