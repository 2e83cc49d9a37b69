"""What the gateway believes: registrations of a worker that is there, and is the one that wrote them."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import msgspec
import pytest

from gateway.fleet import Fleet
from gateway.router import Target
from protocol.board import Board
from protocol.frames import Frame, Kind
from protocol.link import Connection, LinkClosed, serve
from protocol.records import (
    Deployment,
    Infer,
    InstanceRecord,
    InstanceSpec,
    InstanceState,
    PolicyStatus,
    ServiceSpec,
    Table,
    WorkerSpec,
    WorkerStatus,
)


class FakeBoard:
    """What Redis would hold, and a way to tell the follower."""

    def __init__(self) -> None:
        spec = ServiceSpec(variants=("light",), requirement_ms=300.0, router="uniform")
        self.posted: Deployment | None = Deployment(name="d", services={"s": spec}, workers=(), version=1)
        self.records: list[InstanceRecord] = []
        self.policies: dict[str, PolicyStatus] = {}
        self.known_gateways: set[str] = set()
        self.away = False
        self._on_news: Callable[[str, bytes], Awaitable[None]] | None = None

    async def deployment(self) -> Deployment | None:
        """As on the board."""
        self._reach()
        return self.posted

    async def instances(self) -> list[InstanceRecord]:
        """As on the board."""
        self._reach()
        return self.records

    async def post_gateway(self, id: str) -> None:
        """As on the board."""
        self._reach()
        self.known_gateways.add(id)

    async def remove_gateway(self, id: str) -> None:
        """As on the board."""
        self.known_gateways.discard(id)

    async def gateways(self) -> list[str]:
        """As on the board."""
        self._reach()
        return sorted(self.known_gateways)

    async def table(self, service: str) -> Table | None:
        """None."""
        return None

    async def policy_statuses(self, services: list[str]) -> dict[str, PolicyStatus]:
        """As on the board."""
        self._reach()
        return {name: self.policies[name] for name in services if name in self.policies}

    async def follow(
        self, read_all: Callable[[], Awaitable[None]], on_news: Callable[[str, bytes], Awaitable[None]]
    ) -> None:
        """Reads once, then waits for `news`."""
        self._on_news = on_news
        await read_all()
        await asyncio.Event().wait()

    async def news(self, what: bytes) -> None:
        """Something changed."""
        assert self._on_news is not None
        await self._on_news("news", what)

    def _reach(self) -> None:
        if self.away:
            raise ConnectionError("away")


class FakeWorker:
    """Listens on a unix socket and says which start of itself it is; or says nothing."""

    def __init__(self, folder: Path, epoch: str, *, mute: bool = False) -> None:
        self.address = f"unix:{folder}/w.sock"
        self._epoch = epoch
        self._mute = mute
        self._connections: list[Connection] = []
        self._server: asyncio.Server | None = None

    async def start(self) -> "FakeWorker":
        """Listen."""
        self._server = await serve(self.address, self._connection)
        return self

    async def stop(self) -> None:
        """As if killed."""
        assert self._server is not None
        self._server.close()
        for connection in self._connections:
            connection.close("killed")
        await asyncio.sleep(0)

    def record(self, epoch: str) -> InstanceRecord:
        """A registration by some start of this worker."""
        return InstanceRecord(
            id="w/light", worker="w", address=self.address, service="s", variant="light", capacity=3,
            state=InstanceState.READY, epoch=epoch,
        )  # fmt: skip

    def _connection(self) -> Connection:
        self._connections.append(Connection(self._on_frame))
        return self._connections[-1]

    def _on_frame(self, connection: Connection, frame: Frame) -> None:
        if frame.kind == Kind.STATUS_REQUEST and not self._mute:
            connection.send(Kind.STATUS, frame.request_id, WorkerStatus("w", (), False, self._epoch))


def run(body: Callable[[Fleet, FakeBoard], Awaitable[None]]) -> None:
    async def bounded() -> None:
        board = FakeBoard()
        async with asyncio.timeout(30.0), Fleet(cast(Board, board), on_change=lambda: None) as fleet:
            await body(fleet, board)
        assert board.known_gateways <= {"another"}, "an orderly end is told"

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def routable(fleet: Fleet) -> bool:
    return isinstance(fleet.services["s"].route(0.0, 1.0, 0.5), Target)


def test_a_worker_gets_requests_once_it_is_registered_and_reached(tmp_path: Path) -> None:
    async def body(fleet: Fleet, board: FakeBoard) -> None:
        await fleet.settle(5.0)
        assert fleet.missing() == ["s"]
        worker = await FakeWorker(tmp_path, "1").start()
        board.records = [worker.record("1")]
        await board.news(b"instances")
        await fleet.settle(5.0)
        assert routable(fleet)
        assert fleet.missing() == []
        await worker.stop()
        await until(lambda: not routable(fleet))

    run(body)


def test_a_registration_of_an_earlier_life_is_not_believed(tmp_path: Path) -> None:
    """It outlives a killed worker by seconds on the board, while the new one listens and still loads."""

    async def body(fleet: Fleet, board: FakeBoard) -> None:
        await fleet.settle(5.0)
        worker = await FakeWorker(tmp_path, "2").start()
        board.records = [worker.record("1")]
        await board.news(b"instances")
        await fleet.settle(5.0)
        assert next(iter(fleet.peers.values())).up
        assert not routable(fleet)
        assert fleet.missing() == ["s"]
        board.records = [worker.record("2")]
        await board.news(b"instances")
        assert routable(fleet)
        await worker.stop()

    run(body)


def test_a_worker_that_accepts_but_does_not_speak_gets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.fleet.GREETING_S", 0.05)

    async def body(fleet: Fleet, board: FakeBoard) -> None:
        await fleet.settle(5.0)
        worker = await FakeWorker(tmp_path, "1", mute=True).start()
        board.records = [worker.record("1")]
        await board.news(b"instances")
        await fleet.settle(0.2)
        assert next(iter(fleet.peers.values())).up
        assert not routable(fleet)
        worker._mute = False
        await until(lambda: routable(fleet))  # it is asked again with the next look at the board
        await worker.stop()

    run(body)


def test_a_board_that_goes_away_or_forgets_takes_nobody_along(tmp_path: Path) -> None:
    async def body(fleet: Fleet, board: FakeBoard) -> None:
        worker = await FakeWorker(tmp_path, "1").start()
        board.records = [worker.record("1")]
        await fleet.settle(5.0)
        await board.news(b"instances")
        await fleet.settle(5.0)
        board.records, board.posted = [], None  # it lost its memory
        await board.news(b"instances")
        await board.news(b"deployment")
        assert routable(fleet)
        board.away = True
        await asyncio.sleep(0)
        assert routable(fleet)
        await worker.stop()

    run(body)


@pytest.mark.parametrize("hangs", [True, False])
def test_a_worker_that_hangs_is_cut_off_and_one_that_the_board_forgot_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    """Both are off the board; what waits at the one that hangs learns at once that no answer will come."""
    monkeypatch.setattr("gateway.fleet.GREETING_S", 0.05)

    async def body(fleet: Fleet, board: FakeBoard) -> None:
        worker = await FakeWorker(tmp_path, "1").start()
        board.records = [worker.record("1")]
        await fleet.settle(5.0)
        await board.news(b"instances")
        await until(lambda: routable(fleet))
        peer = next(iter(fleet.peers.values()))
        _, waiting = peer.request(Kind.INFER, Infer("w/light", 1.0))
        worker._mute, board.records = hangs, []
        await board.news(b"instances")
        await until(lambda: all(greeting.done() for greeting in fleet._greetings.values()))
        await asyncio.sleep(0)
        if hangs:
            with pytest.raises(LinkClosed, match="hangs"):
                await waiting
            await until(lambda: not routable(fleet))
        else:
            assert routable(fleet)
            assert not waiting.done()
            assert peer.in_flight == 1
        await worker.stop()

    run(body)


def test_a_worker_that_ended_in_order_is_forgotten_at_once_and_its_link_once_it_owes_nothing(tmp_path: Path) -> None:
    """It takes its registration back and still finishes what it has: that must not be lost with the link."""

    async def body(fleet: Fleet, board: FakeBoard) -> None:
        worker = await FakeWorker(tmp_path, "1").start()
        board.records = [worker.record("1")]
        await fleet.settle(5.0)
        await board.news(b"instances")
        await until(lambda: routable(fleet))
        (peer,) = fleet.peers.values()
        request_id, waiting = peer.request(Kind.INFER, Infer("w/light", 1.0))
        board.records = [msgspec.structs.replace(worker.record("1"), state=InstanceState.DRAINING)]
        await board.news(b"instances")
        assert fleet.notices() == ["w/light of s is not ready: draining"]
        board.records = []
        await board.news(b"instances")
        assert fleet.services["s"].targets == []
        assert fleet.peers == {worker.address: peer}
        assert peer.up
        assert not waiting.done()
        worker._connections[0].send(Kind.REPLY, request_id, None, b"late")
        assert (await waiting).payload == b"late"
        await board.news(b"instances")
        assert fleet.peers == {}
        await worker.stop()

    run(body)


def test_a_deployment_is_taken_once() -> None:
    """The board is read every second: what it says again changes nothing."""
    seen: list[object] = []

    async def bounded() -> None:
        board = FakeBoard()
        taken = Fleet(cast(Board, board), on_change=lambda: None, on_deployment=seen.append)
        async with asyncio.timeout(30.0), taken as fleet:
            await fleet.settle(5.0)
            for version in (1, 1, 2, 2):
                assert board.posted is not None
                board.posted = msgspec.structs.replace(board.posted, version=version)
                await board.news(b"deployment")

    asyncio.run(bounded())
    assert len(seen) == 2


def test_an_older_deployment_and_an_unknown_router_change_nothing() -> None:
    async def body(fleet: Fleet, board: FakeBoard) -> None:
        await fleet.settle(5.0)
        good = board.posted
        assert good is not None
        bad = {"s": ServiceSpec(variants=("light",), requirement_ms=300.0, router="best")}
        for services, version in ((bad, 2), ({}, 1)):
            board.posted = Deployment(name="d", services=services, workers=(), version=version)
            await board.news(b"deployment")
            assert fleet.services["s"].spec.router == "uniform"

    run(body)


def test_what_is_not_as_wanted_is_told_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance that failed, one that nobody has registered, a policy that does not fit; not what is unloaded."""
    monkeypatch.setattr("gateway.fleet.READ_AGAIN_S", 0.01)

    async def body(fleet: Fleet, board: FakeBoard) -> None:
        worker = await FakeWorker(tmp_path, "1").start()
        spec = ServiceSpec(variants=("heavy", "light"), requirement_ms=300.0, router="learned-po")
        wanted = (
            InstanceSpec(variant="light"),
            InstanceSpec(variant="heavy"),
            InstanceSpec(variant="heavy", loaded=False),
        )
        workers = (WorkerSpec(name="w", instances=wanted), WorkerSpec(name="v", instances=wanted[:1]))
        board.posted = Deployment(name="d", services={"s": spec}, workers=workers, version=2)
        failed = msgspec.structs.replace(
            worker.record("1"), id="w/heavy", variant="heavy", state=InstanceState.FAILED, reason="no such file"
        )
        board.records = [worker.record("1"), failed]
        board.policies = {"s": PolicyStatus(policy="learned-po", in_force=False, reason="it was trained for four")}
        await board.news(b"deployment")
        await board.news(b"instances")
        expected = [
            "w/heavy of s is not ready: no such file",
            "v/light of s is not ready: no worker has registered it",
            "s is routed by deadline, not learned-po: it was trained for four",
        ]
        await until(lambda: fleet.notices() == expected)
        board.policies = {}
        await until(lambda: "not sent a table" in fleet.notices()[-1])
        await worker.stop()

    run(body)


def test_a_single_queue_that_several_gateways_hold_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.fleet.READ_AGAIN_S", 0.01)

    async def body(fleet: Fleet, board: FakeBoard) -> None:
        spec = ServiceSpec(variants=("light",), requirement_ms=300.0, router="single-queue")
        await fleet.settle(5.0)
        board.posted = Deployment(name="d", services={"s": spec}, workers=(), version=2)
        await board.news(b"deployment")
        await until(lambda: board.known_gateways == {fleet.id})
        assert fleet.notices() == []
        board.known_gateways.add("another")
        await until(lambda: fleet.notices() == ["s has 2 queues: single-queue needs one gateway, end the others"])
        alone = {"s": msgspec.structs.replace(spec, router="uniform")}
        board.posted = Deployment(name="d", services=alone, workers=(), version=3)
        await board.news(b"deployment")
        await until(lambda: fleet.gateways == 1)  # the others are not counted where it does not matter

    run(body)
