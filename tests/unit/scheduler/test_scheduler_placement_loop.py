"""Placement windows at the scheduler, over real links to scripted nodes: who decides them, on what, in which order."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from policies.placement.contract import IntArray, PlacementPolicy, Slots
from policies.placement.deployed import network_of
from policies.placement.edge_network import EdgeNetwork
from policies.placement.evaluate import build_policy
from policies.placement.live import loads_of, place_window
from policies.placement.rules import Sequential
from policies.placement.workload import Load
from protocol.board import Board
from protocol.edge_records import Decide, Decision, EdgeRequest, EdgeServiceSpec, EdgeSpec, NodeStatus
from protocol.frames import Kind
from protocol.link import Connection, connect
from protocol.records import Deployment
from scheduler import placement_loop
from scheduler.config import ConfigError, SchedulerConfig
from scheduler.metrics import SchedulerMetrics
from scheduler.observe import Observer
from scheduler.placement_loop import PlacementLoop
from tests.fakes.scripted_nodes import EdgeBoard, ScriptedNode, until

BOARD_URL = "redis://127.0.0.1:1/0"
WINDOW = (
    EdgeRequest("detection", 0, 2.0, 2.0),
    EdgeRequest("detection", 0, 1.0, 3.0),
    EdgeRequest("tracking", 4, 20.0, 9.0),
)


def edge_spec(**settings: Any) -> EdgeSpec:
    """Huang's graph and services."""
    services = {name: EdgeServiceSpec(table=name) for name in ("detection", "tracking")}
    return EdgeSpec(**{"services": services, "graph": "eua16", "policy": "beam", **settings})


class World:
    """A placement loop, its board, and what it is told is deployed."""

    def __init__(self, folder: Path, edge: EdgeSpec | None, build: Any, leads: bool) -> None:
        self.board = EdgeBoard()
        self.leads = leads
        self.deployment: Deployment | None = None
        self.deploy(edge)
        self.address = f"unix:{folder}/scheduler.sock"
        config = SchedulerConfig(board_url=BOARD_URL, address=self.address)
        observer, board = cast(Observer, self), cast(Board, self.board)
        self.loop = PlacementLoop(config, board, observer, SchedulerMetrics(), lambda: self.leads, build)

    def deploy(self, edge: EdgeSpec | None) -> None:
        """Another deployment is on the board."""
        self.deployment = Deployment(name="d", services={}, workers=(), edge=edge)

    @property
    def network(self) -> EdgeNetwork:
        """Of the deployment."""
        assert self.deployment is not None
        assert self.deployment.edge is not None
        return network_of(self.deployment.edge)

    async def decide(self, *requests: EdgeRequest, without: tuple[int, ...] = ()) -> Decision:
        """One window over a link of its own."""
        link = await connect(self.address, lambda: Connection(on_frame=lambda one, frame: None))
        _, future = link.request(Kind.DECIDE, Decide(7, requests or WINDOW, without))
        frame = await asyncio.wait_for(future, 10.0)
        link.close("done")
        assert frame.kind == Kind.DECISION
        return msgspec.msgpack.decode(frame.meta, type=Decision)

    async def until_decided_by(self, policy: str) -> None:
        """Until that policy decides."""
        await until(lambda: self.loop.statistics().policy == policy and not self.loop.statistics().reason)


@asynccontextmanager
async def world(
    folder: Path, edge: EdgeSpec | None = None, build: Any = build_policy, leads: bool = True, nodes: int = 16
) -> AsyncIterator[World]:
    """A running one; all its nodes have said that they are empty."""
    async with asyncio.timeout(30.0):
        here = World(folder, edge or edge_spec(), build, leads)
        names = here.network.graph.names[:nodes]
        scripted = [await ScriptedNode(name, folder).start() for name in names]
        here.board.node_records = [one.record for one in scripted]
        running = asyncio.create_task(here.loop.run())
        await until(lambda: bool(here.loop.statistics().policy))
        await until(lambda: len(here.loop._links.known(asyncio.get_running_loop().time(), 9.0)) == nodes)
        try:
            yield here
        finally:
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            for one in scripted:
                await one.stop()


def run(body: Callable[[], Any]) -> None:
    asyncio.run(body())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is looked at now and then is looked at at once; nodes' last words do not age."""
    for name in ("LOOK_EVERY_S", "POST_EVERY_S", "ASK_EVERY_S"):
        monkeypatch.setattr(placement_loop, name, 0.01)
    monkeypatch.setattr(placement_loop, "LOAD_AGAIN_S", 0.0)
    monkeypatch.setattr(placement_loop, "OLDEST_STATUS_S", 60.0)


