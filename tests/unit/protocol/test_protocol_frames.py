"""Frames: the stream cut at every byte, and everything that is not a frame."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.frames import (
    HEADER,
    MAX_META_BYTES,
    VERSION,
    Frame,
    FrameError,
    FrameReader,
    Kind,
    encode_head,
)

FRAMES = [
    Frame(Kind.INFER, 1, b"meta", b"payload" * 3),
    Frame(Kind.CANCEL, 2**64 - 1, b"", b""),
    Frame(Kind.REPLY, 7, b"", b"only payload"),
    Frame(Kind.STATUS, 8, b"only meta", b""),
]


def stream_of(frames: list[Frame]) -> bytes:
    """The bytes as they go over the wire."""
    return b"".join(encode_head(one.kind, one.request_id, one.meta, len(one.payload)) + one.payload for one in frames)


def test_the_header_is_what_the_page_says() -> None:
    """Written out by hand, big-endian: another implementation could follow the docstring."""
    head = encode_head(Kind.INFER, 0x0102030405060708, b"ab", 3)
    assert head == bytes([1, 1, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 2, 0, 0, 0, 3]) + b"ab"
    assert HEADER.size == 20


def test_cut_at_every_byte() -> None:
    """Two chunks, whatever the boundary: the same frames, and nothing left over."""
    stream = stream_of(FRAMES)
    for cut in range(len(stream) + 1):
        reader = FrameReader()
        assert reader.feed(stream[:cut]) + reader.feed(stream[cut:]) == FRAMES
        assert reader.pending_bytes == 0


def test_one_byte_at_a_time() -> None:
    """A frame is given out with its last byte, not before."""
    reader = FrameReader()
    found, ends = [], []
    for position, byte in enumerate(stream_of(FRAMES), start=1):
        frames = reader.feed(bytes([byte]))
        found += frames
        ends += [position] * len(frames)
    assert found == FRAMES
    assert ends == [len(stream_of(FRAMES[: count + 1])) for count in range(len(FRAMES))]


@given(
    frames=st.lists(
        st.builds(
            Frame,
            st.sampled_from([int(kind) for kind in Kind]),
            st.integers(0, 2**64 - 1),
            st.binary(max_size=50),
            st.binary(max_size=200),
        ),
        max_size=6,
    ),
    data=st.data(),
)
def test_any_frames_in_any_chunks(frames: list[Frame], data: st.DataObject) -> None:
    """Chunk boundaries never matter."""
    stream, reader, found = stream_of(frames), FrameReader(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += reader.feed(stream[:size])
        stream = stream[size:]
    assert found == frames


def test_a_truncated_frame_shows_as_pending() -> None:
    """So that a link can tell an orderly end from one in the middle of a frame."""
    reader = FrameReader()
    assert reader.feed(stream_of(FRAMES[:1])[:-1]) == []
    assert reader.pending_bytes == len(stream_of(FRAMES[:1])) - 1


def header(
    version: int = VERSION, kind: int = Kind.INFER, reserved: int = 0, meta_bytes: int = 0, payload_bytes: int = 0
) -> bytes:
    """A header with one field wrong."""
    return struct.pack("!BBHQII", version, kind, reserved, 1, meta_bytes, payload_bytes)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (header(version=2), "frame version 2"),
        (header(version=0), "frame version 0"),
        (header(kind=0), "unknown frame kind 0"),
        (header(kind=99), "unknown frame kind 99"),
        (header(reserved=1), "reserved"),
        (header(meta_bytes=MAX_META_BYTES + 1), "meta of"),
        (header(payload_bytes=1001), "payload of 1001 bytes exceeds 1000"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "frame version 71"),
    ],
)
def test_what_is_no_frame_says_why(bad: bytes, reason: str) -> None:
    """Also when it comes after a good frame, and byte by byte; the size is refused before any payload came."""
    with pytest.raises(FrameError, match=reason):
        FrameReader(max_payload_bytes=1000).feed(bad)
    with pytest.raises(FrameError, match=reason):
        FrameReader(max_payload_bytes=1000).feed(stream_of(FRAMES) + bad)
    reader = FrameReader(max_payload_bytes=1000)
    with pytest.raises(FrameError, match=reason):
        _ = [reader.feed(bytes([byte])) for byte in bad]


def test_the_largest_payload_is_accepted() -> None:
    """Exactly at the limit."""
    frame = Frame(Kind.INFER, 1, b"", bytes(1000))
    assert FrameReader(max_payload_bytes=1000).feed(stream_of([frame])) == [frame]


def test_large_payloads_come_whole_whatever_the_chunks() -> None:
    """Beyond what is copied once: bytes of their own, two in a row, cut anywhere."""
    payloads = [bytes([number]) * 200_000 for number in (1, 2)]
    stream = b"".join(encode_head(Kind.EDGE_INFER, n, b"m", len(one)) + one for n, one in enumerate(payloads))
    for chunk in (len(stream), 70_001, 262_144):
        reader = FrameReader()
        frames = [frame for at in range(0, len(stream), chunk) for frame in reader.feed(stream[at : at + chunk])]
        assert [frame.payload for frame in frames] == payloads
        assert all(type(frame.payload) is bytes for frame in frames)
        assert reader.pending_bytes == 0
