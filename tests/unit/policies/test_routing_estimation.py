"""Online estimates: load, service times and the margin, by themselves and inside the simulated gateway."""

import numpy as np
import pytest

from policies.routing.contract import InstanceKind
from policies.routing.estimation import (
    FIRST_MARGIN,
    LAST_TAIL,
    LEAST_TAIL,
    SERVICE_RATE,
    SPENT_PART,
    TARGET_PART,
    arrive,
    arrive_batched,
    depart,
    depart_batched,
    learn_margin,
    learn_service,
    learn_spent,
    learn_tail,
    new_margin,
)
from policies.routing.queueing_model import (
    ARRIVED,
    IN_TIME,
    LATE,
    TO_HEAVY,
    ServiceModel,
    build,
    markovian,
    paper_arrivals,
)
from policies.routing.scores import scores_of
from policies.routing.simulator import run_rule

HEAVY, LIGHT = InstanceKind("heavy", 0, 0.043, 0.8278), InstanceKind("light", 1, 0.0115, 0.7769)
KINDS = (HEAVY, HEAVY, LIGHT, LIGHT)


def test_sends_and_answers_move_the_forecast() -> None:
    length, clear_s, service_s = [0, 0], [0.0, 0.0], [0.1, 0.2]
    arrive(1.0, 0, length, clear_s, service_s)
    arrive(1.05, 0, length, clear_s, service_s)
    assert length == [2, 0]
    assert clear_s == pytest.approx([1.2, 0.0])
    depart(1.12, 0, 1, length, clear_s, service_s)
    assert length == [1, 0]
    assert clear_s[0] == pytest.approx(1.22)


