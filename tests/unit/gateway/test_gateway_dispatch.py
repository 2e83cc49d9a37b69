"""The dispatcher against scripted workers: at most two attempts, one end each, and every place given back."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import cast

import msgspec
import pytest

from gateway.dispatch import Dispatcher
from gateway.fleet import Fleet
from gateway.request import Answered, AnswerTimeout, ClientGone, Refused, Request
from gateway.router import HOLD
from protocol.outcomes import Attempt, Outcome
from protocol.records import BOUNCE, EXPIRE
from tests.fakes.scripted_worker import ScriptedFleet


def request(budget_s: float = 60.0, variant: str = "") -> Request:
    now_s = time.monotonic()
    return Request("r", now_s, now_s + budget_s, b"body", "image/png", 5, variant=variant)


def dispatcher(fleet: ScriptedFleet, draw: float = 0.0) -> Dispatcher:
    return Dispatcher(cast(Fleet, fleet), lambda: draw)


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20.0):
            await body()

    asyncio.run(bounded())


async def started(dispatch: Dispatcher, fleet: ScriptedFleet, one: Request) -> "asyncio.Task[Answered]":
    """The dispatch as a task that has got as far as it can."""
    task = asyncio.create_task(dispatch.dispatch(fleet.router, one))
    await asyncio.sleep(0)
    return task


def at_rest(dispatch: Dispatcher, fleet: ScriptedFleet) -> None:
    """Nothing is in flight or held: every place was given back."""
    assert [target.in_flight for target in fleet.router.targets] == [0] * len(fleet.router.targets)
    assert not any(dispatch.statistics().held.values())
    assert all(peer.in_flight == 0 for peer in fleet.peers.values())


async def refused(task: "asyncio.Task[Answered]") -> Refused:
    with pytest.raises(Refused) as caught:
        await task
    return caught.value


def test_an_answer_comes_back_with_who_gave_it() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("deadline", a="heavy", b="light")
        dispatch = dispatcher(fleet)
        task = await started(dispatch, fleet, request())
        fleet["a"].reply(Attempt.OK, payload=b'{"x":1}', service_s=0.04, batch=1)
        answered = await task
        assert (answered.target.id, answered.rank, answered.attempts) == ("a/heavy", 0, 1)
        assert answered.payload == b'{"x":1}'
        assert dispatch.statistics().attempts == {"a/heavy": {"OK": 1}}
        at_rest(dispatch, fleet)

    run(body)


@pytest.mark.parametrize(
    ("attempt", "outcome"),
    [
        (Attempt.QUEUE_FULL, Outcome.QUEUE_FULL),
        (Attempt.EXPIRED, Outcome.EXPIRED),
        (Attempt.FAILED, Outcome.FAILED),
        (Attempt.INVALID, Outcome.INVALID),
    ],
)
def test_what_computed_or_judged_is_not_tried_again(attempt: Attempt, outcome: Outcome) -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light", b="light")
        dispatch = dispatcher(fleet)
        task = await started(dispatch, fleet, request())
        fleet["a"].reply(attempt, reason="because", http_status=413 if attempt is Attempt.INVALID else 0)
        error = await refused(task)
        assert (error.outcome, error.reason) == (outcome, "because")
        assert error.http_status == (413 if attempt is Attempt.INVALID else 0)
        assert fleet["b"].asked == {}
        at_rest(dispatch, fleet)

    run(body)


@pytest.mark.parametrize("end", [Attempt.BOUNCED, Attempt.UNAVAILABLE, Attempt.LOST])
def test_what_was_not_computed_is_tried_once_elsewhere(end: Attempt) -> None:
    async def body() -> None:
        fleet = ScriptedFleet("deadline", a="heavy", b="light")
        dispatch = dispatcher(fleet)
        task = await started(dispatch, fleet, request())
        fleet["a"].die() if end is Attempt.LOST else fleet["a"].reply(end)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        fleet["b"].reply(Attempt.OK)
        answered = await task
        assert (answered.target.id, answered.attempts) == ("b/light", 2)
        assert dispatch.statistics().attempts == {"a/heavy": {end.name: 1}, "b/light": {"OK": 1}}
        assert fleet["a"].asked[1].flags & BOUNCE
        assert not fleet["b"].asked[1].flags & BOUNCE, "a second attempt is not sent on"
        assert fleet["b"].asked[1].budget_s < fleet["a"].asked[1].budget_s
        at_rest(dispatch, fleet)

    run(body)


@pytest.mark.parametrize(
    ("ends", "outcome"),
    [
        ((Attempt.BOUNCED, Attempt.BOUNCED), Outcome.EXPIRED),
        ((Attempt.LOST, Attempt.LOST), Outcome.UNAVAILABLE),
        ((Attempt.LOST, Attempt.UNAVAILABLE), Outcome.UNAVAILABLE),
        ((Attempt.BOUNCED, Attempt.QUEUE_FULL), Outcome.QUEUE_FULL),
    ],
)
def test_never_a_third_attempt(ends: tuple[Attempt, Attempt], outcome: Outcome) -> None:
    async def body() -> None:
        fleet = ScriptedFleet("deadline", a="light", b="light", c="light")
        dispatch = dispatcher(fleet)
        task = await started(dispatch, fleet, request())
        for end in ends:
            [peer] = [peer for peer in fleet.peers.values() if peer.in_flight]
            peer.die() if end is Attempt.LOST else peer.reply(end)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert (await refused(task)).outcome is outcome
        assert sum(len(peer.asked) for peer in fleet.peers.values()) == 2
        at_rest(dispatch, fleet)

    run(body)


def test_a_lost_request_is_not_sent_again_once_its_time_is_up() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light", b="light")
        dispatch = dispatcher(fleet)
        task = await started(dispatch, fleet, request(budget_s=0.0))
        fleet["a"].die()
        assert (await refused(task)).outcome is Outcome.UNAVAILABLE
        assert fleet["b"].asked == {}
        at_rest(dispatch, fleet)

    run(body)


def test_nobody_ready_is_unavailable_at_once() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform")
        assert (await refused(await started(dispatcher(fleet), fleet, request()))).outcome is Outcome.UNAVAILABLE

    run(body)


@pytest.mark.parametrize("why", [ClientGone(), AnswerTimeout()])
def test_an_abandoned_request_frees_its_place_at_the_worker(why: Exception) -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        dispatch = dispatcher(fleet)
        one = request()
        task = await started(dispatch, fleet, one)
        one.abandon(why)
        one.abandon(why)
        with pytest.raises(type(why)):
            await task
        assert fleet["a"].cancelled == [1]
        assert dispatch.statistics().attempts == {"a/light": {"CANCELLED": 1}}
        at_rest(dispatch, fleet)

    run(body)


def test_a_client_that_goes_during_the_second_attempt_frees_its_place_there() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("deadline", a="light", b="light")
        dispatch = dispatcher(fleet)
        one = request()
        task = await started(dispatch, fleet, one)
        [first] = [peer for peer in fleet.peers.values() if peer.in_flight]
        first.reply(Attempt.BOUNCED)
        [second] = [peer for peer in fleet.peers.values() if peer.in_flight]
        one.abandon(ClientGone())
        with pytest.raises(ClientGone):
            await task
        assert second is not first
        assert (first.cancelled, second.cancelled) == ([], [1])
        at_rest(dispatch, fleet)

    run(body)


def test_flags_say_what_the_worker_may_do() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("heavy-expire", a="heavy")
        dispatch = dispatcher(fleet)
        task = await started(dispatch, fleet, request())
        assert fleet["a"].asked[1].flags == EXPIRE
        fleet["a"].reply(Attempt.OK)
        await task
        fleet = ScriptedFleet("deadline", a="heavy")
        task = await started(dispatcher(fleet), fleet, request())
        assert fleet["a"].asked[1].flags == 0, "nowhere to bounce to"
        fleet["a"].reply(Attempt.OK)
        await task

    run(body)


@pytest.mark.parametrize(("margin", "flags"), [(0.5, 0), (0.9, BOUNCE)])
def test_only_what_was_forecast_to_be_in_time_may_be_bounced(margin: float, flags: int) -> None:
    """0.05 s of 0.08 s: within a margin of 0.9. With less it was sent there for want of anything better."""

    async def body() -> None:
        fleet = ScriptedFleet("deadline", a="heavy", b="heavy")
        fleet.router.margin[0] = margin
        task = await started(dispatcher(fleet), fleet, request(budget_s=0.08))
        assert fleet["a"].asked[1].flags == flags
        fleet["a"].reply(Attempt.OK)
        await task

    run(body)


def test_an_instance_that_says_that_it_is_not_ready_is_asked_no_more() -> None:
    """Until its next registration: what the board says of it is out of date."""

    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light", b="light")
        dispatch = dispatcher(fleet)  # draws 0: always the first that is open
        first = await started(dispatch, fleet, request())
        fleet["a"].reply(Attempt.UNAVAILABLE)
        fleet["b"].reply(Attempt.OK)
        assert (await first).attempts == 2
        second = await started(dispatch, fleet, request())
        fleet["b"].reply(Attempt.OK)
        assert (await second).attempts == 1
        assert len(fleet["a"].asked) == 1
        at_rest(dispatch, fleet)

    run(body)


# the single queue


def test_held_requests_go_to_idle_instances_in_order_of_arrival() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("single-queue", capacity=10, a="heavy")
        dispatch = dispatcher(fleet)
        tasks = [await started(dispatch, fleet, request(budget_s=60.0 + number)) for number in range(4)]
        assert dispatch.statistics().held == {"imagenet": 3}
        for number in range(4):
            assert len(fleet["a"].asked) == number + 1
            fleet["a"].reply(Attempt.OK)
            await tasks[number]
            await asyncio.sleep(0)
        budgets = [asked.budget_s for asked in fleet["a"].asked.values()]
        assert budgets == sorted(budgets)
        at_rest(dispatch, fleet)

    run(body)


def test_who_is_pinned_to_a_variant_does_not_wait_behind_who_is_held() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("single-queue", capacity=10, a="heavy")
        dispatch = dispatcher(fleet)
        tasks = [await started(dispatch, fleet, request(variant=variant)) for variant in ("", "", "heavy")]
        assert dispatch.statistics().held == {"imagenet": 1}
        assert len(fleet["a"].asked) == 2
        for _ in tasks:
            fleet["a"].reply(Attempt.OK)
        for task in tasks:
            await task
        at_rest(dispatch, fleet)

    run(body)


def test_the_single_queue_is_bounded_by_the_places_of_all() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("single-queue", capacity=2, a="heavy", b="light")
        dispatch = dispatcher(fleet)
        tasks = [await started(dispatch, fleet, request()) for _ in range(6)]
        assert [(await refused(task)).outcome for task in tasks[4:]] == [Outcome.QUEUE_FULL] * 2
        for peer in ("a", "b", "a", "b"):
            fleet[peer].reply(Attempt.OK)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert {(await task).attempts for task in tasks[:4]} == {1}
        at_rest(dispatch, fleet)

    run(body)


def test_who_is_held_until_it_cannot_finish_any_more_expires() -> None:
    """Its time is not over, but less is left of it than the quickest instance takes (0.05 s)."""

    async def body() -> None:
        fleet = ScriptedFleet("single-queue", capacity=10, a="heavy")
        fleet.router.configure(msgspec.structs.replace(fleet.router.spec, expire=True))
        dispatch = dispatcher(fleet)
        first, hopeless = [await started(dispatch, fleet, request(budget_s=budget_s)) for budget_s in (60.0, 0.045)]
        fleet["a"].reply(Attempt.OK)
        await first
        assert (await refused(hopeless)).outcome is Outcome.EXPIRED
        assert len(fleet["a"].asked) == 1
        at_rest(dispatch, fleet)

    run(body)


def test_a_held_client_that_leaves_gives_up_its_turn() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("single-queue", capacity=10, a="heavy")
        dispatch = dispatcher(fleet)
        requests = [request() for _ in range(3)]
        tasks = [await started(dispatch, fleet, one) for one in requests]
        requests[1].abandon(ClientGone())
        with pytest.raises(ClientGone):
            await tasks[1]
        fleet["a"].reply(Attempt.OK)
        await tasks[0]
        await asyncio.sleep(0)
        assert len(fleet["a"].asked) == 2
        fleet["a"].reply(Attempt.OK)
        await tasks[2]
        at_rest(dispatch, fleet)

    run(body)


@pytest.mark.parametrize("way", ["left", "cancelled"])
def test_who_was_held_and_then_sent_frees_its_place_when_it_goes(way: str) -> None:
    async def body() -> None:
        fleet = ScriptedFleet("single-queue", capacity=10, a="heavy")
        dispatch = dispatcher(fleet)
        first, second = request(), request()
        tasks = [await started(dispatch, fleet, one) for one in (first, second)]
        fleet["a"].reply(Attempt.OK)
        assert len(fleet["a"].asked) == 2, "the first's end sends the second"
        if way == "left":
            second.abandon(ClientGone())
        else:
            tasks[1].cancel()
        with pytest.raises((ClientGone, asyncio.CancelledError)):
            await tasks[1]
        await tasks[0]
        assert fleet["a"].cancelled == [2]
        at_rest(dispatch, fleet)

    run(body)


def test_one_timer_gives_up_each_request_at_its_own_time() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        dispatch = Dispatcher(cast(Fleet, fleet), lambda: 0.0, answer_timeout_s=0.02)
        patient, hasty = request(budget_s=60.0), request(budget_s=0.001)
        tasks = [await started(dispatch, fleet, one) for one in (patient, hasty)]
        with pytest.raises(AnswerTimeout):
            await tasks[1]
        assert not tasks[0].done()
        fleet["a"].reply(Attempt.OK, number=1)
        await tasks[0]
        later = [await started(dispatch, fleet, request(budget_s=budget_s)) for budget_s in (0.001, 0.03)]
        for task in later:  # the first's end sets the timer for the second
            with pytest.raises(AnswerTimeout):
                await task
        at_rest(dispatch, fleet)

    run(body)


def test_a_bug_before_sending_ends_the_request() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        dispatch = Dispatcher(cast(Fleet, fleet), lambda: cast(float, None))
        with pytest.raises(TypeError):
            await (await started(dispatch, fleet, request()))
        at_rest(dispatch, fleet)

    run(body)


def test_a_switch_of_router_places_whoever_is_held() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("single-queue", capacity=10, a="heavy")
        dispatch = dispatcher(fleet)
        tasks = [await started(dispatch, fleet, request()) for _ in range(3)]
        fleet.router.configure(
            fleet.router.spec.__class__(variants=("heavy", "light"), requirement_ms=300.0, router="uniform")
        )
        dispatch.release()
        await asyncio.sleep(0)
        assert len(fleet["a"].asked) == 3
        for _ in range(3):
            fleet["a"].reply(Attempt.OK)
        await asyncio.gather(*tasks)
        at_rest(dispatch, fleet)

    run(body)


@pytest.mark.parametrize("gone", ["service", "instances"])
def test_held_requests_are_not_forgotten_when_everybody_goes(gone: str) -> None:
    async def body() -> None:
        fleet = ScriptedFleet("single-queue", capacity=10, a="heavy")
        dispatch = dispatcher(fleet)
        tasks = [await started(dispatch, fleet, request()) for _ in range(3)]
        if gone == "service":
            fleet.services.clear()
        else:
            fleet.router.set_instances([], set())
        dispatch.release()
        assert [(await refused(task)).outcome for task in tasks[1:]] == [Outcome.UNAVAILABLE] * 2
        fleet["a"].reply(Attempt.OK)
        assert (await tasks[0]).rank == (0 if gone == "service" else -1)
        assert not any(dispatch.statistics().held.values())

    run(body)


def test_a_dead_workers_other_instances_take_no_second_attempt() -> None:
    """They share its process: the one second attempt goes to a worker that is alive."""

    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light", b="light", c="light")
        records = [msgspec.structs.replace(one.record, address="unix:/a" if one.id < "c" else "unix:/c")
                   for one in fleet.router.targets]  # fmt: skip
        fleet.router.set_instances(records, {"unix:/a", "unix:/c"})
        dispatch = dispatcher(fleet)
        task = await started(dispatch, fleet, request())
        assert list(fleet["a"].asked) == [1]
        fleet["a"].die()
        await asyncio.sleep(0)
        fleet["c"].reply(Attempt.OK)
        assert (await task).attempts == 2
        at_rest(dispatch, fleet)

    run(body)


def test_who_is_told_of_an_end_may_send_what_is_held_for_another_service() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("heavy-expire", a="heavy")
        other = ScriptedFleet("heavy-expire", b="heavy").router
        other.name = "other"
        fleet.services["other"] = other
        dispatch = dispatcher(fleet)
        ends: list[object] = []
        dispatch.start(fleet.router, request(), ends.append)

        def ended(end: object) -> None:
            ends.append(end)
            other.route = lambda *args, **settings: HOLD  # type: ignore[method-assign]
            dispatch.start(other, request(), ends.append)

        line = [request(), request()]
        for one in line:
            one.deadline_s = 0.0
        fleet.router.capacity[0] = 9
        route, fleet.router.route = fleet.router.route, lambda *args, **settings: HOLD  # type: ignore[method-assign]
        dispatch.start(fleet.router, line[0], ended)
        dispatch.start(fleet.router, line[1], ends.append)
        fleet.router.route = route  # type: ignore[method-assign]
        dispatch.release()
        assert [type(end) for end in ends] == [Refused, Refused]
        assert dispatch.statistics().held == {"imagenet": 0, "other": 1}

    run(body)


def test_an_end_that_cannot_be_told_keeps_nobody_else_from_hearing_theirs() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        dispatch = dispatcher(fleet)
        ends: list[object] = []

        def broken(end: object) -> None:
            raise ZeroDivisionError

        dispatch.start(fleet.router, request(), broken)
        dispatch.start(fleet.router, request(), ends.append)
        fleet["a"].die()
        assert [type(end) for end in ends] == [Refused]
        at_rest(dispatch, fleet)

    run(body)
