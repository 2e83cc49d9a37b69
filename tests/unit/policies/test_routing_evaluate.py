"""Scoring, fitting, advice and the way from a workload to an installed router."""

import json
from pathlib import Path

import numpy as np
import pytest

from policies.routing.advise import advise, at_load
from policies.routing.contract import RoutingError, observation_of
from policies.routing.evaluate import LEARNED, ROUTERS, Result, evaluate, paper_evaluation, phase_rates
from policies.routing.fit import fit, statistics
from policies.routing.learn import learn, rank
from policies.routing.presets import HEAVY, LIGHT, PAPER_KINDS, Preset, paper_service
from policies.routing.queueing_model import paper_arrivals, periodic_arrivals, trace_arrivals
from policies.routing.scores import Scores
from policies.routing.tables import Infaas, Stationary, Threshold
from policies.routing.workload import Arrivals, MarkovianArrivalProcess, Poisson, paper_process


@pytest.mark.parametrize("router", sorted(set(ROUTERS) - set(LEARNED)))
def test_every_rule_is_scored_and_shares_add_up(router: str) -> None:
    result = evaluate(router, paper_service(), paper_arrivals(), slots=4_000, seed=1)
    assert set(result.scores) == {"overall", "overall_50_50", "bursty", "normal"}
    for s in result.scores.values():
        assert 0.0 <= s.goodput_ratio <= 0.8278 + 1e-9
        assert s.violation_ratio == pytest.approx(s.rejection_ratio + s.delay_ratio)
    assert json.dumps(result.as_dict())


def test_known_places_in_table_2() -> None:
    """Figures that follow from arithmetic: one light model answers everything in time, and so on."""
    found = paper_evaluation(["light-only", "heavy-only", "deadline"], paper_arrivals(), slots=60_000, seed=2)
    light, heavy, deadline = (found[r].scores for r in ("light-only", "heavy-only", "deadline"))
    assert light["overall"].goodput_ratio == pytest.approx(0.7769, abs=1e-4)
    assert light["overall"].heavy_ratio == 0.0
    assert heavy["bursty"].rejection_ratio == pytest.approx(1 - 4 / 0.043 / 180, abs=0.02)
    assert heavy["bursty"].goodput_ratio < 0.02
    assert deadline["overall_50_50"].goodput_ratio > 0.807
    assert deadline["overall_50_50"].violation_ratio < 0.001


def test_all_routers_meet_the_same_arrivals() -> None:
    results = [evaluate(r, paper_service(), paper_arrivals(), slots=3_000, seed=9) for r in ("uniform", "threshold")]
    assert results[0].scores["bursty"].requests == results[1].scores["bursty"].requests


def test_a_trace_is_run_to_its_end() -> None:
    arrivals = trace_arrivals(np.linspace(0.0, 50.0, 500))
    for router in ("deadline", "threshold"):
        result = evaluate(router, paper_service(), arrivals, slots=1, seed=1)
        assert result.scores["overall"].requests == 500
        assert result.scores["overall"].goodput_ratio > 0.77