@pytest.mark.parametrize(
    ("wanted", "decides"), [("beam", "beam"), ("hisper-sequential", "hisper-sequential"), ("exact", "exact-30ms")]
)
def test_a_window_is_decided_by_the_named_policy_as_the_environment_would(
    tmp_path: Path, wanted: str, decides: str
) -> None:
    async def body() -> None:
        async with world(tmp_path, edge_spec(policy=wanted)) as here:
            await here.until_decided_by(decides)
            decision = await here.decide()
            assert (decision.window, decision.policy) == (7, decides)
            assert decision.decide_s > 0.0
            if decides != "exact-30ms":  # what the solver finds in its time is not repeatable
                network = here.network
                policy = build_policy(decides, network, Load(per_service=4))
                empty = loads_of(network, {k: NodeStatus("n") for k in range(16)}, 16, {})
                assert list(decision.placements) == place_window(
                    network, policy, WINDOW, empty, 4, np.random.default_rng(0)
                )
            assert all(one.node >= 0 for one in decision.placements)

    run(body)


def test_the_next_window_sees_what_is_on_its_way(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, edge_spec(policy="sequential")) as here:
            await here.until_decided_by("sequential")
            alone = await here.decide(WINDOW[0])
            after = await here.decide(WINDOW[0])
            assert alone.placements[0] != after.placements[0]
            network, first = here.network, alone.placements[0]
            both = place_window(
                network,
                Sequential(network),
                [WINDOW[0], WINDOW[0]],
                loads_of(network, {k: NodeStatus("n") for k in range(16)}, 16, {}),
                4,
                np.random.default_rng(0),
            )
            assert [first, after.placements[0]] == both

    run(body)


def test_nodes_to_avoid_and_nodes_that_are_not_there_are_not_chosen(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, edge_spec(policy="sequential"), nodes=3) as here:
            await here.until_decided_by("sequential")
            decision = await here.decide(*[WINDOW[0]] * 4)
            chosen = {one.node for one in decision.placements}
            assert chosen <= {0, 1, 2}
            await until(lambda: bool(here.board.windows))
            (logged,) = here.board.windows
            assert (logged.policy, logged.requests) == ("sequential", (WINDOW[0],) * 4)
            assert logged.placements == decision.placements
            assert len(logged.waiting_tflop) == len(logged.memory_used_mb) == 16
            assert set(logged.closed.values()) == {"is not there"}
            assert logged.closed.keys() == set(here.network.graph.names[3:])
            here.board.away = True  # no board: no entry, and a decision all the same
            kept = {one.node for one in (await here.decide(*[WINDOW[0]] * 4, without=(0, 1))).placements}
            assert kept <= {2, -1}

    run(body)


class Stumbling:
    """A policy whose code fails on real windows."""

    name = "stumbling"

    def __init__(self, network: EdgeNetwork) -> None:
        self.sequential = Sequential(network)

    def decide(self, slots: Slots, rng: np.random.Generator) -> IntArray:
        """Fails, but in rehearsals, where nobody is there."""
        if (slots.memory_used_mb < 1.0).any():
            raise ZeroDivisionError("a bug")
        return self.sequential.decide(slots, rng)


