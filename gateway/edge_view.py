"""What the gateway knows of the edge network: the deployment's graph and tables, the nodes, and who decides.

Fed by the board and by the nodes themselves (asked twice a second, and with every reply). As everywhere, the gateway
waits for neither: without a scheduler it decides by itself, from what it has heard.
"""

import asyncio
import contextlib
import logging
import time
from types import TracebackType
from typing import Final, Self

from gateway.edge_request import Net
from policies.placement.contract import FloatArray
from policies.placement.deployed import network_of, policy_fault
from policies.placement.graph import haversine_km
from protocol.board import BOARD_ERRORS, Board
from protocol.edge_records import ControllerRecord, EdgeServiceSpec, EdgeSpec, NodeStatus
from protocol.node_links import NodeLinks, SilenceWatch
from protocol.peer import Peer
from protocol.tasks import end_tasks

log = logging.getLogger("gateway.edge_view")

ASK_EVERY_S: Final = 0.5
ASK_PATIENCE_S: Final = 0.25
OLDEST_STATUS_S: Final = 2.0
"""A node that has said nothing for so long is not chosen, though its link be up: it hangs."""
READ_AGAIN_S: Final = 1.0


class EdgeView:
    """Nodes, network and controller. `async with` follows the board.

    All mutable state: the present network or why there is none, the links, and the controller's record and link.
    """

    def __init__(self, board: Board) -> None:
        self.links = NodeLinks(board, self._nodes_changed)
        self.services: dict[str, EdgeServiceSpec] = {}  # always this one object: every request looks into it
        self.net: Net | None = None
        self.fault = ""
        self.controller: ControllerRecord | None = None
        self._board = board
        self._wanted: EdgeSpec | None = None
        self._changed = asyncio.Event()
        self._came = asyncio.Event()
        self._peer: Peer | None = None
        self._link: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def configure(self, edge: EdgeSpec | None) -> None:
        """A deployment has come. Its tables and its graph are read beside the requests; until then the last serve."""
        if edge != self._wanted:
            self._wanted = edge
            self._changed.set()
        self.services.clear()
        if edge is not None:
            self.services.update(edge.services)

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._serve_deployments(), name="edge.deployments"),
            asyncio.create_task(self._ask_nodes(), name="edge.ask_nodes"),
            asyncio.create_task(self._find_controller(), name="edge.find_controller"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await end_tasks([*self._tasks, *([self._link] if self._link is not None else [])])

    async def settle(self, patience_s: float) -> None:
        """As `Fleet.settle`: returns once network and nodes that the board knows have been seen, or after that time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while self._wanted is not None and not self.fault and not self._seen():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

    def _seen(self) -> bool:
        links = self.links
        return self.net is not None and links.looked and links.records.keys() <= links.heard_of.keys()

    # what others ask

    def live(self, net: Net) -> list[int]:
        """Nodes that take requests now, by index."""
        links = self.links
        return [
            index
            for name, index in net.node_of.items()
            if links.peer(name) is not None and not links.records[name].draining
        ]

    def entry(self, net: Net, local: int) -> int | None:
        """The node that takes in a request of `local`: itself, else the nearest one that lives, if any.

        One that hangs is passed over as long as any other has said something lately.
        """
        live = self.live(net)
        live = [index for index in self.statuses(net, time.monotonic()) if index in live] or live
        if local in live or not live:
            return local if live else None
        positions: FloatArray = net.network.graph.positions
        distances = haversine_km(positions[live], positions[local])
        return live[int(distances.argmin())]

    def statuses(self, net: Net, now_s: float) -> dict[int, NodeStatus]:
        """What nodes said last, by index; without those that have been silent for too long."""
        known = self.links.known(now_s, OLDEST_STATUS_S)
        return {net.node_of[name]: status for name, status in known.items() if name in net.node_of}

    def scheduler(self) -> Peer | None:
        """The link to the scheduler that decides, if one does and can be asked."""
        return self._peer if self._peer is not None and self._peer.up else None

    def missing(self) -> list[str]:
        """Why edge services cannot be answered now; empty if they can."""
        if not self.services:
            return []
        names = ", ".join(sorted(self.services))
        if self.net is None:
            return [f"{names}: {self.fault or 'the edge network is being read'}"]
        if not self.statuses(self.net, time.monotonic()):
            return [f"{names}: no edge node is ready"]
        return []

    def notices(self) -> list[str]:
        """What is not as the deployment wants it, for people."""
        if self.net is None:
            return []
        now_s = time.monotonic()
        said = [f"edge network: {self.fault}"] if self.fault else []
        for name in self.net.node_of:
            if why := self.not_ready(name, now_s):
                said.append(f"edge node {name} is not ready: {why}")
            elif why := self.links.records[name].reason:
                said.append(f"edge node {name}: {why}")
        by, reason = self.placing()
        if reason:
            said.append(f"edge requests are placed by {by}, not {self.net.edge.policy}: {reason}")
        return said

    def placing(self) -> tuple[str, str]:
        """The policy that places requests now, and why it is not the deployment's (empty if it is)."""
        controller = self.controller
        if self.scheduler() is None or controller is None:
            return "sequential", "no scheduler answers"
        return controller.policy, controller.reason

    def not_ready(self, node: str, now_s: float) -> str:
        """Why a node cannot be chosen now; empty if it can."""
        record, heard = self.links.records.get(node), self.links.heard_of.get(node)
        if record is None:
            return "no worker has registered it"
        if record.draining:
            return "it is draining"
        if self.links.peer(node) is None:
            return record.reason or "its worker does not take connections"
        if heard is None or now_s - heard.at_s > OLDEST_STATUS_S:
            return record.reason or "it does not answer"
        return record.reason if record.memory_mb <= 0 else ""

    # the loops

    async def _serve_deployments(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            linked = False
            while True:
                await self._changed.wait()
                self._changed.clear()
                edge = self._wanted
                if edge is None:
                    self.net, self.fault = None, ""
                    continue
                if not linked:  # only where there is an edge network at all
                    await stack.enter_async_context(self.links)
                    linked = True
                try:
                    network = await asyncio.to_thread(network_of, edge)
                except (ValueError, OSError) as error:
                    self.fault = str(error)
                    log.error("the deployment's edge network cannot be served: %s", error)
                else:
                    self.net, self.fault = Net(edge, network), ""

    def _nodes_changed(self) -> None:
        self._came.set()

    async def _ask_nodes(self) -> None:
        watch = SilenceWatch()
        while True:
            if self.services:
                await self.links.ask(ASK_PATIENCE_S)
                watch.cut_silent(self.links, time.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ASK_EVERY_S):
                    await self._came.wait()
            self._came.clear()

    async def _find_controller(self) -> None:
        while True:
            if self.services:
                with contextlib.suppress(*BOARD_ERRORS):
                    await self._follow(await self._board.controller())
            await asyncio.sleep(READ_AGAIN_S)

    async def _follow(self, record: ControllerRecord | None) -> None:
        """Keeps one link, to where placements are decided. A board that forgets ends no link that is up."""
        if record is None:
            if self.scheduler() is None:
                self.controller = None
            return
        before, self.controller = self.controller, record
        if self._peer is not None and before is not None and before.address == record.address:
            if not self._peer.up:
                self._peer.hurry()
            return
        if self._link is not None:
            await end_tasks([self._link])
        self._peer = Peer(record.address, lambda peer: None)
        self._link = asyncio.create_task(self._peer.run(), name="link to the scheduler")


async def network_fault(edge: EdgeSpec | None) -> str:
    """Why a deployment's edge network cannot be served (its graph and tables are read); empty if it can."""
    if edge is None:
        return ""
    if fault := policy_fault(edge):
        return fault
    try:
        await asyncio.to_thread(network_of, edge)
    except (ValueError, OSError) as error:
        return str(error)
    return ""
