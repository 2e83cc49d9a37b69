"""One placement window: statuses in, a decision out; for edge services. Start reading here for them.

    gateway ── DECIDE ──► ask the nodes how they are ──► the named policy, in a thread ──► DECISION

One window is decided at a time, in the order in which windows come, and each sees what the ones before it sent on its
way. A policy that cannot be loaded, or whose code fails, is stood in for by `sequential`; the reason stands on the
board (`controller`) and so in every gateway's /readyz. Gateways do not depend on this: one that gets no decision in
time decides by itself.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np

from policies.placement.contract import PlacementPolicy
from policies.placement.deployed import network_of
from policies.placement.edge_network import EdgeNetwork
from policies.placement.evaluate import build_policy
from policies.placement.live import Loads, OnTheWay, loads_of, place_window
from policies.placement.rules import Sequential
from policies.placement.workload import Load
from protocol.board import BOARD_ERRORS, Board
from protocol.edge_records import (
    ControllerRecord,
    Decide,
    Decision,
    EdgeRequest,
    EdgeSpec,
    NodeStatus,
    Placement,
    WindowRecord,
)
from protocol.frames import Frame, Kind
from protocol.link import Connection, LinkClosed, serve
from protocol.node_links import NodeLinks
from scheduler.config import SchedulerConfig
from scheduler.metrics import SchedulerMetrics
from scheduler.observe import Observer

log = logging.getLogger("scheduler.placement_loop")

LOOK_EVERY_S: Final = 0.2
POST_EVERY_S: Final = 1.0
ASK_EVERY_S: Final = 0.5
ASK_PATIENCE_S: Final = 0.25
STATUS_PATIENCE_S: Final = 0.01
"""So long a window waits for the nodes' answers. Who is later is taken at its last word."""
OLDEST_STATUS_S: Final = 1.0
"""A node whose last word is older hangs, and is not chosen."""
LOAD_AGAIN_S: Final = 5.0
LIVE_FORMS: Final = {"exact": "exact-30ms"}
"""What stands for a policy that may think as long as it likes."""

BuildPolicy = Callable[[str, EdgeNetwork, Load], PlacementPolicy]


class PlacementStatistics(msgspec.Struct, frozen=True):
    """Windows since start, by what became of them, and who decides now."""

    decided: int
    stood_in_for: int
    policy: str
    reason: str


@dataclass
class _Deployed:
    """One deployment's network, and who decides on it."""

    edge: EdgeSpec
    network: EdgeNetwork
    policy: PlacementPolicy
    moving: OnTheWay
    reason: str = ""
    tried_s: float = 0.0


