"""HAPPO (Kuba et al. 2022), Huang's second comparison algorithm: on-policy, agents updated in random order.

The same hidden layers as HISPER (Section VI-C), sub-actions side by side, a state-value network on the total reward.
Each agent's clipped PPO step weighs the advantage by the probability ratios of the agents updated before it.

Choices that the papers leave open: a rollout of `rollout` slots from the 20 environments per iteration, `EPOCHS`
passes of `MINIBATCHES` minibatches per agent, clip 0.2, entropy weight 0.01, advantages normalised over the rollout,
values learned in units of the first rollout's returns. Discount 0 as for HISPER (a slot's actions do not change the
next slot), so an advantage is reward minus value; with a discount, episodes of the rollout's length per environment
and generalised advantages (`gae`), as HAPPO is usually run.
"""

from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from policies.placement.actors import LearnedPolicy
from policies.placement.contract import IntArray
from policies.placement.networks import (
    CriticShape,
    Parameters,
    actor_log_probs,
    actor_parameters,
    critic_parameters,
    critic_state,
    critic_values,
)
from policies.placement.observation import Layout, bandwidth_features, critic_requests, node_features, observe_all
from policies.placement.speed import Speed
from policies.placement.training import (
    Run,
    Settings,
    action_masks,
    actor_shape,
    artifact_of,
    optimiser_state,
    restore_optimiser,
    save_artifact,
    score,
)
from policies.placement.workload import draw_slots

EPOCHS, MINIBATCHES, CLIP, ENTROPY, MAX_GRADIENT = 5, 2, 0.2, 0.01, 10.0


