"""What the gateway knows of the system: the deployment, the live instances, and one lasting link per worker.

Fed by the board (subscribe first, then read; read again every second), and by the links themselves, which notice a
dead worker at once while its registration lives on for 3 s. The gateway never waits for the board: when Redis is
away, or comes back empty, it goes on with what it last knew.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import msgspec

from gateway.router import ServiceRouter
from protocol.board import BOARD_ERRORS, Board
from protocol.deployment import few_of
from protocol.edge_records import EdgeSpec
from protocol.frames import Kind
from protocol.link import LinkClosed
from protocol.peer import Peer
from protocol.records import (
    ONE_GATEWAY_ROUTERS,
    Deployment,
    InstanceRecord,
    InstanceState,
    Table,
    WorkerStatus,
)
from protocol.tasks import end_tasks

log = logging.getLogger("gateway.fleet")

READ_AGAIN_S: Final = 1.0
PHASES: Final = {b"bursty": 0, b"normal": 1}
"""The header X-Tidegate-Phase, in the order of Tan's Eq. 12."""
GREETING_S: Final = 1.0
FORGET_AFTER_S: Final = 5.0
"""An instance that is off the board but still answers is kept this long: the board may have lost its memory.

One that had said that it was draining has ended in order, and is forgotten at once."""


