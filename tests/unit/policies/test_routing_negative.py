"""The two algorithms that the paper gave up: they must at least be what their names say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from policies.routing.deterministic_gradient import DeterministicTrainer
from policies.routing.negative_results import curve, main
from policies.routing.presets import Preset
from policies.routing.recurrent import SPAN, RecurrentTrainer
from policies.routing.train import paper_task

SMALL = Preset(slots=2_000, environments=20, slots_per_update=1_000, minibatch=500, epochs=2)


def test_a_memory_replayed_is_the_memory_that_acted() -> None:
    """Outputs recomputed span by span, from the memories kept at their starts, are those that acted."""
    trainer = RecurrentTrainer(paper_task("learned-po", "paper"), SMALL, seed=1)
    trainer.run(1_000, lambda progress: None)
    rollout = trainer._collect()
    for k in range(rollout.reward.shape[0] // SPAN):
        seen = torch.from_numpy(rollout.seen[k * SPAN : (k + 1) * SPAN])
        with torch.no_grad():
            out, _, _ = trainer.recurrent.over_time(seen, trainer._starts[k * SPAN])
        assert torch.allclose(out, rollout.outputs[k * SPAN : (k + 1) * SPAN], atol=1e-5)


def test_a_memory_makes_equal_observations_differ() -> None:
    trainer = RecurrentTrainer(paper_task("learned-po", "paper"), SMALL, seed=1)
    seen = torch.ones(2, 1, trainer.layout.size)
    out, _, _ = trainer.recurrent.over_time(seen, torch.zeros(1, 60))
    assert not torch.equal(out[0], out[1])


def test_the_rollouts_of_a_memory_join_without_a_gap() -> None:
    """The boundary between two rollouts is seen twice, but remembered once."""
    trainer = RecurrentTrainer(paper_task("learned-po", "paper"), SMALL, seed=1)
    first = trainer._collect()
    second = trainer._collect()
    assert np.array_equal(first.seen[-1], second.seen[0])
    joined = torch.from_numpy(np.concatenate([first.seen[:-1], second.seen[:1]]))
    with torch.no_grad():
        out, _, _ = trainer.recurrent.over_time(joined, torch.zeros(20, 60))
    assert torch.allclose(out[-1], second.outputs[0], atol=1e-5)


def test_the_deterministic_actor_climbs_what_is_worth_more() -> None:
    """A one-slot problem whose reward is the share of instance 2: the table must move there."""
    trainer = DeterministicTrainer(
        paper_task("learned-po", "paper"), replace(SMALL, gamma=0.01, learning_rate=3e-3), seed=1
    )
    rng = torch.Generator().manual_seed(0)
    now = torch.rand(256, trainer.layout.size, generator=rng)
    for _ in range(150):
        table = torch.softmax(2.0 * torch.randn(256, 4, generator=rng), -1)
        trainer.climb(now, table, table[:, 2], now)
    with torch.no_grad():
        assert float(torch.softmax(trainer.network.actor(now), -1)[:, 2].mean()) > 0.8


@pytest.mark.parametrize("kind", ["ppo", "recurrent", "deterministic"])
def test_a_learning_curve_has_scores(kind: str) -> None:
    points = curve(kind, SMALL, 1, every=1, say=False)
    assert [p["slots"] for p in points] == [1_000, 2_000]
    assert 0.0 < points[-1]["scores"]["overall_50_50"]["goodput_ratio"] < 0.83


def test_kinds_are_kept_beside_each_other(tmp_path: Path) -> None:
    small = ["--set", "slots_per_update=1000", "--set", "environments=20", "--set", "minibatch=500", "--slots", "1000"]
    for kind in ("ppo", "deterministic"):
        assert main(["--kind", kind, "--out", str(tmp_path / "curves.json"), *small]) == 0
    assert (tmp_path / "curves.json").read_text().count('"slots": 1000') == 2


def test_batches_are_refused() -> None:
    for made in (RecurrentTrainer, DeterministicTrainer):
        with pytest.raises(ValueError, match="learned-po-batch"):
            made(paper_task("learned-po-batch", "paper"), SMALL, 1)
