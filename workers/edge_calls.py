"""One connection's edge requests: frames in, one task each, replies out. A connection that ends takes them all back."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec

from protocol.edge_records import EdgeInfer, EdgeRun
from protocol.frames import Frame, Kind
from protocol.link import Connection
from workers.edge_journey import Body, Ended
from workers.edge_node import EdgeNode

EDGE_KINDS = frozenset({Kind.EDGE_INFER, Kind.EDGE_RUN, Kind.NODE_STATUS_REQUEST})
_MOST_UNSENT_BYTES = 64 << 20
"""A caller that lets this much pile up reads no replies: its connection is closed."""

_decode_infer = msgspec.msgpack.Decoder(EdgeInfer).decode
_decode_run = msgspec.msgpack.Decoder(EdgeRun).decode


class EdgeCalls:
    """State: the tasks of the requests that came over this connection."""

    def __init__(self, connection: Connection, node: EdgeNode) -> None:
        self._connection = connection
        self._node = node
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def on_frame(self, frame: Frame) -> None:
        """One of `EDGE_KINDS`. A frame that makes no sense closes the connection, with the reason."""
        if frame.kind == Kind.NODE_STATUS_REQUEST:
            self._connection.send(Kind.NODE_STATUS, frame.request_id, self._node.status())
            return
        try:
            way = self._way(frame)
        except (msgspec.MsgspecError, ValueError) as error:
            self._connection.close(f"not an {Kind(frame.kind).name}: {error}")
            return
        task = asyncio.create_task(self._answered(frame.request_id, way), name=f"edge request {frame.request_id}")
        self._tasks[frame.request_id] = task

    def cancel(self, request_id: int) -> None:
        """The client of this request has gone. An id that is not here is nobody's fault."""
        if task := self._tasks.get(request_id):
            # Not at once: a task that is cancelled before its first step never runs, and would answer nobody.
            asyncio.get_running_loop().call_soon(task.cancel)

    def cancel_all(self) -> None:
        """The connection has ended, or the node ends."""
        for request_id in self._tasks:
            self.cancel(request_id)

    def _way(self, frame: Frame) -> Callable[[], Awaitable[Ended]]:
        """What is to be done for a frame. Raises `MsgspecError` or `ValueError` if it makes no sense."""
        if frame.request_id in self._tasks:
            raise ValueError(f"request {frame.request_id} is used twice")
        if frame.kind == Kind.EDGE_INFER:
            asked = _decode_infer(frame.meta)
            _check_budget(asked.budget_s)
            return partial(self._node.infer, asked, Body(frame.payload))
        run = _decode_run(frame.meta)
        _check_budget(run.budget_s)
        return partial(self._node.run, run, Body(frame.payload))

    async def _answered(self, request_id: int, way: Callable[[], Awaitable[Ended]]) -> None:
        try:
            ended = await way()
        except asyncio.CancelledError:
            ended = self._node.taken_back()  # the task ends here either way; who still listens is told
        finally:
            del self._tasks[request_id]
        if self._connection.closed:
            return
        self._connection.send(Kind.REPLY, request_id, ended.reply, ended.payload)
        if self._connection.unsent_bytes > _MOST_UNSENT_BYTES:
            self._connection.close("replies are not read")


def _check_budget(budget_s: float) -> None:
    if not math.isfinite(budget_s):
        raise ValueError("the budget is no number")