class Fleet:
    """The services, their routers, and the links to workers.

    `on_change` is called when more may be routable, `on_deployment` with the edge part of every new deployment, which
    is not the fleet's business.
    """

    def __init__(
        self,
        board: Board,
        on_change: Callable[[], None],
        on_deployment: Callable[[EdgeSpec | None], None] = lambda edge: None,
    ) -> None:
        self.board = board
        self.id = secrets.token_hex(4)
        self.deployment: Deployment | None = None
        self.services: dict[str, ServiceRouter] = {}
        self.peers: dict[str, Peer] = {}
        self.gateways = 1  # counted only while a service has a router that needs to be alone
        self.board_seen = False
        self._looked = False
        self._on_change = on_change
        self._on_deployment = on_deployment
        self._records: dict[str, InstanceRecord] = {}
        self._seen_s: dict[str, float] = {}
        self._epochs: dict[str, str] = {}  # by address: which start of a worker is at the other end of its link
        self._greetings: dict[str, asyncio.Task[None]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._loops: list[asyncio.Task[None]] = []
        self._phases: dict[str, int] = {}
        self._posting: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._loops = [
            asyncio.create_task(self.board.follow(self._read_all, self._on_news), name="fleet.follow"),
            asyncio.create_task(self._read_again(), name="fleet.read_again"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await end_tasks([*self._loops, *self._tasks.values(), *self._greetings.values(), *self._posting])
        with contextlib.suppress(*BOARD_ERRORS):
            await self.board.remove_gateway(self.id)

    async def settle(self, patience_s: float) -> None:
        """Returns once everything that the board knows has been seen and reached, at the latest after `patience_s`.

        A process that joins others on one port must not refuse what its neighbours could answer.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while not self._looked or self.peers.keys() - self._epochs.keys():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

    def missing(self) -> list[str]:
        """Services of the deployment that nobody could answer now; all is well when this is empty."""
        return sorted(name for name, router in self.services.items() if router.routable == 0)

    def notices(self) -> list[str]:
        """What is not as the deployment wants it: instances that are not ready, routers that are not in force."""
        now_s = time.monotonic()
        said: list[str] = []
        for name, router in sorted(self.services.items()):
            statistics = router.statistics(now_s)
            absent = self.deployment.instance_ids(name, loaded_only=True) if self.deployment is not None else {}
            for view in statistics.instances:
                absent.pop(view.id, None)
                if not view.ready:
                    said.append(f"{view.id} of {name} is not ready: {view.reason}")
            said += [f"{one} of {name} is not ready: no worker has registered it" for one in absent]
            if self.gateways > 1 and router.spec.router in ONE_GATEWAY_ROUTERS:
                said.append(
                    f"{name} has {self.gateways} queues: {router.spec.router} needs one gateway, end the others"
                )
            if statistics.reason:
                said.append(
                    f"{name} is routed by {statistics.routing_by}, not {router.spec.router}: {statistics.reason}"
                )
        return said

    def failures(self, service: str) -> str:
        """Why instances of the service failed to load, as an appendix to a sentence; empty if none did."""
        records = [target.record for target in self.services[service].targets]
        failed = few_of(f"{one.id} failed: {one.reason}" for one in records if one.reason)
        return f" ({'; '.join(failed)})" if failed else ""

    def report_phase(self, service: str, phase: bytes) -> None:
        """An experiment's load generator says which phase its workload is in; a change goes to the board."""
        number = PHASES.get(phase)
        if number is not None and self._phases.get(service) != number:
            self._phases[service] = number
            task = asyncio.create_task(self._post_phase(service, number), name=f"phase of {service}")
            self._posting.add(task)
            task.add_done_callback(self._posting.discard)

    async def _post_phase(self, service: str, number: int) -> None:
        with contextlib.suppress(*BOARD_ERRORS):
            await self.board.put_phase(service, number)

    # from the board

    async def _read_all(self) -> None:
        await self.board.post_gateway(self.id)
        await self._read_deployment()
        await self._read_instances()
        await self._read_policies()
        for router in self.services.values():
            if router.uses_tables and (table := await self.board.table(router.name)) is not None:
                router.set_table(table, time.monotonic())

    async def _read_again(self) -> None:
        while True:
            await asyncio.sleep(READ_AGAIN_S)
            with contextlib.suppress(*BOARD_ERRORS):
                await self.board.post_gateway(self.id)
                await self._read_deployment()
                await self._read_instances()
                await self._read_policies()

    async def _on_news(self, channel: str, data: bytes) -> None:
        if channel == "news":
            await (self._read_deployment() if data == b"deployment" else self._read_instances())
            return
        with contextlib.suppress(msgspec.MsgspecError):
            table = msgspec.json.decode(data, type=Table)
            router = self.services.get(table.service)
            if router is not None and not router.set_table(table, time.monotonic()):
                log.warning("table %d for %s is not usable: keeping the last good one", table.version, table.service)

    async def _read_deployment(self) -> None:
        deployment = await self.board.deployment()
        self.board_seen = True
        if deployment is None or (self.deployment is not None and deployment.version <= self.deployment.version):
            return
        self.deployment = deployment
        for name in [name for name in self.services if name not in deployment.services]:
            del self.services[name]
        for name, spec in deployment.services.items():
            try:
                if name in self.services:
                    self.services[name].configure(spec)
                else:
                    self.services[name] = ServiceRouter(name, spec)
            except ValueError as error:
                log.error("deployment %s version %d: %s", deployment.name, deployment.version, error)
        self._on_deployment(deployment.edge)
        self._spread()

    async def _read_instances(self) -> None:
        now_s = time.monotonic()
        for record in await self.board.instances():
            self._records[record.id] = record
            self._seen_s[record.id] = now_s
        for one, seen_s in list(self._seen_s.items()):
            record = self._records[one]
            peer = self.peers.get(record.address)
            alive = peer is not None and peer.up and record.state is not InstanceState.DRAINING
            if now_s - seen_s > (FORGET_AFTER_S if alive else 0.0):
                del self._records[one], self._seen_s[one]
            elif seen_s < now_s and record.address in self._epochs and self._greetings[record.address].done():
                self._greet(self.peers[record.address])  # is it the board that has forgotten, or the worker that hangs?
        await self._keep_links({record.address for record in self._records.values()})
        self._looked = True
        self._spread()

    async def _read_policies(self) -> None:
        """What the scheduler says of the policies that should set tables; and how many gateways would share a queue."""
        routers = {name: router for name, router in self.services.items() if router.uses_tables}
        statuses = await self.board.policy_statuses(list(routers)) if routers else {}
        for name, router in routers.items():
            router.policy = statuses.get(name)
        held = [router for router in self.services.values() if router.spec.router in ONE_GATEWAY_ROUTERS]
        self.gateways = len(await self.board.gateways()) if held else 1

    # links

    async def _keep_links(self, addresses: set[str]) -> None:
        for address in addresses - self.peers.keys():
            peer = self.peers[address] = Peer(address, self._on_link)
            self._tasks[address] = asyncio.create_task(peer.run(), name=f"link to {address}")
        for address in self.peers.keys() & addresses:
            if not self.peers[address].up:
                self.peers[address].hurry()
            elif address not in self._epochs and self._greetings[address].done():
                self._greet(self.peers[address])
        for address in self.peers.keys() - addresses:
            if self.peers[address].in_flight == 0:
                del self.peers[address]
                self._epochs.pop(address, None)
                self._tasks.pop(address).cancel()
                if (greeting := self._greetings.pop(address, None)) is not None:
                    greeting.cancel()

    def _on_link(self, peer: Peer) -> None:
        log.info("link to %s is %s", peer.address, "up" if peer.up else f"down: {peer.last_error}")
        self._epochs.pop(peer.address, None)
        if peer.up:
            self._greet(peer)
        else:
            self._spread()

    def _greet(self, peer: Peer) -> None:
        """Asks a worker which start of it this is; it gets requests once that is known, while it goes on to answer."""
        if (greeting := self._greetings.pop(peer.address, None)) is not None:
            greeting.cancel()
        self._greetings[peer.address] = asyncio.create_task(self._meet(peer), name=f"greet {peer.address}")

    async def _meet(self, peer: Peer) -> None:
        request_id = 0
        try:
            async with asyncio.timeout(GREETING_S):
                request_id, future = peer.request(Kind.STATUS_REQUEST)
                status = msgspec.msgpack.decode((await future).meta, type=WorkerStatus)
        except (LinkClosed, TimeoutError, msgspec.MsgspecError) as error:
            log.warning("the worker at %s does not say who it is: %s", peer.address, error or "no answer")
            peer.cancel(request_id)
            if peer.address in self._epochs:  # it did before: whoever waits for it may still be answered elsewhere
                peer.cut(f"the worker at {peer.address} hangs")
            return
        self._epochs[peer.address] = status.epoch
        self._spread()

    def _current(self, record: InstanceRecord) -> bool:
        """False for the registration of a worker that has died, while its successor already listens."""
        return self._epochs.get(record.address, record.epoch) == record.epoch

    def _spread(self) -> None:
        """Hands every service its instances."""
        for router in self.services.values():
            records = [one for one in self._records.values() if one.service == router.name and self._current(one)]
            router.set_instances(records, self._epochs.keys())
        self._on_change()
