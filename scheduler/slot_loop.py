"""One slot: observe, act, publish, record; for every service whose router sets tables. Start reading here.

The loop of a service runs on its policy's own slot length, on boundaries that do not drift; a fully observable policy
also decides when the phase changes. Only the holder of the lease publishes. A slot that goes wrong (no status, no
table, no board) costs that slot: gateways keep the last table until it expires, then route by `deadline`.
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

from policies.routing.contract import InstanceKind, SlotPolicy
from protocol.board import BOARD_ERRORS, LEASE_EXPIRES_S, Board
from protocol.records import DecisionRecord, ServiceSpec
from scheduler.config import SchedulerConfig
from scheduler.metrics import SchedulerMetrics
from scheduler.observe import Observer, Seen
from scheduler.publish import UnusableAction, table_from

log = logging.getLogger("scheduler.slot_loop")

MakePolicy = Callable[[str, Sequence[InstanceKind], ServiceSpec, float], SlotPolicy | None]
"""(router, kinds, service settings, slot_s) -> the policy for this set of instances, or None if it sets no tables."""
IDLE_S: Final = 0.2


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
                await self._decide(spec, boundary_s)
            except (UnusableAction, ValueError, *BOARD_ERRORS) as error:
                self._fail()
                log.warning("slot %d of %s: %s", self._slot, self.service, error)
            except Exception:  # a policy may be anybody's code: its bug costs its slot, not the other services' tables
                self._fail()
                log.exception("slot %d of %s", self._slot, self.service)

    def _fail(self) -> None:
        self._failed += 1
        self._metrics.slots.labels(self.service, "failed").inc()

    async def _next_decision(self) -> float:
        """Waits for the slot's end; a policy that sees the phase also decides when that changes, within the slot."""
        loop = asyncio.get_running_loop()
        self._slot += 1
        slot_s = self._policy.slot_s if self._policy is not None else min(self._config.slot_s, IDLE_S)
        next_s = max(self._boundary_s + slot_s, loop.time())
        if self._policy is not None and self._policy.needs_phase:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(next_s):
                    await self._observer.phase_change(self.service)
                    return loop.time()
        else:
            await asyncio.sleep(next_s - loop.time())
        self._boundary_s = next_s
        return next_s

    def _spec(self) -> ServiceSpec | None:
        deployment = self._observer.deployment
        return deployment.services.get(self.service) if deployment is not None else None

    async def _decide(self, spec: ServiceSpec, boundary_s: float) -> None:
        seen = await self._observer.observe(self.service, spec)
        policy = self._policy_of(spec, seen)
        if policy is None or not seen.instances:
            return
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

    def _policy_of(self, spec: ServiceSpec, seen: Seen) -> SlotPolicy | None:
        """The policy for the service's settings and present set of instances; made anew when either changes."""
        wanted = (spec, seen.instances, tuple(kind.variant for kind in seen.kinds))
        if self._policy_for != wanted:
            self._policy, self._policy_for = None, wanted
            if seen.kinds:
                self._policy = self._make_policy(spec.router, seen.kinds, spec, self._config.slot_s)
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
            loops: dict[str, asyncio.Task[None]] = {}
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
                    loops[name] = tasks.create_task(loop.run(), name=f"slots of {name}")
                for name in loops.keys() - services:
                    loops.pop(name).cancel()

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
