"""What the local node does to a request's bytes, in the preparing pool: decode, adapt, encode again."""

import asyncio
import threading
import time
from collections.abc import Iterator

import msgspec

from models.adapt import Adapted, Configuration, adapt_frames
from models.clip_limits import Frame, Limits
from models.clips import open_clip
from models.preprocess import InvalidInput
from protocol.outcomes import Attempt
from workers.edge_journey import Body, Refused
from workers.preparing import Preparer


class AdaptedRequest(msgspec.Struct, frozen=True):
    """Bytes that are ready to be sent. `fps`: of the clip as it came, 0 for an image."""

    adapted: Adapted
    fps: float
    decode_s: float
    adapt_s: float


class _Abandoned(Exception):
    """Nobody waits for this request any more."""


async def prepare_request(
    pool: Preparer, body: Body, content_type: str, configuration: Configuration, limits: Limits
) -> AdaptedRequest:
    """Decode and adapt in the pool. Raises `Refused`. Who stops waiting ends the decoding at the next frame."""
    abandoned = threading.Event()

    def work() -> AdaptedRequest:
        return adapted_request(body.take(), content_type, configuration, limits, abandoned)

    try:
        return await pool.call(work)
    except InvalidInput as error:
        raise Refused(Attempt.INVALID, error.reason, error.status) from error
    except asyncio.CancelledError:
        abandoned.set()
        raise


def adapted_request(
    payload: bytes, content_type: str, configuration: Configuration, limits: Limits, abandoned: threading.Event
) -> AdaptedRequest:
    """Frame by frame, so that a long clip needs no more memory than one. Raises `InvalidInput`."""
    begun_s = time.perf_counter()
    clip = open_clip(payload, content_type, limits)
    decode_s = time.perf_counter() - begun_s

    def watched(frames: Iterator[Frame]) -> Iterator[Frame]:
        nonlocal decode_s
        while not abandoned.is_set():
            asked_s = time.perf_counter()
            frame = next(frames, None)
            decode_s += time.perf_counter() - asked_s
            if frame is None:
                return
            yield frame
        raise _Abandoned

    adapted = adapt_frames(watched(clip.frames()), clip.fps, configuration)
    return AdaptedRequest(adapted, clip.fps, decode_s, time.perf_counter() - begun_s - decode_s)
