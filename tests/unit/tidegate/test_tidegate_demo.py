"""How the demo scales Tan's experiment to a machine: ratios to capacity, requirement and places stay the paper's."""

import numpy as np
import pytest

from tidegate.demo_command import (
    HEAVY,
    LIGHT,
    PAPER_HEAVY_S,
    PAPER_LIGHT_S,
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
