"""Frames: a fixed header, a msgspec-encoded meta struct, raw payload bytes.

    0        1        2                 4                        12           16             20
    version  kind     reserved (zero)   request id (uint64)      meta length  payload length  meta … payload …

Pure functions and one incremental reader; sockets are in `link.py`. Anything that is not a frame (wrong version,
unknown kind, oversize) raises `FrameError` with a reason, and the link closes the connection with it.
"""

import enum
import struct
from typing import NamedTuple

VERSION = 1
HEADER = struct.Struct("!BBHQII")
MAX_META_BYTES = 1 << 20
MAX_PAYLOAD_BYTES = 64 << 20
_COPY_ONCE_BYTES = 65_536


class Kind(enum.IntEnum):
    """What a frame is. The comment names the meta struct of `records.py` that it carries."""

    INFER = 1  # Infer; payload: the encoded image or the tensors
    REPLY = 2  # Reply; payload: the answer
    CANCEL = 3  # no meta: the client of this request id has gone
    STATUS_REQUEST = 4  # no meta
    STATUS = 5  # WorkerStatus
    GOODBYE = 6  # Goodbye: why the sender closes the connection
    # Edge services (edge_records.py); EDGE_INFER and EDGE_RUN are answered by a REPLY that carries an EdgeReply.
    DECIDE = 7  # Decide
    DECISION = 8  # Decision
    EDGE_INFER = 9  # EdgeInfer; payload: the client's body
    EDGE_RUN = 10  # EdgeRun; payload: the adapted image or clip
    NODE_STATUS_REQUEST = 11  # no meta
    NODE_STATUS = 12  # NodeStatus


KINDS: frozenset[int] = frozenset(Kind)


class FrameError(ValueError):
    """The bytes are no frame of this protocol; the message says why. The connection cannot be used further."""


class Frame(NamedTuple):
    """One received frame. `meta` and `payload` are owned bytes (no view into a shared buffer)."""

    kind: int
    request_id: int
    meta: bytes
    payload: bytes


def encode_head(kind: int, request_id: int, meta: bytes, payload_bytes: int) -> bytes:
    """Header and meta of a frame whose payload of `payload_bytes` bytes is written right after."""
    return HEADER.pack(VERSION, kind, 0, request_id, len(meta), payload_bytes) + meta


class FrameReader:
    """Cuts a byte stream into frames, whatever the chunk boundaries.

    `feed` returns the frames completed by this chunk and keeps the rest. After a `FrameError` the reader is spent.
    """

    __slots__ = ("_buffer", "_max_payload_bytes")

    def __init__(self, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> None:
        self._buffer = bytearray()
        self._max_payload_bytes = max_payload_bytes

    @property
    def pending_bytes(self) -> int:
        """Bytes of an incomplete frame: not zero when the peer closes means that it was cut off."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[Frame]:
        """Frames completed by `data`. Raises `FrameError` on anything that is not a frame."""
        buffer: bytes | bytearray
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < HEADER.size:
                return []
            buffer = self._buffer
        else:
            buffer = data
        frames: list[Frame] = []
        start, available = 0, len(buffer)
        while available - start >= HEADER.size:
            version, kind, reserved, request_id, meta_bytes, payload_bytes = HEADER.unpack_from(buffer, start)
            self._check(version, kind, reserved, meta_bytes, payload_bytes)
            meta_start = start + HEADER.size
            payload_start = meta_start + meta_bytes
            end = payload_start + payload_bytes
            if end > available:
                break
            meta = bytes(buffer[meta_start:payload_start])
            # A slice of a bytearray is a copy, and bytes() of it another: for a clip of 30 MB a tenth of a second.
            large = payload_bytes > _COPY_ONCE_BYTES
            payload = bytes(memoryview(buffer)[payload_start:end] if large else buffer[payload_start:end])
            frames.append(Frame(kind, request_id, meta, payload))
            start = end
        if buffer is self._buffer:
            del self._buffer[:start]
        else:
            self._buffer += data[start:]
        return frames

    def _check(self, version: int, kind: int, reserved: int, meta_bytes: int, payload_bytes: int) -> None:
        if version != VERSION:
            raise FrameError(f"frame version {version}, this side speaks {VERSION}")
        if kind not in KINDS:
            raise FrameError(f"unknown frame kind {kind}")
        if reserved:
            raise FrameError(f"reserved header field is {reserved}, must be 0")
        if meta_bytes > MAX_META_BYTES:
            raise FrameError(f"meta of {meta_bytes} bytes exceeds {MAX_META_BYTES}")
        if payload_bytes > self._max_payload_bytes:
            raise FrameError(f"payload of {payload_bytes} bytes exceeds {self._max_payload_bytes}")