class HappoLearner:
    """HAPPO's networks and updates; about `settings.minibatch` x 4 slots are played per iteration."""

    def __init__(self, settings: Settings) -> None:
        """Build everything; nothing is written or drawn from global state."""
        self.settings, self.network = settings, settings.network()
        self.layout = Layout(settings.layout, self.network.nodes, len(self.network.tables))
        self.shape = actor_shape(settings, self.network)
        self.services: IntArray = np.repeat(np.arange(len(self.network.tables)), settings.per_service)
        self.agents = len(self.services)
        self.rollout = max(1, 4 * settings.minibatch // settings.environments) * settings.environments
        self.center, self.scale = torch.zeros(1), torch.zeros(1)  # set by the first rollout
        self.links = torch.as_tensor(bandwidth_features(self.network), dtype=torch.float32).reshape(1, 1, -1)
        nodes, tokens = self.network.nodes, len(self.network.tables)
        self.critic_shape = CriticShape(self.agents, nodes + 2 + tokens, nodes, self.links.numel(), (), heads=1)
        seeded = torch.Generator().manual_seed(settings.seed)
        self.actors = actor_parameters(self.shape, self.agents, seeded)
        self.leaves = [
            {k: v[n : n + 1].detach().requires_grad_(True) for k, v in self.actors.items()} for n in range(self.agents)
        ]
        self.critic = critic_parameters(self.critic_shape, 1, seeded)
        for tensor in self.critic.values():
            tensor.requires_grad_(True)
        self.actor_optimisers = [torch.optim.Adam(list(leaf.values()), lr=settings.actor_lr) for leaf in self.leaves]
        self.critic_optimiser = torch.optim.Adam(list(self.critic.values()), lr=settings.critic_lr)
        self.masks = cast(tuple[Tensor, Tensor, Tensor], action_masks(self.network, self.services, "cpu"))
        self.noise = torch.Generator().manual_seed(settings.seed + 1)
        self.rng = np.random.default_rng([settings.seed, 1])

    def run(self, run: Run, resume: bool = False) -> Parameters:
        """Train to the end (or the time limit); writes the artifact `actors` and returns the last actors."""
        settings, step = self.settings, 0
        if resume:
            step, saved = run.load_checkpoint(self.rng)
            self._restore(saved)
        run.open(step)
        held_out = draw_slots(self.network, settings.load(), settings.evaluation_slots, np.random.default_rng(10_000))
        reported, iterations, speed = -1, 0, Speed(run.elapsed_s(), step)
        passes = EPOCHS * (self.agents + 1)  # over a rollout: every agent's, and the value network's
        while True:
            done = step >= settings.steps or run.out_of_time()
            if done or step // settings.evaluate_every > reported:
                reported = step // settings.evaluate_every
                figures = score(self.network, self._policy(), held_out)
                counts = (iterations * passes * MINIBATCHES, iterations * passes * self.rollout)
                run.report(step, figures | speed.rates(run.elapsed_s(), step, *counts))
                run.save_checkpoint(step, self._state(), self.rng)
            if done or run.out_of_time():
                break
            self.iterate()
            step, iterations = step + self.rollout, iterations + 1
        record = {"steps": step, "processor_s": run.elapsed_s(), **figures}
        save_artifact(run.folder / "actors", settings, self.shape, self.actors, record)
        return self.actors

    def iterate(self) -> None:
        """One rollout, then every agent's update in random order, then the value network's."""
        slots = draw_slots(self.network, self.settings.load(), self.rollout, self.rng)
        observation = torch.as_tensor(observe_all(self.network, self.layout, slots), dtype=torch.float32)
        with torch.no_grad():
            old = actor_log_probs(self.shape, self.actors, observation, self.masks)
            actions = [torch.multinomial(p.exp().flatten(0, 1), 1, generator=self.noise) for p in old]
            taken = [a.reshape(self.agents, self.rollout, 1) for a in actions]
            old_log = self._log_prob(old, taken)  # (U, B)
        placements = torch.cat(taken, dim=2).transpose(0, 1).numpy()
        reward = torch.as_tensor(self.network.evaluate(slots, placements).reward, dtype=torch.float32)
        requests = torch.as_tensor(critic_requests(self.network, slots), dtype=torch.float32)
        nodes = torch.as_tensor(node_features(slots), dtype=torch.float32)
        with torch.no_grad():
            advantage, returns = self._advantages(reward, self._values(requests, nodes))
        weight = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        for n in self.rng.permutation(self.agents):
            self._update_actor(int(n), observation[n : n + 1], [a[n : n + 1] for a in taken], old_log[n], weight)
            with torch.no_grad():  # later agents see how far this one has moved
                masks = self._masks(int(n))
                fresh = actor_log_probs(self.shape, self.leaves[n], observation[n : n + 1], masks)
                weight = weight * (self._log_prob(fresh, [a[n : n + 1] for a in taken])[0] - old_log[n]).exp()
        for _ in range(EPOCHS):
            for rows in torch.randperm(self.rollout, generator=self.noise).chunk(MINIBATCHES):
                error = self._values(requests[rows], nodes[rows]) - returns[rows]
                loss = ((error / self.scale) ** 2).mean()
                self.critic_optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(list(self.critic.values()), MAX_GRADIENT)
                self.critic_optimiser.step()

    def _advantages(self, reward: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Generalised advantages and the returns that the value network learns, (B,); slots stand by environment."""
        discount, decay = self.settings.discount, self.settings.discount * self.settings.gae
        rewards, known = (x.reshape(self.settings.environments, -1) for x in (reward, values))
        advantages = torch.zeros_like(rewards)
        follow, carried = torch.zeros(len(rewards)), torch.zeros(len(rewards))
        for t in range(rewards.shape[1] - 1, -1, -1):
            carried = rewards[:, t] + discount * follow - known[:, t] + decay * carried
            advantages[:, t], follow = carried, known[:, t]
        returns = (advantages + known).flatten()
        if not self.scale:
            self.center, self.scale = returns.mean().reshape(1), returns.std().reshape(1).clamp_min(1e-6)
        return advantages.flatten(), returns

    def _update_actor(self, n: int, seen: Tensor, taken: list[Tensor], old_log: Tensor, weight: Tensor) -> None:
        for _ in range(EPOCHS):
            for rows in torch.randperm(self.rollout, generator=self.noise).chunk(MINIBATCHES):
                found = actor_log_probs(self.shape, self.leaves[n], seen[:, rows], self._masks(n))
                log_prob = self._log_prob(found, [a[:, rows] for a in taken])[0]
                ratio = (log_prob - old_log[rows]).exp()
                gain = torch.min(ratio * weight[rows], ratio.clamp(1 - CLIP, 1 + CLIP) * weight[rows]).mean()
                entropy = torch.stack([-(p.exp() * p.clamp_min(-30)).sum(dim=2).mean() for p in found]).sum()
                loss = -gain - ENTROPY * entropy
                self.actor_optimisers[n].zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(list(self.leaves[n].values()), MAX_GRADIENT)
                self.actor_optimisers[n].step()

    def _log_prob(self, found: tuple[Tensor, ...], taken: list[Tensor]) -> Tensor:
        """(n, B) joint log-probability of the taken sub-actions."""
        return torch.stack([p.gather(2, a)[:, :, 0] for p, a in zip(found, taken, strict=True)]).sum(dim=0)

    def _values(self, requests: Tensor, nodes: Tensor) -> Tensor:
        state = critic_state(self.critic_shape, self.critic, requests, nodes, self.links)
        return critic_values(self.critic_shape, self.critic, state, None)[0, :, 0] * self.scale + self.center

    def _masks(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor, Tensor], tuple(m[n : n + 1] for m in self.masks))

    def _state(self) -> Parameters:
        """Networks, optimisers, units, noise: a resumed run goes on exactly."""
        tensors = {f"actor.{k}": v for k, v in self.actors.items()} | {f"critic.{k}": v for k, v in self.critic.items()}
        for name, optimiser, leaves in self._optimisers():
            tensors |= optimiser_state(name, optimiser, leaves)
        return tensors | {"noise": self.noise.get_state(), "center": self.center, "scale": self.scale}

    def _restore(self, saved: Parameters) -> None:
        with torch.no_grad():
            for prefix, tensors in (("actor", self.actors), ("critic", self.critic)):
                for name, tensor in tensors.items():
                    tensor.copy_(saved[f"{prefix}.{name}"])
        for name, optimiser, leaves in self._optimisers():
            restore_optimiser(name, optimiser, leaves, saved)
        self.noise.set_state(saved["noise"])
        self.center, self.scale = saved["center"], saved["scale"]

    def _optimisers(self) -> list[tuple[str, torch.optim.Optimizer, Parameters]]:
        actors = [(f"agent{n}", o, self.leaves[n]) for n, o in enumerate(self.actor_optimisers)]
        return [*actors, ("critic", self.critic_optimiser, self.critic)]

    def _policy(self) -> LearnedPolicy:
        artifact = artifact_of(self.settings, self.network, self.shape, self.actors)
        return LearnedPolicy("happo", self.network, artifact, sequential=False)


def train_happo(settings: Settings, folder: Path, resume: bool = False) -> Parameters:
    """Train and write `folder`/actors.{safetensors,json}, curve.jsonl, checkpoint and TensorBoard events."""
    return HappoLearner(settings).run(Run(settings, folder), resume)
