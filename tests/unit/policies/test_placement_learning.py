"""The learners: networks and their numpy twin, true action values, targets, updates, resuming."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from policies.placement.actors import LearnedPolicy, load_artifact, log_probabilities
from policies.placement.contract import REJECT, ArtifactError
from policies.placement.counterfactual import Later, with_others_answering, with_others_fixed
from policies.placement.edge_network import ACCEPTED, EdgeNetwork
from policies.placement.graph import eua16
from policies.placement.guided import GuidedTrainer
from policies.placement.happo import HappoLearner
from policies.placement.hasac import hasac_settings
from policies.placement.hisper import SoftLearner
from policies.placement.networks import actor_log_probs, actor_parameters, critic_state, critic_values, straight_through
from policies.placement.observation import Layout, critic_requests, node_features, observe, observe_all
from policies.placement.price_training import price_settings
from policies.placement.prices import PricedAgents, learn_prices
from policies.placement.replay import Replay
from policies.placement.reward_scale import RewardScale
from policies.placement.rules import Convention, Heuristic, RandomRule, Sequential
from policies.placement.tables import shipped_tables
from policies.placement.train import PRESETS, preset, train
from policies.placement.training import Run, Settings, action_masks, actor_shape, artifact_of, with_overrides
from policies.placement.workload import Load, draw_slots

torch.set_num_threads(1)
NETWORK = EdgeNetwork(eua16(), shipped_tables())
SMALL = Settings(
    per_service=2, minibatch=32, prefill=100, warmup=2, buffer=400, steps=40, evaluate_every=40, evaluation_slots=10
)  # fmt: skip
GUIDED = Settings(
    algorithm="guided", layout="derived", guide=0.1, per_service=2, minibatch=16, steps=64, evaluate_every=32,
    evaluation_slots=10,
)  # fmt: skip


def test_true_values_are_those_of_playing_every_action() -> None:
    rng = np.random.default_rng(0)
    slots = draw_slots(NETWORK, Load(per_service=3, mixed=True, present=0.9), 5, rng)
    variants = np.where(slots.service == 0, 4, 3)
    placements = np.stack(
        [rng.integers(16, size=variants.shape), rng.integers(variants), 4 * rng.integers(4, size=variants.shape)],
        axis=2,
    )
    placements[rng.random(variants.shape) < 0.1] = REJECT
    tried = 0
    for agent in range(slots.requests):
        values = with_others_fixed(NETWORK, slots, placements, agent)
        for _ in range(60):
            action = np.stack([rng.integers(16, size=5), rng.integers(3, size=5), 4 * rng.integers(4, size=5)], axis=1)
            changed = placements.copy()
            changed[:, agent] = action
            rewards = NETWORK.evaluate(slots, changed).reward
            present = slots.service[:, agent] >= 0
            got = values[np.arange(5), action[:, 0], action[:, 1], action[:, 2]]
            np.testing.assert_allclose(got[present], rewards[present], atol=1e-9)
            tried += 1
    assert tried == 360


def test_answering_costs_a_later_request_no_more_than_its_second_best_node() -> None:
    slots = draw_slots(NETWORK, Load(per_service=1), 30, np.random.default_rng(1))
    state = NETWORK.start(slots)
    options = NETWORK.options(state, slots, 0)
    nothing = np.full((30, 3), REJECT)
    later = NETWORK.options(state, slots, 1)
    values = np.where(later.feasible, later.value, -100.0).max(axis=(1, 2))
    total = with_others_answering(NETWORK, slots, 0, nothing, options, [Later(values)])
    loss = np.where(options.feasible, options.value - total, 0.0)
    ordered = np.sort(values, axis=1)
    assert (loss >= -1e-12).all()
    assert (loss <= (ordered[:, -1] - ordered[:, -2])[:, None, None, None] + 1e-12).all()
    best_node = values.argmax(axis=1)
    elsewhere = np.arange(16)[None] != best_node[:, None]
    assert (np.abs(loss.max(axis=(1, 2))[elsewhere]) < 1e-12).all()
    assert loss.max() > 0.0


@pytest.mark.parametrize("autoregressive", [True, False])
@pytest.mark.parametrize("layout", ["paper", "derived"])
def test_the_numpy_actor_is_the_torch_actor(autoregressive: bool, layout: str) -> None:
    settings = replace(SMALL, autoregressive=autoregressive, layout=layout)
    shape = actor_shape(settings, NETWORK)
    actors = actor_parameters(shape, 4, torch.Generator().manual_seed(0))
    services = np.array([0, 0, 1, 1])
    masks = action_masks(NETWORK, services, "cpu")
    slots = draw_slots(NETWORK, settings.load(), 7, np.random.default_rng(0))
    seen = observe_all(NETWORK, Layout(layout, 16, 2), slots).astype(np.float32)
    assert seen.shape == (4, 7, Layout(layout, 16, 2).size)
    ours = actor_log_probs(shape, actors, torch.as_tensor(seen), (masks[0], masks[1], masks[2]))
    artifact = artifact_of(settings, NETWORK, shape, actors)
    twin = log_probabilities(artifact, np.arange(4), seen, [m.numpy() for m in masks])
    for a, b in zip(ours, twin, strict=True):
        np.testing.assert_allclose(a.numpy(), b, atol=2e-5)
        np.testing.assert_allclose(np.exp(b).sum(axis=2), 1.0, atol=1e-5)
    assert np.exp(twin[1][2:, :, 3]).max() == 0.0  # tracking has three variants


def test_only_the_autoregressive_actor_lets_one_sub_action_see_the_one_before() -> None:
    seen = torch.as_tensor(np.random.default_rng(0).normal(size=(1, 5, 170)), dtype=torch.float32)
    for autoregressive in (True, False):
        shape = actor_shape(replace(SMALL, autoregressive=autoregressive), NETWORK)
        actors = actor_parameters(shape, 1, torch.Generator().manual_seed(0))
        masks = action_masks(NETWORK, np.array([0]), "cpu")
        before = actor_log_probs(shape, actors, seen, (masks[0], masks[1], masks[2]))
        actors["head0.bias"][:, :, 3] += 5.0
        after = actor_log_probs(shape, actors, seen, (masks[0], masks[1], masks[2]))
        assert bool((before[1] != after[1]).any()) == autoregressive
        assert bool((before[2] != after[2]).any()) == autoregressive


def test_observations_follow_the_state_and_only_ones_own_request() -> None:
    slots = draw_slots(NETWORK, Load(per_service=2), 6, np.random.default_rng(0))
    for name in ("paper", "derived"):
        layout, state = Layout(name, 16, 2), NETWORK.start(slots)
        before = observe(NETWORK, layout, state, slots, 1)
        other = replace(slots, data_mb=np.where(np.arange(4) == 0, 1.0, slots.data_mb))
        np.testing.assert_array_equal(before, observe(NETWORK, layout, state, other, 1))
        placed = NETWORK.place(state, slots, 0, np.tile([15, 0, 3], (6, 1)))[0] == ACCEPTED
        assert placed.any()
        np.testing.assert_array_equal((before != observe(NETWORK, layout, state, slots, 1)).any(axis=1), placed)
        assert np.isfinite(before).all()
        assert np.abs(before).max() < 60


def test_straight_through_samples_the_distribution_and_passes_gradients() -> None:
    logits = torch.tensor([0.5, 1.5, -1.0], requires_grad=True)
    log_probs = torch.log_softmax(logits, dim=0).expand(1, 40_000, 3)
    sample = straight_through(log_probs, torch.Generator().manual_seed(0))
    frequency = sample.detach().mean(dim=(0, 1))
    np.testing.assert_allclose(frequency.numpy(), torch.softmax(logits, 0).detach().numpy(), atol=0.01)
    sample[..., 0].sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad[0] > 0 > logits.grad[1]


def test_targets_follow_equation_31() -> None:
    learner = SoftLearner(replace(SMALL, discount=0.9))  # no prefill: the critics learn rewards as they are
    learner.collect(64)
    learner.noise.manual_seed(5)
    learner.rng = np.random.default_rng(5)
    got = learner._next_values(alpha=2.0)
    learner.noise.manual_seed(5)
    rows = torch.as_tensor(np.random.default_rng(5).integers(learner.replay.filled, size=32))
    batch = learner.replay.take(rows)
    requests, nodes = batch.requests, batch.nodes
    found = actor_log_probs(learner.shape, learner.actors, learner._observation(requests, nodes), learner.masks)
    one_hot = torch.cat([straight_through(p, learner.noise) for p in found], dim=2)
    entropy = torch.zeros(32)
    for n in range(4):
        for log_probs, action in zip(found, one_hot[n].split([16, 4, 16], dim=1), strict=True):  # type: ignore[no-untyped-call]
            entropy += log_probs[n].gather(1, action.argmax(dim=1, keepdim=True))[:, 0]
    state = critic_state(learner.critic_shape, learner.targets, requests, nodes, learner.links)
    values = critic_values(learner.critic_shape, learner.targets, state, one_hot.transpose(0, 1))
    wanted = torch.minimum(values[0], values[1]) - 2.0 * entropy[:, None]
    np.testing.assert_allclose(got.detach().numpy(), wanted.detach().numpy(), atol=1e-4)


def test_critics_learn_the_sub_rewards_and_targets_trail() -> None:
    learner = SoftLearner(replace(SMALL, critic_lr=1e-3))
    learner.collect(256)
    before = {k: v.clone() for k, v in learner.targets.items()}
    losses = [learner.update(2.0) for _ in range(25)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    name = "hidden0.weight"
    moved = (learner.targets[name] - before[name]).norm()
    assert 0 < moved < (learner.critics[name].detach() - before[name]).norm()


def test_an_agents_update_is_seen_by_the_stacked_networks() -> None:
    learner = SoftLearner(SMALL)
    learner.collect(64)
    before = learner.actors["head0.weight"].clone()
    learner.update(2.0)
    for n in range(4):
        assert (learner.actors["head0.weight"][n] != before[n]).any()
        np.testing.assert_array_equal(
            learner.leaves[n]["head0.weight"][0].detach().numpy(), learner.actors["head0.weight"][n].numpy()
        )


def test_hasac_is_hisper_without_its_two_additions() -> None:
    learner = SoftLearner(hasac_settings(SMALL))
    assert learner.critics["out.weight"].shape[2] == 1
    assert not any(name.startswith("cell") for name in learner.actors)
    learner.collect(64)
    assert np.isfinite(learner.update(2.0))


@pytest.mark.slow
def test_happo_gains_from_a_few_iterations() -> None:
    learner = HappoLearner(replace(SMALL, minibatch=128, actor_lr=2e-3, autoregressive=False, hra=False))
    held_out = draw_slots(learner.network, learner.settings.load(), 300, np.random.default_rng(9))
    placements = learner._policy().decide(held_out, np.random.default_rng(0))
    before = float(learner.network.evaluate(held_out, placements).reward.mean())
    for _ in range(8):
        learner.iterate()
    after = learner._policy().decide(held_out, np.random.default_rng(0))
    assert float(learner.network.evaluate(held_out, after).reward.mean()) > before + 10.0


def test_an_untrained_guided_actor_is_the_rule_that_it_starts_from() -> None:
    slots = draw_slots(NETWORK, Load(per_service=2), 40, np.random.default_rng(3))
    rng = np.random.default_rng(0)
    blind, sequential = GuidedTrainer(GUIDED), GuidedTrainer(replace(GUIDED, sequential=True, shared=True))
    assert (blind._policy().decide(slots, rng) == Heuristic(NETWORK).decide(slots, rng)).all()
    assert (sequential._policy().decide(slots, rng) == Sequential(NETWORK).decide(slots, rng)).all()
    owned = GuidedTrainer(replace(GUIDED, start="convention"))
    convention = Convention(NETWORK, Load(per_service=2), 0, swaps=4000, slots=1000)
    same = (owned._policy().decide(slots, rng) == convention.decide(slots, rng)).all(axis=2)
    assert same.mean() > 0.97  # another agent's node is taken only where it is worth far more


def test_a_guided_run_from_prices_keeps_them_and_begins_as_they_decide(tmp_path: Path) -> None:
    settings = replace(GUIDED, start="prices", price_slots=100, price_rounds=1, steps=1, minibatch=1, actor_lr=1e-9)
    train(settings, tmp_path)
    policy = LearnedPolicy("x", NETWORK, load_artifact(tmp_path / "actors", NETWORK), sequential=False)
    slots = draw_slots(NETWORK, settings.load(), 40, np.random.default_rng(3))
    learned = learn_prices(NETWORK, settings.load(), price_settings(settings))
    expected = PricedAgents(NETWORK, learned).decide(slots, np.random.default_rng(0))
    assert (policy.decide(slots, np.random.default_rng(0)) == expected).mean() > 0.99  # tables in single precision
    assert not (expected == Heuristic(NETWORK).decide(slots, np.random.default_rng(0))).all()
    with pytest.raises(ValueError, match="blind guided actors"):
        GuidedTrainer(replace(settings, sequential=True))


@pytest.mark.slow
def test_guided_training_improves_on_its_start() -> None:
    settings = replace(GUIDED, minibatch=64, actor_lr=1e-3, per_service=3, temperature=0.02, temperature_end=0.02)
    trainer = GuidedTrainer(settings)
    held_out = draw_slots(NETWORK, settings.load(), 200, np.random.default_rng(9))
    rewards = []
    for _ in range(2):
        placements = trainer._policy().decide(held_out, np.random.default_rng(0))
        rewards.append(float(NETWORK.evaluate(held_out, placements).reward.mean()))
        for _ in range(12):
            trainer.update(0.0)
    assert rewards[1] > rewards[0] + 1.0


@pytest.mark.parametrize("settings", [SMALL, replace(SMALL, algorithm="happo", minibatch=10), GUIDED])
def test_runs_write_artifacts_that_load_and_decide(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] >= settings.steps
    steps_s, samples_s = rows[-1]["steps_per_s"], rows[-1]["samples_per_s"]
    # HAPPO: 5 passes over a rollout for each of 4 agents and the value network; HISPER: a minibatch every 40 steps.
    assert samples_s / steps_s == pytest.approx(
        {"happo": 25, "hisper": 32 / 40, "guided": 1}[settings.algorithm], rel=1e-3
    )
    per_update = {"happo": 20, "hisper": 32, "guided": 16}[settings.algorithm]
    assert samples_s / rows[-1]["updates_per_s"] == pytest.approx(per_update, rel=1e-3)
    printed = capsys.readouterr().err.splitlines()[-1]
    assert all(f"{what}_per_s" in printed for what in ("steps", "updates", "samples"))
    assert any((tmp_path / "tensorboard").glob("events*"))
    artifact = load_artifact(tmp_path / "actors", NETWORK)
    policy = LearnedPolicy("x", NETWORK, artifact, settings.sequential)
    slots = draw_slots(NETWORK, settings.load(), 5, np.random.default_rng(0))
    one_by_one = np.concatenate(
        [policy.decide(slots.take(slice(e, e + 1)), np.random.default_rng(0)) for e in range(5)]
    )
    assert (one_by_one == policy.decide(slots, np.random.default_rng(0))).all()
    with pytest.raises(ArtifactError, match="trained for 2 requests per service"):
        policy.decide(draw_slots(NETWORK, Load(per_service=3), 1, np.random.default_rng(0)), np.random.default_rng(0))


class StoppedRun(Run):
    """A run that is out of time once a given step was evaluated, as if its process had been told to stop."""

    def __init__(self, settings: Settings, folder: Path, stop_at: int) -> None:
        super().__init__(settings, folder)
        self.stop_at, self.seen = stop_at, -1

    def report(self, step: int, figures: Mapping[str, float]) -> None:
        super().report(step, figures)
        self.seen = step

    def out_of_time(self) -> bool:
        return self.seen >= self.stop_at


@pytest.mark.parametrize(
    ("learner", "settings"),
    [
        (GuidedTrainer, GUIDED),
        (SoftLearner, replace(SMALL, steps=160, evaluate_every=80, discount=0.5, alpha_end=0.5)),
        (HappoLearner, replace(SMALL, algorithm="happo", minibatch=10, steps=160, evaluate_every=80, discount=0.9)),
    ],
)
def test_a_resumed_run_ends_exactly_as_one_that_never_stopped(
    learner: type[GuidedTrainer] | type[SoftLearner] | type[HappoLearner], settings: Settings, tmp_path: Path
) -> None:
    whole = learner(settings).run(Run(settings, tmp_path / "whole"))
    half = settings.steps // 2
    learner(settings).run(StoppedRun(settings, tmp_path / "parts", half))
    parts = learner(settings).run(Run(settings, tmp_path / "parts"), resume=True)
    for name, tensor in whole.items():
        np.testing.assert_array_equal(tensor.detach().numpy(), parts[name].detach().numpy(), err_msg=name)
    rows = [json.loads(line) for line in (tmp_path / "parts" / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, half, half, settings.steps]
    assert rows[2]["processor_s"] > rows[1]["processor_s"]  # a time limit goes on where it was
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        learner(settings).run(Run(settings, tmp_path / "none"), resume=True)


def test_critics_learn_small_sub_rewards_beside_penalties_only_when_scaled() -> None:
    """Unscaled, the penalties of Eq. 20 drown the delay head: it stays worse than predicting the mean."""
    explained = {}
    for normalise in (True, False):
        learner = SoftLearner(replace(SMALL, prefill=2000, buffer=2000, minibatch=128, normalise=normalise))
        learner.prefill()
        for _ in range(100):
            learner.update(2.0, actors=False)
        batch = learner.replay.take(torch.arange(2000))
        with torch.no_grad():
            state = critic_state(learner.critic_shape, learner.critics, batch.requests, batch.nodes, learner.links)
            values = critic_values(learner.critic_shape, learner.critics, state, learner._one_hot(batch.actions))
        error = learner.scale.rewards(values.mean(dim=0)) - batch.rewards
        explained[normalise] = float(1 - error[:, 1].var() / batch.rewards[:, 1].var())
    assert explained[True] > 0.3 > 0.0 > explained[False]


def test_the_reward_scale_maps_back_and_resolves_small_differences_beside_penalties() -> None:
    rewards = torch.tensor([[-700.0, -12.0], [-99.6, -5.0], [0.0, -0.2], [0.25, -4.0], [5.0, -8.0]])
    scale = RewardScale(2, "cpu")
    np.testing.assert_array_equal(scale.rewards(scale.learned(rewards)), rewards)  # the identity until fitted
    scale.fit(rewards)
    learned = scale.learned(rewards)
    np.testing.assert_allclose(learned.mean(dim=0).numpy(), 0.0, atol=1e-6)
    np.testing.assert_allclose(learned.std(dim=0).numpy(), 1.0, atol=1e-6)
    np.testing.assert_allclose(scale.rewards(learned).numpy(), rewards.numpy(), rtol=1e-4, atol=1e-5)
    linear = rewards[:, 0] / rewards[:, 0].std()
    assert learned[3, 0] - learned[2, 0] > 50 * (linear[3] - linear[2])


def test_the_buffer_gives_back_what_it_was_given_and_forgets_the_oldest() -> None:
    services = np.array([0, 0, 1, 1])
    replay, slots = (
        Replay(30, services, 16, "cpu"),
        draw_slots(NETWORK, Load(per_service=2), 40, np.random.default_rng(0)),
    )
    placements = RandomRule(NETWORK).decide(slots, np.random.default_rng(0))
    rewards = NETWORK.evaluate(slots, placements).reward_parts
    for first in (0, 20):
        part = slice(first, first + 20)
        replay.add(slots.take(part), placements[part], rewards[part])
    kept = np.array([*range(30, 40), *range(10, 30)])  # the ring's order
    batch = replay.take(torch.arange(30))
    np.testing.assert_allclose(batch.requests.numpy(), critic_requests(NETWORK, slots)[kept], rtol=1e-6)
    np.testing.assert_allclose(batch.nodes.numpy(), node_features(slots)[kept], rtol=1e-6)
    np.testing.assert_array_equal(batch.actions.numpy(), placements[kept])
    np.testing.assert_allclose(batch.rewards.numpy(), rewards[kept], rtol=1e-6)


def test_generalised_advantages_are_discounted_sums_of_one_step_errors() -> None:
    settings = replace(SMALL, algorithm="happo", environments=2, minibatch=3, discount=0.9, gae=0.8)
    learner = HappoLearner(settings)
    rng = np.random.default_rng(0)
    reward, values = rng.normal(size=(2, 6)), rng.normal(size=(2, 6))
    got, returns = learner._advantages(
        *(torch.as_tensor(x.ravel(), dtype=torch.float32) for x in (reward, values))
    )  # 12 slots: six of each environment
    follow = np.concatenate([values[:, 1:], np.zeros((2, 1))], axis=1)
    errors = reward + 0.9 * follow - values
    weights = np.array([[(0.9 * 0.8) ** (s - t) if s >= t else 0.0 for s in range(6)] for t in range(6)])
    np.testing.assert_allclose(got.numpy().reshape(2, 6), errors @ weights.T, atol=1e-5)
    np.testing.assert_allclose(returns.numpy(), got.numpy() + values.ravel(), atol=1e-5)


def test_an_artifact_for_another_layout_or_service_is_refused(tmp_path: Path) -> None:
    train(replace(GUIDED, steps=16), tmp_path)
    path = tmp_path / "actors.json"
    text = json.loads(path.read_text())
    path.write_text(json.dumps({**text, "layout": {"name": "derived", "hash": "0"}}))
    with pytest.raises(ArtifactError, match="layout"):
        load_artifact(tmp_path / "actors", NETWORK)
    path.write_text(json.dumps({**text, "services": ["ocr", "tracking"]}))
    with pytest.raises(ArtifactError, match="services"):
        load_artifact(tmp_path / "actors", NETWORK)
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_artifact(tmp_path / "missing", NETWORK)


def test_presets_and_overrides() -> None:
    paper = preset("hisper-paper")
    assert (paper.alpha, paper.environments, paper.prefill, paper.steps) == (2.0, 20, 90_000, 600_000)
    assert (paper.actor_lr, paper.critic_lr) == (2e-4, 5e-4)
    assert replace(paper, preset="paper") == preset("paper")
    assert preset("hisper-paper-10").alpha == 2.5
    assert {s.algorithm for s in PRESETS.values()} == {"hisper", "hasac", "happo", "guided", "prices"}
    assert with_overrides(paper, {"hra": "false", "steps": "10"}) == replace(paper, hra=False, steps=10)
    for wrong, says in (({"stepz": "1"}, "unknown"), ({"steps": "many"}, "type int"), ({"steps": "0"}, "at least 1")):
        with pytest.raises(ValueError, match=says):
            with_overrides(paper, wrong)
    with pytest.raises(ValueError, match="unknown; use one of"):
        preset("sarsa")
