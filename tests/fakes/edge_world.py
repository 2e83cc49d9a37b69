"""Edge nodes in one process and virtual time: real node code, links between them in memory, threads played inline."""

import asyncio
import functools
import math
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar, cast

import msgspec

from models.clip_limits import Frame, Limits
from models.detection import Detections
from models.edge_catalog import EdgeVariant
from models.tracking import Tracks
from protocol.edge_records import EdgeInfer, EdgeRun
from protocol.frames import Frame as WireFrame
from protocol.frames import Kind
from protocol.link import LinkClosed
from protocol.peer import Peer
from protocol.records import Deployment
from tests.fakes.edge_models import BrightRuntime, open_bright
from tests.fakes.virtual_time import VirtualTimeLoop
from workers.device import Clock, Device, Timer
from workers.edge_journey import Body, Ended
from workers.edge_node import EdgeNode
from workers.edge_view import view_of
from workers.preparing import Preparer

T = TypeVar("T")


class InlineLoop(VirtualTimeLoop):
    """Virtual time; what would run in a thread runs at once, or after `takes_s` of the function, if it says."""

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """The result, or what was raised."""
        future: asyncio.Future[T] = self.create_future()
        # `asyncio.to_thread` wraps what it is given: partial(context.run, function, ...).
        inner = func.args[0] if isinstance(func, functools.partial) and func.args else func
        takes_s = float(getattr(inner, "takes_s", 0.0))

        def finish() -> None:
            if future.done():
                return
            try:
                future.set_result(func(*args))
            except Exception as error:
                future.set_exception(error)

        if takes_s:
            self.call_later(takes_s, finish)
        else:
            finish()
        return future


