"""Edge nodes and a board for those who talk to them: real framed connections, answers as the test says.

`ScriptedNode` stands in for a worker with a node, `EdgeBoard` for the part of Redis that edge services read.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
from redis.exceptions import ConnectionError as RedisAway

from protocol.edge_records import ControllerRecord, EdgeInfer, EdgeReply, NodeRecord, NodeStatus, Spent, WindowRecord
from protocol.frames import Frame, Kind
from protocol.link import Connection, serve
from protocol.outcomes import Attempt
from protocol.records import Deployment

Script = Callable[[EdgeInfer, bytes], tuple[EdgeReply, bytes] | None]


class EdgeBoard:
    """What Redis would hold, and a way to tell the followers."""

    def __init__(self, posted: Deployment | None = None) -> None:
        self.posted = posted
        self.node_records: list[NodeRecord] = []
        self.controller_record: ControllerRecord | None = None
        self.away = False
        self.controllers: list[ControllerRecord] = []
        self.windows: list[WindowRecord] = []
        self._followers: list[Callable[[str, bytes], Awaitable[None]]] = []

    async def follow(
        self, read_all: Callable[[], Awaitable[None]], on_news: Callable[[str, bytes], Awaitable[None]]
    ) -> None:
        """As `Board.follow`, without the reconnecting."""
        self._followers.append(on_news)
        await read_all()
        await asyncio.Event().wait()

    async def tell(self, what: bytes = b"nodes") -> None:
        """Publishes news."""
        for on_news in self._followers:
            await on_news("news", what)

    async def nodes(self) -> list[NodeRecord]:
        """As on the board."""
        self._reach()
        return self.node_records

    async def controller(self) -> ControllerRecord | None:
        """As on the board."""
        self._reach()
        return self.controller_record

    async def post_controller(self, record: ControllerRecord) -> None:
        """As on the board; all that were ever posted are kept."""
        self._reach()
        self.controller_record = record
        self.controllers.append(record)

    async def add_window(self, record: WindowRecord) -> None:
        """As on the board; all are kept."""
        self._reach()
        self.windows.append(record)

    async def deployment(self) -> Deployment | None:
        """As on the board."""
        self._reach()
        return self.posted

    def _reach(self) -> None:
        if self.away:
            raise RedisAway("the test took the board away")


class ScriptedNode:
    """One node: says how it is unless `silent`, keeps what it is asked, answers by `script` or when told to.

    It settles at `unix:FOLDER/NAME.sock`.
    """

    def __init__(self, name: str, folder: Path, script: Script | None = None) -> None:
        self.name = name
        self.address = f"unix:{folder}/{name}.sock"
        self.status = NodeStatus(name, epoch="1")
        self.silent = False
        self.script = script
        self.asked: list[tuple[EdgeInfer, bytes]] = []
        self.cancelled: list[int] = []
        self.arrived = asyncio.Event()
        self._open: list[tuple[Connection, int]] = []
        self._server: asyncio.Server | None = None
        self._connections: list[Connection] = []

    async def start(self) -> "ScriptedNode":
        """Listen."""
        self._server = await serve(self.address, self._connection)
        return self

    async def stop(self) -> None:
        """As if killed."""
        assert self._server is not None
        self._server.close()
        for connection in self._connections:
            connection.abort("killed")
        await asyncio.sleep(0)

    @property
    def record(self) -> NodeRecord:
        """Its registration."""
        return NodeRecord(node=self.name, worker=self.name, address=self.address, epoch="1", memory_mb=4096.0)

    def reply(self, attempt: Attempt, number: int = 0, payload: bytes = b"", reply: EdgeReply | None = None) -> None:
        """Ends the request that came as `number` (from 0)."""
        connection, request_id = self._open[number]
        connection.send(Kind.REPLY, request_id, reply or EdgeReply(attempt, self.status), payload)

    def _connection(self) -> Connection:
        connection = Connection(self._on_frame)
        self._connections.append(connection)
        return connection

    def _on_frame(self, connection: Connection, frame: Frame) -> None:
        if frame.kind == Kind.NODE_STATUS_REQUEST and not self.silent:
            connection.send(Kind.NODE_STATUS, frame.request_id, self.status)
        elif frame.kind == Kind.CANCEL:
            self.cancelled.append(frame.request_id)
        elif frame.kind == Kind.EDGE_INFER:
            asked = msgspec.msgpack.decode(frame.meta, type=EdgeInfer)
            self.asked.append((asked, frame.payload))
            self._open.append((connection, frame.request_id))
            self.arrived.set()
            if self.script is not None and (said := self.script(asked, frame.payload)) is not None:
                self.reply(Attempt.OK, len(self.asked) - 1, said[1], said[0])


def answering(status: NodeStatus, attempt: Attempt = Attempt.OK, payload: bytes = b'{"detections":[]}') -> Script:
    """A script that gives every request the same end at once."""
    spent = Spent(emulated_access_s=0.1, emulated_transmission_s=0.05, emulated_queue_s=0.02, emulated_compute_s=0.2)

    def script(asked: EdgeInfer, body: bytes) -> tuple[EdgeReply, bytes]:
        return EdgeReply(attempt, status, adapted_mb=0.5, new_instance=True, spent=spent), payload

    return script


async def until(condition: Callable[[], bool]) -> None:
    """Returns once the condition holds; other tasks and sockets get their turns meanwhile."""
    async with asyncio.timeout(5.0):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
