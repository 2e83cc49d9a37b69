"""The compiled simulator against an independent brute force, against queueing theory, and against itself."""

import heapq
import math
from typing import Any

import numpy as np
import pytest

from policies.routing.contract import InstanceKind
from policies.routing.queueing_model import (
    ARRIVED,
    BOUNCED,
    EXPIRED,
    GOODPUT,
    IN_TIME,
    LATE,
    QUEUE_FULL,
    SOJOURN_S,
    UNAVAILABLE,
    ServiceModel,
    build,
    markovian,
    paper_arrivals,
    periodic_arrivals,
    trace_arrivals,
)
from policies.routing.simulator import run_rule, run_tables
from policies.routing.stationary import md1_waits_beyond

KINDS = (
    InstanceKind("heavy", 0, 0.043, 0.8, 4),
    InstanceKind("heavy", 0, 0.043, 0.8, 6),
    InstanceKind("light", 1, 0.0115, 0.7, 3),
)


def brute_force_batches(
    times: list[float], chosen: list[int], service: ServiceModel, limits: list[tuple[int, int]]
) -> list[float]:
    """Finish time per request (nan: refused), by a plain event heap over all instances; no line shared."""
    queue: list[list[int]] = [[] for _ in service.kinds]
    serving: list[list[int]] = [[] for _ in service.kinds]
    finish = [math.nan] * len(times)
    events: list[tuple[float, int, int, int]] = [(t, 1, j, -1) for j, t in enumerate(times)]
    heapq.heapify(events)

    def begin(i: int, now: float) -> None:
        waiting, (low, high) = len(queue[i]), limits[service.kinds[i].rank]
        if serving[i] or waiting < low or not waiting:
            return
        size = high if waiting >= high else max(b for b in (1, 3, 5) if b <= waiting)
        serving[i], queue[i] = queue[i][:size], queue[i][size:]
        factor = {1: 1.0, 3: 2.2, 5: 3.4}[size]
        heapq.heappush(events, (now + service.kinds[i].service_s * factor, 0, -1, i))

    while events:
        now, kind, j, i = heapq.heappop(events)
        if kind == 0:
            for request in serving[i]:
                finish[request] = now
            serving[i] = []
            begin(i, now)
        else:
            i = chosen[j]
            if len(queue[i]) + len(serving[i]) < service.kinds[i].capacity:
                queue[i].append(j)
                begin(i, now)
    return finish


@pytest.mark.parametrize("limits", [None, [(1, 5), (1, 5)], [(3, 5), (1, 3)], [(1, 1), (5, 5)]])
def test_equals_brute_force_request_by_request(limits: list[tuple[int, int]] | None) -> None:
    rng = np.random.default_rng(3)
    times = np.cumsum(rng.exponential(1 / 70.0, size=4000))
    service = ServiceModel(KINDS)
    system, state = build(service, trace_arrivals(times), 1, 5, batching=limits is not None, log=len(times))
    arrays: dict[str, Any] = {}
    if limits is not None:
        arrays = {
            "minimum": np.array([[low for low, _ in limits]]),
            "maximum": np.array([[high for _, high in limits]]),
        }
    run_tables(system, state, np.array([[0.3, 0.3, 0.4]]), times[-1] + 10.0, **arrays)
    refused = np.isnan(state.log[:, 1])
    assert 0 < refused.sum() < len(times)
    # The draws are the simulator's own: replay them from its stream to know where refused requests went.
    chosen = replayed_draws(len(times), 5, [0.3, 0.6, 1.0])
    assert all(chosen[j] == state.log[j, 0] for j in np.flatnonzero(~refused))
    expected = np.array(brute_force_batches(times.tolist(), chosen, service, limits or [(1, 1), (1, 1)]))
    if limits is None:
        assert np.array_equal(np.isnan(expected), refused)
        assert np.allclose(expected[~refused], state.log[~refused, 1], rtol=0, atol=1e-9)
    else:
        both = ~np.isnan(expected) & ~refused
        # A batch below its minimum may still wait when the trace ends, in both.
        assert np.array_equal(np.isnan(expected), refused)
        assert np.allclose(expected[both], state.log[both, 1], rtol=0, atol=1e-9)


def replayed_draws(count: int, seed: int, sums: list[float]) -> list[int]:
    """The routing draws of environment 0: SplitMix64 in Python integers."""
    word = int(np.random.SeedSequence(seed).generate_state(3, np.uint64)[1])
    mask, chosen = (1 << 64) - 1, []
    for _ in range(count):
        word = (word + 0x9E3779B97F4A7C15) & mask
        z = word
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        u = ((z ^ (z >> 31)) >> 11) / 2**53
        chosen.append(next(i for i, s in enumerate(np.cumsum([0.3, 0.3, 0.4])) if u < s or i == len(sums) - 1))
    return chosen


def test_md1_waiting_times_match_erlang() -> None:
    rate, service_s = 18.0, 0.043
    kind = InstanceKind("only", 0, service_s, 1.0, 400)
    for wait_s in (0.05, 0.1, 0.2):
        system, state = build(
            ServiceModel((kind,), requirement_s=wait_s + service_s), markovian([[-rate]], [[rate]]), 20, 1
        )
        run_tables(system, state, np.ones((20, 1)), 5000.0)
        total = state.tally.sum(axis=(0, 1))
        late = total[LATE] / total[ARRIVED]
        assert late == pytest.approx(md1_waits_beyond(rate, service_s, wait_s), abs=0.004)


