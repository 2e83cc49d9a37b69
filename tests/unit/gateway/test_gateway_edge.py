"""Edge requests through the gateway: scripted nodes and scheduler below, HTTP bytes above, every end counted."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from operator import add
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from gateway import edge_decide, edge_view
from gateway.app import build_api
from gateway.config import GatewayConfig
from gateway.edge_exposition import EdgeValues, edge_families
from gateway.exposition import merged
from gateway.handle import Gateway
from protocol import node_links
from protocol.board import Board
from protocol.edge_records import (
    ControllerRecord,
    Decide,
    Decision,
    EdgeInfer,
    EdgeLinkSpec,
    EdgeNodeSpec,
    EdgeReply,
    EdgeServiceSpec,
    EdgeSpec,
    NodeStatus,
    Placement,
    Spent,
)
from protocol.frames import Frame, Kind
from protocol.link import Connection, serve
from protocol.outcomes import Attempt
from protocol.records import Deployment
from tests.fakes.scripted_client import Client, soon
from tests.fakes.scripted_nodes import EdgeBoard, Script, ScriptedNode, answering, until
from tests.unit.gateway.test_gateway_handle import tally

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
    async with asyncio.timeout(30.0):
        one = World(folder, script)
        for name in up:
            await one[name].start()
            one.board.node_records.append(one[name].record)
        one.gateway.edge_view.configure(spec or edge_spec())
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


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boards are read again at once."""
    monkeypatch.setattr(edge_view, "READ_AGAIN_S", 0.01)


def run(body: Callable[[], Any]) -> None:
    asyncio.run(body())


