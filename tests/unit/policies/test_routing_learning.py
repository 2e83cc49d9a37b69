"""The learning: density, gradient, advantages, repeatability, resume, and serving in numpy equal to torch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policies.routing.artifact import read_artifact
from policies.routing.checkpoint import load, save
from policies.routing.contract import InstanceKind, RoutingError, observation_of
from policies.routing.environment import SlotEnvironments
from policies.routing.features import features, layout_for
from policies.routing.learned import load_policy
from policies.routing.network import log_density
from policies.routing.ppo import Progress, Trainer
from policies.routing.presets import PAPER_KINDS, Preset, paper_service, preset
from policies.routing.queueing_model import HEAD, LENGTH, NOW_S, PHASE, RING, SERVING, STARTED_S, paper_arrivals
from policies.routing.returns import advantages, without_input
from policies.routing.train import paper_task

SIGMA = 0.698
SMALL = Preset(slots=4_000, environments=20, slots_per_update=1_000, minibatch=500, epochs=2)


def test_density_integrates_to_one_over_the_simplex() -> None:
    """n = 3 by a grid on (y1, y2), y3 being what is left."""
    f = torch.tensor([0.4, -0.3, 0.1], dtype=torch.float64)
    edge = torch.linspace(0.0, 1.0, 1601, dtype=torch.float64)
    middle = (edge[1:] + edge[:-1]) / 2
    y1, y2 = torch.meshgrid(middle, middle, indexing="ij")
    y3 = 1.0 - y1 - y2
    inside = y3 > 1e-9
    y = torch.stack([y1, y2, y3.clamp(min=1e-9)], -1)
    density = torch.where(inside, log_density(f, y.log(), SIGMA).exp(), torch.zeros_like(y1))
    total = float(density.sum()) * float(middle[1] - middle[0]) ** 2
    assert total == pytest.approx(1.0, abs=2e-3)


def test_density_of_two_instances_is_logit_normal() -> None:
    """n = 2: the log-odds are normal with variance 2 sigma^2 (independent closed form)."""
    f = torch.tensor([0.7, -0.2], dtype=torch.float64)
    for y1 in (0.1, 0.5, 0.83):
        y = torch.tensor([y1, 1 - y1], dtype=torch.float64)
        odds, spread = np.log(y1 / (1 - y1)), 2.0**0.5 * SIGMA
        normal = np.exp(-((odds - 0.9) ** 2) / (2 * spread**2)) / (spread * (2 * np.pi) ** 0.5)
        expected = normal / (y1 * (1 - y1))
        assert float(log_density(f, y.log(), SIGMA).exp()) == pytest.approx(expected)


def test_gradient_of_the_density_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    f = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    log_y = torch.log_softmax(torch.randn(5, generator=generator, dtype=torch.float64), -1)
    log_density(f, log_y, SIGMA).backward()  # type: ignore[no-untyped-call]
    assert f.grad is not None
    for i in range(5):
        step = torch.zeros(5, dtype=torch.float64)
        step[i] = 1e-6
        change = log_density(f.detach() + step, log_y, SIGMA) - log_density(f.detach() - step, log_y, SIGMA)
        assert float(f.grad[i]) == pytest.approx(float(change) / 2e-6, abs=1e-6)


def test_advantages_equal_the_sum_of_eq_11() -> None:
    rng = np.random.default_rng(2)
    reward = rng.normal(size=(6, 2)).astype(np.float32)
    value = rng.normal(size=(7, 2)).astype(np.float32)
    found = advantages(reward, value, 0.9, 0.8)
    for t in range(6):
        expected = sum(0.72 ** (k - t) * (reward[k] + 0.9 * value[k + 1] - value[k]) for k in range(t, 6))
        assert np.allclose(found[t], expected, atol=1e-5)


def test_the_exogenous_input_is_taken_out_of_the_reward() -> None:
    rng = np.random.default_rng(3)
    given = rng.normal(size=(50, 10, 4))
    own = rng.normal(size=(50, 10)).astype(np.float32) * 0.1
    reward = (own + given @ np.array([3.0, -2.0, 0.5, 1.0])).astype(np.float32)
    assert np.abs(without_input(reward, given) - own).max() < 0.05


def run(folder: Path, **changes: Any) -> Trainer:
    """A tiny training of learned-fo-batch, exported to `folder`."""
    task = paper_task(changes.pop("policy", "learned-fo-batch"), "paper")
    trainer = Trainer(task, replace(SMALL, **changes), seed=3)
    trainer.run(2_000, lambda progress: None)
    trainer.export(folder, {"command": "test"})
    return trainer


@pytest.mark.parametrize("policy", ["learned-po", "learned-fo-batch"])
def test_numpy_serves_what_torch_trained(tmp_path: Path, policy: str) -> None:
    trainer = run(tmp_path, policy=policy)
    served = load_policy(tmp_path / f"{policy}.json", PAPER_KINDS)
    seen = np.random.default_rng(0).random((64, trainer.layout.size)).astype(np.float32)
    with torch.no_grad():
        expected = trainer.network.actor(torch.from_numpy(seen)).numpy()
    assert np.abs(served.forward(seen) - expected).max() < 1e-5
    tables, low, high = served.tables(seen)
    assert np.allclose(tables.sum(axis=1), 1.0)
    assert (low <= high).all()


def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path: Path) -> None:
    task = paper_task("learned-po", "paper")
    whole, first, second = (Trainer(task, SMALL, seed=3) for _ in range(3))
    reports: list[Progress] = []
    whole.run(4_000, reports.append)
    assert [p.slots for p in reports] == [1_000, 2_000, 3_000, 4_000]
    first.run(2_000, lambda progress: None)
    save(first, tmp_path / "checkpoint.pt")
    load(second, tmp_path / "checkpoint.pt")
    second.run(4_000, lambda progress: None)
    for a, b in zip(whole.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_simulated_and_live_observations_give_one_vector() -> None:
    environments = SlotEnvironments(paper_service(), paper_arrivals(), 30, 4, observable=True, batching=True)
    for _ in range(40):
        environments.step(np.tile([0.3, 0.3, 0.2, 0.2], (30, 1)))
    vectors, state = environments.observe(), environments.state
    ring = (state.queue.shape[2] - RING) // 2
    for e in range(30):
        now_s = state.clock[e, NOW_S]
        length = state.queue[e, :, LENGTH].tolist()
        ages = []
        for i in range(4):
            places = [(state.queue[e, i, HEAD] + k) % ring for k in range(length[i])]
            ages.append([now_s - state.times[e, i, RING + k] for k in places])
        serving = state.queue[e, :, SERVING].tolist()
        elapsed = [now_s - state.times[e, i, STARTED_S] if serving[i] else 0.0 for i in range(4)]
        live = observation_of(length, elapsed, ages, serving, [True] * 4, phase=int(state.marks[e, PHASE]))
        assert np.allclose(features(environments.layout, live), vectors[e], atol=1e-6)


@pytest.mark.slow
def test_training_moves_away_from_a_start_that_drowns_in_bursts() -> None:
    """From 97% heavy, a short run with large steps must already lower the bursts' violations."""
    task = paper_task("learned-fo", "paper")
    short = Preset(
        slots=60_000, environments=100, slots_per_update=6_000, minibatch=2_000, learning_rate=3e-3, gamma=0.9
    )
    trainer = Trainer(task, short, seed=1)
    before = trainer.examine(60)[0]["bursty"].violation_ratio
    trainer.run(60_000, lambda progress: None)
    assert trainer.examine(60)[0]["bursty"].violation_ratio < before - 0.1


