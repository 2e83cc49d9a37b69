"""Images and clips from request bytes to frames: JPEG, PNG, MP4, MJPEG, lists of JPEG or PNG frames.

What a body is its content type says; the bytes have to agree:

    image/jpeg, image/png                          one frame
    video/mp4, video/quicktime                     a clip (models/mp4.py)
    video/x-motion-jpeg, video/x-mjpeg, ...        JPEGs one after another; `; fps=15` says how fast, else 30
    multipart/x-mixed-replace                      the same as a camera sends it over HTTP, the headers between skipped
    multipart/form-data, multipart/mixed           parts: one clip, or the frames as JPEG or PNG in order

Frames come one by one (`Clip.frames`), so that a long clip needs no more memory than one frame, and every limit holds
while decoding. Nothing here keeps state: all of it may run in many threads at once.
"""

import re
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import simplejpeg

from models import preprocess
from models.clip_limits import Frame, Limits
from models.mp4 import mp4_facts, mp4_frames
from models.preprocess import InvalidInput

DEFAULT_FPS = 30.0  # of clips that do not say (MJPEG, lists of frames); MOT17's rate

_ANY = frozenset({"", "application/octet-stream"})
_IMAGES = frozenset({"image/jpeg", "image/jpg", "image/png", "image/*"})
_MP4 = frozenset({"video/mp4", "video/quicktime", "video/x-m4v", "application/mp4"})
_MJPEG = frozenset({"video/x-motion-jpeg", "video/x-mjpeg", "video/mjpeg", "video/x-jpeg", "multipart/x-mixed-replace"})
_MULTIPART = frozenset({"multipart/form-data", "multipart/mixed"})
_ACCEPTED = "image/jpeg, image/png, video/mp4, video/x-motion-jpeg or multipart/form-data"
_SOI = b"\xff\xd8\xff"
_PNG = b"\x89PNG"
_LARGEST_GAP = 4096  # bytes between two JPEGs: headers of a camera's stream, padding
_MOST_SEGMENTS = 4096, 64  # of JPEGs to be taken apart: in any case, and more for each one; plain ones have about ten
_PADDING = re.compile(rb"\xff+")
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in entropy-coded data: neither a stuffed 0xff nor a restart


class Clip(msgspec.Struct, frozen=True, eq=False):
    """An encoded image or clip whose headers were looked at and of which nothing is decoded yet.

    An image is a clip of one frame with `fps` 0. `frame_count` is what the headers promise (0: they do not say).
    """

    kind: str  # "image" | "mp4" | "frames"
    parts: tuple[bytes, ...]  # the body, or one JPEG or PNG per frame
    fps: float
    frame_count: int
    limits: Limits

    def frames(self) -> Iterator[Frame]:
        """Decode frame by frame. Raises `InvalidInput` where one is damaged (400) or a limit is passed (413)."""
        if self.kind == "mp4":
            yield from mp4_frames(self.parts[0], self.limits)
            return
        for number, part in enumerate(self.parts, 1):
            try:
                yield preprocess.decode(part, "", "rgb", self.limits.max_pixels)
            except InvalidInput as error:
                if self.kind == "image":
                    raise
                raise InvalidInput(f"frame {number} of the clip: {error.reason}", error.status) from error


def open_clip(payload: bytes | Sequence[bytes], content_type: str, limits: Limits) -> Clip:
    """Look at a body, or at a list of JPEG and PNG frames, without decoding it (PyAV decodes an MP4's first).

    Raises `InvalidInput`: 415 for another type, 413 for more than the limits where the headers tell, 400 for an empty
    or damaged body.
    """
    if not isinstance(payload, bytes | bytearray | memoryview):
        return _of_frames(tuple(payload), _fps_of(content_type), limits)
    payload = bytes(payload)
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in _ANY | _IMAGES | _MP4 | _MJPEG | _MULTIPART:
        raise InvalidInput(f"content type {content_type[:80]!r}: send {_ACCEPTED}", 415)
    if not payload:
        raise InvalidInput("the body is empty: send an image or a clip")
    if kind in _MULTIPART:
        return _of_parts(payload, content_type, limits)
    if kind in _MJPEG:
        return _of_frames(split_jpegs(payload, limits), _fps_of(content_type), limits)
    if kind in _MP4 or (kind in _ANY and payload[4:8] == b"ftyp"):
        return _of_mp4(payload, limits)
    return Clip("image", (payload,), 0.0, 1, limits)


def split_jpegs(payload: bytes, limits: Limits) -> tuple[bytes, ...]:
    """The JPEGs that stand one after another in `payload`, in order, undecoded.

    Follows the segments' lengths, so that a thumbnail inside a header ends no picture. Raises `InvalidInput`, also for
    more segments than pictures have: a body of nothing else would keep the interpreter busy for half a minute.
    """
    found: list[bytes] = []
    at_least, for_each = _MOST_SEGMENTS
    left = at_least
    start = payload.find(_SOI, 0, _LARGEST_GAP)
    if start < 0:
        raise InvalidInput("the clip does not begin with a JPEG: send JPEG images one after another")
    while start >= 0:
        limits.check_frames(len(found) + 1)
        left += for_each
        end, left = _end_of_jpeg(payload, start, len(found) + 1, left)
        found.append(payload[start:end])
        start = payload.find(_SOI, end, end + _LARGEST_GAP)
        if start < 0 and len(payload) - end > _LARGEST_GAP:
            raise InvalidInput(f"after frame {len(found)} no further JPEG begins: the clip is damaged")
    return tuple(found)