@pytest.mark.parametrize("maximum", [1, 3, 5])
def test_batched_forecasts_count_full_batches(maximum: int) -> None:
    """Against the plain statement: what is in service, then every batch that has begun to fill, taken as full."""
    one_s, full_s, left_s = 0.04, {1: 0.04, 3: 0.09, 5: 0.13}[maximum], 0.02
    for remaining in range(9):
        batch = min(remaining, maximum)
        length, clear_s, added_s, serving = [0], [0.0], [one_s], [0]
        depart_batched(
            1.0,
            0,
            remaining,
            batch,
            left_s if batch else 0.0,
            maximum,
            one_s,
            full_s,
            length,
            clear_s,
            added_s,
            serving,
        )
        for sent in range(1, 8):
            foreseen_s = clear_s[0] + added_s[0] - 1.0
            arrive_batched(1.0, 0, maximum, full_s, length, clear_s, added_s, serving)
            in_service, left = (1, one_s) if remaining == 0 else (batch, left_s)
            waiting = remaining + sent - in_service
            assert foreseen_s == pytest.approx(left + -(-waiting // maximum) * full_s)
            assert clear_s[0] == pytest.approx(1.0 + foreseen_s)
            assert length == [remaining + sent]


def test_service_estimate_converges() -> None:
    service_s = [0.5]
    for _ in range(200):
        learn_service(0, 0.1, service_s, 0.05)
    assert service_s[0] == pytest.approx(0.1, rel=1e-3)


def test_margin_settles_where_the_target_share_misses() -> None:
    """Sojourns of prediction x lognormal noise: the margin's quantile is known in closed form."""
    rng = np.random.default_rng(1)
    margin = new_margin()
    kept = []
    for step in range(60_000):
        predicted = float(rng.uniform(0.5, 1.0)) * margin[0]
        learn_margin(predicted, predicted * float(np.exp(0.3 * rng.standard_normal())), 1.0, margin)
        if step > 20_000:
            kept.append(margin[0])
    share = np.mean(
        [np.mean(m * rng.uniform(0.5, 1.0, 400) * np.exp(0.3 * rng.standard_normal(400)) > 1.0) for m in kept[::400]]
    )
    assert share == pytest.approx(0.02 / TARGET_PART, abs=0.0012)


@pytest.mark.parametrize("cv", [0.3, 1.0])
def test_the_tail_settles_where_the_promise_is_missed(cv: float) -> None:
    rng = np.random.default_rng(1)
    margin = new_margin(0.02)
    kept = []
    drawn = rng.gamma(1.0 / cv**2, cv**2, 100_000)
    for step, service in enumerate(drawn):
        learn_tail(0.05 * service, 0.05, margin)
        if step > 10_000:
            kept.append(margin[2])
    assert np.mean(kept) == pytest.approx(np.quantile(drawn, 0.98), rel=0.05)


def test_violations_so_far_are_counted_against_their_share_of_the_promise() -> None:
    margin = new_margin(0.02)
    assert margin[3] == 1.0
    rng = np.random.default_rng(1)
    for missed in rng.random(60_000) < 0.006:
        learn_spent(float("inf") if missed else 0.2, 0.3, margin)
    assert margin[3] == pytest.approx(0.006 / (SPENT_PART * 0.02), rel=0.15)
    for _ in range(6_931):
        learn_spent(0.3, 0.3, margin)
    assert margin[3] == pytest.approx(0.5 * 0.006 / (SPENT_PART * 0.02), rel=0.15)


@pytest.mark.parametrize("expected_s", [0.05, 0.5])
def test_the_tail_has_bounds(expected_s: float) -> None:
    margin = new_margin(0.02)
    for _ in range(10_000):
        learn_tail(0.05, expected_s, margin)
    assert margin[2] == LEAST_TAIL
    for _ in range(200):
        learn_tail(0.05, 0.001, margin)
    assert margin[2] == LAST_TAIL


@pytest.mark.parametrize(
    ("heavy_s", "light_s", "requirement_s", "cv", "heavy"),
    [(0.2, 0.05, 1.0, 1.0, 0.8), (0.15, 0.03, 0.3, 0.3, 0.8), (0.15, 0.03, 0.3, 1.0, 0.0), (0.25, 0.03, 0.3, 0.0, 0.6)],
)
def test_slow_instances_are_used_while_they_keep_the_promise_and_are_not_locked_out(
    heavy_s: float, light_s: float, requirement_s: float, cv: float, heavy: float
) -> None:
    """In calm the heavy ones answer if 98% of their services fit the requirement, however long they have been idle.

    At a variation of 1 a service of 0.15 s misses 0.3 s in 13.5%, and is hardly ever tried. That a steady one of 0.25 s
    fits takes some 2000 answers of the light ones to believe.
    """
    kinds = (InstanceKind("heavy", 0, heavy_s, 0.83),) * 2 + (InstanceKind("light", 1, light_s, 0.78),) * 2
    service = ServiceModel(kinds, requirement_s=requirement_s, law="gamma", cv=cv)
    rate = 0.1 / heavy_s
    system, state = build(service, markovian([[-rate]], [[rate]]), 8, 5, learn_trust=True, learn_rate=SERVICE_RATE)
    run_rule(system, state, "deadline", 6000.0 / rate)
    total = state.tally.sum(axis=(0, 1))
    assert heavy <= total[TO_HEAVY] / total[ARRIVED] <= heavy + 0.2
    assert total[LATE] / total[ARRIVED] < 0.02


@pytest.mark.parametrize(("law", "cv"), [("gamma", 1.0), ("lognormal", 1.0)])
def test_a_low_start_spares_the_first_burst_and_costs_nothing_later(law: str, cv: float) -> None:
    service = ServiceModel(KINDS, law=law, cv=cv)
    missed, goodput = {}, {}
    for start in (FIRST_MARGIN, None):
        system, state = build(
            service, markovian([[-180.0]], [[180.0]]), 200, 5, learn_trust=True, learn_rate=SERVICE_RATE, margin=start
        )
        run_rule(system, state, "deadline", 5.0)
        total = state.tally.sum(axis=(0, 1))
        missed[start] = total[LATE] / total[ARRIVED]
        system, state = build(service, paper_arrivals(), 8, 5, learn_trust=True, learn_rate=SERVICE_RATE, margin=start)
        run_rule(system, state, "deadline", 4000.0)
        goodput[start] = scores_of(state.tally.sum(axis=0), ("bursty", "normal"))["overall_50_50"].goodput_ratio
    assert missed[None] < 0.7 * missed[FIRST_MARGIN]
    assert goodput[None] > goodput[FIRST_MARGIN] - 5e-4


def test_a_service_whose_heavy_instance_takes_long_starts_within_its_reach() -> None:
    assert new_margin(0.02, 0.0)[0] == 0.3
    for share in (0.3, 0.35, 0.39):
        assert share < new_margin(0.02, share)[0] < 0.5
        kinds = (InstanceKind("heavy", 0, share * 0.3, 0.9), LIGHT)
        system, state = build(
            ServiceModel(kinds, law="gamma", cv=0.1), markovian([[-5.0]], [[5.0]]), 8, 5, learn_trust=True
        )
        run_rule(system, state, "deadline", 100.0)
        assert state.tally[:, :, TO_HEAVY].sum() > 0.4 * state.tally[:, :, ARRIVED].sum()


def test_what_the_margin_did_not_decide_leaves_it_alone() -> None:
    margin = new_margin()
    learn_margin(0.9 * FIRST_MARGIN, float("inf"), 1.0, margin)
    lowered = margin[0]
    assert lowered < FIRST_MARGIN
    learn_margin(1.1 * lowered, float("inf"), 1.0, margin)
    learn_margin(0.4 * lowered, float("inf"), 1.0, margin)
    assert margin[0] == lowered


@pytest.mark.parametrize(("cv", "goodput"), [(0.0, 0.807), (0.3, 0.806), (0.5, 0.805), (1.0, 0.801)])
def test_deadline_is_at_the_limit_without_tuning(cv: float, goodput: float) -> None:
    service = ServiceModel(KINDS, law="gamma", cv=cv)
    system, state = build(service, paper_arrivals(), 8, 5, learn_trust=True, learn_rate=SERVICE_RATE)
    run_rule(system, state, "deadline", 4000.0)
    even = scores_of(state.tally.sum(axis=0), ("bursty", "normal"))["overall_50_50"]
    assert even.goodput_ratio > goodput
    assert even.violation_ratio < (0.001 if cv == 0.0 else 0.02)


@pytest.mark.parametrize(("scale", "cv", "goodput"), [(1.0, 0.0, 0.8105), (1.0, 0.3, 0.808), (1.5, 0.0, 0.807)])
def test_deadline_with_batches_passes_the_limit_without_them(scale: float, cv: float, goodput: float) -> None:
    service = ServiceModel(KINDS, law="gamma", cv=cv)
    scores = {}
    for batching in (False, True):
        system, state = build(
            service, paper_arrivals(scale), 8, 5,
            learn_trust=True, learn_rate=SERVICE_RATE, batching=batching, choose_limits=batching,
        )  # fmt: skip
        run_rule(system, state, "deadline", 4000.0)
        scores[batching] = scores_of(state.tally.sum(axis=0), ("bursty", "normal"))["overall_50_50"]
    assert goodput < scores[True].goodput_ratio > scores[False].goodput_ratio
    assert scores[True].violation_ratio < 0.005


def test_deadline_recovers_within_30_s_when_heavy_service_grows_by_half() -> None:
    service = ServiceModel(KINDS, law="gamma", cv=0.3, slow_at_s=200.0, slow_factor=(1.5, 1.5, 1.0, 1.0))
    system, state = build(service, markovian([[-180.0]], [[180.0]]), 16, 5, learn_trust=True, learn_rate=SERVICE_RATE)
    run_rule(system, state, "deadline", 230.0)
    before = state.tally.sum(axis=(0, 1))
    run_rule(system, state, "deadline", 260.0)
    after = state.tally.sum(axis=(0, 1)) - before
    assert after[LATE] / after[ARRIVED] < 0.02
    assert after[IN_TIME] / after[ARRIVED] > 0.98