def test_a_policy_that_fails_costs_no_request(tmp_path: Path) -> None:
    def build(name: str, network: EdgeNetwork, load: Load) -> PlacementPolicy:
        return Stumbling(network)

    async def body() -> None:
        async with world(tmp_path, build=build) as here:
            await here.until_decided_by("stumbling")
            decision = await here.decide()
            assert decision.policy == "sequential"
            assert all(one.node >= 0 for one in decision.placements)
            assert (here.loop.statistics().decided, here.loop.statistics().stood_in_for) == (1, 1)
            assert any("a bug" in record.reason for record in here.board.controllers) or "a bug" in (
                here.loop.statistics().reason
            )
            await here.until_decided_by("stumbling")  # tried again: its file may have been put right

    run(body)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"policy": "beem"}, "policy 'beem' is unknown; use one of"),
        ({"policy": "hisper", "per_service": 40}, "hisper: trained for 5 requests per service, asked for 40"),
        ({"policy": "/nowhere/policy"}, "/nowhere/policy: cannot be read"),
        (
            {"services": {"detection": EdgeServiceSpec(table="detection")}, "policy": "hisper-sequential"},
            "hisper-sequential",
        ),
    ],
)
def test_a_policy_that_cannot_be_loaded_is_stood_in_for_with_the_reason(
    tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    async def body() -> None:
        async with world(tmp_path, edge_spec(**settings)) as here:
            await until(lambda: says in here.loop.statistics().reason)
            await until(lambda: bool(here.board.controllers) and says in here.board.controllers[-1].reason)
            assert here.board.controllers[-1].policy == "sequential"
            decision = await here.decide(WINDOW[0])
            assert decision.policy == "sequential"
            assert decision.placements[0].node >= 0
            here.deploy(edge_spec(policy="heuristic"))
            await here.until_decided_by("heuristic")

    run(body)


def test_only_the_leader_says_where_it_is(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, leads=False) as here:
            await here.until_decided_by("beam")
            await asyncio.sleep(0.05)
            assert here.board.controllers == []
            here.leads = True
            await until(lambda: bool(here.board.controllers))
            record = here.board.controllers[-1]
            assert (record.address, record.policy, record.reason) == (here.address, "beam", "")

    run(body)


def test_windows_for_another_network_get_no_placements(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path) as here:
            await here.until_decided_by("beam")
            assert (await here.decide(EdgeRequest("ocr", 0, 1.0, 1.0))).placements == ()
            here.deploy(edge_spec(services={"detection": EdgeServiceSpec(table="nothing")}))
            await until(lambda: not here.loop.statistics().policy)
            assert (await here.decide()).placements == ()
            here.deploy(None)
            assert (await here.decide()).placements == ()

    run(body)


def test_one_window_is_decided_at_a_time_and_the_loop_is_not_held_up(tmp_path: Path) -> None:
    class Slow(Sequential):
        name = "slow"
        going, most = 0, 0
        let = threading.Event()

        def decide(self, slots: Slots, rng: np.random.Generator) -> IntArray:
            Slow.going += 1
            Slow.most = max(Slow.most, Slow.going)
            assert Slow.let.wait(10.0)
            Slow.going -= 1
            return super().decide(slots, rng)

    async def body() -> None:
        Slow.let.set()
        async with world(tmp_path, build=lambda name, network, load: Slow(network)) as here:
            await here.until_decided_by("slow")
            Slow.let.clear()
            windows = [asyncio.create_task(here.decide()) for _ in range(3)]
            await until(lambda: Slow.going == 1)
            posted = len(here.board.controllers)
            await until(lambda: len(here.board.controllers) > posted + 2)  # the loop goes on
            Slow.let.set()
            for window in windows:
                assert (await window).policy == "slow"
            assert Slow.most == 1

    run(body)


def test_a_window_that_its_gateway_has_taken_back_is_not_decided(tmp_path: Path) -> None:
    """It waited for its turn; the gateway has decided by itself, so its requests must not count as on their way."""

    class Held(Sequential):
        name = "held"
        begun = 0
        let = threading.Event()

        def decide(self, slots: Slots, rng: np.random.Generator) -> IntArray:
            Held.begun += 1
            assert Held.let.wait(10.0)
            return super().decide(slots, rng)

    async def body() -> None:
        Held.let.set()
        async with world(tmp_path, build=lambda name, network, load: Held(network)) as here:
            await here.until_decided_by("held")
            Held.let.clear()
            Held.begun = 0
            link = await connect(here.address, lambda: Connection(on_frame=lambda one, frame: None))
            _, first = link.request(Kind.DECIDE, Decide(1, WINDOW, ()))
            await until(lambda: Held.begun == 1)
            taken_back, _ = link.request(Kind.DECIDE, Decide(2, WINDOW, ()))
            await until(lambda: len(here.loop._answering) == 2)
            link.send(Kind.CANCEL, taken_back)
            await until(lambda: len(here.loop._answering) == 1)
            Held.let.set()
            await asyncio.wait_for(first, 10.0)
            await until(lambda: not here.loop._answering)
            assert (Held.begun, here.loop.statistics().decided) == (1, 1)
            link.close("done")

    run(body)


def test_addresses_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="address = 'here': must be"):
        SchedulerConfig(board_url=BOARD_URL, address="here")
    with pytest.raises(ConfigError, match="advertise = 'there:1': must be"):
        SchedulerConfig(board_url=BOARD_URL, advertise="there:1")
    with pytest.raises(ConfigError, match="advertise is empty"):
        SchedulerConfig(board_url=BOARD_URL, address="tcp:0.0.0.0:7100")
