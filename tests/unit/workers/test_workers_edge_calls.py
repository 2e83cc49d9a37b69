"""One connection's edge requests: each answered once, whatever comes together; nonsense closes the connection."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol.edge_records import EdgeInfer, EdgeReply, EdgeRun, Emulation, NodeStatus
from protocol.frames import Frame, FrameReader, Kind, encode_head
from protocol.outcomes import Attempt
from tests.fakes.edge_models import bright_deployment, picture
from tests.fakes.edge_world import World, run_world
from workers.host import Host
from workers.server import Caller

ASKED = EdgeInfer("detection", 0, 0, 0, 60.0, "image/jpeg")


class Wire:
    """Stands in for a transport: keeps what was written."""

    def __init__(self) -> None:
        self.written = b""
        self.closing = False

    def write(self, data: bytes) -> None:
        """Keep."""
        self.written += data

    def set_write_buffer_limits(self, high: int) -> None:
        """Nothing."""

    def get_write_buffer_size(self) -> int:
        """Nothing waits."""
        return 0

    def is_closing(self) -> bool:
        """As told."""
        return self.closing

    def close(self) -> None:
        """Told."""
        self.closing = True


class Line:
    """A gateway's connection to node `a` of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.wire = Wire()
        self.callers: set[Caller] = set()
        host: Any = Host.__new__(Host)  # no instance is asked for here
        self.caller = Caller("w-a", host, self.callers, "1", world.nodes["a"])
        self.caller.connection.connection_made(self.wire)  # type: ignore[arg-type]

    def feed(self, *frames: bytes) -> None:
        """All in one read."""
        self.caller.connection.data_received(b"".join(frames))

    def replies(self) -> dict[int, Attempt]:
        """How each request ended."""
        frames = [frame for frame in FrameReader().feed(self.wire.written) if frame.kind == Kind.REPLY]
        assert len({frame.request_id for frame in frames}) == len(frames), "answered twice"
        return {
            frame.request_id: Attempt(msgspec.msgpack.decode(frame.meta, type=EdgeReply).attempt) for frame in frames
        }


def frame(kind: Kind, request_id: int, meta: Any = None, payload: bytes = b"") -> bytes:
    """As it comes off the wire."""
    encoded = msgspec.msgpack.encode(meta) if meta is not None else b""
    return encode_head(kind, request_id, encoded, len(payload)) + payload


def played(folder: Path, scenario: Callable[[Line], Coroutine[Any, Any, None]]) -> None:
    """With a connection to a node that takes half a second for a request."""

    async def body() -> None:
        emulate = Emulation(uplink=False, links=False)
        line = Line(World(bright_deployment(folder, tflops=0.04, emulate=emulate)))
        await scenario(line)
        line.world.check_the_books()
        assert line.world.nodes["a"].books.held == 0

    run_world(body())


def test_a_request_and_its_cancellation_in_one_read(tmp_path: Path) -> None:
    """Answered CANCELLED, not lost; one that waits is answered the moment its client has gone."""

    async def scenario(line: Line) -> None:
        line.feed(
            frame(Kind.EDGE_INFER, 1, ASKED, picture()),
            frame(Kind.CANCEL, 1),
            frame(Kind.EDGE_INFER, 2, ASKED, picture()),
            frame(Kind.EDGE_INFER, 3, ASKED, picture()),
        )
        await asyncio.sleep(0.1)
        line.feed(frame(Kind.CANCEL, 3), frame(Kind.CANCEL, 77))
        await asyncio.sleep(0.1)
        assert line.replies() == {1: Attempt.CANCELLED, 3: Attempt.CANCELLED}
        await asyncio.sleep(1.0)
        assert line.replies()[2] == Attempt.OK
        assert line.world.nodes["a"].status().counts[Attempt.CANCELLED] == 2

    played(tmp_path, scenario)


def test_a_connection_that_ends_takes_its_requests_back(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.feed(*(frame(Kind.EDGE_INFER, number, ASKED, picture()) for number in range(4)))
        await asyncio.sleep(0.1)
        line.caller.connection.connection_lost(None)
        await asyncio.sleep(0.1)
        assert line.wire.written == b""
        assert line.callers == set()
        assert line.world.nodes["a"].status().counts[Attempt.CANCELLED] == 4

    played(tmp_path, scenario)


def test_a_node_says_how_it_is(tmp_path: Path) -> None:
    async def scenario(line: Line) -> None:
        line.feed(frame(Kind.EDGE_INFER, 1, ASKED, picture()))
        await asyncio.sleep(0.25)
        line.feed(frame(Kind.NODE_STATUS_REQUEST, 5))
        (answer,) = FrameReader().feed(line.wire.written)
        assert (answer.kind, answer.request_id) == (Kind.NODE_STATUS, 5)
        status = msgspec.msgpack.decode(answer.meta, type=NodeStatus)
        assert (status.node, status.length, status.deployed, status.idle) == ("a", 1, ("small",), ())
        assert status.waiting_tflop == pytest.approx(0.01, abs=1e-4)
        await asyncio.sleep(1.0)
        assert line.world.nodes["a"].status().idle == ("small",)

    played(tmp_path, scenario)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (frame(Kind.EDGE_INFER, 5, [1, 2, 3]), "not an EDGE_INFER"),
        (encode_head(Kind.EDGE_RUN, 5, b"\xc1", 0), "not an EDGE_RUN"),
        (frame(Kind.EDGE_INFER, 1, ASKED, picture()), "request 1 is used twice"),
        (frame(Kind.EDGE_INFER, 5, EdgeInfer("detection", 0, 0, 0, float("nan"))), "the budget is no number"),
        (frame(Kind.EDGE_RUN, 5, EdgeRun("detection", 0, 0, 0, float("nan"), 1, 1, 1.0)), "the budget is no number"),
        (frame(Kind.DECIDE, 5), "takes no DECIDE"),
    ],
)
def test_a_frame_that_makes_no_sense_closes_the_connection(tmp_path: Path, bad: bytes, reason: str) -> None:
    """With a reason. What came before on it is taken back when it ends; the node lives on."""

    async def scenario(line: Line) -> None:
        line.feed(frame(Kind.EDGE_INFER, 1, ASKED, picture()), bad)
        assert line.wire.closing
        assert reason.encode() in line.wire.written
        line.caller.connection.connection_lost(None)
        await asyncio.sleep(0.1)
        other = Line(line.world)
        other.feed(frame(Kind.EDGE_INFER, 1, ASKED, picture()))
        await asyncio.sleep(2.0)
        assert other.replies() == {1: Attempt.OK}

    played(tmp_path, scenario)


def test_cut_frames_wait_for_their_rest(tmp_path: Path) -> None:
    """At every hundredth byte: nothing happens until the frame is whole, and the connection's end ends it."""
    whole = frame(Kind.EDGE_INFER, 1, ASKED, picture())

    async def scenario(line: Line) -> None:
        for cut in range(1, len(whole), 100):
            other = Line(line.world)
            other.feed(whole[:cut])
            other.caller.connection.connection_lost(None)
        line.feed(whole[:99])
        await asyncio.sleep(0.1)
        assert line.world.nodes["a"].statistics().entered == 0
        line.feed(whole[99:])
        await asyncio.sleep(1.0)
        assert line.replies() == {1: Attempt.OK}

    played(tmp_path, scenario)


def test_frames_of_a_frame() -> None:
    """What this file builds is what the reader takes."""
    (read,) = FrameReader().feed(frame(Kind.EDGE_INFER, 9, ASKED, b"x"))
    assert read == Frame(Kind.EDGE_INFER, 9, msgspec.msgpack.encode(ASKED), b"x")
