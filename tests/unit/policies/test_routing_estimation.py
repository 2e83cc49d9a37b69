"""Online estimates: load, service times and the margin, by themselves and inside the simulated gateway."""

import numpy as np
import pytest

from policies.routing.contract import InstanceKind
from policies.routing.estimation import FIRST_MARGIN, arrive, depart, learn_margin, learn_service, new_margin
from policies.routing.queueing_model import ARRIVED, IN_TIME, LATE, ServiceModel, build, markovian, paper_arrivals
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
    assert share == pytest.approx(0.005, abs=0.002)


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
    system, state = build(service, paper_arrivals(), 8, 5, learn_trust=True, learn_rate=0.02)
    run_rule(system, state, "deadline", 4000.0)
    even = scores_of(state.tally.sum(axis=0), ("bursty", "normal"))["overall_50_50"]
    assert even.goodput_ratio > goodput
    assert even.violation_ratio < (0.001 if cv == 0.0 else 0.02)


def test_deadline_recovers_within_30_s_when_heavy_service_grows_by_half() -> None:
    service = ServiceModel(KINDS, law="gamma", cv=0.3, slow_at_s=200.0, slow_factor=(1.5, 1.5, 1.0, 1.0))
    system, state = build(service, markovian([[-180.0]], [[180.0]]), 16, 5, learn_trust=True, learn_rate=0.02)
    run_rule(system, state, "deadline", 230.0)
    before = state.tally.sum(axis=(0, 1))
    run_rule(system, state, "deadline", 260.0)
    after = state.tally.sum(axis=(0, 1)) - before
    assert after[LATE] / after[ARRIVED] < 0.02
    assert after[IN_TIME] / after[ARRIVED] > 0.98