def test_mdc_mean_wait_matches_crommelin() -> None:
    """The single queue over c equal servers: its mean wait from the chain embedded at multiples of the service."""
    servers, service_s, load = 3, 0.05, 0.85
    rate = load * servers / service_s
    jumps = poisson(rate * service_s, 400)
    chain = np.zeros(400)
    chain[0] = 1.0
    for _ in range(3000):
        left = np.concatenate([[chain[: servers + 1].sum()], chain[servers + 1 :]])
        chain = np.convolve(left, jumps)[:400]
        chain /= chain.sum()
    waiting = float((np.maximum(np.arange(400) - servers, 0) * chain).sum())
    kinds = (InstanceKind("one", 0, service_s, 1.0, 1),) * servers
    service = ServiceModel(kinds, requirement_s=100.0, central_capacity=2000)
    system, state = build(service, markovian([[-rate]], [[rate]]), 20, 2)
    run_rule(system, state, "single-queue", 2000.0)
    total = state.tally.sum(axis=(0, 1))
    assert total[SOJOURN_S] / total[IN_TIME] - service_s == pytest.approx(waiting / rate, rel=0.03)


def poisson(mean: float, size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Poisson probabilities of 0..size-1."""
    return np.array([math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(size)])


@pytest.mark.parametrize("rule", ["uniform", "deadline", "single-queue", "heavy-expire", "light-only"])
def test_conservation_and_repeatability_by_seed(rule: str) -> None:
    outcomes = (IN_TIME, LATE, QUEUE_FULL, EXPIRED, UNAVAILABLE)

    def run(seed: int, threads: int) -> Any:
        service = ServiceModel(KINDS, law="gamma", cv=0.5, expire=rule == "heavy-expire")
        system, state = build(service, paper_arrivals(), 8, seed, learn_trust=True, learn_rate=0.05)
        run_rule(system, state, rule, 300.0, threads)
        held = state.queue[:, :, 0].sum() + state.marks[:, 4].sum()
        total = state.tally.sum(axis=(0, 1))
        assert total[ARRIVED] == sum(total[k] for k in outcomes) + held
        return state.tally.tobytes()

    assert run(1, 1) == run(1, 2)
    assert run(1, 1) != run(2, 1)


def test_arrival_rates_and_phases_of_the_papers_workloads() -> None:
    for arrivals in (paper_arrivals(), periodic_arrivals()):
        system, state = build(ServiceModel(KINDS), arrivals, 400, 4)
        run_tables(system, state, np.tile([0.0, 0.0, 1.0], (400, 1)), 1000.0)
        bursty, normal = state.tally.sum(axis=0)[:, ARRIVED] / (400 * 1000.0)
        share = 1 / 0.036 / (1 / 0.036 + 500)
        assert bursty == pytest.approx(180 * share, rel=0.08)
        assert normal == pytest.approx(10 * (1 - share), rel=0.01)


@pytest.mark.parametrize("law", ["gamma", "lognormal"])
def test_service_laws_have_their_moments(law: str) -> None:
    kind = InstanceKind("only", 0, 0.02, 1.0, 1)
    times = np.arange(200_000) * 1000.0
    system, state = build(ServiceModel((kind,), law=law, cv=0.5), trace_arrivals(times), 1, 9, log=len(times))
    run_tables(system, state, np.ones((1, 1)), times[-1] + 100.0)
    took = state.log[:, 1] - times
    assert took.mean() == pytest.approx(0.02, rel=0.01)
    assert took.std() / took.mean() == pytest.approx(0.5, rel=0.02)


def test_empirical_service_follows_its_quantiles() -> None:
    grid = np.broadcast_to(np.linspace(0.01, 0.03, 101), (1, 3, 101)).copy()
    kind = InstanceKind("only", 0, 0.02, 1.0, 1)
    times = np.arange(50_000) * 1000.0
    service = ServiceModel((kind,), law="empirical", quantiles_s=grid)
    system, state = build(service, trace_arrivals(times), 1, 9, log=len(times))
    run_tables(system, state, np.ones((1, 1)), times[-1] + 100.0)
    took = np.sort(state.log[:, 1] - times)
    assert np.allclose(took[[5_000, 25_000, 45_000]], [0.012, 0.02, 0.028], atol=3e-4)


def test_fixed_table_goodput_counts_accuracy_of_requests_in_time() -> None:
    system, state = build(ServiceModel(KINDS), markovian([[-5.0]], [[5.0]]), 4, 1)
    run_tables(system, state, np.tile([0.0, 0.0, 1.0], (4, 1)), 500.0)
    total = state.tally.sum(axis=(0, 1))
    assert total[GOODPUT] == pytest.approx(0.7 * total[IN_TIME])
    assert total[BOUNCED] == 0


def test_bouncing_rescues_stale_views() -> None:
    kinds = tuple(
        InstanceKind(k.variant, k.rank, k.service_s, k.accuracy, 15) for k in (KINDS[0],) * 2 + (KINDS[2],) * 2
    )
    missed = {}
    for bounce in (False, True):
        system, state = build(
            ServiceModel(kinds, law="gamma", cv=0.5),
            paper_arrivals(),
            8,
            3,
            gateways=8,
            refresh_s=0.05,
            bounce=bounce,
            learn_trust=True,
            learn_rate=0.02,
        )
        run_rule(system, state, "deadline", 2000.0)
        total = state.tally.sum(axis=(0, 1))
        missed[bounce] = 1.0 - total[IN_TIME] / total[ARRIVED]
    assert missed[True] < 0.002
    assert missed[True] < 0.6 * missed[False]