def test_bad_artifacts_are_named(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "learned-fo-batch.json"
    with pytest.raises(RoutingError, match="does not exist"):
        read_artifact(tmp_path / "nothing.json")
    with pytest.raises(RoutingError, match="trained for instances"):
        load_policy(path, PAPER_KINDS[:2])
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "layout": {**record["layout"], "age_s": 1.0}}))
    with pytest.raises(RoutingError, match="layout_hash"):
        read_artifact(path)
    path.write_text("{")
    with pytest.raises(RoutingError, match="not JSON"):
        read_artifact(path)


def test_nan_in_a_network_is_refused(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    with torch.no_grad():
        next(iter(trainer.network.actor.parameters()))[0, 0] = float("nan")
    trainer.export(tmp_path, {})
    with pytest.raises(RoutingError, match="NaN"):
        load_policy(tmp_path / "learned-fo-batch.json")


def test_a_policy_that_needs_the_phase_says_so() -> None:
    layout = layout_for(PAPER_KINDS, phases=2)
    nothing = observation_of([0] * 4, [0.0] * 4, [[]] * 4, [0] * 4, [True] * 4)
    with pytest.raises(RoutingError, match="needs the workload's phase"):
        features(layout, nothing)
    with pytest.raises(RoutingError, match="4"):
        features(layout, observation_of([0], [0.0], [[]], [0], [True], phase=0))


def test_layouts_differ_by_hash() -> None:
    other = (*PAPER_KINDS[:3], InstanceKind("light", 1, 0.012, 0.7))
    assert len({layout_for(k, batching=b).hash for k in (PAPER_KINDS, other) for b in (False, True)}) == 4


def test_presets_are_checked() -> None:
    assert preset("paper").slots == 250_000_000
    with pytest.raises(RoutingError, match="preset"):
        preset("slow")
    with pytest.raises(RoutingError, match="multiple"):
        Preset(environments=7)
