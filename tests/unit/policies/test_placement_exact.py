"""The exact solver against exhaustive enumeration, and its promises under a short limit."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from policies.placement.contract import REJECT, Slots
from policies.placement.edge_network import EdgeNetwork
from policies.placement.exact import Exact
from policies.placement.graph import EdgeGraph
from policies.placement.rules import Beam
from policies.placement.tables import ServiceTable, shipped_tables
from policies.placement.workload import Load, draw_slots

DETECTION, TRACKING = shipped_tables()


def thin(table: ServiceTable, configurations: list[int], variants: list[int]) -> ServiceTable:
    """The table with few rows, so that every joint action can be tried."""
    return replace(
        table,
        configurations=tuple(table.configurations[c] for c in configurations),
        settings=tuple(table.settings[c] for c in configurations),
        size_factor=table.size_factor[configurations],
        size_factor_source=tuple(table.size_factor_source[c] for c in configurations),
        inferences=table.inferences[configurations],
        variants=tuple(table.variants[m] for m in variants),
        memory_mb=table.memory_mb[variants],
        tflop=table.tflop[variants],
        accuracy=table.accuracy[np.ix_(configurations, variants)],
        accuracy_source=tuple(tuple(table.accuracy_source[c][m] for m in variants) for c in configurations),
    )


def small_network(memory_mb: list[float]) -> EdgeNetwork:
    graph = EdgeGraph(
        names=("a", "b", "c"),
        positions=np.zeros((3, 2)),
        tflops=np.array([1.33, 1.26, 0.5]),
        memory_mb=np.array(memory_mb),
        uplink_mbps=np.array([36.0, 72.0, 48.0]),
        links=np.array([[0, 1], [1, 2]]),
        bandwidth_mbps=np.array([100.0, 300.0]),
        routing_usd_per_mb=np.full(2, 0.002),
    )
    return EdgeNetwork(graph, [thin(DETECTION, [5, 15], [0, 3]), thin(TRACKING, [11, 15], [1, 2])])


def best_by_enumeration(network: EdgeNetwork, slot: Slots) -> float:
    options = [[(REJECT,) * 3, *itertools.product(range(2), range(2), range(3))]] * slot.requests
    every = np.array(list(itertools.product(*options)))
    best = -np.inf
    for first in range(0, len(every), 20_000):
        block = every[first : first + 20_000]
        rewards = network.evaluate(slot.take(np.zeros(len(block), dtype=np.int64)), block).reward
        best = max(best, float(rewards.max()))
    return best


@pytest.mark.parametrize("memory_mb", [[4096.0] * 3, [1100.0, 900.0, 1024.0]])
def test_equals_exhaustive_enumeration(memory_mb: list[float]) -> None:
    network = small_network(memory_mb)
    rng = np.random.default_rng(int(memory_mb[0]))
    slots = draw_slots(network, Load(per_service=2, mixed=True), 12, rng)
    slots = replace(slots, memory_used_mb=np.minimum(slots.memory_used_mb, np.array(memory_mb)))
    warm_was_short = 0
    for e in range(slots.slots):
        slot = slots.take(slice(e, e + 1))
        answer = Exact(network, beam_width=1).solve(slot)
        best = best_by_enumeration(network, slot)
        assert answer.proved
        assert answer.reward == pytest.approx(best, abs=1e-5)
        assert answer.bound >= best - 1e-9
        warm = Beam(network, 1).decide_one(slot)
        warm_was_short += float(network.evaluate(slot, warm[None]).reward[0]) < best - 1e-6
    assert warm_was_short > 0  # the solver, not the warm start, found some of them


def test_nothing_fits_is_an_answer() -> None:
    network = small_network([50.0, 50.0, 50.0])
    slot = draw_slots(network, Load(per_service=1), 1, np.random.default_rng(0))
    slot = replace(slot, memory_used_mb=np.full((1, 3), 10.0))
    answer = Exact(network).solve(slot)
    assert (answer.placements == REJECT).all()
    assert answer.reward == pytest.approx(-200.0)
    assert answer.proved


def test_out_of_time_is_never_worse_than_the_warm_start_and_says_so() -> None:
    from policies.placement.graph import eua16

    network = EdgeNetwork(eua16(), shipped_tables())
    slots = draw_slots(network, Load(per_service=5), 4, np.random.default_rng(2))
    ticks = itertools.count(step=10.0)  # every reading of this clock finds ten seconds gone
    hurried = Exact(network, limit_s=5.0, beam_width=8, clock=lambda: float(next(ticks)))
    for e in range(slots.slots):
        slot = slots.take(slice(e, e + 1))
        warm = Beam(network, 8).decide_one(slot)
        answer = hurried.solve(slot)
        assert (answer.placements == warm).all()
        assert not answer.proved
        assert answer.bound > answer.reward
        live = Exact(network, limit_s=0.03, beam_width=8).solve(slot)
        assert live.reward >= answer.reward - 1e-12
        assert live.bound >= live.reward


def test_few_actions_improve_on_the_warm_start_but_prove_nothing() -> None:
    from policies.placement.graph import eua16

    network = EdgeNetwork(eua16(), shipped_tables())
    slots = draw_slots(network, Load(per_service=4), 6, np.random.default_rng(4))
    gained = 0.0
    for e in range(slots.slots):
        slot = slots.take(slice(e, e + 1))
        start = float(network.evaluate(slot, Beam(network, 1).decide_one(slot)[None]).reward[0])
        answer = Exact(network, beam_width=1, most_actions=3).solve(slot)
        assert answer.reward >= start - 1e-12
        assert answer.bound > answer.reward
        assert not answer.proved
        assert answer.reward == pytest.approx(float(network.evaluate(slot, answer.placements[None]).reward[0]))
        gained += answer.reward - start
    assert gained > 0.01


@pytest.mark.parametrize("readings", [2, 4, 7])
def test_a_limit_that_ends_while_the_model_is_built_gives_the_warm_start(readings: int) -> None:
    from policies.placement.graph import eua16

    network = EdgeNetwork(eua16(), shipped_tables())
    slot = draw_slots(network, Load(per_service=4), 1, np.random.default_rng(2))
    clock = itertools.chain(itertools.repeat(0.0, readings), itertools.repeat(1.0))
    answer = Exact(network, limit_s=0.5, beam_width=4, clock=lambda: next(clock)).solve(slot)
    assert (answer.placements == Beam(network, 4).decide_one(slot)).all()
    assert not answer.proved


def test_a_limit_has_to_be_some_time() -> None:
    with pytest.raises(ValueError, match="limit_s"):
        Exact(small_network([1000.0] * 3), limit_s=0.0)
