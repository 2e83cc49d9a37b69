"""Random conversations with a node: good and bad frames in any order and any chunks, seeded, in virtual time."""

import asyncio
import random
from pathlib import Path

import msgspec
import pytest

from protocol.edge_records import EdgeInfer, EdgeReply, EdgeRun, NodeStatus
from protocol.frames import Frame, FrameReader, Kind, encode_head
from protocol.link import Connection
from protocol.outcomes import Attempt
from tests.fakes.edge_models import bright_deployment, picture
from tests.fakes.edge_world import World, run_world
from workers.edge_calls import EDGE_KINDS, EdgeCalls

BUDGETS_S = (-1.0, 0.0, 0.001, 0.3, 5.0, 1e9)


class Talk:
    """One connection, and what was asked on it. Ends like a socket does: without a word, or by its own goodbye."""

    def __init__(self, world: World, node: str) -> None:
        self.written = b""
        self.closing = False
        self.asked: set[int] = set()
        self.connection = Connection(self._on_frame, lambda *_: self.calls.cancel_all())
        self.calls = EdgeCalls(self.connection, world.nodes[node])
        self.connection.connection_made(self)  # type: ignore[arg-type]

    def write(self, data: bytes) -> None:
        """As a transport."""
        self.written += data

    def writelines(self, parts: tuple[bytes, ...]) -> None:
        """As a transport."""
        self.written += b"".join(parts)

    def set_write_buffer_limits(self, high: int) -> None:
        """As a transport."""

    def get_write_buffer_size(self) -> int:
        """As a transport."""
        return 0

    def is_closing(self) -> bool:
        """As a transport."""
        return self.closing

    def close(self) -> None:
        """As a transport: the end is told in the next turn."""
        self.closing = True
        asyncio.get_running_loop().call_soon(self.connection.connection_lost, None)

    def feed(self, data: bytes) -> None:
        """What arrives; nothing more after the end."""
        if not self.closing:
            self.connection.data_received(data)

    def replies(self) -> list[Frame]:
        """What was answered so far."""
        return [frame for frame in FrameReader().feed(self.written) if frame.kind == Kind.REPLY]

    def _on_frame(self, connection: Connection, frame: Frame) -> None:
        if frame.kind == Kind.CANCEL:
            self.calls.cancel(frame.request_id)
        elif frame.kind in EDGE_KINDS:
            if frame.kind != Kind.NODE_STATUS_REQUEST:
                self.asked.add(frame.request_id)
            self.calls.on_frame(frame)
        else:
            connection.close("no")


def some_frame(rng: random.Random, number: int) -> bytes:
    """A request, mostly sound in its form, of a client or a neighbour; or a cancellation, or a question."""
    draw = rng.random()
    if draw < 0.2:
        return encode_head(Kind.CANCEL, rng.randint(0, number), b"", 0)
    if draw < 0.3:
        return encode_head(Kind.NODE_STATUS_REQUEST, 10_000 + number, b"", 0)
    body = rng.choice([picture(), picture(), b"", b"\xff\xd8\xff", rng.randbytes(200)])
    indices = rng.choice([0, 1, -1, 2**31]), rng.choice([0, 1, 2, 3, 4, 5]), rng.choice([0, 1, 2, 3])
    service = rng.choice(["detection", "detection", "tracking", ""])
    meta: EdgeInfer | EdgeRun
    if draw < 0.7:
        meta = EdgeInfer(service, *indices, rng.choice(BUDGETS_S), rng.choice(["image/jpeg", "video/mp4", "x"]))
        kind = Kind.EDGE_INFER
    else:
        size, scale = rng.choice([(160, 120), (0, 1)]), rng.choice([1.0, 0.5, 1e-300, float("inf")])
        numbers, data_mb = rng.choice([(1,), (1,), (), (1, 2)]), rng.choice([0.001, -5.0, float("nan")])
        meta = EdgeRun(service, *indices, rng.choice(BUDGETS_S), *size, scale, 0.0, numbers, data_mb)
        kind = Kind.EDGE_RUN
    encoded = msgspec.msgpack.encode(meta)
    if rng.random() < 0.02:
        encoded = rng.randbytes(len(encoded))
    return encode_head(kind, number, encoded, len(body)) + body


@pytest.mark.parametrize("seed", range(12))
def test_every_request_is_answered_once_and_the_books_add_up(tmp_path: Path, seed: int) -> None:
    """Also when connections end in the middle of anything. Nothing is left in memory or in line at the end."""
    rng = random.Random(seed)

    async def scenario() -> None:
        deployment = bright_deployment(tmp_path, tflops=0.2, memory_mb=350.0, queue_capacity=3, uplink_mbps=1.0)
        world = World(deployment, compute_s=0.02, load_s=0.05)
        talks: list[Talk] = []
        for _ in range(6):
            talk = Talk(world, rng.choice("abc"))
            talks.append(talk)
            stream = b"".join(some_frame(rng, number) for number in range(1, 30))
            if rng.random() < 0.3:
                stream += rng.randbytes(50)
            while stream:
                chunk = rng.choice([1, 19, 20, 500, 4000])
                talk.feed(stream[:chunk])
                stream = stream[chunk:]
                if rng.random() < 0.1:
                    await asyncio.sleep(rng.expovariate(5.0))
                    world.check_the_books()
            if rng.random() < 0.3:
                talk.close()
        for node in world.nodes.values():
            await node.books.emptied()
        await asyncio.sleep(1.0)
        world.check_the_books()
        for talk in talks:
            ended = [frame.request_id for frame in talk.replies()]
            assert len(ended) == len(set(ended)), "answered twice"
            if not talk.closing:
                assert set(ended) == talk.asked, "never answered"
            for frame in talk.replies():
                reply = msgspec.msgpack.decode(frame.meta, type=EdgeReply)
                assert reply.attempt in (Attempt.OK, Attempt.LATE) or reply.reason, "refused without a reason"
                assert reply.attempt != Attempt.FAILED or "the network broke" in reply.reason, reply.reason
        for node in world.nodes.values():
            status: NodeStatus = node.status()
            assert (status.length, status.waiting_tflop, status.loading) == (0, 0.0, ())
            assert set(status.idle) == set(status.deployed)
            assert node.books.bytes == 0

    run_world(scenario())
