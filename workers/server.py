"""The worker process: gateways' frames in, replies out, and the board's deployment kept.

`serve_until` is the loop that names its phases; `Caller` is one gateway's (or scheduler's) connection.
"""

import asyncio
import contextlib
import logging
import math
import secrets

import msgspec

from models.clip_limits import Limits
from protocol.board import Board
from protocol.frames import Frame, Kind
from protocol.link import Connection, serve
from protocol.records import Deployment, Infer, InstanceRecord, Reply, Table, WorkerStatus
from workers.batch_limits import BatchLimits
from workers.config import WorkerConfig
from workers.device import Clock, Device, LoopClock
from workers.edge_calls import EDGE_KINDS, EdgeCalls
from workers.edge_follow import NodeFollower, drain, opener, stay_linked
from workers.edge_metrics import NodeCollector
from workers.edge_node import EdgeNode
from workers.edge_variants import OpenVariant
from workers.host import Host
from workers.instance import Request, Site
from workers.life import NOTICE_S, Loading
from workers.metrics import WorkerCollector, serve_metrics
from workers.preparing import Preparer
from workers.reconcile import Reconciler
from workers.registration import Registration

log = logging.getLogger(__name__)

_decode_infer = msgspec.msgpack.Decoder(Infer).decode
_MOST_UNSENT_BYTES = 16 << 20
"""A caller that lets this much pile up reads no replies: its connection is closed."""


async def serve_until(
    stop: asyncio.Event,
    config: WorkerConfig,
    clock: Clock | None = None,
    open_variant: OpenVariant | None = None,
) -> None:
    """Serve until `stop` is set, then drain. Raises `OSError` if the address cannot be listened on.

    `open_variant`: how an edge node opens its variants, if not by the catalog.
    """
    clock = clock or LoopClock()
    device, preparer = Device(clock), Preparer(config.prepare_threads)
    host = Host(clock, device, preparer)
    epoch = secrets.token_hex(8)
    limits = Limits(max_frames=config.clip_frames, max_seconds=config.clip_s)
    node = EdgeNode(clock, device, preparer, open_variant or opener(config.catalog), epoch, limits)
    host.beside_s, node.beside_s = node.backlog_s, host.own_backlog_s  # they share the device
    callers: set[Caller] = set()
    listener = await serve(config.address, lambda: Caller(config.name, host, callers, epoch, node).connection)
    site = Site(config.name, advertised(config, listener), epoch)
    try:
        collectors = WorkerCollector(config.name, host), NodeCollector(config.name, node)
        with serve_metrics(config.metrics_host, config.metrics_port, *collectors):
            async with Board(config.board) as board:
                log.info("listening", extra={"address": site.address})
                await _follow_board(stop, config, board, host, node, callers, site)
    finally:
        listener.close()
        for caller in list(callers):
            caller.connection.close("the worker has ended")
        preparer.close()
        device.close()


async def _follow_board(
    stop: asyncio.Event,
    config: WorkerConfig,
    board: Board,
    host: Host,
    node: EdgeNode,
    callers: "set[Caller]",
    site: Site,
) -> None:
    """Be what the board asks for, and tell it so, until `stop`; then finish what is here and take the records back."""

    def records() -> list[InstanceRecord]:
        return [host.instances[id].record(site) for id in sorted(host.instances)]

    registration = Registration(board, records, lambda: node.record(site))
    node.on_change = registration.changed
    following_node = NodeFollower(config.name, node)
    loading = Loading(config.catalog, config.seed)
    reconciler = Reconciler(config.name, host, loading, registration.changed, config.drain_s)
    limits = BatchLimits(host)

    def follow(deployment: Deployment | None) -> None:
        reconciler.follow(deployment)
        following_node.follow(deployment)

    def cut_off() -> None:
        for caller in list(callers):
            caller.edge.cancel_all()

    async def read_all() -> None:
        deployment = await board.deployment()
        follow(deployment)
        registration.changed()
        for service in sorted({instance.service for instance in host.instances.values()}):
            if (table := await board.table(service)) is not None:
                limits.take(table)

    async def on_news(channel: str, data: bytes) -> None:
        if channel.startswith("table:"):
            with contextlib.suppress(msgspec.MsgspecError):  # one that this version cannot read
                limits.take(msgspec.json.decode(data, type=Table))
        elif data == b"deployment":
            follow(await board.deployment())

    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(board.follow(read_all, on_news))
        renewing = tasks.create_task(registration.run())
        linked = tasks.create_task(stay_linked(board, node, host.clock))
        await stop.wait()
        log.info("draining")
        host.draining = True
        await asyncio.gather(reconciler.end(), drain(node, config.drain_s, NOTICE_S, cut_off))
        for task in (following, renewing, linked):
            task.cancel()
    await registration.withdraw()
    log.info("ended")


def advertised(config: WorkerConfig, listener: asyncio.Server) -> str:
    """How others reach this worker: what was said, or where it listens (port 0 becomes the one that was given)."""
    if config.advertise:
        return config.advertise
    if config.address.startswith("tcp:") and config.address.endswith(":0"):
        return config.address[:-1] + str(listener.sockets[0].getsockname()[1])
    return config.address


class Caller:
    """One connection and its requests that are in this worker. A connection that ends cancels them all."""

    def __init__(self, worker: str, host: Host, callers: "set[Caller]", epoch: str, node: EdgeNode) -> None:
        self.connection = Connection(self._on_frame, self._on_close)
        self.edge = EdgeCalls(self.connection, node)
        self._worker = worker
        self._epoch = epoch
        self._host = host
        self._callers = callers
        self._requests: dict[int, Request] = {}
        callers.add(self)

    def _on_frame(self, connection: Connection, frame: Frame) -> None:
        match frame.kind:
            case Kind.INFER:
                self._infer(frame)
            case Kind.CANCEL:
                if request := self._requests.get(frame.request_id):
                    self._host.cancel(request)
                else:
                    self.edge.cancel(frame.request_id)
            case Kind.STATUS_REQUEST:
                status = WorkerStatus(self._worker, self._host.status(), self._host.draining, self._epoch)
                connection.send(Kind.STATUS, frame.request_id, status)
            case kind if kind in EDGE_KINDS:
                self.edge.on_frame(frame)
            case _:
                connection.close(f"a worker takes no {Kind(frame.kind).name} frame")

    def _infer(self, frame: Frame) -> None:
        try:
            asked = _decode_infer(frame.meta)
        except msgspec.MsgspecError as error:
            self.connection.close(f"not an INFER: {error}")
            return
        if frame.request_id in self._requests or math.isnan(asked.budget_s):
            self.connection.close(f"request {frame.request_id}: used twice, or a budget that is no number")
            return
        request = Request(asked, frame.payload, self._host.clock.now_s(), frame.request_id, self._respond)
        self._requests[frame.request_id] = request
        self._host.arrive(request)

    def _respond(self, request: Request, reply: Reply, payload: bytes) -> None:
        self._requests.pop(request.request_id, None)
        if self.connection.closed:
            return
        self.connection.send(Kind.REPLY, request.request_id, reply, payload)
        if self.connection.unsent_bytes > _MOST_UNSENT_BYTES:
            self.connection.close("replies are not read")

    def _on_close(self, connection: Connection, reason: str) -> None:
        self._callers.discard(self)
        for request in list(self._requests.values()):
            self._host.cancel(request)
        self.edge.cancel_all()
