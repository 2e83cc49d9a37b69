"""Windows of edge requests in time: when they close, what their decision is told, and what ends leave behind."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from gateway import edge, edge_decide
from gateway.edge_exchange import EdgeExchange
from policies.placement.live import HANDLING_S, OnTheWay
from protocol.edge_records import ControllerRecord, Decide, Decision, EdgeInfer, EdgeReply, NodeStatus, Placement
from protocol.outcomes import Attempt
from tests.fakes.edge_gateway import JPEG, NODES, ScriptedScheduler, World, edge_spec, failing, run, world
from tests.fakes.scripted_client import Client, soon, tally
from tests.fakes.scripted_nodes import answering, until

WINDOW_MS = 120.0
PATIENT = {"x-deadline-ms": "20000"}  # on a busy machine, too


async def at_rest(here: World) -> None:
    """Every request has ended, and nothing that is kept for one is left."""
    await soon(lambda: here.gateway.statistics().in_flight == 0)
    counts = here.gateway.edge.counts()
    assert (counts.waiting, counts.under_way) == (0, 0)


@pytest.mark.parametrize("before", ["full", "left"])
def test_each_window_has_its_own_time(tmp_path: Path, before: str) -> None:
    """The timer of one that closed early, or whose only client left, does not cut the next one short."""

    async def body() -> None:
        spec = edge_spec(window_ms=WINDOW_MS, per_service=2)
        async with world(tmp_path, answering(NodeStatus("north")), spec) as here:
            early = [here.ask() for _ in range(2 if before == "full" else 1)]
            if before == "left":
                early[0].leave()
            timer = here.gateway.edge._closing
            assert timer is not None
            assert timer.cancelled()
            await asyncio.sleep(WINDOW_MS / 2e3)
            told = await here.answer(here.ask())
            assert told["delay_s"]["real"]["window"] >= WINDOW_MS / 1e3
            if before == "full":
                for client in early:
                    await here.answer(client)
            await at_rest(here)

    run(body)


def test_a_window_is_decided_for_the_network_that_its_requests_were_admitted_to(tmp_path: Path) -> None:
    """A deployment comes in between: the open window closes, and the next request begins another."""

    async def body() -> None:
        spec = edge_spec(window_ms=WINDOW_MS)
        async with world(tmp_path, answering(NodeStatus("north")), spec) as here:
            view = here.gateway.edge_view
            former = view.net
            first = here.ask(headers=PATIENT)
            view.configure(edge_spec(window_ms=WINDOW_MS, per_service=3))
            await until(lambda: view.net is not former)
            second = here.ask(headers=PATIENT)
            for client in (first, second):
                assert (await here.answer(client))["outcome"] == "OK"
            assert here.gateway.edge.counts().windows == {"gateway": 2}
            await at_rest(here)

    run(body)


async def with_scheduler(here: World, scheduler: ScriptedScheduler) -> None:
    """The gateway has found it."""
    here.board.controller_record = ControllerRecord(address=scheduler.address, epoch="1", policy="beam")
    await until(lambda: here.gateway.edge_view.scheduler() is not None)


def test_who_leaves_while_its_window_is_decided_is_sent_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others of the window are; a scheduler that was given up is told so."""
    monkeypatch.setattr(edge_decide, "DECIDE_PATIENCE_S", 0.1)

    async def body() -> None:
        scheduler = ScriptedScheduler(tmp_path, lambda asked: None)
        await scheduler.start()
        async with world(tmp_path, answering(NodeStatus("north")), edge_spec(per_service=2)) as here:
            await with_scheduler(here, scheduler)
            leaves, stays = (here.ask(headers=PATIENT | {"x-edge-node": name}) for name in ("south", "north"))
            await until(lambda: bool(scheduler.asked))
            leaves.leave()
            assert (await here.answer(stays))["outcome"] == "OK"
            assert list(here.received()) == ["north"]
            await until(lambda: scheduler.cancelled == 1)
            assert tally(here.gateway) == {"CANCELLED": 1, "OK": 1}
            await at_rest(here)
        await scheduler.stop()

    run(body)


def test_what_requests_took_beyond_their_predictions_is_kept_off_the_next_ones_time(tmp_path: Path) -> None:
    def decide(asked: Decide) -> Decision:
        return Decision(asked.window, "beam", (Placement(3, 2, 1, access_s=0.25, transmission_s=0.5, compute_s=1.0),))

    async def body() -> None:
        scheduler = ScriptedScheduler(tmp_path, decide)
        await scheduler.start()
        async with world(tmp_path, answering(NodeStatus("middle"))) as here:
            await with_scheduler(here, scheduler)
            told = await here.answer(here.ask(headers=PATIENT))
            ((_, beyond_s),) = here.gateway.edge._overhead._seen
            # The scripted node answers at once: 1.75 s before it was predicted to.
            assert 0.0 <= beyond_s + 1.75 <= told["delay_s"]["real"]["total"]
            assert scheduler.asked[0].requests[0].deadline_s <= 20.0
            here.gateway.edge._overhead.learn(asyncio.get_running_loop().time(), 9.0)
            await here.answer(here.ask(headers=PATIENT))
            assert scheduler.asked[1].requests[0].deadline_s <= 20.0 - 9.0
        await scheduler.stop()

    run(body)


