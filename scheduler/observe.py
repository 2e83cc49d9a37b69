"""What the scheduler sees at a slot boundary: every worker's status, over its own links, as one Observation.

The board says who exists (read every second and on news); the links say how they are, at this moment: 100 ms of age
would be 18 requests of a burst.
"""

import asyncio
import contextlib
import logging
from types import TracebackType
from typing import Final, Self

import msgspec

from policies.routing.contract import InstanceKind, Observation, observation_of
from protocol.board import BOARD_ERRORS, Board
from protocol.frames import Kind
from protocol.link import LinkClosed
from protocol.peer import Peer
from protocol.records import (
    Deployment,
    InstanceRecord,
    InstanceState,
    RouterChoice,
    ServiceSpec,
    Status,
    WorkerStatus,
)
from protocol.tasks import end_tasks

log = logging.getLogger("scheduler.observe")

READ_AGAIN_S: Final = 1.0
_UNKNOWN_SERVICE_S: Final = 0.01


class Seen(msgspec.Struct, frozen=True):
    """One service at one moment: its instances in sorted order, their kinds and their observation.

    `counts`: by instance that answered, its counters by `Attempt` code since the worker's start.
    """

    instances: tuple[str, ...]
    kinds: tuple[InstanceKind, ...]
    observation: Observation
    counts: dict[str, tuple[int, ...]] = {}


class Observer:
    """Follows the board and keeps one link per worker. `async with` starts it."""

    def __init__(self, board: Board, timeout_s: float) -> None:
        self.board = board
        self.deployment: Deployment | None = None
        self.shadow_choices: dict[str, RouterChoice] = {}
        self.changed = asyncio.Event()
        self._timeout_s = timeout_s
        self._records: dict[str, InstanceRecord] = {}
        self._known: dict[str, InstanceRecord] = {}
        self._phases: dict[str, int] = {}
        self._events: dict[str, asyncio.Event] = {}
        self._happened: dict[str, set[str]] = {}
        self._peers: dict[str, Peer] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._loops: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._loops = [
            asyncio.create_task(self.board.follow(self._read, self._on_news), name="observer.follow"),
            asyncio.create_task(self._read_again(), name="observer.read_again"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await end_tasks([*self._loops, *self._tasks.values()])

    async def observe(self, service: str, spec: ServiceSpec) -> Seen:
        """Asks every worker of the service for its status, all at once, and waits at most the timeout.

        Instances that are desired but absent are there too, as not ready: a policy that was trained for the whole
        set keeps its layout while one of them is dead (masking, Tan section 6.3).
        """
        desired = self.deployment.instance_ids(service) if self.deployment is not None else {}
        order = {variant: rank for rank, variant in enumerate(spec.variants)}
        live = {one.id: one for one in self._records.values() if one.service == service and one.variant in order}
        self._known.update(live)
        ids = sorted(desired.keys() | live.keys())
        addresses = {record.address for record in live.values()}
        answers = await asyncio.gather(*(self._ask(address) for address in addresses))
        statuses = {status.instance: status for answer in answers if answer for status in answer.instances}
        draining = {answer.worker for answer in answers if answer and answer.draining}
        each = [statuses.get(one, Status(one)) for one in ids]
        return Seen(
            instances=tuple(ids),
            kinds=tuple(self._kind(one, desired.get(one, ""), order) for one in ids),
            observation=observation_of(
                length=[status.length for status in each],
                elapsed_s=[status.elapsed_s for status in each],
                ages_s=[status.ages_s for status in each],
                in_service=[status.batch for status in each],
                ready=[
                    one in live
                    and live[one].state is InstanceState.READY
                    and one in statuses
                    and live[one].worker not in draining
                    for one in ids
                ],
                phase=self._phases.get(service, -1),
            ),
            counts={one: statuses[one].counts for one in ids if one in statuses},
        )

    def _kind(self, one: str, desired_variant: str, order: dict[str, int]) -> InstanceKind:
        record = self._known.get(one)
        variant = record.variant if record is not None else desired_variant
        return InstanceKind(
            variant=variant,
            rank=order[variant],
            service_s=(record.service_s if record is not None else 0.0) or _UNKNOWN_SERVICE_S,
            accuracy=(record.accuracy if record is not None else None) or 0.0,
            capacity=record.capacity if record is not None else 15,
            batch=record.batch if record is not None else (1, 1),
            batch_s=record.batch_s if record is not None else None,
        )

    async def event(self, service: str, *, phases: bool) -> None:
        """Returns when an instance of the service has come or gone since the last call, or (`phases`) its workload's
        reported phase has changed: what a decision should not wait for the slot's end for (Tan 6.2)."""
        event = self._events.setdefault(service, asyncio.Event())
        while True:
            await event.wait()
            event.clear()
            happened = self._happened.pop(service, set())
            if phases or "instances" in happened:
                return

    def _tell(self, service: str, what: str) -> None:
        if service in self._events:
            self._happened.setdefault(service, set()).add(what)
            self._events[service].set()

    def _on_link(self, peer: Peer) -> None:
        """A worker died, or came back: whatever it serves has other instances now."""
        for service in {record.service for record in self._records.values() if record.address == peer.address}:
            self._tell(service, "instances")

    async def _ask(self, address: str) -> WorkerStatus | None:
        peer = self._peers.get(address)
        if peer is None or not peer.up:
            return None
        try:
            request_id, future = peer.request(Kind.STATUS_REQUEST)
            try:
                async with asyncio.timeout(self._timeout_s):
                    frame = await future
            except TimeoutError:
                peer.cancel(request_id)
                return None
            return msgspec.msgpack.decode(frame.meta, type=WorkerStatus)
        except (LinkClosed, msgspec.MsgspecError):
            return None

    # the board

    async def _read(self) -> None:
        deployment = await self.board.deployment()
        if deployment is not None and (self.deployment is None or deployment.version > self.deployment.version):
            self.deployment = deployment
            self.changed.set()
        known, self._records = self._records, {record.id: record for record in await self.board.instances()}
        for service in {service for service, _ in _ready(known) ^ _ready(self._records)}:
            self._tell(service, "instances")
        if self.deployment is not None:
            services = list(self.deployment.services)
            before, self._phases = self._phases, await self.board.phases(services)
            for service, phase in self._phases.items():
                if before.get(service) != phase:
                    self._tell(service, "phase")
            self.shadow_choices = await self.board.shadow_choices(services)
        wanted = {record.address for record in self._records.values()}
        for address in wanted - self._peers.keys():
            peer = self._peers[address] = Peer(address, self._on_link)
            self._tasks[address] = asyncio.create_task(peer.run(), name=f"link to {address}")
        for address in self._peers.keys() - wanted:
            if not self._peers[address].up:
                del self._peers[address]
                self._tasks.pop(address).cancel()

    async def _on_news(self, channel: str, data: bytes) -> None:
        if channel == "news":
            await self._read()

    async def _read_again(self) -> None:
        while True:
            await asyncio.sleep(READ_AGAIN_S)
            with contextlib.suppress(*BOARD_ERRORS):
                await self._read()


def _ready(records: dict[str, InstanceRecord]) -> set[tuple[str, str]]:
    """(service, instance id) of those that may be routed to."""
    return {(record.service, one) for one, record in records.items() if record.state is InstanceState.READY}
