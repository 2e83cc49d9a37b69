"""A shadow's bookkeeping: what arrived and ended between two looks, who decides what, and when news is heard."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import msgspec
import numpy as np
import pytest

from policies.routing.contract import Action, InstanceKind, Observation, SlotPolicy, observation_of
from policies.routing.tables import Stationary, Threshold
from protocol.board import Board
from protocol.outcomes import Attempt
from protocol.peer import Peer
from protocol.records import Deployment, InstanceRecord, InstanceState, RouterChoice, ServiceSpec, ShadowRecord
from scheduler.config import SchedulerConfig
from scheduler.metrics import SchedulerMetrics
from scheduler.observe import Observer, Seen
from scheduler.shadow import Observed, ShadowLoop, Understudy
from tests.fakes.virtual_time import run

KINDS = (InstanceKind("heavy", 0, 0.04, 0.8), InstanceKind("light", 1, 0.01, 0.7))
SPEC = ServiceSpec(variants=("heavy", "light"), requirement_ms=300.0, router="deadline")
CONFIG = SchedulerConfig(board_url="redis://nowhere")


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


def test_what_a_worker_held_when_it_died_did_not_leave_again() -> None:
    observed = Observed(seen(counts(OK=1000), counts(), lengths=(7, 0)))
    assert observed.take(seen(counts(OK=3), counts(), lengths=(2, 0))) == 3 + 2


def test_of_a_worker_that_does_not_answer_nothing_is_known_until_it_does() -> None:
    observed = Observed(seen(counts(), counts(), lengths=(6, 1)))
    silent = seen(counts(), counts(), lengths=(0, 2))
    assert observed.take(msgspec.structs.replace(silent, counts={"b": counts()})) == 1
    assert observed.take(seen(counts(OK=2), counts(), lengths=(5, 2))) == 1


def test_who_did_not_answer_at_one_look_is_counted_from_its_last_word() -> None:
    observed = Observed(seen(counts(OK=1000), counts(OK=50)))
    silent = seen(counts(), counts(OK=51))
    del silent.counts["a"]
    assert observed.take(silent) == 1
    assert observed.take(seen(counts(OK=1004), counts(OK=51))) == 4
    assert observed.total.in_time == 5


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


def test_an_understudy_that_sees_the_phase_decides_when_it_changes() -> None:
    calm, burst = (
        msgspec.structs.replace(one, observation=replace(one.observation, phase=phase))
        for one, phase in ((seen(counts(), counts()), 1), (seen(counts(), counts()), 0))
    )
    policies: dict[str, SlotPolicy] = {"stationary": Stationary(KINDS, (0.0, 1.0)), "threshold": Threshold(KINDS)}
    for router, heavy in (("stationary", 0.0), ("threshold", 0.97)):
        one = Understudy(RouterChoice(router=router), SPEC, calm, lambda router, *_: policies[router], 1.0)
        one.run(0, 0.5, np.random.default_rng(0))
        one.turn(burst, np.random.default_rng(0))
        assert one.weights["a"] == pytest.approx(heavy), router


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


class Scripted:
    """An observer and a board: `arrivals(now_s)` so far, all served at once by the light instance."""

    def __init__(self, arrivals: Callable[[float], int], delay_s: Callable[[float], float] = lambda now_s: 0.0) -> None:
        self.deployment = Deployment(name="d", services={"s": SPEC}, workers=())
        self.shadow_choices = {"s": RouterChoice(router="threshold")}
        self.told: list[tuple[float, ShadowRecord]] = []
        self._arrivals = arrivals
        self._delay_s = delay_s

    async def observe(self, service: str, spec: ServiceSpec) -> Seen:
        now_s = asyncio.get_running_loop().time()
        await asyncio.sleep(self._delay_s(now_s))
        return seen(counts(), counts(OK=self._arrivals(now_s)))

    async def put_shadow(self, service: str, record: ShadowRecord) -> None:
        self.told.append((asyncio.get_running_loop().time(), record))

    def watched(self, seconds: float) -> list[tuple[float, ShadowRecord]]:
        """What is told within so many seconds, by a shadow that starts at second 2."""

        def make(router: str, kinds: Sequence[InstanceKind], spec: ServiceSpec, slot_s: float) -> SlotPolicy | None:
            return Threshold(tuple(kinds), calm=1.0, slot_s=slot_s) if router == "threshold" else None

        async def at_once(work: Callable[..., None], *given: object) -> None:  # virtual time does not wait for threads
            work(*given)

        async def watch() -> None:
            loop = ShadowLoop(
                "s", cast(Board, self), cast(Observer, self), make, CONFIG, SchedulerMetrics(), lambda: True
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await loop.run()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio, "to_thread", at_once)
            run(watch())
        return self.told


def test_a_burst_meets_the_table_that_stands_when_it_begins() -> None:
    """36 requests in the last fifth of a slot, all to a heavy instance that serves 25 a second and holds 15."""
    told = Scripted(lambda now_s: min(36, max(0, round((now_s - 4.8) * 180.0)))).watched(8.5)
    assert [round(at_s, 1) for at_s, _ in told] == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0], "told once a slot"
    assert [record.slots for _, record in told] == [1, 2, 3, 4, 5, 6]
    last = told[-1][1]
    assert (last.shadow.requests, last.observed.requests) == (36, 36)
    assert last.shadow.heavy_ratio == 1.0
    assert 15 <= last.shadow.violation_ratio * 36 <= 30, "spread over the slot, each would have found a place"


def test_a_late_look_makes_no_time_disappear() -> None:
    """20 requests a second, one at a time of 40 ms: never late, also if the workers take half a second to answer."""
    told = Scripted(lambda now_s: int(now_s * 20.0), lambda now_s: 0.45 if round(now_s * 10) % 7 == 0 else 0.0).watched(
        20
    )
    last = told[-1][1]
    assert last.slots >= 16
    assert last.shadow.requests == pytest.approx(last.observed.requests, abs=10)
    assert last.active.violation_ratio == 0.0


def test_silence_makes_no_burst_of_what_arrived_meanwhile() -> None:
    """40 requests a second to the light instance; for 0.5 s of every 2 nobody answers."""

    class Silent(Scripted):
        async def observe(self, service: str, spec: ServiceSpec) -> Seen:
            answer = await super().observe(service, spec)
            quiet = asyncio.get_running_loop().time() % 2.0 > 1.5
            return msgspec.structs.replace(answer, counts={}) if quiet else answer

    told = Silent(lambda now_s: int(now_s * 40.0)).watched(12)
    assert told[-1][1].observed.requests > 300
    assert told[-1][1].active.requests == pytest.approx(told[-1][1].observed.requests, abs=10)
    assert told[-1][1].active.heavy_ratio > 0.5, "in one burst they would not fit"


def test_who_stays_away_is_not_waited_for() -> None:
    observed = Observed(seen(counts(), counts()))
    silent = msgspec.structs.replace(seen(counts(), counts()), counts={"b": counts()})
    assert observed.silent(silent)
    observed.take(silent)
    assert not observed.silent(silent)


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
    async def scenario() -> None:
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

    asyncio.run(scenario())


def test_a_dead_workers_services_are_told_at_once() -> None:
    async def scenario() -> None:
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

    asyncio.run(scenario())


def test_a_shadow_that_has_ended_leaves_no_figures_behind() -> None:
    """Nobody asks for it any more, or its service is gone; those of other services stay."""

    class Deaf:
        async def put_shadow(self, service: str, record: ShadowRecord) -> None:
            pass

    async def body() -> None:
        metrics, board = SchedulerMetrics(), cast(Board, Deaf())
        observer = SimpleNamespace(shadow_choices={}, deployment=None)

        def figure(service: str) -> float | None:
            labels = {"service": service, "of": "shadow", "ratio": "goodput"}
            return metrics.registry.get_sample_value("tidegate_shadow_ratio", labels)

        def loop_of(service: str) -> ShadowLoop:
            config = SchedulerConfig(board_url="redis://nobody")
            return ShadowLoop(service, board, cast(Observer, observer), lambda *_: None, config, metrics, lambda: True)

        record = ShadowRecord(choice=RouterChoice(router="light-only"), active_router="deadline")
        gone, other = loop_of("s"), loop_of("other")
        for one in (gone, other):
            await one._say(record)
        running = asyncio.create_task(gone.run())
        await asyncio.sleep(0.5)
        assert figure("s") == 0.0
        await asyncio.sleep(1.0)
        assert figure("s") is None
        assert figure("other") == 0.0
        await gone._say(record)
        running.cancel()
        await asyncio.wait([running])
        assert figure("s") is None

    run(body())
