"""One connection of a worker: what it takes, and what its end means."""

from typing import Any

import msgspec
import pytest

from protocol.frames import Frame, FrameReader, Kind
from protocol.outcomes import Attempt
from protocol.records import Infer, Reply
from workers.server import Caller

Bench = Any  # of this folder's conftest.py


class Wire:
    """Stands in for a transport: keeps what was written."""

    def __init__(self, unsent_bytes: int = 0) -> None:
        self.written = b""
        self.closing = False
        self._unsent_bytes = unsent_bytes

    def write(self, data: bytes) -> None:
        """Keep."""
        self.written += data

    def set_write_buffer_limits(self, high: int) -> None:
        """Nothing."""

    def get_write_buffer_size(self) -> int:
        """What the caller has not taken."""
        return self._unsent_bytes

    def is_closing(self) -> bool:
        """As told."""
        return self.closing

    def close(self) -> None:
        """Told."""
        self.closing = True


def frame(kind: Kind, request_id: int, meta: Any = None, payload: bytes = b"") -> Frame:
    """A frame as it comes off the wire."""
    return Frame(kind, request_id, msgspec.msgpack.encode(meta) if meta is not None else b"", payload)


def test_a_connection_that_ends_cancels_its_requests(bench: Bench) -> None:
    """Waiting ones free their places at once; the one in service is computed, for nobody."""
    instance = bench.add("a", 1.0)
    caller, wire = Caller("w", bench.host, set(), "", bench.node), Wire()
    caller.connection.connection_made(wire)  # type: ignore[arg-type]
    for number in range(3):
        caller._on_frame(caller.connection, frame(Kind.INFER, number, Infer("a", 60.0), b"x"))
    assert instance.queue.length == 3
    caller.connection.connection_lost(None)
    assert instance.queue.length == 1
    bench.clock.advance_to(5.0)
    assert instance.queue.counts[Attempt.CANCELLED] == 3
    assert wire.written == b"", "nothing is sent to who has gone"


def test_cancel_names_a_request_of_this_connection(bench: Bench) -> None:
    """The waiting one is answered CANCELLED at once; an id that is not here is nobody's fault."""
    instance = bench.add("a", 1.0)
    caller, wire = Caller("w", bench.host, set(), "", bench.node), Wire()
    caller.connection.connection_made(wire)  # type: ignore[arg-type]
    for number in (1, 2):
        caller._on_frame(caller.connection, frame(Kind.INFER, number, Infer("a", 60.0), b"x"))
    for number in (2, 77):
        caller._on_frame(caller.connection, frame(Kind.CANCEL, number))
    (sent,) = FrameReader().feed(wire.written)
    assert (sent.kind, sent.request_id) == (Kind.REPLY, 2)
    assert msgspec.msgpack.decode(sent.meta, type=Reply).attempt == Attempt.CANCELLED
    assert instance.queue.length == 1


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Frame(Kind.INFER, 5, b"\xc1", b""), "not an INFER"),
        (frame(Kind.INFER, 1, Infer("a", 60.0), b"x"), "used twice"),
        (frame(Kind.INFER, 5, Infer("a", float("nan")), b"x"), "no number"),
        (frame(Kind.REPLY, 5), "takes no REPLY"),
    ],
)
def test_a_frame_that_makes_no_sense_closes_the_connection(bench: Bench, bad: Frame, reason: str) -> None:
    """With a reason; the worker lives on."""
    bench.add("a", 1.0)
    caller, wire = Caller("w", bench.host, set(), "", bench.node), Wire()
    caller.connection.connection_made(wire)  # type: ignore[arg-type]
    caller._on_frame(caller.connection, frame(Kind.INFER, 1, Infer("a", 60.0), b"x"))
    caller._on_frame(caller.connection, bad)
    assert wire.closing
    assert reason.encode() in wire.written


def test_who_has_been_answered_is_forgotten(bench: Bench) -> None:
    """An id may come again once its request has ended; a connection that has ended is none of the callers'."""
    bench.add("a", 1.0)
    callers: set[Caller] = set()
    caller, wire = Caller("w", bench.host, callers, "", bench.node), Wire()
    caller.connection.connection_made(wire)  # type: ignore[arg-type]
    for second in (1.0, 2.0):
        caller._on_frame(caller.connection, frame(Kind.INFER, 1, Infer("a", 60.0), b"x"))
        bench.clock.advance_to(second)
    assert [(sent.kind, sent.request_id) for sent in FrameReader().feed(wire.written)] == [(Kind.REPLY, 1)] * 2
    assert not wire.closing
    assert callers == {caller}
    caller.connection.connection_lost(None)
    assert callers == set()


@pytest.mark.parametrize(("unsent_mb", "closes"), [(16, False), (17, True)])
def test_a_caller_that_reads_no_replies_is_cut_off(bench: Bench, unsent_mb: int, closes: bool) -> None:
    """Else its replies would pile up in the worker's memory."""
    bench.add("a", 1.0)
    caller, wire = Caller("w", bench.host, set(), "", bench.node), Wire(unsent_mb << 20)
    caller.connection.connection_made(wire)  # type: ignore[arg-type]
    caller._on_frame(caller.connection, frame(Kind.INFER, 1, Infer("a", 60.0), b"x"))
    bench.clock.advance_to(1.0)
    assert wire.closing is closes
    assert (b"replies are not read" in wire.written) is closes