class PlacementLoop:
    """Listens for windows while the deployment has an edge network; the leader says so on the board.

    All mutable state: what is deployed, the links to nodes, and the counts.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        board: Board,
        observer: Observer,
        metrics: SchedulerMetrics,
        leading: Callable[[], bool],
        build: BuildPolicy = build_policy,
    ) -> None:
        self._config = config
        self._board = board
        self._observer = observer
        self._metrics = metrics
        self._leading = leading
        self._build = build
        self._links = NodeLinks(board)
        self._epoch = secrets.token_hex(4)
        self._address = config.address
        self._deployed: _Deployed | None = None
        self._refused: EdgeSpec | None = None
        self._rng = np.random.default_rng(config.seed)
        self._one_at_a_time = asyncio.Lock()
        self._answering: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._decided = 0
        self._stood_in_for = 0

    async def run(self) -> None:
        """Until cancelled. Whatever goes wrong here, routing goes on."""
        while self._address:
            try:
                await self._serve()
            except Exception:
                log.exception("placing stopped; it starts again in %g s", POST_EVERY_S)
                await asyncio.sleep(POST_EVERY_S)

    async def _serve(self) -> None:
        while self._wanted() is None:  # noqa: ASYNC110 - the observer tells of changes to one listener only
            await asyncio.sleep(LOOK_EVERY_S)
        self._links = NodeLinks(self._board)
        server = await serve(self._address, self._connection)
        try:
            async with self._links, asyncio.TaskGroup() as tasks:
                tasks.create_task(self._ask_nodes(), name="placement.ask_nodes")
                tasks.create_task(self._say_where(), name="placement.say_where")
                while True:
                    await self._keep_up()
                    await asyncio.sleep(LOOK_EVERY_S)
        finally:
            server.close()
            if self._address.startswith("unix:"):
                with contextlib.suppress(OSError):
                    os.unlink(self._address.removeprefix("unix:"))

    def statistics(self) -> PlacementStatistics:
        """Windows so far."""
        here = self._deployed
        policy, reason = (here.policy.name, here.reason) if here is not None else ("", "")
        return PlacementStatistics(self._decided, self._stood_in_for, policy, reason)

    def _wanted(self) -> EdgeSpec | None:
        deployment = self._observer.deployment
        return deployment.edge if deployment is not None else None

    # what is deployed

    async def _keep_up(self) -> None:
        """Follows the deployment, and tries again to load a policy that could not be loaded."""
        edge, here = self._wanted(), self._deployed
        if edge is None or edge == self._refused:
            self._deployed = None
            return
        now_s = time.monotonic()
        if here is not None and here.edge == edge:
            if here.reason and now_s - here.tried_s > LOAD_AGAIN_S:
                await self._load(here)
            return
        try:
            network = await asyncio.to_thread(network_of, edge)
        except (ValueError, OSError) as error:
            log.error("the deployment's edge network cannot be used: %s", error)
            self._refused, self._deployed = edge, None
            return
        self._refused = None
        here = _Deployed(edge, network, Sequential(network), OnTheWay(network), f"{edge.policy} is being loaded")
        self._deployed = here
        await self._load(here)
        await self._post()

    async def _load(self, here: _Deployed) -> None:
        """The deployment's policy, warmed up; as long as it cannot be had, `sequential` with the reason."""
        here.tried_s = time.monotonic()
        name = LIVE_FORMS.get(here.edge.policy, here.edge.policy)
        try:
            policy = await asyncio.to_thread(self._build, name, here.network, Load(per_service=here.edge.per_service))
            await asyncio.to_thread(_rehearse, here.network, policy, here.edge.per_service)
        except ImportError as error:
            reason = f"{error}; install what it needs: pip install 'tidegate[place]'"
        except Exception as error:  # a path may name anybody's artifact
            reason = str(error) or repr(error)
        else:
            here.policy, here.reason = policy, ""
            log.info("edge requests are placed by %s", policy.name)
            return
        if reason != here.reason:
            log.warning("edge requests are placed by sequential: %s", reason)
        here.policy, here.reason = Sequential(here.network), reason

    # windows

    def _connection(self) -> Connection:
        return Connection(self._on_frame)

    def _on_frame(self, connection: Connection, frame: Frame) -> None:
        key = id(connection), frame.request_id
        if frame.kind == Kind.CANCEL and (task := self._answering.get(key)) is not None:
            task.cancel()  # the gateway has decided by itself
        elif frame.kind == Kind.DECIDE:
            self._answering[key] = task = asyncio.create_task(self._answer(connection, frame), name="decide a window")
            task.add_done_callback(lambda task: self._answering.pop(key))

    async def _answer(self, connection: Connection, frame: Frame) -> None:
        try:
            asked = msgspec.msgpack.decode(frame.meta, type=Decide)
        except msgspec.MsgspecError as error:
            connection.close(f"DECIDE cannot be read: {error}")
            return
        async with self._one_at_a_time:
            decision, loads = await self._decide(asked)
        with contextlib.suppress(LinkClosed):
            connection.send(Kind.DECISION, frame.request_id, decision)
        if loads is not None and self._deployed is not None:  # the answer first, then the books
            with contextlib.suppress(*BOARD_ERRORS):
                await self._board.add_window(_record(asked, decision, loads, self._deployed.network.graph.names))

    async def _decide(self, asked: Decide) -> tuple[Decision, Loads | None]:
        """One window, and what was known of the nodes; no placements where not what the gateway knows is deployed."""
        here = self._deployed
        if here is None or not asked.requests:
            return Decision(asked.window, "", ()), None
        began_s = time.monotonic()
        await self._links.ask(STATUS_PATIENCE_S)
        now_s = time.monotonic()
        names = here.network.graph.names
        known = self._links.known(now_s, OLDEST_STATUS_S)
        statuses = {k: known[name] for k, name in enumerate(names) if name in known}
        shut = dict.fromkeys(asked.without, "failed a moment ago")
        loads = here.moving.onto(loads_of(here.network, statuses, here.edge.queue_capacity, shut), now_s)
        policy, stood_in_for = here.policy, bool(here.reason)
        per_service = here.edge.per_service

        def place(by: PlacementPolicy) -> list[Placement]:
            return place_window(here.network, by, asked.requests, loads, per_service, self._rng)

        try:
            placements = await asyncio.to_thread(place, policy)
        except Exception as error:  # a learned policy meets what it was not trained on; a bug costs no request
            log.exception("%s could not decide window %d", policy.name, asked.window)
            here.reason = f"{policy.name} failed: {error!r} (see the scheduler's log)"
            here.policy = policy = Sequential(here.network)
            here.tried_s, stood_in_for = now_s, True
            try:
                placements = await asyncio.to_thread(place, policy)
            except ValueError:  # the gateway knows another network: it decides by itself
                return Decision(asked.window, "", ()), None
        here.moving.add(asked.requests, placements, now_s)
        took_s = time.monotonic() - began_s
        self._decided += 1
        self._stood_in_for += stood_in_for  # the policy may have been loaded anew meanwhile
        self._metrics.windows.labels(policy.name).inc()
        self._metrics.window_seconds.observe(took_s)
        return Decision(asked.window, policy.name, tuple(placements), took_s), loads

    # news

    async def _ask_nodes(self) -> None:
        while True:
            await self._links.ask(ASK_PATIENCE_S)
            await asyncio.sleep(ASK_EVERY_S)

    async def _say_where(self) -> None:
        while True:
            await self._post()
            await asyncio.sleep(POST_EVERY_S)

    async def _post(self) -> None:
        here = self._deployed
        if here is None or not self._leading():
            return
        address = self._config.advertise or self._address
        record = ControllerRecord(address=address, epoch=self._epoch, policy=here.policy.name, reason=here.reason)
        with contextlib.suppress(*BOARD_ERRORS):
            await self._board.post_controller(record)


def _record(asked: Decide, decision: Decision, loads: Loads, names: tuple[str, ...]) -> WindowRecord:
    return WindowRecord(
        policy=decision.policy,
        decide_ms=decision.decide_s * 1e3,
        requests=asked.requests,
        placements=decision.placements,
        waiting_tflop=tuple(loads.waiting_tflop.tolist()),
        memory_used_mb=tuple(loads.memory_used_mb.tolist()),
        closed={names[k]: why for k, why in loads.closed.items() if k < len(names)},
    )


def _rehearse(network: EdgeNetwork, policy: PlacementPolicy, per_service: int) -> None:
    """One full window on empty nodes, so that what is slow only once is over before the first real one."""
    statuses = {k: NodeStatus(name, memory_used_mb=1.0) for k, name in enumerate(network.graph.names)}
    requests = [
        EdgeRequest(table.name, 0, max(table.deadlines_s), max(table.data_mb))
        for table in network.tables
        for _ in range(per_service)
    ]
    place_window(network, policy, requests, loads_of(network, statuses, 1, {}), per_service, np.random.default_rng(0))
