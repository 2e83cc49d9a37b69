"""Edge requests on their way: windows, who decides them, attempts at nodes, second choices; every end counted."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway import edge_decide, edge_view
from protocol import node_links
from protocol.edge_records import (
    ControllerRecord,
    Decide,
    Decision,
    EdgeInfer,
    EdgeReply,
    NodeStatus,
    Placement,
)
from protocol.outcomes import Attempt
from tests.fakes.edge_gateway import (
    BODY,
    JPEG,
    NODES,
    ScriptedScheduler,
    agrees_with_the_document,
    edge_spec,
    failing,
    run,
    world,
)
from tests.fakes.scripted_client import Client, soon, tally
from tests.fakes.scripted_nodes import answering, until


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


def test_a_request_whose_time_is_over_with_its_window_expires(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, spec=edge_spec(window_ms=30.0)) as here:
            client = here.ask(headers={"x-deadline-ms": "20"})
            told = await here.answer(client)
            assert (client.status, told["code"]) == (504, "EXPIRED")
            assert here.received() == {}

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