def test_an_image_is_placed_sent_and_answered_with_its_story(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, answering(NodeStatus("south"))) as here:
            client = here.ask(headers={"x-edge-node": "middle", "x-request-id": "mine"})
            told = await here.answer(client)
            assert client.status == 200
            agrees_with_the_document(here.gateway, client, "detection")
            (asked,) = here.received()["middle"]
            assert list(here.received()) == ["middle"]
            assert here["middle"].asked[0][1] == BODY
            assert (asked.service, asked.content_type) == ("detection", "image/jpeg")
            assert 1.5 < asked.budget_s < 2.0
            table = here.gateway.edge_view.net.network.tables[0]  # type: ignore[union-attr]
            decision = told["decision"]
            predicted_s, predicted_usd = (decision.pop(f"predicted_{one}") for one in ("delay_s", "cost_usd"))
            assert decision == {
                "configuration": {
                    "name": table.configurations[asked.configuration],
                    "settings": table.settings[asked.configuration],
                },
                "variant": table.variants[asked.variant],
                "node": NODES[asked.node],
                "entry": "middle",
                "policy": "sequential",
                "decided_by": "gateway",
                "second_choice": False,
            }
            assert told["detections"] == []
            assert (told["request_id"], told["service"], told["outcome"]) == ("mine", "detection", "OK")
            assert told["expected_accuracy"] == table.accuracy[asked.configuration, asked.variant]
            assert told["emulated"] is True
            assert told["observed"] == {"adapted_mb": 0.5, "waiting_tflop": 0.0, "new_instance": True}
            delay = told["delay_s"]
            assert delay["total"] == pytest.approx(0.1 + 0.05 + 0.02 + 0.2)
            assert 0.005 <= delay["real"]["window"] < delay["real"]["total"]
            # Eqs. 8 to 10 by hand: the node said 0.5 MB adapted and a variant loaded anew.
            hops = {0: 1, 1: 0, 2: 1}[asked.node]
            cost, per_mb = told["cost_usd"], 0.016 / 1024
            assert cost["routing"] == pytest.approx(8 * 0.5 * 0.002 * hops)
            assert cost["memory"] == pytest.approx(per_mb * table.memory_mb[asked.variant])
            tflops = 1.0 + asked.node
            assert cost["compute"] == pytest.approx(0.0003 * table.tflop[asked.variant] / tflops + per_mb * 0.5)
            assert cost["total"] == pytest.approx(cost["routing"] + cost["memory"] + cost["compute"])
            # What was foreseen, by Eqs. 3 to 6 and 8 to 11 for the body's size: all nodes idle, nothing loaded.
            megabits = 8 * len(BODY) / 1e6 * table.size_factor[asked.configuration]
            graph = here.gateway.edge_view.net.network.graph  # type: ignore[union-attr]
            work = table.inferences[asked.configuration] * table.tflop[asked.variant]
            access_s, links_s = megabits / graph.uplink_mbps[1], hops * megabits / graph.bandwidth_mbps[asked.node // 2]
            assert predicted_s == pytest.approx(access_s + links_s + work / tflops)
            billed = 0.0003 * table.tflop[asked.variant] / tflops + per_mb * (
                megabits / 8 + table.memory_mb[asked.variant]
            )
            assert predicted_usd == pytest.approx(megabits * 0.002 * hops + billed)

    run(body)


@pytest.mark.parametrize(
    ("service", "headers", "method", "body", "status", "says"),
    [
        ("detection", {"x-edge-node": "nroth"}, "POST", BODY, 400, "no such node; there are north, middle, south; did"),
        ("detection", {"x-position": "12"}, "POST", BODY, 400, "X-Position = '12': must be LATITUDE,LONGITUDE"),
        ("detection", {"x-position": "nan,144"}, "POST", BODY, 400, "must be LATITUDE,LONGITUDE"),
        ("detection", {"x-position": "91,144"}, "POST", BODY, 400, "must be LATITUDE,LONGITUDE"),
        ("detection", {"x-deadline-ms": "0"}, "POST", BODY, 400, "X-Deadline-Ms = '0': must be milliseconds, above 0"),
        ("detection", {}, "POST", b"", 400, "the body is empty"),
        ("detection", {}, "GET", b"", 405, "POST the image or clip"),
        ("tracking", {"content-type": "text/html"}, "POST", BODY, 415, "send image/jpeg, image/png, video/mp4"),
        ("tracking", {"content-encoding": "gzip"}, "POST", BODY, 415, "Content-Encoding"),
        ("tracking", {}, "POST", b"x" * 300_001, 413, "larger than 300000 bytes"),
        ("segmentation", {}, "POST", BODY, 404, "no service of this name: /v1/segmentation"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_with_a_remedy(
    tmp_path: Path, service: str, headers: dict[str, str], method: str, body: bytes, status: int, says: str
) -> None:
    spec = edge_spec()
    services = {name: msgspec.structs.replace(one, max_body_bytes=300_000) for name, one in spec.services.items()}

    async def one() -> None:
        async with world(tmp_path, spec=msgspec.structs.replace(spec, services=services)) as here:
            client = here.ask(service, body, headers, method)
            told = await here.answer(client)
            assert client.status == status
            assert says in told["error"]
            assert told["code"] == "INVALID"
            if method == "POST" and service != "segmentation":
                agrees_with_the_document(here.gateway, client, service)
            assert here.received() == {}
            assert tally(here.gateway) == {"INVALID": 1}

    run(one)


def test_a_position_enters_at_the_nearest_access_point_and_a_dead_one_is_stood_in_for(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, answering(NodeStatus("south")), up=("north", "middle")) as here:
            near_south = {"x-position": "-37.8201,145.001"}
            first = await here.answer(here.ask(headers=near_south))
            assert first["decision"]["entry"] == "middle"  # south is dead: the nearest that lives
            assert list(here.received()) == ["middle"]
            second = await here.answer(here.ask(headers={"x-position": "-37.80,145"}))
            assert second["decision"]["entry"] == "north"
            assert {asked.node for asked in here.received()["north"]} <= {0, 1}

    run(body)


def test_a_window_closes_when_a_service_has_its_number_or_its_time_is_over(tmp_path: Path) -> None:
    async def body() -> None:
        spec = edge_spec(window_ms=600.0, per_service=2)
        async with world(tmp_path, answering(NodeStatus("north")), spec) as here:
            first = here.ask("detection")
            here.ask("tracking")
            await asyncio.sleep(0.02)
            assert not here.received()
            assert here.gateway.edge.counts().waiting == 2
            last = here.ask("detection")  # the second of its service
            whole = await here.answer(last)
            assert whole["delay_s"]["real"]["window"] < 0.5
            assert (await here.answer(first))["delay_s"]["real"]["window"] >= 0.02
            await until(lambda: here.gateway.statistics().in_flight == 0)
            assert here.gateway.edge.counts().windows == {"gateway": 1}
            lonely = await here.answer(here.ask("detection"))
            assert lonely["delay_s"]["real"]["window"] >= 0.6
            assert here.gateway.edge.counts().windows == {"gateway": 2}

    run(body)


def test_a_client_that_leaves_is_forgotten_in_its_window_and_cancelled_at_its_node(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path) as here:
            early = here.ask(headers={"x-edge-node": "south"})
            early.leave()
            assert tally(here.gateway) == {"CANCELLED": 1}
            assert here.gateway.edge.counts().waiting == 0
            late = Client(BODY, JPEG | {"x-edge-node": "south"}, "/v1/detection").connect(here.gateway)
            late.send(late.request[:-1000])
            late.send(late.request[-1000:])
            await here["south"].arrived.wait()
            assert here.gateway.uploads.held == len(BODY)  # a clip takes memory until its request has ended
            late.leave()
            assert here.gateway.uploads.held == 0
            await until(lambda: bool(here["south"].cancelled))
            assert tally(here.gateway) == {"CANCELLED": 2}
            assert len(here["south"].asked) == 1
            cut_off = Client(BODY, JPEG, "/v1/tracking").connect(here.gateway)
            cut_off.send(cut_off.request[:-1000])
            assert here.gateway.uploads.held > 0
            cut_off.leave()
            assert here.gateway.uploads.held == 0
            assert tally(here.gateway) == {"CANCELLED": 3}

    run(body)


def failing(attempt: Attempt, *nodes: str) -> Script:
    """A script by which those nodes refuse what is decided for them, and all others serve."""

    def script(asked: EdgeInfer, payload: bytes) -> tuple[EdgeReply, bytes]:
        name = NODES[asked.node]
        if name in nodes:
            return EdgeReply(attempt, NodeStatus(name), reason=f"{name} will not"), b""
        return EdgeReply(Attempt.OK, NodeStatus(name), adapted_mb=0.1, spent=Spent()), b'{"detections":[]}'

    return script


@pytest.mark.parametrize("attempt", [Attempt.QUEUE_FULL, Attempt.UNAVAILABLE])
def test_a_node_that_refuses_leads_to_one_second_choice_without_it(tmp_path: Path, attempt: Attempt) -> None:
    async def body() -> None:
        async with world(tmp_path, failing(attempt, "south")) as here:  # south has the most TFLOPS: everybody's first
            told = await here.answer(here.ask(headers={"x-edge-node": "middle"}))
            first, second = here.received()["middle"]
            assert NODES[first.node] == "south"
            assert told["decision"]["node"] == NODES[second.node] != "south"
            assert told["decision"]["second_choice"] is True
            assert here.gateway.edge.counts().second_choices == 1
            assert second.budget_s < first.budget_s
            again = await here.answer(here.ask(headers={"x-edge-node": "middle"}))
            # A full node is avoided for a moment; what is unavailable to one may be right for the next.
            assert again["decision"]["second_choice"] is (attempt is Attempt.UNAVAILABLE)
            assert tally(here.gateway) == {"OK": 2}

    run(body)


def test_a_variant_that_cannot_be_loaded_is_not_chosen_twice(tmp_path: Path) -> None:
    """A node with room for it refused it: the second choice is another variant, and no node is blamed."""
    refused: list[int] = []

    def script(asked: EdgeInfer, payload: bytes) -> tuple[EdgeReply, bytes]:
        status = NodeStatus(NODES[asked.node], memory_used_mb=100.0)
        if not refused or asked.variant == refused[0]:
            refused.append(asked.variant)
            return EdgeReply(Attempt.UNAVAILABLE, status, reason="the variant cannot be loaded"), b""
        return EdgeReply(Attempt.OK, status, adapted_mb=0.1), b'{"detections":[]}'

    async def body() -> None:
        async with world(tmp_path, script) as here:
            told = await here.answer(here.ask())
            assert told["decision"]["second_choice"] is True
            first, second = (asked.variant for asked, _ in here["north"].asked)
            assert first == refused[0] != second
            assert not here.gateway.edge._closed(here.gateway.edge_view.net, [0], 0.0)  # type: ignore[arg-type]

    run(body)


@pytest.mark.parametrize(
    ("attempt", "status", "code"), [(Attempt.QUEUE_FULL, 429, "QUEUE_FULL"), (Attempt.UNAVAILABLE, 503, "UNAVAILABLE")]
)
def test_two_refusals_are_the_end(tmp_path: Path, attempt: Attempt, status: int, code: str) -> None:
    async def body() -> None:
        async with world(tmp_path, failing(attempt, *NODES)) as here:
            client = here.ask(headers={"x-edge-node": "middle"})
            told = await here.answer(client)
            assert (client.status, told["code"]) == (status, code)
            assert "will not" in told["error"]
            assert len(here.received()["middle"]) == 2
            assert "retry-after" in client.headers
            agrees_with_the_document(here.gateway, client, "detection")

    run(body)


@pytest.mark.parametrize(
    ("attempt", "http_status", "status", "code"),
    [
        (Attempt.INVALID, 415, 415, "INVALID"),
        (Attempt.EXPIRED, 0, 504, "EXPIRED"),
        (Attempt.FAILED, 0, 500, "FAILED"),
        (Attempt.LATE, 0, 200, None),
    ],
)
def test_other_ends_are_final(
    tmp_path: Path, attempt: Attempt, http_status: int, status: int, code: str | None
) -> None:
    def script(asked: EdgeInfer, payload: bytes) -> tuple[EdgeReply, bytes]:
        return EdgeReply(attempt, NodeStatus("north"), reason="no", http_status=http_status), b'{"detections":[]}'

    async def body() -> None:
        async with world(tmp_path, script) as here:
            client = here.ask()
            told = await here.answer(client)
            assert client.status == status
            assert told.get("code") == code
            assert sum(map(len, here.received().values())) == 1

    run(body)


def test_a_node_that_dies_with_a_request_is_stood_in_for(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path) as here:
            client = here.ask(headers={"x-edge-node": "north"})
            await here["north"].arrived.wait()
            await here["north"].stop()
            await here["middle"].arrived.wait()
            assert NODES[here["middle"].asked[0][0].node] != "north"
            assert here["middle"].asked[0][1] == BODY
            here["middle"].reply(Attempt.OK, 0, b'{"detections":[]}')
            told = await here.answer(client)
            assert told["decision"]["second_choice"] is True
            assert told["decision"]["entry"] == "middle"
            assert here.gateway.edge.counts().attempts["north"] == {"LOST": 1}
            await here["north"].start()

    run(body)


def test_a_dead_node_in_the_middle_cuts_the_others_off(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, answering(NodeStatus("north")), up=("north", "south")) as here:
            told = await here.answer(here.ask(headers={"x-edge-node": "north"}))
            assert told["decision"]["node"] == "north"  # south is faster, but the way there leads over middle

    run(body)


def test_a_node_that_hangs_is_given_up_and_told(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path) as here:
            client = here.ask(headers={"x-deadline-ms": "300"})
            told = await here.answer(client)  # 0.3 s, and the 0.5 s of answer_timeout_s
            assert (client.status, told["code"]) == (500, "FAILED")
            await until(lambda: bool(here["north"].cancelled))

    run(body)


def test_a_node_that_says_nothing_any_more_loses_what_it_holds_and_gets_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_links, "SILENT_S", 0.6)
    monkeypatch.setattr(edge_view, "ASK_EVERY_S", 0.02)
    monkeypatch.setattr(edge_view, "ASK_PATIENCE_S", 0.02)
    monkeypatch.setattr(edge_view, "OLDEST_STATUS_S", 0.25)

    async def body() -> None:
        async with world(tmp_path) as here:
            first = here.ask(headers={"x-edge-node": "north", "x-deadline-ms": "60000"})
            await here["north"].arrived.wait()
            here["north"].silent = True
            view = here.gateway.edge_view
            assert view.net is not None
            north = view.net.node_of["north"]
            now_s = asyncio.get_running_loop().time
            await until(lambda: view.net is not None and north not in view.statuses(view.net, now_s()))
            assert view.links.peer("north") is not None
            assert view.entry(view.net, north) == view.net.node_of["middle"]
            await here["middle"].arrived.wait()
            here["middle"].reply(Attempt.OK, 0, b'{"detections":[]}')
            told = await here.answer(first)
            assert told["decision"]["second_choice"] is True
            assert here.gateway.edge.counts().attempts["north"] == {"LOST": 1}

    run(body)


def test_the_scheduler_decides_where_there_is_one(tmp_path: Path) -> None:
    def decide(asked: Decide) -> Decision:
        refused = Placement(reason="no action meets the deadline of 9 s", late=True)
        no_room = Placement(reason="no node has the memory")
        return Decision(asked.window, "beam", (Placement(3, 2, 1, accuracy=0.3), refused, no_room))

    async def body() -> None:
        scheduler = ScriptedScheduler(tmp_path, decide)
        await scheduler.start()
        async with world(tmp_path, answering(NodeStatus("middle")), edge_spec(window_ms=100.0)) as here:
            here.board.controller_record = ControllerRecord(address=scheduler.address, epoch="1", policy="beam")
            await until(lambda: here.gateway.edge_view.scheduler() is not None)
            clients = [here.ask(headers={"x-edge-node": name, "x-deadline-ms": "9000"}) for name in NODES]
            told = [await here.answer(client) for client in clients]
            assert [client.status for client in clients] == [200, 504, 503]
            assert told[0]["decision"]["decided_by"] == "scheduler"
            assert told[0]["decision"]["policy"] == "beam"
            assert [told[0]["decision"]["node"]] == ["middle"]
            assert told[1]["error"] == "beam refused it: no action meets the deadline of 9 s"
            (window,) = scheduler.asked
            assert [one.node for one in window.requests] == [0, 1, 2]
            assert all(8.0 < one.deadline_s < 9.0 for one in window.requests)
            assert window.requests[0].data_mb == pytest.approx(0.2)
            (asked,) = here.received()["north"]
            assert (asked.configuration, asked.variant, asked.node) == (3, 2, 1)
        await scheduler.stop()

    run(body)


@pytest.mark.parametrize(
    "decide",
    [
        lambda asked: None,
        lambda asked: Decision(asked.window, "beam", ()),
        lambda asked: Decision(asked.window, "beam", (Placement(0, 0, 77),)),
        lambda asked: Decision(asked.window, "beam", (Placement(0, 99, 0),)),
        lambda asked: Decision(asked.window, "beam", (Placement(),)),
    ],
    ids=["silent", "starting", "other graph", "other table", "no reason"],
)
def test_a_scheduler_without_a_usable_answer_is_passed_over(
    tmp_path: Path, decide: Callable[[Decide], Decision | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_decide, "DECIDE_PATIENCE_S", 0.05)

    async def body() -> None:
        scheduler = ScriptedScheduler(tmp_path, decide)
        await scheduler.start()
        async with world(tmp_path, answering(NodeStatus("south"))) as here:
            here.board.controller_record = ControllerRecord(address=scheduler.address, epoch="1", policy="beam")
            await until(lambda: here.gateway.edge_view.scheduler() is not None)
            told = await here.answer(here.ask())
            assert scheduler.asked
            assert told["decision"]["decided_by"] == "gateway"
            assert told["decision"]["policy"] == "sequential"
        await scheduler.stop()

    run(body)


def test_a_table_that_does_not_exist_is_told_and_not_served(tmp_path: Path) -> None:
    spec = edge_spec()
    services = {"detection": EdgeServiceSpec(table="nothing")}

    async def body() -> None:
        async with world(tmp_path, spec=msgspec.structs.replace(spec, services=services), up=()) as here:
            client = here.ask()
            told = await here.answer(client)
            assert (client.status, told["code"]) == (503, "UNAVAILABLE")
            assert "table = 'nothing'" in told["error"]
            assert "table = 'nothing'" in here.gateway.edge_view.missing()[0]

    run(body)


def test_what_a_deployment_may_not_be_changed_to_is_told_before_nodes_hear_of_it() -> None:
    fine = edge_spec()
    wrong = msgspec.structs.replace(fine, services={"detection": EdgeServiceSpec(table="no-such-table")})
    assert asyncio.run(edge_view.network_fault(None)) == ""
    assert asyncio.run(edge_view.network_fault(fine)) == ""
    assert "no-such-table" in asyncio.run(edge_view.network_fault(wrong))
    beem = msgspec.structs.replace(fine, policy="beem")
    assert "did you mean 'beam'" in asyncio.run(edge_view.network_fault(beem))


def test_without_a_node_nothing_is_served(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, up=()) as here:
            client = here.ask()
            told = await here.answer(client)
            assert client.status == 503
            assert told["error"] == "no edge node is up"
            assert here.gateway.edge_view.missing() == ["detection, tracking: no edge node is ready"]

    run(body)


def test_a_request_whose_time_is_over_with_its_window_expires(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, spec=edge_spec(window_ms=30.0)) as here:
            client = here.ask(headers={"x-deadline-ms": "20"})
            told = await here.answer(client)
            assert (client.status, told["code"]) == (504, "EXPIRED")
            assert here.received() == {}

    run(body)


def test_means_by_service_and_node_are_those_of_the_answers(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, answering(NodeStatus("south"))) as here:
            told = [await here.answer(here.ask(headers={"x-edge-node": "south"})) for _ in range(3)]
            await soon(lambda: here.gateway.statistics().in_flight == 0)
            means = here.gateway.edge_metrics.means()["detection"]
            for node in {one["decision"]["node"] for one in told}:
                those, found = [one for one in told if one["decision"]["node"] == node], means.pop(node)
                assert (found.answers, found.failures, found.failure_ratio) == (len(those), 0, 0.0)
                each = len(those)
                assert found.accuracy == pytest.approx(sum(one["expected_accuracy"] for one in those) / each)
                assert found.delay_s == pytest.approx(sum(one["delay_s"]["total"] for one in those) / each)
                assert found.cost_usd == pytest.approx(sum(one["cost_usd"]["total"] for one in those) / each)
            assert not means

    run(body)


def test_failures_count_where_they_were_decided_for(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, failing(Attempt.EXPIRED, "south")) as here:
            await here.answer(here.ask())
            await here.answer(here.ask(headers={"x-deadline-ms": "8"}))  # refused: no node is fast enough
            await soon(lambda: here.gateway.statistics().in_flight == 0)
            means = here.gateway.edge_metrics.means()["detection"]
            assert {node: (one.answers, one.failures, one.failure_ratio) for node, one in means.items()} == {
                "south": (0, 1, 1.0),
                "none": (0, 1, 1.0),
            }

    run(body)


async def get(here: World, path: str) -> bytes:
    """A page of the gateway."""
    client = Client(b"", {"content-length": ""}, path, "GET").ask(here.gateway)
    await until(lambda: b"\r\n\r\n" in client.socket.written)
    await client.answered()
    assert client.status in (200, 503)
    return client.socket.written.partition(b"\r\n\r\n")[2]


def test_state_readiness_and_metrics_tell_of_the_edge(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, failing(Attempt.QUEUE_FULL, "south"), up=("north", "south", "middle")) as here:
            here.gateway.fleet.deployment = Deployment(name="d", services={}, workers=(), edge=edge_spec())
            told = await here.answer(here.ask(headers={"x-edge-node": "middle"}))
            await here["north"].stop()
            await until(lambda: here.gateway.edge_view.links.peer("north") is None)
            ready = msgspec.json.decode(await get(here, "/readyz"))
            assert ready == {
                "ready": True,
                "reasons": [],
                "notices": [
                    "edge node north is not ready: its worker does not take connections",
                    "edge requests are placed by sequential, not beam: no scheduler answers",
                ],
            }
            edge = msgspec.json.decode(await get(here, "/state"))["edge"]
            assert (edge["policy"], edge["placing_by"], edge["reason"]) == (
                "beam",
                "sequential",
                "no scheduler answers",
            )
            assert {node["node"]: node["ready"] for node in edge["nodes"]} == {
                "north": False,
                "middle": True,
                "south": True,
            }
            node = told["decision"]["node"]
            assert edge["requests"]["attempts"] == {"south": {"QUEUE_FULL": 1}, node: {"OK": 1}}
            assert edge["requests"]["windows"] == {"gateway": 1}
            assert edge["services"]["detection"][node]["answers"] == 1
            metrics = (await get(here, "/metrics")).decode()
            assert f'tidegate_edge_answers_total{{node="{node}",service="detection"}} 1.0' in metrics
            assert "tidegate_edge_second_choices_total 1.0" in metrics
            assert 'tidegate_edge_node_ready{node="north"} 0.0' in metrics
            assert 'tidegate_requests_total{outcome="OK",service="detection"} 1.0' in metrics
            expected = told["expected_accuracy"]
            accuracy = f'tidegate_edge_expected_accuracy_total{{node="{node}",service="detection"}} {expected}'
            assert accuracy in metrics
            index = msgspec.json.decode(await get(here, "/"))
            assert index["ask"]["tracking"] == "POST an image or a clip to /v1/tracking"
            await here["north"].start()

    run(body)


def test_views_of_several_processes_add_up(tmp_path: Path) -> None:
    """What was counted adds up; a node is ready only where every process can choose it."""
    values: list[EdgeValues] = [
        {"answers": {("s", "n"): 2.0}, "ready": {("n",): 1.0}},
        {"answers": {("s", "n"): 3.0}, "ready": {("n",): 0.0}},
    ]
    families = edge_families(
        lambda key: merged(add, (one.get(key, {}) for one in values)), [one["ready"] for one in values]
    )
    samples = {one.name: one.value for family in families for one in family.samples}
    assert samples == {"tidegate_edge_answers_total": 5.0, "tidegate_edge_node_ready": 0.0}


def test_a_large_body_is_read_with_pauses_in_which_others_are_served(tmp_path: Path) -> None:
    """A full buffer pauses reading for a moment, small pieces do not; whatever is refused meanwhile reads on."""

    async def body() -> None:
        async with world(tmp_path, answering(NodeStatus("north"))) as here:
            client = Client(bytes(400_000), {"content-type": "video/mp4"}, "/v1/tracking").connect(here.gateway)
            head = len(client.request) - 400_000
            client.send(client.request[: head + 1000])
            assert client.socket.reading
            client.send(client.request[head + 1000 : head + 200_000])
            assert not client.socket.reading
            await until(lambda: client.socket.reading)
            client.send(client.request[head + 200_000 :])
            told = await here.answer(client)
            assert told["outcome"] == "OK"
            assert here["north"].asked[0][1] == bytes(400_000)
            gone = Client(bytes(400_000), {"content-type": "video/mp4"}, "/v1/tracking").connect(here.gateway)
            gone.send(gone.request[:300_000])
            gone.leave()
            await asyncio.sleep(0.005)  # the pause ends on a connection that has ended

    run(body)
