"""The limits against brute force, and the stationary approximation against its closed forms."""

import itertools
import math

import numpy as np
import pytest

from policies.routing.contract import InstanceKind, RoutingError
from policies.routing.limit import clairvoyant_limit, exact_limit, fluid_limit, servable
from policies.routing.presets import PAPER_KINDS
from policies.routing.stationary import best_heavy_share, md1_waits_beyond, violation_ratio


def brute_force(times: list[float], kinds: list[InstanceKind], requirement_s: float) -> float:
    """The best goodput ratio over every assignment of every request to an instance or to none."""
    best = 0.0
    for choice in itertools.product(range(len(kinds) + 1), repeat=len(times)):
        idle, goodput = [0.0] * len(kinds), 0.0
        for t, i in zip(times, choice, strict=True):
            if i == len(kinds):
                continue
            idle[i] = max(idle[i], t) + kinds[i].service_s
            if idle[i] > t + requirement_s:
                break
            goodput += kinds[i].accuracy
        else:
            best = max(best, goodput)
    return best / len(times)


@pytest.mark.parametrize("seed", range(6))
def test_exact_limit_equals_brute_force_and_stays_below_the_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    times = np.sort(rng.uniform(0.0, 0.4, 7))
    kinds = [InstanceKind("h", 0, 0.15, 0.9), InstanceKind("l", 1, 0.06, 0.6)]
    exact = exact_limit(times, kinds, 0.3)
    assert exact == pytest.approx(brute_force(times.tolist(), kinds, 0.3))
    assert exact <= clairvoyant_limit(times, kinds, 0.3)[0] + 1e-12


@pytest.mark.parametrize("seed", range(6))
def test_greedy_serves_the_most_on_equal_instances(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    times = np.sort(rng.uniform(0.0, 0.3, 8))
    kinds = [InstanceKind("h", 0, 0.11, 1.0)] * 2
    most = brute_force(times.tolist(), kinds, 0.2) * len(times)
    assert servable(times, [0.11, 0.11], 0.2).sum() == pytest.approx(most)


def test_fluid_limit_on_the_papers_workload() -> None:
    bursty, normal = fluid_limit(PAPER_KINDS, (180.0, 10.0))
    assert bursty == pytest.approx(0.7769 + (0.8278 - 0.7769) * (2 / 0.043) / 180)
    assert normal == pytest.approx(0.8278)


def test_fluid_limit_with_batches_of_five() -> None:
    bursty, normal = fluid_limit(PAPER_KINDS, (180.0, 10.0), each_share=3.4 / 5.0)
    assert bursty == pytest.approx(0.7769 + (0.8278 - 0.7769) * (2 * 5 / (3.4 * 0.043)) / 180)
    assert normal == pytest.approx(0.8278)
    with pytest.raises(RoutingError, match="each_share"):
        fluid_limit(PAPER_KINDS, (180.0,), each_share=0.0)


def test_an_empty_trace_has_no_limit() -> None:
    with pytest.raises(RoutingError, match="empty"):
        clairvoyant_limit(np.zeros(0), PAPER_KINDS, 0.3)


def test_md1_by_its_first_interval_and_by_its_mean() -> None:
    """On [0, D) P(W <= x) = (1 - rho) exp(lambda x); and the mean is rho D / (2 (1 - rho))."""
    rate, service_s = 12.0, 0.05
    rho = rate * service_s
    assert md1_waits_beyond(rate, service_s, 0.03) == pytest.approx(1 - (1 - rho) * math.exp(rate * 0.03))
    grid = np.linspace(0.0, 1.5, 1501)
    tail = np.array([md1_waits_beyond(rate, service_s, float(x)) for x in grid])
    mean = float(((tail[1:] + tail[:-1]) / 2).sum() * 0.001)
    assert mean == pytest.approx(rho * service_s / (2 * (1 - rho)), rel=1e-3)
    assert md1_waits_beyond(30.0, 0.05, 1.0) == 1.0


def test_the_stationary_share_is_the_largest_that_keeps_the_promise() -> None:
    share = best_heavy_share(PAPER_KINDS, 180.0, 0.3, 0.02)
    assert violation_ratio(PAPER_KINDS, 180.0, 0.3, share) <= 0.02
    assert violation_ratio(PAPER_KINDS, 180.0, 0.3, share + 0.001) > 0.02
    assert best_heavy_share(PAPER_KINDS, 10.0, 0.3, 0.02) == pytest.approx(0.9999)


def test_where_no_share_keeps_the_promise_the_least_harm_is_done() -> None:
    """At 150 ms the light instances alone would drown in a burst (their load is above 1)."""
    share = best_heavy_share(PAPER_KINDS, 180.0, 0.15, 0.02)
    best = violation_ratio(PAPER_KINDS, 180.0, 0.15, share)
    assert 0.02 < best < 0.05
    assert all(violation_ratio(PAPER_KINDS, 180.0, 0.15, x) >= best for x in np.arange(0.0, 1.0, 0.01))
