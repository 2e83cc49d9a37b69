"""An edge node: a request's way through it, and what it says of itself. The worker's `server.py` brings the frames.

    EDGE_INFER ─► decode, adapt (pool) ─► emulated uplink ─┬─► decided here: `edge_queue.py` ─────────────► REPLY
    EDGE_RUN ──────────────────────────────────────────────┤
                                                           └─► decided elsewhere: emulated link, EDGE_RUN ─► its REPLY

Every request ends once: it is counted where it was executed or refused, and handed back by the nodes on its way.
State: the view (what the deployment makes of this node), its queue and links, the books (`edge_books.py`).
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable

import msgspec

from models.clip_limits import Limits
from protocol.edge_records import EdgeInfer, EdgeReply, EdgeRun, NodeRecord, NodeStatus
from protocol.outcomes import Attempt
from protocol.peer import Peer
from workers.device import Clock, Device
from workers.edge_books import Books
from workers.edge_journey import Body, Ended, Journey, Refused
from workers.edge_links import EdgeLinks
from workers.edge_prepare import prepare_request
from workers.edge_queue import EdgeQueue
from workers.edge_variants import EdgeVariants, OpenVariant, VariantStatistics
from workers.edge_view import NodeView, Task, Unknown
from workers.instance import Site
from workers.preparing import Preparer

log = logging.getLogger(__name__)


class NodeStatistics(msgspec.Struct, frozen=True):
    """A node at one moment. entered = passing + handed_on + status.arrived; status.arrived = counts + length."""

    status: NodeStatus
    variants: VariantStatistics
    entered: int
    passing: int
    handed_on: int
    uplink_s: float
    links_s: dict[str, float]


class _Here:
    """What belongs to one view: requests finish in the one that they came in."""

    def __init__(
        self,
        clock: Clock,
        device: Device,
        variants: EdgeVariants,
        view: NodeView,
        beside_s: Callable[[float], float],
    ) -> None:
        self.view = view
        self.queue = EdgeQueue(clock, device, variants, view, beside_s)
        self.links = EdgeLinks(clock, view)


class EdgeNode:
    """One node. `peer_of(name)`: the link to a neighbour, if it is up; set while the board is followed."""

    def __init__(
        self,
        clock: Clock,
        device: Device,
        preparer: Preparer,
        open_variant: OpenVariant,
        epoch: str = "",
        limits: Limits = Limits(),  # noqa: B008 - frozen
    ) -> None:
        self.clock = clock
        self.draining = False  # it has said that it will end
        self.refusing = False  # nothing new is taken
        self.cut_off = False  # what is still here ends now
        self.named = asyncio.Event()
        """Set while this worker is a node."""
        self.peer_of: Callable[[str], Peer | None] = lambda name: None
        self.on_change: Callable[[], None] = lambda: None
        self.beside_s: Callable[[float], float] = lambda now_s: 0.0  # what else the device has to do: instances
        self.books = Books()
        self.variants = EdgeVariants(clock, device, open_variant, self._changed)
        self._device = device
        self._preparer = preparer
        self._limits = limits
        self._epoch = epoch
        self._here: _Here | None = None
        self._name = ""
        self._fault = "the deployment makes this worker no edge node"

    # the deployment

    def follow(self, name: str, view: NodeView | None, fault: str = "", *, same_network: bool = False) -> None:
        """From now on this is node `name` ("": none) as `view` says; `fault`: why there is no view.

        With `same_network` nothing has changed but what is to be loaded, and on what: queue and links go on.
        """
        self._name = name
        self._fault = fault or "the deployment makes this worker no edge node"
        if name:
            self.named.set()
        else:
            self.named.clear()
        if view is None:
            self._here = None
            self.variants.follow(0.0, frozenset(), {}, "cpu", 1)
        else:
            if self._here is None or not same_network:
                self._here = _Here(self.clock, self._device, self.variants, view, lambda now_s: self.beside_s(now_s))
            self.variants.follow(view.memory_mb, view.variants, view.preload, view.device, view.threads)
        self._changed()

    def is_neighbour(self, name: str) -> bool:
        """Whether a link joins this node to that one."""
        return self._here is not None and any(one.name == name for one in self._here.view.neighbours.values())

    # requests

    async def infer(self, asked: EdgeInfer, body: Body) -> Ended:
        """A client's request entered here. Never raises but when cancelled."""
        journey = Journey(self.clock.now_s(), asked.budget_s)
        return await self._counted(journey, lambda: self._enter(journey, asked, body))

    async def run(self, run: EdgeRun, body: Body) -> Ended:
        """A neighbour passed a request on. Never raises but when cancelled."""
        # The size is that of the bytes that came: what a frame says of itself could spoil clocks and ledgers for good.
        journey = Journey(self.clock.now_s(), run.budget_s, run.spent, len(body) / 1e6)
        return await self._counted(journey, lambda: self._pass(journey, run, body))

    async def _enter(self, journey: Journey, asked: EdgeInfer, body: Body) -> Ended:
        here, task = self._task(asked)
        try:
            with self.books.holding(len(body)):
                async with asyncio.timeout(journey.left_s(self.clock.now_s())):
                    ready = await prepare_request(
                        self._preparer, body, asked.content_type, task.configuration, self._limits
                    )
        except TimeoutError as error:
            raise Refused(Attempt.EXPIRED, "its time was over before it was decoded") from error
        adapted = ready.adapted
        journey.spend(decode_s=ready.decode_s, adapt_s=ready.adapt_s)
        journey.adapted_mb = len(adapted.payload) / 1e6
        run = EdgeRun(
            service=asked.service,
            configuration=asked.configuration,
            variant=asked.variant,
            node=asked.node,
            budget_s=0.0,
            width=adapted.width,
            height=adapted.height,
            scale=adapted.scale,
            fps=ready.fps,
            frame_numbers=adapted.frame_numbers,
            adapted_mb=journey.adapted_mb,
        )
        small = Body(adapted.payload)
        del ready, adapted
        with self.books.holding(len(small)):
            await here.links.access(journey)
            return await self._onward(here, task, journey, run, small)

    async def _pass(self, journey: Journey, run: EdgeRun, body: Body) -> Ended:
        here, task = self._task(run)
        if not (math.isfinite(run.scale) and run.scale > 0.0 and run.width > 0 and run.height > 0):
            raise Refused(Attempt.INVALID, f"scale {run.scale} of {run.width} x {run.height} pixels makes no sense")
        with self.books.holding(len(body)):
            return await self._onward(here, task, journey, run, body)

    async def _onward(self, here: _Here, task: Task, journey: Journey, run: EdgeRun, body: Body) -> Ended:
        if run.node != here.view.index:
            return await here.links.forward(journey, run, body, self.peer_of)
        with self.books.placed():
            attempt, answer = await here.queue.serve(journey, task, run, body)
        return self._ended(journey, attempt, answer=answer)

    def _task(self, asked: EdgeInfer | EdgeRun) -> tuple[_Here, Task]:
        if self._here is None:
            raise Refused(Attempt.UNAVAILABLE, self._fault)
        if self.refusing:
            raise Refused(Attempt.UNAVAILABLE, f"node {self._name} is draining")
        try:
            return self._here, self._here.view.task(asked.service, asked.configuration, asked.variant, asked.node)
        except Unknown as error:
            raise Refused(Attempt.UNAVAILABLE, f"{error}; its deployment is another one") from error

    # endings

    async def _counted(self, journey: Journey, way: Callable[[], Awaitable[Ended]]) -> Ended:
        """The end of a request's way, entered in the books exactly once."""
        self.books.enter()
        attempt = Attempt.FAILED
        try:
            ended = await way()
            attempt = Attempt(ended.reply.attempt)
        except Refused as refused:
            attempt = refused.attempt
            ended = self._ended(journey, attempt, refused.reason, refused.http_status)
        except asyncio.CancelledError:
            attempt = Attempt.UNAVAILABLE if self.cut_off else Attempt.CANCELLED
            raise
        except Exception as error:  # a fault of ours: say so, and stay up
            log.exception("a request ended unexpectedly", extra={"node": self._name})
            attempt = Attempt.FAILED
            ended = self._ended(journey, attempt, f"node {self._name} failed: {error!r}"[:500])
        finally:
            self.books.end(attempt, elsewhere=journey.passed_on)
        return ended

    def _ended(
        self, journey: Journey, attempt: Attempt, reason: str = "", http_status: int = 0, answer: bytes = b""
    ) -> Ended:
        reply = EdgeReply(
            attempt,
            self.status(),
            reason,
            http_status,
            journey.adapted_mb,
            journey.waiting_tflop,
            journey.new_instance,
            journey.spent,
        )
        return Ended(reply, answer)

    def taken_back(self) -> Ended:
        """What a request is answered with that was cancelled: by its client, or because the node ends."""
        if self.cut_off:
            return Ended(EdgeReply(Attempt.UNAVAILABLE, self.status(), f"node {self._name} has ended"))
        return Ended(EdgeReply(Attempt.CANCELLED, self.status(), "the client has gone"))

    # reading

    @property
    def name(self) -> str:
        """Which node this is; empty if it is none."""
        return self._name

    def backlog_s(self, now_s: float) -> float:
        """Predicted time until the device has computed what is here."""
        return self._here.queue.line.backlog_s(now_s) if self._here is not None else 0.0

    def status(self) -> NodeStatus:
        """This node at this moment."""
        variants = self.variants.statistics()
        return NodeStatus(
            node=self._name,
            epoch=self._epoch,
            length=self.books.length,
            waiting_tflop=self._here.queue.line.waiting_tflop(self.clock.now_s()) if self._here is not None else 0.0,
            memory_used_mb=variants.memory_used_mb,
            deployed=variants.deployed,
            loading=variants.loading,
            loads=variants.loads,
            evictions=variants.evictions,
            draining=self.draining,
            arrived=self.books.arrived,
            counts=tuple(self.books.counts),
            idle=variants.idle,
        )

    def record(self, site: Site) -> NodeRecord | None:
        """What goes onto the board; None if this worker is no node."""
        if not self._name:
            return None
        variants = self.variants.statistics()
        return NodeRecord(
            node=self._name,
            worker=site.worker,
            address=site.address,
            epoch=site.epoch,
            deployed=variants.deployed,
            memory_mb=variants.memory_mb,
            memory_used_mb=variants.memory_used_mb,
            draining=self.draining,
            reason=self._fault if self._here is None else self.variants.reason,
        )

    def statistics(self) -> NodeStatistics:
        """This node at this moment, for metrics."""
        links = self._here.links if self._here is not None else None
        neighbours = self._here.view.neighbours if self._here is not None else {}
        return NodeStatistics(
            status=self.status(),
            variants=self.variants.statistics(),
            entered=self.books.entered,
            passing=self.books.passing,
            handed_on=self.books.handed_on,
            uplink_s=links.uplink.busy_s if links is not None else 0.0,
            links_s={neighbours[k].name: link.busy_s for k, link in links.to.items()} if links is not None else {},
        )

    def _changed(self) -> None:
        self.on_change()