def encode_jpeg(frame: Frame, quality: int) -> bytes:
    """One JPEG, colours at half resolution (4:2:0), as cameras do."""
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(frame), quality=quality, colorspace="RGB", colorsubsampling="420"
    )
    return encoded


def write_mjpeg(frames: Sequence[Frame], quality: int = 90) -> bytes:
    """`frames` as JPEGs one after another."""
    return b"".join(encode_jpeg(frame, quality) for frame in frames)


def _of_mp4(payload: bytes, limits: Limits) -> Clip:
    facts = mp4_facts(payload, limits)
    return Clip("mp4", (payload,), facts.fps or DEFAULT_FPS, facts.frame_count, limits)


def _of_frames(parts: tuple[bytes, ...], fps: float, limits: Limits) -> Clip:
    if not parts:
        raise InvalidInput("the clip has no frames: send at least one JPEG or PNG")
    limits.check_frames(len(parts))
    limits.check_seconds(len(parts) / fps)
    return Clip("frames", parts, fps, len(parts), limits)


def _of_parts(payload: bytes, content_type: str, limits: Limits) -> Clip:
    """A form: one MP4 or MJPEG, or images. Fields that are no file are passed over."""
    boundary = re.search(r";\s*boundary\s*=\s*(?:\"([^\"]+)\"|([^;\s]+))", content_type, re.IGNORECASE)
    if boundary is None:
        raise InvalidInput("multipart without a boundary: the content type has to name it")
    mark = b"\r\n--" + (boundary[1] or boundary[2]).encode("latin-1", "replace")
    pieces = (b"\r\n" + payload).split(mark, limits.max_frames + 2)
    if len(pieces) < 3 or not pieces[-1].startswith(b"--"):
        limits.check_frames(len(pieces) - 2)
        raise InvalidInput("the multipart body is cut off or has another boundary: its closing line is missing")
    images: list[bytes] = []
    for piece in pieces[1:-1]:
        head, _, body = piece.partition(b"\r\n\r\n")
        named = re.search(rb"content-type:\s*((?:video|multipart)/[^\r\n]+)", head, re.IGNORECASE)
        if body[4:8] == b"ftyp":
            return _of_mp4(body, limits)
        if named is not None and named[1].lower().startswith(b"video/"):
            return open_clip(body, named[1].decode("latin-1"), limits)
        if body.startswith((_SOI, _PNG)):
            images.append(body)
        elif re.search(rb"filename\s*=", head, re.IGNORECASE):
            raise InvalidInput(f"part {len(images) + 1} of the form is neither a JPEG, a PNG nor a clip")
    return _of_frames(tuple(images), _fps_of(content_type), limits)


def _fps_of(content_type: str) -> float:
    """The `fps` parameter of a content type; 30 if there is none."""
    given = re.search(r";\s*fps\s*=\s*\"?([^;\"]*)", content_type, re.IGNORECASE)
    if given is None:
        return DEFAULT_FPS
    try:
        fps = float(given[1])
    except ValueError:
        fps = 0.0
    if not 0 < fps <= 1000:
        raise InvalidInput(f"content type with fps={given[1][:20]!r}: frames per second, above 0 and at most 1000")
    return fps


def _end_of_jpeg(payload: bytes, start: int, number: int, segments: int) -> tuple[int, int]:
    """The place after the JPEG that begins at `start`, and what is left of `segments`. Raises `InvalidInput`."""
    place = start + 2
    cut = InvalidInput(f"frame {number} of the clip is cut off: its JPEG has no end")
    while True:
        if place + 2 > len(payload):
            raise cut
        if payload[place] != 0xFF:
            raise InvalidInput(f"frame {number} of the clip is damaged: no JPEG marker where one must stand")
        code = payload[place + 1]
        if code == 0xD9:  # end of image
            return place + 2, segments
        if code == 0xFF:  # padding before a marker
            padding = _PADDING.match(payload, place)
            assert padding is not None, "it begins here"
            place = padding.end() - 1
            continue
        segments -= 1
        if segments < 0:
            raise InvalidInput(f"frame {number} of the clip is no picture: its JPEG is nothing but markers")
        if place + 4 > len(payload):
            raise cut
        place += 2 + max(2, int.from_bytes(payload[place + 2 : place + 4], "big"))
        if code == 0xDA:  # start of scan: entropy-coded data follow up to the next marker
            marker = _MARKER.search(payload, place)
            if marker is None:
                raise cut
            place = marker.start()
