"""Training of `learned-set`: several sizes in one update, resumed, exported, and scored."""

from pathlib import Path

import numpy as np
import pytest
import torch

from policies.routing.checkpoint import load, save
from policies.routing.evaluate import evaluate
from policies.routing.presets import Preset
from policies.routing.queueing_model import paper_arrivals
from policies.routing.set_environment import SetEnvironments
from policies.routing.set_network import SetPolicy, load_set_policy
from policies.routing.set_ppo import FINAL_NOISE, SetTrainer
from policies.routing.set_sizes import sized
from policies.routing.train import train

MIX = {"2x2": 6, "3x1": 4}
SMALL = Preset(slots=4_000, environments=10, slots_per_update=1_000, minibatch=500, epochs=2, sigma=0.5)


def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, first, second = (SetTrainer(MIX, SMALL, seed=3) for _ in range(3))
    speeds: list[int] = []
    whole.run(4_000, lambda progress: speeds.append(progress.slots))
    assert speeds == [1_000, 2_000, 3_000, 4_000]
    first.run(2_000, lambda progress: None)
    assert first.sigma == pytest.approx(0.5 * (1.0 + FINAL_NOISE) / 2.0)
    save(first, tmp_path / "checkpoint.pt")
    load(second, tmp_path / "checkpoint.pt")
    assert second.slots == 2_000
    second.run(4_000, lambda progress: None)
    for a, b in zip(whole.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.scaling == second.scaling


def test_untrained_it_leans_heavy_at_every_size() -> None:
    trainer = SetTrainer(MIX, SMALL, seed=1)
    for name in ("2x2", "3x16", "1+2"):
        service, load_factor = sized(name)
        seen = SetEnvironments(service, paper_arrivals(load_factor), 3, 1).observe()
        tensors = {k: v.detach().numpy() for k, v in trainer.network.actor.state_dict().items()}
        assert SetPolicy(tensors, service.kinds).heavy(seen) == pytest.approx(SMALL.heavy_start, abs=0.02)


def test_sizes_count_alike() -> None:
    """Every size's advantages have mean 0 and spread 1, whatever its rewards; values start from nothing."""
    trainer = SetTrainer({"2x2": 5, "2x16": 5}, SMALL, seed=2)
    rollout = trainer._collect()
    assert trainer.scaling == [0.0] * 4
    assert np.exp(rollout.log_y[..., 0].numpy()).mean() > 0.9  # the heaviest variant's share comes first
    advantage, target = trainer._judge(rollout)
    for size in trainer.sizes:
        for part in (advantage[:, size.rows], target[:, size.rows]):
            assert part.mean() == pytest.approx(0.0, abs=1e-3)
            assert part.std() == pytest.approx(1.0, abs=1e-2)
    small, large = (np.abs(rollout.reward[:, size.rows]).mean() for size in trainer.sizes)
    assert large == pytest.approx(small, rel=0.7)  # per load of the paper's service, not 8 times as much


def test_training_writes_what_serves_and_is_scored(tmp_path: Path) -> None:
    trainer = SetTrainer(MIX, SMALL, seed=4)
    curve = train(trainer, tmp_path, until_slots=2_000, examine_every=1)
    assert [point["slots"] for point in curve] == [1_000, 2_000]
    assert set(curve[-1]["scores"]) == set(MIX)
    service, load_factor = sized("2x3")
    policy = load_set_policy(tmp_path / "learned-set.json", service.kinds)
    first, again = (
        evaluate("learned-set", service, paper_arrivals(load_factor), slots=2_000, seed=3, policy=policy).scores
        for _ in range(2)
    )
    assert first == again
    assert first["overall"].requests > 10_000


@pytest.mark.slow
def test_training_moves_away_from_a_start_that_drowns_in_bursts() -> None:
    """From 97% heavy, a short run with large steps must already lower the bursts' violations at both sizes."""
    short = Preset(
        slots=120_000, environments=120, slots_per_update=6_000, minibatch=2_000, learning_rate=3e-3, gamma=0.9
    )
    trainer = SetTrainer({"2x2": 80, "2x8": 40}, short, seed=1)
    before = trainer.examine(60)[0]
    trainer.run(120_000, lambda progress: None)
    after = trainer.examine(60)[0]
    for name in before:
        assert after[name].violation_ratio < before[name].violation_ratio - 0.05
