"""Edge requests over HTTP: heads and bodies that are let in or refused, answers, and what pages tell of the edge."""

import asyncio
from operator import add
from pathlib import Path

import msgspec
import pytest

from gateway import edge_view
from gateway.edge_exposition import EdgeValues, edge_families
from gateway.exposition import merged
from protocol.edge_records import (
    EdgeServiceSpec,
    NodeStatus,
)
from protocol.outcomes import Attempt
from protocol.records import Deployment
from tests.fakes.edge_gateway import (
    BODY,
    NODES,
    World,
    agrees_with_the_document,
    edge_spec,
    failing,
    run,
    world,
)
from tests.fakes.scripted_client import Client, soon, tally
from tests.fakes.scripted_nodes import answering, until


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
