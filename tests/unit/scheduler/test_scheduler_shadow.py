"""A shadow's bookkeeping: what arrived and ended between two looks, who decides what, and when news is heard."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import msgspec
import numpy as np
import pytest

from policies.routing.contract import Action, InstanceKind, Observation, SlotPolicy, observation_of
from policies.routing.tables import Threshold
from protocol.board import Board
from protocol.outcomes import Attempt
from protocol.peer import Peer
from protocol.records import InstanceRecord, InstanceState, RouterChoice, ServiceSpec
from scheduler.observe import Observer, Seen
from scheduler.shadow import Observed, Understudy

KINDS = (InstanceKind("heavy", 0, 0.04, 0.8), InstanceKind("light", 1, 0.01, 0.7))
SPEC = ServiceSpec(variants=("heavy", "light"), requirement_ms=300.0, router="deadline")


def counts(**ends: int) -> tuple[int, ...]:
    """Counters of a worker by the names of their codes."""
    return tuple(ends.get(attempt.name, 0) for attempt in Attempt)


def seen(a: tuple[int, ...], b: tuple[int, ...], lengths: Sequence[int] = (0, 0)) -> Seen:
    """A heavy instance a and a light one b."""
    return Seen(
        instances=("a", "b"),
        kinds=KINDS,
        observation=observation_of(list(lengths), [0.0] * 2, [()] * 2, [0] * 2, [True] * 2),
        counts={"a": a, "b": b},
    )


def test_what_arrived_is_what_ended_and_what_is_queued_more_than_before() -> None:
    observed = Observed(seen(counts(OK=10), counts(OK=5), lengths=(2, 0)))
    after = seen(counts(OK=14, LATE=1, QUEUE_FULL=2), counts(OK=8, CANCELLED=1), lengths=(1, 3))
    assert observed.take(after) == (4 + 1 + 2) + (3 + 1) + (1 + 3) - 2
    total = observed.total
    assert (total.requests, total.in_time, total.late, total.refused) == (10, 7, 1, 2)
    assert total.heavy == 7
    assert total.goodput == pytest.approx(4 * 0.8 + 3 * 0.7)
    assert total.violation_ratio == pytest.approx(3 / 10)


def test_one_that_was_bounced_counts_where_it_went_next() -> None:
    observed = Observed(seen(counts(), counts()))
    assert observed.take(seen(counts(BOUNCED=4), counts(OK=4))) == 4


def test_a_worker_that_restarted_counts_from_nothing() -> None:
    observed = Observed(seen(counts(OK=1000), counts(OK=50)))
    assert observed.take(seen(counts(OK=3), counts(OK=50))) == 3
    assert observed.total.in_time == 3


def test_an_understudy_runs_its_own_router_on_the_counted_arrivals() -> None:
    def make(router: str, kinds: Sequence[InstanceKind], spec: ServiceSpec, slot_s: float) -> SlotPolicy | None:
        assert spec.policy_file == "mine"
        return None if router == "light-only" else Threshold(tuple(kinds), slot_s=slot_s)

    now, rng = seen(counts(), counts()), np.random.default_rng(0)
    light = Understudy(RouterChoice(router="light-only", policy_file="mine"), SPEC, now, make, 1.0)
    light.run(50, 1.0, rng)
    light.run(0, 1.0, rng)
    assert light.weights == {}
    assert (light.total.requests, light.total.heavy) == (50, 0)
    table = Understudy(RouterChoice(router="threshold", policy_file="mine"), SPEC, now, make, 1.0)
    assert table.weights == pytest.approx({"a": 0.97, "b": 0.03})
    table.run(200, 1.0, rng)
    table.decide(now, rng)
    assert table.weights == pytest.approx({"a": 0.13, "b": 0.87}), "it saw its own jam"
    assert table.total.violation_ratio > 0.5


def test_an_understudy_serves_in_the_batches_that_its_router_asks_for() -> None:
    """One light instance of 10 ms and 130 requests/s: one at a time it is overloaded, in batches of five it is not."""

    class Batching(Threshold):
        def act(self, observation: Observation, rng: np.random.Generator) -> Action:
            return Action(np.array([0.0, 1.0]), (1, 1), (1, self.largest))

        largest = 5

    kinds = tuple(replace(kind, batch_s=(kind.service_s, 2.2 * kind.service_s, 3.4 * kind.service_s)) for kind in KINDS)
    now, choice = (
        msgspec.structs.replace(seen(counts(), counts()), kinds=kinds),
        RouterChoice(router="learned-po-batch"),
    )
    violations = {}
    for Batching.largest in (1, 5):
        one = Understudy(choice, SPEC, now, lambda *_: Batching(kinds), 1.0)
        for _ in range(10):
            one.run(130, 1.0, np.random.default_rng(0))
            one.decide(now, np.random.default_rng(0))
        violations[Batching.largest] = one.total.violation_ratio
    assert violations[1] > 0.2
    assert violations[5] < 0.05


def test_what_workers_register_of_batches_reaches_the_shadow() -> None:
    observer = Observer(cast(Board, None), 0.1)
    record = InstanceRecord(
        id="w/heavy", worker="w", address="unix:w", service="s", variant="heavy", capacity=15,
        state=InstanceState.READY, epoch="1", service_s=0.04, batch=(1, 5), batch_s=(0.04, 0.09, 0.14),
    )  # fmt: skip
    observer._known = {"w/heavy": record}
    kind = observer._kind("w/heavy", "heavy", {"heavy": 0})
    assert (kind.batch, kind.batch_s) == ((1, 5), (0.04, 0.09, 0.14))


def test_news_of_instances_wakes_everybody_and_of_phases_those_who_see_them() -> None:
    async def run() -> None:
        observer = Observer(cast(Board, None), 0.1)
        blind = asyncio.create_task(observer.event("s", phases=False))
        await asyncio.sleep(0)
        observer._tell("s", "phase")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not blind.done()
        observer._tell("s", "instances")
        async with asyncio.timeout(1.0):
            await blind
        seeing = asyncio.create_task(observer.event("s", phases=True))
        await asyncio.sleep(0)
        observer._tell("other", "phase")
        observer._tell("s", "phase")
        async with asyncio.timeout(1.0):
            await seeing

    asyncio.run(run())


def test_a_dead_workers_services_are_told_at_once() -> None:
    async def run() -> None:
        observer = Observer(cast(Board, None), 0.1)
        observer._records = {
            "w/heavy": InstanceRecord(
                id="w/heavy", worker="w", address="unix:w", service="s", variant="heavy", capacity=15,
                state=InstanceState.READY, epoch="1",
            )
        }  # fmt: skip
        waiting = asyncio.create_task(observer.event("s", phases=False))
        await asyncio.sleep(0)

        observer._on_link(Peer("unix:w", lambda peer: None))
        async with asyncio.timeout(1.0):
            await waiting

    asyncio.run(run())
