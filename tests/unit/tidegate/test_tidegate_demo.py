"""How the demo scales Tan's experiment to a machine: ratios to capacity, requirement and places stay the paper's."""

import numpy as np
import pytest

from policies.routing.contract import InstanceKind
from policies.routing.queueing_model import ServiceModel, build, markovian
from policies.routing.scores import Scores, scores_of
from policies.routing.simulator import run_rule
from tidegate.demo_command import (
    BURST_S,
    CALM_S,
    HEAVY,
    LIGHT,
    PAPER_BURST_LOAD,
    PAPER_HEAVY_S,
    PAPER_LIGHT_S,
    PAPER_NORMAL_LOAD,
    PAPER_REQUIREMENT_S,
    scaled_places,
    scaled_workload,
)


def test_on_the_papers_own_machine_nothing_changes() -> None:
    paper = {HEAVY: PAPER_HEAVY_S, LIGHT: PAPER_LIGHT_S}
    trace, requirement_ms = scaled_workload(paper, 30.0, seed=1)
    assert requirement_ms == 300
    assert scaled_places(paper, requirement_ms) == {HEAVY: 15, LIGHT: 15}
    assert "at 90 and 5.0 requests/s" in trace.description, "half the paper's 180 and 10: half its instances"


@pytest.mark.parametrize(("heavy_s", "light_s"), [(0.045, 0.008), (0.1, 0.05), (0.02, 0.001)])
def test_a_full_queue_lasts_for_the_papers_share_of_the_requirement(heavy_s: float, light_s: float) -> None:
    service_s = {HEAVY: heavy_s, LIGHT: light_s}
    _, requirement_ms = scaled_workload(service_s, 30.0, seed=1)
    places = scaled_places(service_s, requirement_ms)
    for variant, paper_s in ((HEAVY, 0.043), (LIGHT, 0.0115)):
        lasts_s, half_s = places[variant] * service_s[variant], service_s[variant] / 2
        assert lasts_s == pytest.approx(15 * paper_s / 0.3 * requirement_ms / 1e3, abs=half_s * 1.001)


def test_a_trace_shows_both_phases_at_the_papers_loads() -> None:
    service_s = {HEAVY: 0.045, LIGHT: 0.008}
    trace, _ = scaled_workload(service_s, 60.0, seed=3)
    arrivals = trace.arrivals
    assert arrivals.phase is not None
    bursts = [end - start for start, end, name in arrivals.phase_spans() if name == "bursty"]
    assert len(bursts) >= 2
    capacity = 1 / 0.045 + 1 / 0.008
    in_bursts = int((np.asarray(arrivals.phase) == 0).sum())
    assert in_bursts / sum(bursts) / capacity == pytest.approx(180 / (2 / 0.043 + 2 / 0.0115), rel=0.15)


def simulated(router: str, models: tuple[str, ...], *, slower: float = 1.0, places: int | None = None) -> Scores:
    """All of 400 demos of 30 s in the simulator; `slower`: the machine is, by this factor, than when it was measured.

    Service times as in a quiet run here, scattered by a quarter (gamma); accuracies as measured.
    """
    service_s, accuracy = {HEAVY: 0.044, LIGHT: 0.0082}, {HEAVY: 0.9922, LIGHT: 0.9423}
    requirement_s = PAPER_REQUIREMENT_S / PAPER_HEAVY_S * service_s[HEAVY]
    scaled = scaled_places(service_s, 1e3 * requirement_s)
    kinds = tuple(
        InstanceKind(one, 0 if one == HEAVY else 1, service_s[one], accuracy[one], places or scaled[one])
        for one in models
    )
    service = ServiceModel(
        kinds,
        requirement_s=requirement_s,
        law="gamma",
        cv=0.25,
        expire=True,
        slow_at_s=0.0,
        slow_factor=(slower,) * len(kinds),
    )
    capacity = 1 / service_s[HEAVY] + 1 / service_s[LIGHT]
    burst, calm = PAPER_BURST_LOAD * capacity, PAPER_NORMAL_LOAD * capacity
    arrivals = markovian(
        [[-burst - 1 / BURST_S, 1 / BURST_S], [1 / CALM_S, -calm - 1 / CALM_S]],
        [[burst, 0.0], [0.0, calm]],
        ("bursty", "normal"),
    )
    learns = router == "deadline"
    system, state = build(
        service, arrivals, 400, 3, bounce=learns, learn_trust=learns, learn_rate=0.05 if learns else 0.0
    )
    run_rule(system, state, router, 30.0)
    return scores_of(state.tally.sum(axis=0), ("bursty", "normal"))["overall"]


@pytest.mark.slow
@pytest.mark.parametrize("slower", [1.0, 1.1, 1.2])
def test_deadline_is_the_best_of_the_demos_four_over_many_traces(slower: float) -> None:
    """One demo of 600 requests can go either way by chance; 400 of them cannot. Figures: docs/results/serving.md."""
    found = {
        "light-only": simulated("light-only", (LIGHT, LIGHT), slower=slower),
        "heavy-only": simulated("heavy-only", (HEAVY, HEAVY), slower=slower),
        "single-queue": simulated("single-queue", (HEAVY, LIGHT), slower=slower),
        "deadline": simulated("deadline", (HEAVY, LIGHT), slower=slower),
        "deadline, 15 places each": simulated("deadline", (HEAVY, LIGHT), slower=slower, places=15),
    }
    for name, scores in found.items():
        print(f"{slower}: {name}: goodput {scores.goodput_ratio:.2%}, violations {scores.violation_ratio:.2%}")
    assert all(found["deadline"].goodput_ratio >= scores.goodput_ratio for scores in found.values())
