"""Real node processes in a row (a - b - c) on a real board, their variants faked, and what talks to them."""

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from policies.placement.deployed import network_of
from policies.placement.edge_network import EdgeNetwork
from protocol.board import BOARD_ERRORS, Board
from protocol.edge_records import EdgeInfer, EdgeReply, EdgeRun, NodeRecord, NodeStatus
from protocol.frames import Frame, Kind
from protocol.link import Connection, connect
from protocol.outcomes import Attempt
from protocol.records import Deployment

T = TypeVar("T")
ROOT = Path(__file__).parents[2]


class Answer(NamedTuple):
    """A REPLY, decoded."""

    reply: EdgeReply
    payload: bytes

    @property
    def attempt(self) -> Attempt:
        """How it ended."""
        return Attempt(self.reply.attempt)

    @property
    def json(self) -> Any:
        """The payload."""
        return json.loads(self.payload)


class EdgeRig:
    """Nodes of one deployment, by name. With a `catalog` they run as `python -m workers`, else with faked variants."""

    def __init__(self, folder: Path, board: Board, deployment: Deployment, catalog: Path | None = None) -> None:
        assert deployment.edge is not None
        self.folder = folder
        self.catalog = catalog
        self.board = board
        self.deployment = deployment
        self.network: EdgeNetwork = network_of(deployment.edge)
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self._connections: dict[str, Connection] = {}

    def log(self, node: str) -> str:
        """What a node has logged."""
        return (self.folder / f"{node}.log").read_text()

    async def start(self, node: str) -> None:
        """Start a node's process (again)."""
        name, address = f"w-{node}", self.address(node)
        if self.catalog is None:
            command = [sys.executable, "-m", "tests.fakes.edge_worker", name, self.board.url, address]
        else:
            command = [sys.executable, "-m", "workers", "--name", name, "--board", self.board.url, "--address", address]
            command += ["--catalog", str(self.catalog)]
        with (self.folder / f"{node}.log").open("ab") as log:
            self.processes[node] = await asyncio.create_subprocess_exec(*command, stderr=log, cwd=ROOT)

    def address(self, node: str) -> str:
        """Where it listens."""
        return f"unix:{self.folder}/{node}.sock"

    def signal(self, node: str, number: signal.Signals) -> None:
        """Send a signal to a node's process."""
        self.processes[node].send_signal(number)

    async def until(self, look: Callable[[], Awaitable[T | None]], limit_s: float = 30.0) -> T:
        """What `look` gives once it is not None."""
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    with contextlib.suppress(*BOARD_ERRORS):
                        if (found := await look()) is not None:
                            return found
                    await asyncio.sleep(0.02)
        except TimeoutError as error:
            logs = "\n".join(f"--- {node}\n{self.log(node)}" for node in self.processes)
            raise AssertionError(f"it never came\n{logs}") from error

    async def record(self, node: str) -> NodeRecord:
        """A node's registration, once it is there."""

        async def look() -> NodeRecord | None:
            return next((record for record in await self.board.nodes() if record.node == node), None)

        return await self.until(look)

    async def link(self, node: str) -> Connection:
        """One lasting connection to a node."""
        known = self._connections.get(node)
        if known is None or known.closed:
            known = self._connections[node] = await self.other_link(node)
        return known

    async def other_link(self, node: str) -> Connection:
        """A connection of its own to a node."""
        return await connect(self.address(node), lambda: Connection(lambda *_: None))

    async def send(
        self,
        at: str,
        to: str,
        payload: bytes,
        *,
        variant: str = "small",
        service: str = "detection",
        configuration: int = 0,
        budget_s: float = 30.0,
        content_type: str = "image/jpeg",
    ) -> asyncio.Future[Frame]:
        """One request that enters at a node and is decided for another; the future of its reply's frame."""
        asked = self.asked(to, variant, service, configuration, budget_s, content_type)
        return (await self.link(at)).request(Kind.EDGE_INFER, asked, payload)[1]

    def asked(
        self,
        to: str,
        variant: str = "small",
        service: str = "detection",
        configuration: int = 0,
        budget_s: float = 30.0,
        content_type: str = "image/jpeg",
    ) -> EdgeInfer:
        """The meta of such a request."""
        tables = {table.name: table for table in self.network.tables}
        variants = tables[service].variants
        names = self.network.graph.names
        index = variants.index(variant) if variant in variants else 99
        return EdgeInfer(service, configuration, index, names.index(to) if to in names else 99, budget_s, content_type)

    async def ask(self, at: str, to: str, payload: bytes, **settings: Any) -> Answer:
        """`send`, and its end."""
        return await answer(await self.send(at, to, payload, **settings))

    async def run(self, at: str, run: EdgeRun, payload: bytes) -> Answer:
        """As a neighbour would."""
        return await answer((await self.link(at)).request(Kind.EDGE_RUN, run, payload)[1])

    async def status(self, node: str) -> NodeStatus:
        """A node's word."""
        async with asyncio.timeout(10.0):
            frame = await (await self.link(node)).request(Kind.NODE_STATUS_REQUEST)[1]
        return msgspec.msgpack.decode(frame.meta, type=NodeStatus)

    def resident_mb(self, node: str) -> float:
        """Physical memory that a node's process holds, from /proc."""
        lines = Path(f"/proc/{self.processes[node].pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))

    async def end(self) -> None:
        """Leave no process behind."""
        for connection in self._connections.values():
            connection.close("the test is over")
        for process in self.processes.values():
            if process.returncode is None:
                process.kill()
                await process.wait()


async def answer(future: asyncio.Future[Frame]) -> Answer:
    """The decoded reply."""
    async with asyncio.timeout(20.0):
        frame = await future
    return Answer(msgspec.msgpack.decode(frame.meta, type=EdgeReply), frame.payload)


@contextlib.asynccontextmanager
async def edge_rig(
    folder: Path, board_url: str, deployment: Deployment, catalog: Path | None = None
) -> AsyncIterator[EdgeRig]:
    """Nodes that run, know each other and answer."""
    async with Board(board_url) as board:
        rig = EdgeRig(folder, board, await board.put_deployment(deployment), catalog)
        try:
            names = [worker.node for worker in deployment.workers]
            await asyncio.gather(*(rig.start(name) for name in names))
            for name in names:
                await rig.record(name)
            yield rig
        finally:
            await rig.end()
