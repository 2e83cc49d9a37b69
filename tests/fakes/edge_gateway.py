"""A gateway over scripted edge nodes and a scripted scheduler: HTTP bytes above, framed connections below."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from gateway import edge_view
from gateway.app import build_api
from gateway.config import GatewayConfig
from gateway.handle import Gateway
from protocol.board import Board
from protocol.edge_records import (
    Decide,
    Decision,
    EdgeInfer,
    EdgeLinkSpec,
    EdgeNodeSpec,
    EdgeReply,
    EdgeServiceSpec,
    EdgeSpec,
    NodeStatus,
    Spent,
)
from protocol.frames import Frame, Kind
from protocol.link import Connection, serve
from protocol.outcomes import Attempt
from tests.fakes.scripted_client import Client, tally
from tests.fakes.scripted_nodes import EdgeBoard, Script, ScriptedNode, until

NODES = ("north", "middle", "south")
JPEG = {"content-type": "image/jpeg"}
BODY = b"j" * 200_000


def edge_spec(**settings: Any) -> EdgeSpec:
    """Three nodes in a row, Huang's two services."""
    return EdgeSpec(
        services={
            "detection": EdgeServiceSpec(table="detection", requirement_ms=2000.0),
            "tracking": EdgeServiceSpec(table="tracking", requirement_ms=25_000.0),
        },
        nodes=tuple(
            EdgeNodeSpec(name=name, latitude=-37.80 - 0.01 * n, longitude=145.0, tflops=1.0 + n, memory_mb=4096.0,
                         uplink_mbps=64.0)
            for n, name in enumerate(NODES)
        ),
        links=(
            EdgeLinkSpec(between=("north", "middle"), bandwidth_mbps=400.0),
            EdgeLinkSpec(between=("middle", "south"), bandwidth_mbps=200.0),
        ),
        **{"policy": "beam", "window_ms": 5.0, "per_service": 4, **settings},
    )  # fmt: skip


class ScriptedScheduler:
    """Takes DECIDE frames; answers with `placements` of its own, or not at all."""

    def __init__(self, folder: Path, decide: Callable[[Decide], Decision | None]) -> None:
        self.address = f"unix:{folder}/scheduler.sock"
        self.decide = decide
        self.asked: list[Decide] = []
        self.cancelled = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen."""
        self._server = await serve(self.address, lambda: Connection(self._on_frame))

    async def stop(self) -> None:
        """Done."""
        assert self._server is not None
        self._server.close()
        await asyncio.sleep(0)

    def _on_frame(self, connection: Connection, frame: Frame) -> None:
        self.cancelled += frame.kind == Kind.CANCEL
        if frame.kind == Kind.DECIDE:
            asked = msgspec.msgpack.decode(frame.meta, type=Decide)
            self.asked.append(asked)
            if (decision := self.decide(asked)) is not None:
                connection.send(Kind.DECISION, frame.request_id, decision)


class World:
    """A gateway over scripted nodes."""

    def __init__(self, folder: Path, script: Script | None = None) -> None:
        self.board = EdgeBoard()
        self.nodes = {name: ScriptedNode(name, folder, script) for name in NODES}
        config = GatewayConfig(board_url="redis://127.0.0.1:1/0", answer_timeout_s=0.5)
        self.gateway = Gateway(config, cast(Board, self.board), seed=1)

    def __getitem__(self, name: str) -> ScriptedNode:
        return self.nodes[name]

    def ask(
        self,
        service: str = "detection",
        body: bytes = BODY,
        headers: dict[str, str] | None = None,
        method: str = "POST",
    ) -> Client:
        """A request on a connection of its own."""
        return Client(body, {**JPEG, **(headers or {})}, f"/v1/{service}", method).ask(self.gateway)

    async def answer(self, client: Client) -> dict[str, Any]:
        """Of that request, once it has come."""
        await until(lambda: bool(client.socket.written))
        await client.answered()
        return client.json

    def received(self) -> dict[str, list[EdgeInfer]]:
        """What nodes were asked."""
        return {name: [asked for asked, _ in node.asked] for name, node in self.nodes.items() if node.asked}


@asynccontextmanager
async def world(
    folder: Path, script: Script | None = None, spec: EdgeSpec | None = None, up: Any = NODES
) -> AsyncIterator[World]:
    """A running one, whose nodes have said how they are; at its end nothing may be under way."""
    with pytest.MonkeyPatch.context() as quick:
        quick.setattr(edge_view, "READ_AGAIN_S", 0.01)  # boards are read again at once
        async with _running(World(folder, script), spec or edge_spec(), up) as one:
            yield one


@asynccontextmanager
async def _running(one: World, spec: EdgeSpec, up: Any) -> AsyncIterator[World]:
    async with asyncio.timeout(30.0):
        for name in up:
            await one[name].start()
            one.board.node_records.append(one[name].record)
        one.gateway.edge_view.configure(spec)
        async with one.gateway.edge_view as view:
            await view.settle(10.0)
            assert view.fault or len(view.links.known(asyncio.get_running_loop().time(), 5.0)) == len(up)
            yield one
            assert one.gateway.statistics().in_flight == 0
            tally(one.gateway)
        for name in up:
            await one[name].stop()


def agrees_with_the_document(gateway: Gateway, client: Client, service: str) -> None:
    """What was sent is what the OpenAPI document says: its status, its headers, its keys and those of its parts."""
    document = build_api(gateway).openapi()
    described = document["paths"][f"/v1/{service}"]["post"]["responses"][str(client.status)]
    names = {name.lower() for name in described["headers"]}
    assert set(client.headers) - {"content-type", "content-length", "connection"} <= names
    schemas = document["components"]["schemas"]

    def keys(schema: dict[str, Any], value: Any) -> None:
        if "$ref" in schema:
            schema = schemas[schema["$ref"].rpartition("/")[2]]
        for part in schema.get("allOf", ()):
            keys(part, value)
        for name, inner in schema.get("properties", {}).items():
            if name in schema.get("required", ()) or name in value:
                keys(inner, value[name])

    def all_keys(schema: dict[str, Any]) -> set[str]:
        if "$ref" in schema:
            schema = schemas[schema["$ref"].rpartition("/")[2]]
        return set(schema.get("properties", ())).union(*(all_keys(part) for part in schema.get("allOf", ())))

    schema = described["content"]["application/json"]["schema"]
    keys(schema, client.json)
    assert client.json.keys() <= all_keys(schema)


def failing(attempt: Attempt, *nodes: str) -> Script:
    """A script by which those nodes refuse what is decided for them, and all others serve."""

    def script(asked: EdgeInfer, payload: bytes) -> tuple[EdgeReply, bytes]:
        name = NODES[asked.node]
        if name in nodes:
            return EdgeReply(attempt, NodeStatus(name), reason=f"{name} will not"), b""
        return EdgeReply(Attempt.OK, NodeStatus(name), adapted_mb=0.1, spent=Spent()), b'{"detections":[]}'

    return script


def run(body: Callable[[], Any]) -> None:
    """Runs a test's coroutine to its end."""
    asyncio.run(body())
