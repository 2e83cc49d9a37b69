"""MP4 clips: facts from the headers, frames one by one, and writing them, through PyAV.

PyAV comes with the extra `edge` and is imported when the first MP4 does. Bytes stay in memory: no file, no network
address is ever opened on a clip's behalf (references from one file to another are off in the reader).
"""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from models.clip_limits import Frame, Limits
from models.preprocess import InvalidInput

if TYPE_CHECKING:
    import av.container
    import av.video

_FIRST_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"})
_COUNTS = re.compile(rb"(?:(?:stsz|stz2).{8}|trun.{4})(.{4})", re.DOTALL)
"""Where an index says how many samples it has: the reader makes an entry of each, however few bytes promise them."""
_MOST_SAMPLES = 1_000_000
"""Of all tracks together. The reader takes about 70 bytes and 0.3 microseconds for each, before anybody can refuse."""
_MOST_BOXES = 100_000
"""In a row. A file with a fragment for every frame has two for each."""


class Mp4Facts(msgspec.Struct, frozen=True):
    """What the headers say; 0 where they do not."""

    width: int
    height: int
    fps: float
    frame_count: int


def mp4_facts(payload: bytes, limits: Limits) -> Mp4Facts:
    """Read a clip's headers. Raises `InvalidInput`: 400 not a whole MP4 with video, 413 beyond the limits."""
    _check_boxes(payload)
    with _opened(payload, limits) as (_, stream):
        if stream.duration and stream.time_base:
            limits.check_seconds(float(stream.duration * stream.time_base))
        limits.check_frames(stream.frames)
        context = stream.codec_context
        limits.check_size(context.width, context.height)
        rate = stream.average_rate or stream.guessed_rate
        return Mp4Facts(context.width, context.height, float(rate) if rate else 0.0, stream.frames)


def mp4_frames(payload: bytes, limits: Limits) -> Iterator[Frame]:
    """Decode one frame after another. Raises `InvalidInput` where one is damaged (400) or a limit is passed (413)."""
    count = 0
    with _opened(payload, limits) as (container, stream):
        for frame in container.decode(stream):
            count += 1
            limits.check_frames(count)
            limits.check_size(frame.width, frame.height)
            if frame.time is not None:
                limits.check_seconds(frame.time)
            if frame.is_corrupt:
                raise InvalidInput(f"frame {count} of the clip is damaged")
            yield np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
    if count == 0:
        raise InvalidInput("the clip has no frames")


def write_mp4(frames: Sequence[Frame], fps: float, codec: str = "libx264", rate_factor: int = 18) -> bytes:
    """`frames` as an MP4 file; width and height have to be even. `rate_factor`: 0 (best) to 51, x264's."""
    import av
    from av.video.stream import VideoStream

    height, width = frames[0].shape[:2]
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=round(fps), options={"crf": str(rate_factor)})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


def _check_boxes(payload: bytes) -> None:
    """An MP4 is a row of boxes with lengths: find out here what a decoder would pass over in silence (a cut end)."""
    place = boxes = samples = 0
    kinds: set[bytes] = set()
    while place < len(payload):
        boxes += 1
        if boxes > _MOST_BOXES:
            raise InvalidInput(f"the clip has more than {_MOST_BOXES} boxes: send it whole, not in fragments", 413)
        size = int.from_bytes(payload[place : place + 4], "big")
        kind = payload[place + 4 : place + 8]
        if size == 1:  # 64 bits, after the kind
            size = int.from_bytes(payload[place + 8 : place + 16], "big")
        elif size == 0:  # up to the end
            size = len(payload) - place
        if not kinds and kind not in _FIRST_BOXES:
            raise InvalidInput("the body is not an MP4 clip")
        if size < 8 or len(kind) < 4 or place + size > len(payload):
            raise InvalidInput(f"the clip is cut off or damaged at byte {place} of {len(payload)}: send it whole")
        kinds.add(kind)
        if kind != b"mdat":
            samples += _samples(payload, place, place + size)
            if samples > _MOST_SAMPLES:
                remedy = "send a shorter one, without its sound"
                raise InvalidInput(f"the clip's index has {samples} samples: at most {_MOST_SAMPLES}; {remedy}", 413)
        place += size
    if b"moov" not in kinds:
        raise InvalidInput("the clip has no index (no moov box): it was cut off or never finished")


def _samples(payload: bytes, start: int, end: int) -> int:
    """How many samples the indices in this box promise together, wherever they stand in it. Raises `InvalidInput`."""
    if payload.find(b"cmov", start, end) >= 0:
        raise InvalidInput("the clip's index is compressed (cmov): send it as cameras and encoders write it", 415)
    return sum(int.from_bytes(one[1], "big") for one in _COUNTS.finditer(payload, start, end))


@contextlib.contextmanager
def _opened(
    payload: bytes, limits: Limits
) -> Iterator[tuple["av.container.InputContainer", "av.video.stream.VideoStream"]]:
    """The container and its first video stream. PyAV's own errors become `InvalidInput`."""
    try:
        import av
    except ImportError as error:
        remedy = 'install it where the node runs (pip install -e ".[edge]"), or send video/x-motion-jpeg'
        raise InvalidInput(f"MP4 needs the package av: {remedy}", 415) from error
    try:
        with av.open(io.BytesIO(payload), "r", format="mp4") as container:
            if not container.streams.video:
                raise InvalidInput("the clip has no video")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise InvalidInput("the clip's video has a coding that cannot be read: send H.264")
            # One thread: a node's cores belong to its queue. The decoder refuses larger frames before it allocates
            # them, and stops where it would have to guess.
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"max_pixels": str(limits.max_pixels), "err_detect": "explode"}
            yield container, stream
    except InvalidInput:
        raise
    except (av.error.FFmpegError, ValueError, MemoryError) as error:
        reason = str(getattr(error, "strerror", None) or error)[:120]
        raise InvalidInput(f"the clip is damaged or not an MP4 ({reason})") from error
