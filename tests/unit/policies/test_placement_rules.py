"""The rules: order among them, what each may see, and the convention's split."""

from dataclasses import replace

import numpy as np
import pytest

from policies.placement.contract import ABSENT, REJECT, PlacementPolicy, Slots
from policies.placement.edge_network import ACCEPTED, EdgeNetwork
from policies.placement.graph import eua16
from policies.placement.rules import Beam, Convention, Heuristic, RandomRule, Sequential, TwoTier, node_values
from policies.placement.tables import shipped_tables
from policies.placement.workload import Load, draw_slots

NETWORK = EdgeNetwork(eua16(), shipped_tables())
RNG = np.random.default_rng(0)
SLOTS = draw_slots(NETWORK, Load(), 60, np.random.default_rng(5))
POLICIES: list[PlacementPolicy] = [
    RandomRule(NETWORK),
    Heuristic(NETWORK),
    Convention(NETWORK, Load()),
    Sequential(NETWORK),
    TwoTier(NETWORK),
    Beam(NETWORK),
]


def reward(policy: PlacementPolicy, slots: Slots = SLOTS) -> float:
    return float(NETWORK.evaluate(slots, policy.decide(slots, np.random.default_rng(1))).reward.mean())


def test_the_rules_stand_in_the_expected_order() -> None:
    rewards = [reward(policy) for policy in POLICIES]
    assert rewards == sorted(rewards)
    assert rewards[1] < -30.0  # independent agents collide
    assert rewards[3] - rewards[2] > 0.1


def test_heuristic_takes_the_best_action_by_exhaustive_search() -> None:
    few = SLOTS.take(slice(0, 3))
    placements = Heuristic(NETWORK).decide(few, RNG)
    for e in range(3):
        for u in (0, 5):
            alone = few.take(slice(e, e + 1)).columns(u, u + 1)
            service = int(alone.service[0, 0])
            c, m, k = np.meshgrid(np.arange(16), np.arange(4 - service), np.arange(16), indexing="ij")
            every = np.stack([c.ravel(), m.ravel(), k.ravel()], axis=1)[:, None, :]
            outcome = NETWORK.evaluate(alone.take(np.zeros(len(every), dtype=np.int64)), every)
            best = NETWORK.evaluate(alone, placements[e : e + 1, u : u + 1])
            assert best.reward[0] == pytest.approx(outcome.reward.max(), abs=1e-12)


def test_blind_rules_do_not_look_at_other_requests() -> None:
    changed = SLOTS.take(slice(0, 20))
    other = Slots(*(getattr(changed, name).copy() for name in Slots.__slots__))
    other.data_mb[:, 0] = 1.0
    other.local[:, 0] = 3
    for policy in (Heuristic(NETWORK), Convention(NETWORK, Load())):
        before, after = policy.decide(changed, RNG), policy.decide(other, RNG)
        assert (before[:, 1:] == after[:, 1:]).all()


def test_convention_agents_own_disjoint_nodes() -> None:
    convention = Convention(NETWORK, Load())
    assert np.bincount(convention.owner, minlength=8).min() >= 1
    placements = convention.decide(SLOTS, RNG)
    placed = placements[..., 2]
    for u in range(8):
        nodes = placed[:, u][placed[:, u] != REJECT]
        assert (convention.owner[nodes] == u).all()


def test_the_conventions_search_does_not_end_below_its_start() -> None:
    start = reward(Convention(NETWORK, Load(), swaps=0))
    assert reward(Convention(NETWORK, Load(), swaps=1000)) > start


def test_sequential_never_places_what_would_fail() -> None:
    slots = draw_slots(NETWORK, Load(per_service=10), 20, np.random.default_rng(6))
    placements = Sequential(NETWORK).decide(slots, RNG)
    reasons = NETWORK.evaluate(slots, placements).reason
    assert (reasons[placements[..., 2] != REJECT] == ACCEPTED).all()


def test_a_wider_beam_is_no_worse_on_average_and_beats_greedy() -> None:
    greedy, narrow, wide = reward(Sequential(NETWORK)), reward(Beam(NETWORK, 4)), reward(Beam(NETWORK, 64))
    assert greedy < narrow <= wide


def test_a_services_agent_sees_earlier_services_and_nothing_of_later_ones() -> None:
    few, policy = SLOTS.take(slice(0, 5)), TwoTier(NETWORK)
    later = Slots(*(getattr(few, name).copy() for name in Slots.__slots__))
    later.data_mb[:, 4:] = 5.0
    before, after = policy.decide(few, RNG), policy.decide(later, RNG)
    assert (before[:, :4] == after[:, :4]).all()
    alone = Slots(*(getattr(few, name).copy() for name in Slots.__slots__))
    alone.service[:, :4] = ABSENT
    assert (policy.decide(alone, RNG)[:, 4:] != before[:, 4:]).any()  # the first service's work is seen
    one = few.columns(0, 4)  # a single service: two tiers are one beam
    np.testing.assert_array_equal(policy.decide(one, RNG), Beam(NETWORK, 4).decide(one, RNG))


def test_absent_requests_are_left_alone() -> None:
    slots = draw_slots(NETWORK, Load(present=0.4), 30, np.random.default_rng(7))
    for policy in POLICIES:
        placements = policy.decide(slots, RNG)
        assert (placements[slots.service == ABSENT] == REJECT).all()
        assert (NETWORK.evaluate(slots, placements).standard_accuracy[slots.service == ABSENT] == 0).all()


def test_a_deadline_that_nothing_meets_is_rejected_by_every_greedy_rule() -> None:
    few = SLOTS.take(slice(0, 2))
    slots = replace(few, deadline_s=np.full_like(few.deadline_s, 1e-4))
    for policy in POLICIES[1:]:
        assert (policy.decide(slots, RNG) == REJECT).all()


def test_node_values_are_what_a_lone_request_earns() -> None:
    few = SLOTS.take(slice(0, 4))
    values = node_values(NETWORK, few)
    placements = Heuristic(NETWORK).decide(few, RNG)
    for u in range(8):
        lone = NETWORK.evaluate(few.columns(u, u + 1), placements[:, u : u + 1])
        np.testing.assert_allclose(values[:, u].max(axis=1), lone.reward, atol=1e-12)
