"""Arrival processes against their closed formulas: moments, correlation, phase shares, and bad matrices."""

import numpy as np
import pytest
from numpy.typing import NDArray

from policies.routing.workload import (
    BURSTY,
    NORMAL,
    Arrivals,
    Constant,
    MarkovianArrivalProcess,
    PeriodicProcess,
    Poisson,
    paper_process,
)

# Three phases; arrivals that keep the phase, arrivals that change it, and changes without an arrival.
D0 = [[-9.0, 1.0, 0.5], [0.2, -3.0, 0.3], [0.0, 0.4, -20.0]]
D1 = [[6.0, 1.5, 0.0], [1.0, 1.5, 0.0], [4.6, 0.0, 15.0]]


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def embedded(process: MarkovianArrivalProcess) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (phi, M): phases just after arrivals, and (-D0)^-1, from an eigenvector, not a least square."""
    waiting = np.linalg.inv(-process.d0)
    values, vectors = np.linalg.eig((waiting @ process.d1).T)
    phi = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    return np.asarray(phi / phi.sum(), dtype=np.float64), np.asarray(waiting, dtype=np.float64)


def test_gaps_between_requests_have_the_moments_and_the_correlation_of_the_formulas() -> None:
    process = MarkovianArrivalProcess(D0, D1)
    phi, m = embedded(process)
    one = np.ones(3)
    mean = phi @ m @ one
    second = 2 * phi @ m @ m @ one
    product = phi @ m @ (m @ process.d1) @ m @ one  # E[X0 X1]

    gaps = np.diff(process.generate(rng(), count=400_000).time_s)

    assert gaps.mean() == pytest.approx(mean, rel=0.01)
    assert (gaps**2).mean() == pytest.approx(second, rel=0.03)
    correlation = (product - mean**2) / (second - mean**2)
    assert abs(correlation) > 0.02  # else the next line would prove nothing
    assert np.corrcoef(gaps[:-1], gaps[1:])[0, 1] == pytest.approx(correlation, abs=0.01)


def test_rate_and_stationary_shares_agree_with_the_embedded_chain_and_with_a_long_run() -> None:
    process = MarkovianArrivalProcess(D0, D1)
    phi, m = embedded(process)
    assert process.rate() == pytest.approx(1.0 / (phi @ m @ np.ones(3)))
    assert process.stationary() @ (process.d0 + process.d1) == pytest.approx(np.zeros(3), abs=1e-12)

    arrivals = process.generate(rng(2), duration_s=40_000.0)

    assert len(arrivals) / 40_000.0 == pytest.approx(process.rate(), rel=0.01)
    assert arrivals.phase is not None
    share = np.bincount(arrivals.phase, minlength=3) / len(arrivals)
    assert share == pytest.approx(process.stationary() * process.phase_rates() / process.rate(), abs=0.01)


def test_an_arrival_that_changes_the_phase_counts_as_one_of_the_phase_it_leaves() -> None:
    # Two phases that swap at every arrival: an Erlang-2 renewal process seen at its every stage.
    process = MarkovianArrivalProcess([[-2.0, 0.0], [0.0, -5.0]], [[0.0, 2.0], [5.0, 0.0]], ("slow", "fast"))
    arrivals = process.generate(rng(3), count=20_001, initial_phase=0)
    assert arrivals.phase is not None
    assert arrivals.phase.tolist() == [0, 1] * 10_000 + [0]
    gaps = np.diff(arrivals.time_s)
    assert gaps[0::2].mean() == pytest.approx(1 / 5, rel=0.03)
    assert gaps[1::2].mean() == pytest.approx(1 / 2, rel=0.03)


def test_the_papers_process_lasts_18_times_longer_in_its_normal_state() -> None:
    process = paper_process()
    assert process.phase_names == ("bursty", "normal")
    assert process.phase_rates() == pytest.approx([180.0, 10.0])
    assert -1 / (process.d0 + process.d1).diagonal() == pytest.approx([27.777, 500.0], rel=1e-3)
    assert process.stationary() == pytest.approx([1 / 19, 18 / 19])
    assert process.rate() == pytest.approx(360 / 19)


def test_rates_and_holding_times_scale_apart() -> None:
    process = paper_process(rate_scale=0.2, time_scale=2.0)
    assert process.phase_rates() == pytest.approx([36.0, 2.0])
    assert -1 / (process.d0 + process.d1).diagonal() == pytest.approx([55.556, 1000.0], rel=1e-3)
    arrivals = process.generate(rng(4), duration_s=600_000.0)
    spans = arrivals.phase_spans()
    bursts = [end - start for start, end, name in spans if name == "bursty"]
    # About 570 bursts: one standard error is 4%; a burst looks longer by the half second to the next request.
    assert np.mean(bursts) == pytest.approx(55.556 + 0.5, rel=0.13)
    assert sum(end - start for start, end, _ in spans) == pytest.approx(600_000.0)


def test_the_first_phase_is_drawn_from_the_stationary_distribution() -> None:
    process = paper_process()
    firsts = [process.generate(rng(seed), count=1).phase for seed in range(800)]
    bursty = np.mean([first is not None and first[0] == BURSTY for first in firsts])
    assert bursty == pytest.approx(1 / 19, abs=0.03)


def test_a_given_first_phase_and_the_seed_fix_the_draw() -> None:
    process = paper_process(time_scale=0.01)
    one = process.generate(rng(5), duration_s=30.0, initial_phase=BURSTY)
    two = process.generate(rng(5), duration_s=30.0, initial_phase=BURSTY)
    assert one.phase is not None
    assert one.phase[0] == BURSTY
    assert np.array_equal(one.time_s, two.time_s)
    assert not np.array_equal(one.time_s, process.generate(rng(6), duration_s=30.0).time_s[: len(one)])


def test_count_gives_exactly_so_many_and_ends_with_the_last() -> None:
    arrivals = paper_process().generate(rng(7), count=12_345)
    assert len(arrivals) == 12_345
    assert arrivals.end_s == arrivals.time_s[-1]
    assert len(paper_process().generate(rng(7), count=0)) == 0


def test_one_phase_is_a_poisson_process() -> None:
    arrivals = MarkovianArrivalProcess([[-50.0]], [[50.0]]).generate(rng(8), duration_s=2_000.0)
    gaps = np.diff(arrivals.time_s)
    assert gaps.mean() == pytest.approx(0.02, rel=0.01)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1.0, abs=0.02)
    per_second = np.bincount(arrivals.time_s.astype(int), minlength=2_000)
    assert per_second.var() / per_second.mean() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("d0", "d1", "reason"),
    [
        ([[-1.0, 0.5]], [[0.5, 0.0]], "square"),
        ([[-1.0]], [[0.5, 0.5], [0.5, 0.5]], "square"),
        ([[-1.0, 0.5], [0.5, -1.0]], [[0.4, 0.0], [0.0, 0.5]], "row 0"),
        ([[-1.0, 0.5], [-0.5, -1.0]], [[0.5, 0.0], [0.5, 1.0]], "negative"),
        ([[-1.0, 0.5], [0.5, -1.0]], [[0.5, 0.0], [1.0, -0.5]], "negative"),
        ([[0.0, 0.0], [0.5, -1.0]], [[0.0, 0.0], [0.5, 0.0]], "diagonal"),
        ([[-1.0, 1.0], [1.0, -1.0]], [[0.0, 0.0], [0.0, 0.0]], "nothing would ever arrive"),
        ([[-1.0, 0.5], [0.0, -1.0]], [[0.5, 0.0], [0.0, 1.0]], "never reached"),
        ([[-1.0, float("nan")], [0.0, -1.0]], [[0.5, 0.0], [0.0, 1.0]], "finite"),
    ],
)
def test_matrices_that_describe_no_process_are_refused(
    d0: list[list[float]], d1: list[list[float]], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        MarkovianArrivalProcess(d0, d1)


def test_phases_may_be_reached_by_way_of_others() -> None:
    ring = np.roll(np.eye(4), 1, axis=1)  # each phase leads to the next only
    process = MarkovianArrivalProcess(-2.0 * np.eye(4) + ring, np.eye(4))
    assert process.stationary() == pytest.approx(np.full(4, 0.25))


def test_the_misprinted_matrix_of_the_paper_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1"):
        MarkovianArrivalProcess([[-180.036, 0.036], [0.0002, -10.002]], [[180.0, 0.0], [0.0, 10.0]])


def test_periodic_phases_follow_the_clock() -> None:
    process = PeriodicProcess(normal_rate=20.0, bursty_rate=200.0, normal_s=50.0, bursty_s=5.0)
    arrivals = process.generate(rng(9), duration_s=1_100.0)
    assert arrivals.phase is not None
    in_period = np.mod(arrivals.time_s, 55.0)
    assert np.array_equal(arrivals.phase == NORMAL, in_period < 50.0)
    assert (arrivals.phase == BURSTY).sum() / (20 * 5.0) == pytest.approx(200.0, rel=0.05)
    assert (arrivals.phase == NORMAL).sum() / (20 * 50.0) == pytest.approx(20.0, rel=0.05)
    assert np.all(np.diff(arrivals.time_s) >= 0)


def test_periodic_stops_at_the_stated_end() -> None:
    arrivals = PeriodicProcess().generate(rng(10), duration_s=510.0)
    assert arrivals.end_s == 510.0
    assert 505.0 < arrivals.time_s[-1] < 510.0


def test_constant_is_evenly_spaced_and_poisson_is_not() -> None:
    constant = Constant(50.0).generate(rng(), 2.0)
    assert len(constant) == 100
    assert np.diff(constant.time_s) == pytest.approx(np.full(99, 0.02))
    gaps = np.diff(Poisson(50.0).generate(rng(11), 1_000.0).time_s)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_rates_must_be_positive(rate: float) -> None:
    with pytest.raises(ValueError, match="rate must be a positive number"):
        Poisson(rate)
    with pytest.raises(ValueError, match="rate_scale must be a positive number"):
        paper_process(rate_scale=rate)


def test_arrivals_check_what_they_are_given() -> None:
    times = np.array([0.5, 0.2])
    with pytest.raises(ValueError, match="never decrease"):
        Arrivals(times, None, 1.0)
    with pytest.raises(ValueError, match="before the last request"):
        Arrivals(np.array([0.2, 0.5]), None, 0.4)
    with pytest.raises(ValueError, match="index phase_names"):
        Arrivals(np.array([0.2, 0.5]), np.array([0, 2], dtype=np.int16), 1.0, ("a", "b"))
    with pytest.raises(ValueError, match="either duration_s or count"):
        paper_process().generate(rng(), duration_s=1.0, count=1)


def test_phase_spans_join_runs_of_one_phase() -> None:
    phase = np.array([1, 1, 0, 0, 1], dtype=np.int16)
    arrivals = Arrivals(np.array([0.5, 1.0, 2.0, 3.0, 4.0]), phase, 6.0, ("bursty", "normal"))
    assert arrivals.phase_spans() == [(0.0, 2.0, "normal"), (2.0, 4.0, "bursty"), (4.0, 6.0, "normal")]