def test_a_node_that_was_full_is_chosen_again_after_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both placements of a request count as on their way; nodes are shunned, not those that pass requests on."""
    monkeypatch.setattr(edge, "SHUN_S", 0.1)
    placed: list[int] = []
    there_s: list[float] = []
    add = OnTheWay.add

    def spy(self: OnTheWay, requests: Sequence[Any], placements: Sequence[Placement], now_s: float) -> None:
        placed.extend(placement.node for placement in placements)
        there_s.extend(now_s + one.access_s + one.transmission_s + HANDLING_S for one in placements)
        add(self, requests, placements, now_s)

    monkeypatch.setattr(OnTheWay, "add", spy)

    async def body() -> None:
        async with world(tmp_path, failing(Attempt.QUEUE_FULL, "south")) as here:
            told = await here.answer(here.ask(headers={"x-edge-node": "middle"}))
            assert [NODES[node] for node in placed] == ["south", told["decision"]["node"]]
            assert set(here.gateway.edge._shunned) == {"south"}
            forgotten_s = max(time.monotonic() + 0.1, *there_s)
            await until(lambda: time.monotonic() > forgotten_s)
            await here.answer(here.ask(headers={"x-edge-node": "middle"}))
            assert NODES[here.received()["middle"][2].node] == "south"

    run(body)


def test_an_attempt_that_nobody_waits_for_any_more_is_counted_and_its_body_freed(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path) as here:
            client = here.ask(headers={"x-edge-node": "south"})
            await here["south"].arrived.wait()
            (request,) = here.gateway.edge._under_way
            assert request.body
            client.leave()
            assert here.gateway.edge.counts().attempts == {"south": {"CANCELLED": 1}}
            assert not request.body
            assert request.give_up is not None
            assert request.give_up.__self__.cancelled(), "its timer keeps nothing alive"  # type: ignore[attr-defined]
            await at_rest(here)

    run(body)


@pytest.mark.parametrize("attempt", [Attempt.BOUNCED, Attempt.LOST])
def test_ends_that_are_no_outcomes_are_told_as_unavailable(tmp_path: Path, attempt: Attempt) -> None:
    """No node of ours answers so; one of another version may."""

    def script(asked: EdgeInfer, payload: bytes) -> tuple[EdgeReply, bytes]:
        return EdgeReply(attempt, NodeStatus(NODES[asked.node]), reason="not here"), b""

    async def body() -> None:
        async with world(tmp_path, script) as here:
            client = here.ask()
            told = await here.answer(client)
            assert (client.status, told["code"], told["error"]) == (503, "UNAVAILABLE", "not here")
            assert tally(here.gateway) == {"UNAVAILABLE": 1}

    run(body)


def test_a_node_that_drains_takes_nothing_new(tmp_path: Path) -> None:
    async def body() -> None:
        async with world(tmp_path, answering(NodeStatus("north"))) as here:
            north = next(one for one in here.board.node_records if one.node == "north")
            here.board.node_records.remove(north)
            here.board.node_records.append(msgspec.structs.replace(north, draining=True))
            await here.board.tell()
            told = await here.answer(here.ask(headers={"x-edge-node": "north"}))
            assert told["decision"]["entry"] == "middle"
            assert told["decision"]["node"] != "north"

    run(body)


def test_a_scheduler_that_the_board_forgot_is_kept_and_one_that_moved_is_followed(tmp_path: Path) -> None:
    async def body() -> None:
        folders = [tmp_path / name for name in "ab"]
        for folder in folders:
            folder.mkdir()
        former, latter = (ScriptedScheduler(folder, lambda asked: None) for folder in folders)
        await former.start()
        await latter.start()
        async with world(tmp_path, answering(NodeStatus("north"))) as here:
            view = here.gateway.edge_view
            await with_scheduler(here, former)
            here.board.controller_record = None
            await asyncio.sleep(0.05)  # read several times
            assert view.placing() == ("beam", "")
            link = view._link
            await with_scheduler(here, latter)
            await until(lambda: (peer := view.scheduler()) is not None and peer.address == latter.address)
            assert link is not None
            assert link.done(), "nobody keeps a link to where nobody decides"
        await former.stop()
        await latter.stop()

    run(body)


def test_a_body_in_many_pieces_arrives_whole_and_its_time_limit_ends_with_it(tmp_path: Path) -> None:
    whole = np.random.default_rng(3).bytes(600 * 512)

    async def body() -> None:
        async with world(tmp_path, answering(NodeStatus("north"))) as here:
            client = Client(whole, JPEG | PATIENT, "/v1/detection").connect(here.gateway)
            head = len(client.request) - len(whole)
            client.send(client.request[:head])
            timer = cast(EdgeExchange, client.connection.cycle)._body_timer
            assert timer is not None
            for start in range(head, len(client.request), 512):
                assert not timer.cancelled()
                client.send(client.request[start : start + 512])
            assert timer.cancelled()
            assert (await here.answer(client))["outcome"] == "OK"
            assert here["north"].asked[0][1] == whole

    run(body)
