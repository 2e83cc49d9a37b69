"""`learned-request` in the simulator, and the search that trains it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from policies.routing import evolution
from policies.routing.contract import RoutingError
from policies.routing.evolution import Evolution, Scenario, trial
from policies.routing.per_request import WEIGHTS, first_weights
from policies.routing.presets import paper_service
from policies.routing.queueing_model import ARRIVED, IN_TIME, LATE, LENGTH, QUEUE_FULL, build, paper_arrivals
from policies.routing.simulator import run_rule


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evolution, "SCENARIOS", (Scenario("gamma", 0.5), Scenario("gamma", 0.3, batching=True)))
    monkeypatch.setattr(evolution, "PAIRS", 2)


@pytest.mark.parametrize("scenario", [Scenario("gamma", 0.3), Scenario("gamma", 0.5, gateways=4)])
def test_untrained_it_behaves_much_like_deadline(scenario: Scenario) -> None:
    weights = first_weights(np.random.default_rng(0))
    rule, learned = (
        trial(scenario, paper_arrivals(), environments=8, duration_s=2000.0, seed=3, weights=w) for w in (None, weights)
    )
    assert learned.requests == rule.requests
    assert learned.goodput_ratio == pytest.approx(rule.goodput_ratio, abs=0.004)


def test_every_request_ends_once() -> None:
    service = replace(paper_service(), law="lognormal", cv=1.0)
    weights = np.random.default_rng(1).normal(size=WEIGHTS)
    system, state = build(service, paper_arrivals(), 6, 2, weights=weights, learn_trust=True, learn_rate=0.05)
    run_rule(system, state, "learned-request", 400.0)
    total = state.tally.sum(axis=(0, 1))
    held = state.queue[:, :, LENGTH].sum()
    assert total[ARRIVED] == total[IN_TIME] + total[LATE] + total[QUEUE_FULL] + held


def test_without_weights_it_does_not_run() -> None:
    system, state = build(paper_service(), paper_arrivals(), 1, 1)
    with pytest.raises(RoutingError, match="80 weights"):
        run_rule(system, state, "learned-request", 1.0)


@pytest.mark.usefixtures("small")
def test_a_search_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    through, stopped = Evolution(4), Evolution(4)
    before = through.weights.copy()
    for _ in range(3):
        through.generation(0.05)
    stopped.generation(0.05)
    stopped.save(tmp_path / "kept.json")
    resumed = Evolution(9)
    resumed.load(tmp_path / "kept.json")
    for _ in range(2):
        resumed.generation(0.05)
    assert np.array_equal(resumed.weights, through.weights)
    assert not np.array_equal(before, through.weights)


@pytest.mark.usefixtures("small")
def test_the_search_repairs_a_spoilt_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evolution, "PAIRS", 4)
    search = Evolution(1)
    search.weights[-1] = -6.0  # it trusts no forecast: the light instances get everything
    first = evolution.fitness(search.weights, 7)
    for _ in range(15):
        search.generation(0.1)
    assert evolution.fitness(search.weights, 7) > first + 0.001
