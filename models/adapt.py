"""A configuration applied to real bytes: what the local node does to a request, and the profile in just the same way.

Resize by `resolution`, keep frames by `frame_rate`, encode again at `jpeg_quality` (Huang's configuration, section
III-A). What leaves the local node is always JPEG: one, or as many one after another as frames were kept. In
measurements a clip's own coding (MP4) therefore counts at the way in only.

    decode + adapt       holds every frame: small things, and where one request is adapted in many ways (the profile)
    adapt_clip           frame by frame, no more memory than one frame: what a node uses
    AdaptedFrames        the other side: frames for the detector or tracker, one by one; `read_adapted`: all at once
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import msgspec
import numpy as np
from PIL import Image

from models import preprocess
from models.clip_limits import Frame
from models.clip_limits import Limits as Limits
from models.clips import Clip, encode_jpeg, open_clip, split_jpegs
from models.preprocess import InvalidInput

_OWN_LIMITS = Limits(max_frames=100_000)  # of payloads that a local node made within its own
_TIE = 1e-9


class Configuration(msgspec.Struct, frozen=True):
    """How a request is made smaller before it is sent. The names are those of a placement table's settings."""

    resolution: float = 1.0  # factor on width and height, above 0 and at most 1
    jpeg_quality: int = 95  # 1 to 100
    frame_rate: float = 0.0  # frames per second that are kept at most; 0 keeps all; images ignore it

    def __post_init__(self) -> None:
        """Raises ValueError with key, value and remedy."""
        if not 0 < self.resolution <= 1:
            raise ValueError(f"resolution = {self.resolution!r}: a factor above 0 and at most 1")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality = {self.jpeg_quality!r}: 1 to 100")
        if not 0 <= self.frame_rate < float("inf"):
            raise ValueError(f"frame_rate = {self.frame_rate!r}: frames per second, or 0 to keep all")


class Media(msgspec.Struct, frozen=True, eq=False):
    """A decoded image (one frame, `fps` 0) or clip; every frame [height, width, 3] uint8 RGB."""

    frames: tuple[Frame, ...]
    fps: float
    width: int
    height: int


class Adapted(msgspec.Struct, frozen=True):
    """What is sent to the node that computes, and how to read its answer in the original's coordinates."""

    payload: bytes  # one JPEG, or the kept frames' JPEGs one after another
    scale: float  # boxes found in the adapted frames are divided by it
    frame_numbers: tuple[int, ...]  # 1-based numbers of the kept frames in the original
    frame_count: int  # of the original, counted while decoding
    width: int  # of the original, pixels
    height: int


def decode(payload: bytes | Sequence[bytes], content_type: str, limits: Limits = Limits()) -> Media:  # noqa: B008 - frozen
    """Decode an image or clip whole. Raises `models.preprocess.InvalidInput` (400, 413, 415)."""
    clip = open_clip(payload, content_type, limits)
    frames: list[Frame] = []
    held = 0
    for frame in _same_size(clip.frames()):
        held += frame.shape[0] * frame.shape[1]
        limits.check_held(held)
        frames.append(frame)
    height, width = frames[0].shape[:2]
    return Media(tuple(frames), clip.fps, width, height)


def adapt(media: Media, configuration: Configuration) -> Adapted:
    """Apply `configuration` to decoded frames. 1080p to half: about 4 ms a frame (docs/results/edge.md)."""
    return _adapted(media.frames, media.fps, configuration)


def adapt_clip(clip: Clip, configuration: Configuration) -> Adapted:
    """`adapt(decode(...))` of a clip that was opened, frame by frame. Raises `InvalidInput` as decoding goes."""
    return adapt_frames(clip.frames(), clip.fps, configuration)


def adapt_frames(frames: Iterator[Frame], fps: float, configuration: Configuration) -> Adapted:
    """`adapt_clip` for who wants to watch the clip's `frames` come: to time the decoding, or to end it."""
    return _adapted(_same_size(frames), fps, configuration)


def read_adapted(payload: bytes) -> tuple[Frame, ...]:
    """The frames of an `Adapted.payload`. Raises `InvalidInput` for anything that is not JPEGs one after another."""
    return tuple(AdaptedFrames(payload))


class AdaptedFrames(Sequence[Frame]):
    """The frames of an `Adapted.payload`, each decoded when it is asked for and kept by nobody here.

    Raises `InvalidInput` for anything that is not JPEGs one after another; for a damaged one, when it is asked for.
    """

    def __init__(self, payload: bytes) -> None:
        self._parts = split_jpegs(payload, _OWN_LIMITS)
        self.decode_s = 0.0
        """Time spent decoding so far."""

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, index: int) -> Frame: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Frame, ...]: ...

    def __getitem__(self, index: int | slice) -> Frame | tuple[Frame, ...]:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        begun_s = time.perf_counter()
        frame = preprocess.decode(self._parts[index], "image/jpeg", "rgb")
        self.decode_s += time.perf_counter() - begun_s
        return frame


def keeps(index: int, fps: float, frame_rate: float) -> bool:
    """Whether the frame `index` (from 0) of a clip at `fps` is kept at `frame_rate`: the first in each of its ticks."""
    if index == 0 or fps <= 0 or frame_rate <= 0 or frame_rate >= fps:
        return True
    return int(index * frame_rate / fps + _TIE) > int((index - 1) * frame_rate / fps + _TIE)


def resize(frame: Frame, resolution: float) -> Frame:
    """`frame` made smaller by `resolution`; at least one pixel stays.

    A whole fraction (1/2, 1/4) averages boxes, which takes a quarter of a filter's time and leaves a part of a box at
    the right and lower edge of odd sizes; other factors go through Pillow's bilinear filter.
    """
    boxes = round(1 / resolution)
    if boxes == 1 and resolution == 1:
        return frame
    image = Image.fromarray(frame)
    if abs(boxes * resolution - 1) < _TIE:
        return np.asarray(image.reduce(boxes))
    width, height = (max(1, round(length * resolution)) for length in image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def scale_of(width: int, height: int, resolution: float) -> float:
    """What coordinates shrink by in `resize`: exactly the factor where boxes are averaged, else the sides' rounding."""
    if abs(round(1 / resolution) * resolution - 1) < _TIE:
        return resolution
    longer = max(width, height)
    return max(1, round(longer * resolution)) / longer


def _adapted(frames: Iterable[Frame], fps: float, configuration: Configuration) -> Adapted:
    kept: list[bytes] = []
    numbers: list[int] = []
    height = width = count = 0
    for index, frame in enumerate(frames):
        height, width = frame.shape[:2]
        count = index + 1
        if keeps(index, fps, configuration.frame_rate):
            kept.append(encode_jpeg(resize(frame, configuration.resolution), configuration.jpeg_quality))
            numbers.append(count)
    scale = scale_of(width, height, configuration.resolution)
    return Adapted(b"".join(kept), scale, tuple(numbers), count, width, height)


def _same_size(frames: Iterator[Frame]) -> Iterator[Frame]:
    """The frames of a clip, all of the first one's size; boxes in mixed coordinates would mean nothing."""
    shape: tuple[int, ...] | None = None
    for number, frame in enumerate(frames, 1):
        if shape is not None and frame.shape != shape:
            sizes = f"{shape[1]} x {shape[0]}, then {frame.shape[1]} x {frame.shape[0]}"
            raise InvalidInput(f"frame {number} of the clip has another size ({sizes}): send frames of one size")
        shape = frame.shape
        yield frame