def run_world(coroutine: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in virtual time."""
    with asyncio.Runner(loop_factory=InlineLoop) as runner:
        return runner.run(coroutine)


class WorldClock:
    """The loop's virtual time, and what a computation that is being played takes on top."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def now_s(self) -> float:
        """Virtual seconds."""
        return asyncio.get_running_loop().time() + self.ahead_s

    def call_at(self, when_s: float, callback: Callable[[], None]) -> Timer:
        """At that virtual time."""
        return asyncio.get_running_loop().call_at(when_s, callback)


class PlayedDevice(Device):
    """One computation at a time; each takes as long as its runtime put on the clock."""

    def __init__(self, clock: WorldClock) -> None:
        super().__init__(clock)
        self._world_clock = clock
        self._line: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._busy = False

    def submit(self, function: Callable[[], T]) -> "Future[T]":
        """As `Device.submit`."""
        future: Future[T] = Future()
        self._line.append((future, function))
        self._next()
        return future

    def _next(self) -> None:
        while not self._busy and self._line:
            future, function = self._line.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            self._busy = True
            try:
                finish: Callable[[], None] = functools.partial(future.set_result, function())
            except Exception as error:
                finish = functools.partial(future.set_exception, error)
            takes_s, self._world_clock.ahead_s = self._world_clock.ahead_s, 0.0
            asyncio.get_running_loop().call_later(takes_s, self._finish, finish)

    def _finish(self, finish: Callable[[], None]) -> None:
        self._busy = False
        finish()
        self._next()


class TimedRuntime(BrightRuntime):
    """Puts `compute_s` on the clock whenever it runs."""

    def __init__(self, variant: EdgeVariant, clock: WorldClock, compute_s: float) -> None:
        super().__init__(variant, 0.0)
        self._clock = clock
        self._compute_s = compute_s

    def run(self, frames: Sequence[Frame]) -> Detections | Tracks:
        """What is bright."""
        self._clock.ahead_s += self._compute_s
        return super().run(frames)


class MemoryPeer:
    """A link to another node. `up` is false once the node was killed; `mute`: it takes and says nothing."""

    def __init__(self, world: "World", name: str) -> None:
        self._world = world
        self._name = name
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._futures: dict[int, asyncio.Future[WireFrame]] = {}
        self._asked = 0
        self.cancelled: list[int] = []
        self.mute = False
        self.up = True

    def request(self, kind: Kind, meta: msgspec.Struct, payload: bytes) -> tuple[int, asyncio.Future[WireFrame]]:
        """As `Peer.request`, through the wire's encoding."""
        if not self.up:
            raise LinkClosed("killed")
        assert kind == Kind.EDGE_RUN
        run = msgspec.msgpack.decode(msgspec.msgpack.encode(meta), type=EdgeRun)
        self._asked += 1
        number = self._asked
        future: asyncio.Future[WireFrame] = asyncio.get_running_loop().create_future()
        self._futures[number] = future
        if not self.mute:
            self._tasks[number] = asyncio.create_task(self._serve(number, run, payload))
        return number, future

    def cancel(self, number: int) -> None:
        """As `Peer.cancel`."""
        self.cancelled.append(number)
        self._futures.pop(number)
        if task := self._tasks.get(number):
            asyncio.get_running_loop().call_soon(task.cancel)

    def kill(self) -> None:
        """The node is gone, and what it held."""
        self.up = False
        for future in self._futures.values():
            if not future.done():
                future.set_exception(LinkClosed("killed"))
        for task in self._tasks.values():
            task.cancel()

    async def _serve(self, number: int, run: EdgeRun, payload: bytes) -> None:
        ended = await self._world.nodes[self._name].run(run, Body(payload))
        future = self._futures.get(number)
        if future is not None and not future.done():
            future.set_result(WireFrame(Kind.REPLY, number, msgspec.msgpack.encode(ended.reply), ended.payload))


class World:
    """All nodes of a deployment. `compute_s`: what a real computation takes; `load_s`: what opening a variant takes."""

    def __init__(self, deployment: Deployment, *, compute_s: float = 0.0, load_s: float = 0.0) -> None:
        self.clock = WorldClock()
        self.compute_s = compute_s
        self.opened: list[TimedRuntime] = []
        self.nodes: dict[str, EdgeNode] = {}
        self.peers: dict[tuple[str, str], MemoryPeer] = {}

        def open_variant(name: str, device: str, threads: int) -> TimedRuntime:
            runtime = TimedRuntime(open_bright(name, device, threads).variant, self.clock, self.compute_s)
            self.opened.append(runtime)
            return runtime

        open_variant.takes_s = load_s  # type: ignore[attr-defined]
        for worker in deployment.workers:
            device = PlayedDevice(self.clock)
            node = EdgeNode(cast(Clock, self.clock), device, Preparer(1), open_variant, "1", Limits(max_frames=100))
            node.peer_of = functools.partial(self._peer, worker.node)
            view = view_of(deployment, worker.name)
            assert view is not None
            node.follow(worker.node, view)
            self.nodes[worker.node] = node
            self.network = view.network

    def _peer(self, here: str, there: str) -> Peer | None:
        if there not in self.nodes:
            return None
        peer = self.peers.setdefault((here, there), MemoryPeer(self, there))
        return cast(Peer, peer) if peer.up else None

    async def infer(
        self,
        at: str,
        to: str,
        payload: bytes,
        *,
        service: str = "detection",
        variant: str = "small",
        configuration: int = 0,
        budget_s: float = 60.0,
        content_type: str = "image/jpeg",
    ) -> Ended:
        """One request, to its end."""
        table = next(table for table in self.network.tables if table.name == service)
        number, node = table.variants.index(variant), self.network.graph.names.index(to)
        asked = EdgeInfer(service, configuration, number, node, budget_s, content_type)
        return await self.nodes[at].infer(asked, Body(payload))

    def check_the_books(self) -> None:
        """Conservation, at every node."""
        for name, node in self.nodes.items():
            books = node.statistics()
            assert books.entered == books.passing + books.handed_on + books.status.arrived, name
            assert books.status.arrived == sum(books.status.counts) + books.status.length, name
            assert node.books.held == books.passing + books.status.length, name
            assert books.variants.memory_used_mb <= books.variants.memory_mb + 1e-9, name
            figures = (
                books.uplink_s,
                *books.links_s.values(),
                books.variants.memory_used_mb,
                books.status.waiting_tflop,
            )
            assert all(math.isfinite(figure) and figure >= 0.0 for figure in figures), name
