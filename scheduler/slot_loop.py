"""One slot: observe, act, publish, record; for every service whose router sets tables. Start reading here.

The loop of a service runs on its policy's own slot length, on boundaries that do not drift (`slots.py`). It also
decides at once when an instance comes or goes and, for a policy that sees it, when the phase changes. Only the holder
of the lease publishes. A slot that goes wrong (no status, no table, no board) costs that slot: gateways keep the last
table until it expires, then route by `deadline`, and are told why.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import numpy as np

from policies.routing.contract import InstanceKind, Remarking, SlotPolicy
from protocol.board import BOARD_ERRORS, LEASE_EXPIRES_S, Board
from protocol.records import DecisionRecord, PolicyStatus, ServiceSpec
from scheduler.config import SchedulerConfig
from scheduler.metrics import SchedulerMetrics
from scheduler.observe import Observer, Seen
from scheduler.placement_loop import PlacementLoop
from scheduler.publish import UnusableAction, table_from
from scheduler.shadow import ShadowLoop
from scheduler.slots import slot_start_s

log = logging.getLogger("scheduler.slot_loop")

MakePolicy = Callable[[str, Sequence[InstanceKind], ServiceSpec, float], SlotPolicy | None]
"""(router, kinds, service settings, slot_s) -> the policy for this set of instances, or None if it sets no tables."""
IDLE_S: Final = 0.2
SAY_AGAIN_S: Final = 3.0
"""So often a policy's status is renewed on the board while nothing about it changes."""
LOAD_AGAIN_S: Final = 5.0
"""So often a policy that could not be loaded is tried again: its file may have been put right."""


class SlotStatistics(msgspec.Struct, frozen=True):
    """Slots of one service since start, by what became of them."""

    published: int
    failed: int


