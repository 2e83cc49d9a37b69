"""Scores: sums over slots, means over seeds, gaps to the optimum, and the cache of optima."""

import json
from pathlib import Path

import numpy as np
import pytest

from policies.placement.contract import ALL, RULES, ArtifactError, join
from policies.placement.edge_network import EdgeNetwork
from policies.placement.evaluate import Optima, build_policy, evaluate_policy, evaluation_slots, slot_key
from policies.placement.graph import eua16
from policies.placement.tables import shipped_tables
from policies.placement.workload import Load

NETWORK = EdgeNetwork(eua16(), shipped_tables())
LOAD = Load(per_service=1)


def test_scores_are_sums_over_slots_and_means_over_seeds() -> None:
    batches = evaluation_slots(NETWORK, LOAD, slots=6, seeds=3)
    policy = build_policy("sequential", NETWORK, LOAD)
    ticks = iter(np.arange(100) * 0.002)
    result = evaluate_policy(NETWORK, policy, batches, np.zeros((3, 6)), clock=lambda: float(next(ticks)))
    whole = NETWORK.evaluate(join(batches), policy.decide(join(batches), np.random.default_rng(0)))
    by_seed = whole.reward.reshape(3, 6).sum(axis=1)
    assert result["reward"]["mean"] == pytest.approx(by_seed.mean())
    assert result["reward"]["std"] == pytest.approx(by_seed.std())
    assert result["delay_s"] == pytest.approx(whole.delay_s.sum() / 3)
    assert result["cost_usd"] == pytest.approx(whole.cost_usd.sum() / 3)
    assert result["accuracy"] - result["delay_s"] - result["cost_usd"] == pytest.approx(result["reward"]["mean"])
    assert result["gap_per_slot"] == pytest.approx(-whole.reward.mean())
    assert result["failure_ratio"] == 0.0
    assert result["decide_ms"] == {"p50": pytest.approx(2.0), "p99": pytest.approx(2.0)}
    np.testing.assert_allclose(result["agents"]["delay_s"], whole.delay_s.mean(axis=0))


def test_every_policy_meets_the_same_slots() -> None:
    first, again = (evaluation_slots(NETWORK, LOAD, 4, 2) for _ in range(2))
    assert all((a.data_mb == b.data_mb).all() for a, b in zip(first, again, strict=True))
    assert (first[0].data_mb != first[1].data_mb).all()


def test_optima_are_above_every_rule_and_remembered(tmp_path: Path) -> None:
    slots = evaluation_slots(NETWORK, LOAD, 5, 1)[0]
    store = Optima(NETWORK, tmp_path / "optima.json")
    ticks: list[int] = []
    found = store.rewards(slots, lambda: ticks.append(1))
    assert len(ticks) == 5
    for name in RULES:
        policy = build_policy(name, NETWORK, LOAD)
        rewards = NETWORK.evaluate(slots, policy.decide(slots, np.random.default_rng(0))).reward
        assert (rewards <= found[:, 0] + 1e-6).all()
    again = Optima(NETWORK, tmp_path / "optima.json")
    again.open()
    again.known = {key: (reward + 1.0, bound, s) for key, (reward, bound, s) in again.known.items()}
    np.testing.assert_allclose(again.rewards(slots, lambda: None)[:, 0], found[:, 0] + 1.0)
    assert len(json.loads((tmp_path / "optima.json").read_text())) == 5


def test_a_slots_key_depends_on_slot_and_network() -> None:
    slots = evaluation_slots(NETWORK, LOAD, 2, 1)[0]
    one, other = slots.take(slice(0, 1)), slots.take(slice(1, 2))
    assert slot_key(NETWORK, one) == slot_key(NETWORK, slots.take(slice(0, 1)))
    assert slot_key(NETWORK, one) != slot_key(NETWORK, other)
    assert slot_key(NETWORK, one) != slot_key(EdgeNetwork(eua16(1), shipped_tables()), one)


def test_unknown_policies_and_missing_artifacts_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use one of random"):
        build_policy("optimal", NETWORK, LOAD)
    with pytest.raises(ArtifactError, match="tidegate placement train"):
        build_policy("hisper", NETWORK, LOAD, tmp_path)


@pytest.mark.parametrize("name", [name for name in ALL if name != "exact"])
def test_every_shipped_policy_decides_the_papers_setting(name: str) -> None:
    load = Load(per_service=4)
    slots = evaluation_slots(NETWORK, load, 20, 1)[0]
    policy = build_policy(name, NETWORK, load)
    outcome = NETWORK.evaluate(slots, policy.decide(slots, np.random.default_rng(0)))
    if name not in ("random", "heuristic", "hisper-paper", "hasac", "happo"):
        assert outcome.accepted.mean() > 0.99


@pytest.mark.parametrize("per_service", [4, 5])
def test_what_hisper_sequential_learned_beats_the_rule_that_it_starts_from(per_service: int) -> None:
    load = Load(per_service=per_service)
    slots = evaluation_slots(NETWORK, load, 150, 2)[1]
    rewards = []
    for name in ("sequential", "hisper-sequential"):
        placements = build_policy(name, NETWORK, load).decide(slots, np.random.default_rng(0))
        rewards.append(NETWORK.evaluate(slots, placements).reward.mean())
    assert rewards[1] > rewards[0]


@pytest.mark.parametrize(("name", "per_service"), [("prices", 4), ("prices", 5), ("hisper", 4), ("hisper", 5)])
def test_what_blind_agents_learned_beats_the_convention_that_they_started_from(name: str, per_service: int) -> None:
    load = Load(per_service=per_service)
    slots = evaluation_slots(NETWORK, load, 200, 2)[1]
    outcomes = [
        NETWORK.evaluate(slots, build_policy(one, NETWORK, load).decide(slots, np.random.default_rng(0)))
        for one in ("convention", name)
    ]
    assert outcomes[1].reward.mean() > outcomes[0].reward.mean() + 0.02  # by learning, not by chance
    assert (~outcomes[1].accepted).mean() < 0.005


def test_hisper_sequential_takes_any_number_of_requests_in_any_order() -> None:
    for load in (Load(per_service=1), Load(per_service=7, mixed=True, present=0.5)):
        slots = evaluation_slots(NETWORK, load, 10, 1)[0]
        placements = build_policy("hisper-sequential", NETWORK, load).decide(slots, np.random.default_rng(0))
        outcome = NETWORK.evaluate(slots, placements)
        assert outcome.accepted.sum() == (slots.service >= 0).sum()
