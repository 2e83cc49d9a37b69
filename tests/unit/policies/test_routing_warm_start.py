"""Starting from a trained actor: the new policy must act as the old one did, whatever its layout."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from policies.routing.contract import RoutingError, observation_of
from policies.routing.features import features, layout_for
from policies.routing.learned import load_policy
from policies.routing.ppo import Trainer
from policies.routing.presets import PAPER_KINDS, Preset
from policies.routing.train import paper_task
from policies.routing.warm_start import columns, start_from

SMALL = Preset(
    slots=4_000, environments=20, slots_per_update=1_000, minibatch=500, epochs=2, batch_start=0.9, critic_first=2
)


def old_policy(folder: Path) -> Path:
    """A learned-po artifact with random weights, so that every feature matters."""
    trainer = Trainer(paper_task("learned-po", "paper"), SMALL, seed=5)
    with torch.no_grad():
        for weight in trainer.network.actor.parameters():
            weight.normal_(0.0, 0.3)
    trainer.export(folder, {"command": "test"})
    return folder / "learned-po.json"


@pytest.mark.parametrize("policy", ["learned-po", "learned-po-batch", "learned-fo"])
def test_the_new_policy_acts_as_the_old_one(tmp_path: Path, policy: str) -> None:
    old = load_policy(old_policy(tmp_path))
    trainer = Trainer(paper_task(policy, "paper"), SMALL, seed=6)
    start_from(trainer, tmp_path / "learned-po.json")
    trainer.export(tmp_path / "new", {"command": "test"})
    new = load_policy(tmp_path / "new" / f"{policy}.json")
    seen = observation_of(
        [3, 0, 15, 1],
        [0.02, 0.0, 0.01, 0.005],
        [[0.2, 0.1, 0.05], [], [0.3] * 15, [0.01]],
        [1, 0, 1, 1],
        [True] * 4,
        phase=1,
    )
    expected, _, _ = old.tables(features(old.layout, seen)[None])
    found, low, high = new.tables(features(new.layout, seen)[None])
    assert np.abs(found - expected).max() < 1e-5
    if new.batching:
        assert low.tolist() == [[1, 1]]
        assert high.tolist() == [[5, 5]]


def test_features_are_matched_by_meaning() -> None:
    old, new = layout_for(PAPER_KINDS), layout_for(PAPER_KINDS, batching=True, phases=2)
    index, scale = columns(old, new)
    seen = observation_of([2, 0, 0, 1], [0.04, 0.0, 0.0, 0.01], [[0.2, 0.1], [], [], [0.1]], [1, 0, 0, 1], [True] * 4)
    phased = replace(seen, phase=0)
    x_old, x_new = features(old, seen), features(new, phased)
    carried = np.zeros(old.size)
    for j in range(new.size):
        if index[j] >= 0:
            carried[index[j]] += x_new[j] * scale[j]
    assert np.allclose(carried, x_old, atol=1e-6)
    assert int((index < 0).sum()) == 4 * 4 + 2


@pytest.mark.parametrize("missing", [1, 3])
def test_with_an_instance_fewer_it_acts_as_the_old_one_masked(tmp_path: Path, missing: int) -> None:
    """The last of a variant is the one that is left out: instances of one variant are alike to a trained actor."""
    old = load_policy(old_policy(tmp_path))
    trainer = Trainer(paper_task("learned-po", "paper", without=frozenset({missing})), SMALL, seed=6)
    start_from(trainer, tmp_path / "learned-po.json")
    trainer.export(tmp_path / "new", {"command": "test"})
    new = load_policy(tmp_path / "new" / "learned-po.json")
    length, elapsed_s, ages_s = [3, 1, 2, 5], [0.02, 0.03, 0.01, 0.005], [[0.2, 0.1, 0.05], [0.04], [0.03] * 2, [0.1]]
    length[missing], elapsed_s[missing], ages_s[missing] = 0, 0.0, []
    left = [i for i in range(4) if i != missing]
    whole = observation_of(length, elapsed_s, ages_s, [1] * 4, [True] * 4)
    part = observation_of(
        [length[i] for i in left], [elapsed_s[i] for i in left], [ages_s[i] for i in left], [1] * 3, [True] * 3
    )
    [expected], _, _ = old.tables(features(old.layout, whole)[None])
    [found], _, _ = new.tables(features(new.layout, part)[None])
    assert np.abs(found - expected[left] / expected[left].sum()).max() < 1e-5


def test_other_instances_are_refused() -> None:
    with pytest.raises(RoutingError, match="cannot start"):
        columns(layout_for(PAPER_KINDS[:3]), layout_for(PAPER_KINDS))


def test_the_critic_learns_alone_at_first() -> None:
    trainer = Trainer(paper_task("learned-po", "paper"), SMALL, seed=7)
    actor = [w.detach().clone() for w in trainer.network.actor.parameters()]
    critic = next(trainer.network.critic.parameters()).detach().clone()
    trainer.run(2_000, lambda progress: None)
    assert all(torch.equal(a, b) for a, b in zip(actor, trainer.network.actor.parameters(), strict=True))
    assert not torch.equal(critic, next(trainer.network.critic.parameters()))
    trainer.run(3_000, lambda progress: None)
    assert not torch.equal(actor[0], next(iter(trainer.network.actor.parameters())))