@pytest.mark.parametrize(
    ("times", "message"), [([0.0, 2.0, 1.0], "decreases"), ([0.0, float("nan")], "missing"), ([], "empty")]
)
def test_bad_traces_are_named(times: list[float], message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        trace_arrivals(times)


def test_table_rules_act_on_observations() -> None:
    rng = np.random.default_rng(0)
    calm = observation_of([1, 0, 0, 0], [0.01, 0, 0, 0], [[0.01], [], [], []], [1, 0, 0, 0], [True] * 4, phase=1)
    busy = observation_of([1, 9, 0, 2], [0.01] * 4, [[0.01]] * 4, [1] * 4, [True] * 4, phase=0)
    assert Threshold(PAPER_KINDS).act(calm, rng).probabilities[:2].sum() == pytest.approx(0.97)
    assert Threshold(PAPER_KINDS).act(busy, rng).probabilities[:2].sum() == pytest.approx(0.13)
    assert Infaas(PAPER_KINDS).act(busy, rng).probabilities == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    stationary = Stationary.solve(PAPER_KINDS, phase_rates(paper_arrivals()), 0.3, 0.02)
    assert stationary.act(calm, rng).probabilities[:2].sum() == pytest.approx(0.9999)
    with pytest.raises(RoutingError, match="phase"):
        stationary.act(observation_of([0] * 4, [0] * 4, [[]] * 4, [0] * 4, [True] * 4), rng)


def test_the_paper_process_is_found_again_in_its_trace() -> None:
    arrivals = paper_process().generate(np.random.default_rng(5), duration_s=20_000.0)
    found = fit(arrivals)
    assert arrivals.phase is not None
    assert found.rates == pytest.approx((180.0, 10.0), rel=0.03)
    changes = int((np.diff(arrivals.phase) != 0).sum()) / 2
    assert found.hold_s[0] == pytest.approx((arrivals.phase == 0).sum() / 180.0 / changes, rel=0.15)
    seen = statistics(arrivals)
    made = statistics(found.process.generate(np.random.default_rng(6), duration_s=20_000.0))
    assert found.process.rate() == pytest.approx(seen.rate, rel=0.1)
    assert made.autocorrelation[0] == pytest.approx(seen.autocorrelation[0], abs=0.05)


def test_a_poisson_trace_has_no_dispersion_and_its_fit_neither() -> None:
    arrivals = Poisson(50.0).generate(np.random.default_rng(1), duration_s=150.0)
    seen = statistics(arrivals)
    assert seen.scv == pytest.approx(1.0, abs=0.06)
    assert seen.dispersion[2] == pytest.approx(1.0, abs=0.15)
    found = fit(arrivals)
    assert found.process.rate() == pytest.approx(50.0, rel=0.03)


def test_too_short_a_trace_is_named() -> None:
    with pytest.raises(RoutingError, match="at least"):
        fit(Arrivals(np.arange(5.0), None, 5.0))


def test_loads_scale_rates_and_leave_holding_times() -> None:
    double = at_load(paper_arrivals(), 2.0)
    assert double.d0 is not None
    MarkovianArrivalProcess(double.d0, double.d1 if double.d1 is not None else double.d0)
    assert phase_rates(double) == pytest.approx((360.0, 20.0))
    assert double.d0[0, 1] == pytest.approx(0.036)
    assert phase_rates(at_load(periodic_arrivals(), 0.5)) == pytest.approx((90.0, 5.0))


def test_advice_finds_the_load_that_breaks_and_what_moves_it() -> None:
    advice = advise(paper_service(), paper_arrivals(), slots=2_000)
    by_name = {c.what: c.breaks_at for c in advice.changes}
    assert advice.keeps
    # Two heavy and two light instances serve 46.5 + 173.9 of a burst's 180 a second.
    assert by_name["as it is"] == pytest.approx(1.22, abs=0.15)
    assert by_name[f"one more {LIGHT}"] > by_name[f"one more {HEAVY}"] > by_name["as it is"]


def test_ranking_puts_the_promise_first() -> None:
    def of(router: str, goodput: float, violations: float) -> Result:
        return Result(router, {"overall": Scores(1, goodput, 0.0, violations, violations, 0.0, 0.0)})

    ranked = rank([of("a", 0.9, 0.05), of("b", 0.7, 0.01), of("c", 0.8, 0.02), of("d", 0.95, 0.03)], 0.02)
    assert [r.router for r in ranked] == ["c", "b", "d", "a"]


def test_learning_installs_the_winner_whichever_it_is(tmp_path: Path) -> None:
    small = Preset(slots=4_000, environments=20, slots_per_update=1_000, minibatch=500, epochs=1)
    found = learn(paper_service(), paper_arrivals(), tmp_path, minutes=0.5, slots=3_000, threads=1, settings=small)
    ranking = json.loads((tmp_path / "ranking.json").read_text())
    assert ranking["winner"] == found.winner == "deadline"
    assert set(ranking["results"]) >= {"learned-po", "learned-set", "threshold", "deadline"}
    assert found.artifact.exists()