class SlotLoop:
    """The slots of one service, until cancelled."""

    def __init__(
        self,
        service: str,
        board: Board,
        observer: Observer,
        make_policy: MakePolicy,
        config: SchedulerConfig,
        metrics: SchedulerMetrics,
        leading: Callable[[], bool],
    ) -> None:
        self.service = service
        self._board = board
        self._observer = observer
        self._make_policy = make_policy
        self._config = config
        self._metrics = metrics
        self._leading = leading
        self._rng = np.random.default_rng(config.seed)
        self._policy: SlotPolicy | None = None
        self._policy_for: tuple[ServiceSpec, tuple[str, ...], tuple[str, ...]] | None = None
        self._unloadable = ""
        self._tried_s = 0.0
        self._said: PolicyStatus | None = None
        self._said_s = 0.0
        self._slot = 0
        self._boundary_s = 0.0
        self._published = 0
        self._failed = 0

    async def run(self) -> None:
        """Boundary, observe, act, publish, record; for ever."""
        self._boundary_s = asyncio.get_running_loop().time()
        while True:
            boundary_s = await self._next_decision()
            spec = self._spec()
            if spec is None or not self._leading():
                continue
            try:
                status = await self._decide(spec, boundary_s)
            except (UnusableAction, ValueError) as error:
                status = PolicyStatus(policy=spec.router, in_force=False, reason=str(error))
                self._fail(status.reason)
            except BOARD_ERRORS as error:
                self._fail(str(error))
                continue
            except Exception as error:  # a policy may be anybody's code: its bug costs its slot, not other services
                status = PolicyStatus(
                    policy=spec.router, in_force=False, reason=f"its code failed: {error!r} (see the scheduler's log)"
                )
                self._fail(status.reason, traceback=True)
            if status is not None:
                await self._say(status)

    def _fail(self, reason: str, *, traceback: bool = False) -> None:
        """Counts a lost slot; one that is lost like the last is not logged again."""
        self._failed += 1
        self._metrics.slots.labels(self.service, "failed").inc()
        if self._said is None or self._said.reason != reason:
            log.warning("slot %d of %s: %s", self._slot, self.service, reason, exc_info=traceback)

    async def _say(self, status: PolicyStatus) -> None:
        """Tells the gateways whether the policy sets tables, on every change and now and then."""
        now_s = asyncio.get_running_loop().time()
        if status == self._said and now_s - self._said_s < SAY_AGAIN_S:
            return
        with contextlib.suppress(*BOARD_ERRORS):
            await self._board.put_policy_status(self.service, status)
            self._said, self._said_s = status, now_s

    async def _next_decision(self) -> float:
        """Waits for the slot's end, or for an event within the slot that should not wait for it."""
        loop = asyncio.get_running_loop()
        self._slot += 1
        slot_s = self._policy.slot_s if self._policy is not None else min(self._config.slot_s, IDLE_S)
        next_s = slot_start_s(max(self._boundary_s, loop.time()), slot_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(next_s):
                phases = self._policy is not None and self._policy.needs_phase
                await self._observer.event(self.service, phases=phases)
                return loop.time()
        self._boundary_s = next_s
        return next_s

    def _spec(self) -> ServiceSpec | None:
        deployment = self._observer.deployment
        return deployment.services.get(self.service) if deployment is not None else None

    async def _decide(self, spec: ServiceSpec, boundary_s: float) -> PolicyStatus | None:
        """One slot; the policy's status, or None for a router that needs no tables."""
        seen = await self._observer.observe(self.service, spec)
        policy = self._policy_of(spec, seen)
        if policy is None or not seen.instances:
            return None
        action = policy.act(seen.observation, self._rng)
        valid_for_s = policy.slot_s * self._config.tables_live_slots
        table = await self._board.put_table(table_from(self.service, policy.name, seen, action, valid_for_s))
        taken_s = asyncio.get_running_loop().time() - boundary_s
        self._published += 1
        self._metrics.slots.labels(self.service, "published").inc()
        self._metrics.decide_seconds.labels(self.service).observe(taken_s)
        await self._board.add_decision(
            DecisionRecord(
                service=self.service,
                slot=self._slot,
                policy=policy.name,
                table_version=table.version,
                instances=table.instances,
                weights=table.weights,
                lengths=tuple(int(length) for length in seen.observation.length),
                elapsed_s=tuple(float(elapsed_s) for elapsed_s in seen.observation.elapsed_s),
                publish_ms=taken_s * 1e3,
            )
        )
        remark = policy.remark(seen.observation.ready) if isinstance(policy, Remarking) else ""
        return PolicyStatus(policy=spec.router, in_force=True, reason=remark)

    def _policy_of(self, spec: ServiceSpec, seen: Seen) -> SlotPolicy | None:
        """The policy for the service's settings and present set of instances; made anew when either changes.

        Raises `ValueError` as long as it cannot be loaded.
        """
        wanted = (spec, seen.instances, tuple(kind.variant for kind in seen.kinds))
        now_s = asyncio.get_running_loop().time()
        if self._policy_for != wanted or (self._unloadable and now_s - self._tried_s > LOAD_AGAIN_S):
            self._policy, self._policy_for, self._unloadable, self._tried_s = None, wanted, "", now_s
            try:
                if seen.kinds:
                    self._policy = self._make_policy(spec.router, seen.kinds, spec, self._config.slot_s)
            except ValueError as error:
                self._unloadable = str(error)
        if self._unloadable:
            raise ValueError(self._unloadable)
        return self._policy

    def statistics(self) -> SlotStatistics:
        """Slots so far."""
        return SlotStatistics(self._published, self._failed)


class Scheduler:
    """All slot loops of the deployment, and the lease that lets one scheduler at a time publish."""

    def __init__(self, config: SchedulerConfig, board: Board, make_policy: MakePolicy) -> None:
        self.config = config
        self.metrics = SchedulerMetrics()
        self.leads = False
        self._board = board
        self._make_policy = make_policy
        self._owner = f"{socket.gethostname()}:{os.getpid()}"

    async def run(self) -> None:
        """Until cancelled: hold the lease, and keep one slot loop per service of the deployment."""
        self.metrics.serve(self.config.metrics_port)
        async with Observer(self._board, self.config.status_timeout_s) as observer, asyncio.TaskGroup() as tasks:
            tasks.create_task(self._hold_lease())
            placing = PlacementLoop(self.config, self._board, observer, self.metrics, lambda: self.leads)
            tasks.create_task(placing.run(), name="placements")
            loops: dict[str, list[asyncio.Task[None]]] = {}
            while True:
                await observer.changed.wait()
                observer.changed.clear()
                services = set(observer.deployment.services) if observer.deployment is not None else set()
                for name in services - loops.keys():
                    loop = SlotLoop(
                        name,
                        self._board,
                        observer,
                        self._make_policy,
                        self.config,
                        self.metrics,
                        leading=lambda: self.leads,
                    )
                    shadow = ShadowLoop(
                        name, self._board, observer, self._make_policy, self.config, self.metrics, lambda: self.leads
                    )
                    loops[name] = [
                        tasks.create_task(loop.run(), name=f"slots of {name}"),
                        tasks.create_task(shadow.run(), name=f"shadow of {name}"),
                    ]
                for name in loops.keys() - services:
                    for task in loops.pop(name):
                        task.cancel()

    async def _hold_lease(self) -> None:
        while True:
            leads = False
            with contextlib.suppress(*BOARD_ERRORS):
                leads = await self._board.hold_lease(self._owner)
            if leads != self.leads:
                log.info("%s", "this scheduler leads" if leads else "another scheduler leads, or the board is away")
            self.leads = leads
            self.metrics.leading.set(1.0 if leads else 0.0)
            await asyncio.sleep(LEASE_EXPIRES_S / 3)
