"""Learned prices against played-out slots, and what they are good for."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from policies.placement.contract import ArtifactError
from policies.placement.counterfactual import with_others_fixed
from policies.placement.edge_network import EdgeNetwork
from policies.placement.evaluate import build_policy
from policies.placement.graph import eua16
from policies.placement.price_training import train_prices
from policies.placement.prices import LOSS, PricedAgents, Prices, PriceSettings, learn_prices, load_prices
from policies.placement.rules import Convention, Heuristic
from policies.placement.tables import shipped_tables
from policies.placement.training import Settings
from policies.placement.workload import Load, draw_slots

NETWORK = EdgeNetwork(eua16(), shipped_tables())
LOAD = Load(per_service=2)


@pytest.fixture(scope="module")
def prices() -> Prices:
    return learn_prices(NETWORK, LOAD, PriceSettings(slots=600, rounds=4, last=2))


def test_a_price_is_what_playing_the_action_against_the_others_costs() -> None:
    """One request, dropped into many slots whose others play fixed policies: value less price is its mean worth."""
    slots = draw_slots(NETWORK, LOAD, 400, np.random.default_rng(5))
    flat = replace(
        slots,
        system_tflop=np.broadcast_to(slots.system_tflop[:1], slots.system_tflop.shape).copy(),
        memory_used_mb=np.broadcast_to(slots.memory_used_mb[:1], slots.memory_used_mb.shape).copy(),
    )
    u = 2
    for name in ("local", "deadline_s", "data_mb"):
        getattr(flat, name)[:, u] = getattr(flat, name)[0, u]
    from policies.placement import prices as module

    shape = (4, module.LEVELS, len(module.SECONDS), NETWORK.nodes)
    memory = (4, len(module.MEGABYTES), NETWORK.nodes)
    edges = np.quantile(flat.system_tflop, [0.25, 0.5, 0.75])
    found = Prices(edges, np.zeros(shape), np.zeros(shape), np.zeros(memory), np.zeros(memory))
    placements = Heuristic(NETWORK).decide(flat, np.random.default_rng(0))
    placements[:, 3] = placements[0, 3]  # a later request on one node, so that standing before it costs something
    module._learn_from_earlier(NETWORK, flat, u, placements, found)
    module._learn_from_later(NETWORK, flat, u, placements, found)
    scores, options = PricedAgents(NETWORK, found).scores(flat.take(slice(0, 1)), u)
    true = with_others_fixed(NETWORK, flat, placements, u).mean(axis=0)
    feasible = options.feasible[0] & (options.value[0] > options.value[0].max() - 3.0)
    difference = (true - scores[0])[feasible]
    priced = options.value[0][feasible] - scores[0][feasible]
    assert priced.max() > 5.0  # meeting others does cost something here
    constant = np.median(difference[priced < 0.1])
    # The tables round towards caution, by at most one grid step.
    assert (difference - constant > -0.15 * priced - 0.1).all()
    assert np.abs(difference - constant).mean() < 0.15 * priced.mean() + 0.1


def test_learning_from_nothing_ends_the_heuristics_collisions(prices: Prices) -> None:
    held_out = draw_slots(NETWORK, LOAD, 200, np.random.default_rng(77))
    rng = np.random.default_rng(0)
    learned = NETWORK.evaluate(held_out, PricedAgents(NETWORK, prices).decide(held_out, rng))
    greedy = NETWORK.evaluate(held_out, Heuristic(NETWORK).decide(held_out, rng))
    assert (~greedy.accepted).mean() > 0.02
    assert (~learned.accepted).mean() < 0.005
    assert learned.reward.mean() > greedy.reward.mean() + 1.0


def test_prices_learned_from_the_convention_beat_it() -> None:
    settings = PriceSettings(slots=600, rounds=1, temperature=0.0, convention=True)
    held_out = draw_slots(NETWORK, LOAD, 300, np.random.default_rng(78))
    rng = np.random.default_rng(0)
    learned = PricedAgents(NETWORK, learn_prices(NETWORK, LOAD, settings)).decide(held_out, rng)
    rule = Convention(NETWORK, LOAD, 0, swaps=4000, slots=1000).decide(held_out, rng)
    assert NETWORK.evaluate(held_out, learned).reward.mean() > NETWORK.evaluate(held_out, rule).reward.mean()


def test_agents_stay_blind_and_a_price_is_never_a_gain(prices: Prices) -> None:
    slots = draw_slots(NETWORK, LOAD, 50, np.random.default_rng(3))
    other = draw_slots(NETWORK, LOAD, 50, np.random.default_rng(4))
    policy = PricedAgents(NETWORK, prices)
    mixed = replace(
        slots,
        **{
            name: np.where(np.arange(4) == 1, getattr(slots, name), getattr(other, name))
            for name in ("local", "deadline_s", "data_mb")
        },
    )
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(policy.decide(slots, rng)[:, 1], policy.decide(mixed, rng)[:, 1])
    for table in (prices.waiting, prices.delaying, prices.crowded, prices.crowding):
        assert (table >= 0).all()
    assert prices.waiting.max() <= LOSS
    assert (prices.waiting[0] == 0).all()  # nobody stands before the first request
    assert (prices.delaying[3] == 0).all()  # nor behind the last


def test_the_temperature_falls_and_ends_at_zero() -> None:
    settings = PriceSettings(rounds=5, last=2, temperature=0.4, temperature_end=0.1)
    assert [settings.temperature_at(r) for r in range(5)] == pytest.approx([0.4, 0.2, 0.1, 0.0, 0.0])


def test_training_writes_an_artifact_that_decides_the_same(tmp_path: Path) -> None:
    settings = Settings(algorithm="prices", per_service=2, price_slots=100, price_rounds=2, evaluation_slots=10)
    learned = train_prices(settings, tmp_path)
    policy = build_policy(f"{tmp_path}/actors", NETWORK, LOAD)
    slots = draw_slots(NETWORK, LOAD, 30, np.random.default_rng(1))
    rng = np.random.default_rng(0)
    same = policy.decide(slots, rng) == PricedAgents(NETWORK, learned).decide(slots, rng)
    assert same.mean() > 0.99  # half a millionth of rounding in the file may tip a tie
    assert len((tmp_path / "curve.jsonl").read_text().splitlines()) == 2
    with pytest.raises(ArtifactError, match=r"learned for 4 requests per slot, asked for 6"):
        build_policy(f"{tmp_path}/actors", NETWORK, Load(per_service=3))
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_prices(tmp_path / "missing", NETWORK, 4)
    with pytest.raises(ValueError, match="without --resume"):
        train_prices(settings, tmp_path, resume=True)
    with pytest.raises(ValueError, match="start is"):
        train_prices(replace(settings, start="soft"), tmp_path)
