"""HISPER (Huang, Section V, Algorithm 1) and, by two switches, its ablations and HASAC.

Soft actor-critic for heterogeneous agents: one actor per request, twin critics over the joint state and action.
- `hra` (hybrid reward architecture): three heads, one per sub-reward, each with its own target (Eq. 31); off: one.
- `autoregressive`: the three sub-actions come out of LSTM cells in turn; off: three heads side by side.
With both off this is HASAC (Liu et al. 2024) with the same hidden layers.

Readings that the paper leaves open:
- Eq. 31 puts the entropy of all agents in each of the three heads, so the summed target carries it three times; this
  is followed. Eq. 33 takes it once and sums the per-head minima of the twins; this is followed.
- Eq. 34's tau multiplies the old target.
- The discount is 0 by default (see `training.Settings`); then the targets are the sub-rewards and no next action is
  needed. Any discount in [0, 1) works.
- Critics learn every head on the scale of `reward_scale.py` (`normalise`); actors see the figures scaled back, so
  that alpha means what it means in Eq. 23.
- Acting while training samples; evaluation takes the likeliest sub-actions (`sampled` draws them instead).
"""

from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from policies.placement.actors import LearnedPolicy
from policies.placement.contract import IntArray, PlacementPolicy, Slots
from policies.placement.edge_network import EdgeNetwork
from policies.placement.networks import (
    ActorShape,
    CriticShape,
    Parameters,
    actor_log_probs,
    actor_parameters,
    critic_parameters,
    critic_state,
    critic_values,
    straight_through,
)
from policies.placement.observation import Layout, bandwidth_features, critic_requests, node_features
from policies.placement.replay import Batch, Replay
from policies.placement.reward_scale import RewardScale
from policies.placement.rules import Convention, Heuristic, RandomRule
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
    set_learning_rate,
)
from policies.placement.workload import draw_slots


class SoftLearner:
    """HISPER's networks, buffer and updates."""

    def __init__(self, settings: Settings) -> None:
        """Build everything; nothing is written or drawn from global state."""
        if settings.layout != "paper" or settings.shared or settings.sequential or settings.guide:
            raise ValueError("hisper and hasac train blind agents of their own on layout 'paper'; see guided.py")
        self.settings, self.device = settings, settings.device
        self.network: EdgeNetwork = settings.network()
        self.layout = Layout(settings.layout, self.network.nodes, len(self.network.tables))
        self.shape: ActorShape = actor_shape(settings, self.network)
        self.services: IntArray = np.repeat(np.arange(len(self.network.tables)), settings.per_service)
        self.agents = len(self.services)
        links = torch.as_tensor(bandwidth_features(self.network), dtype=torch.float32, device=self.device)
        self.links = links.reshape(1, 1, -1)
        nodes, tokens = self.network.nodes, len(self.network.tables)
        heads = 3 if settings.hra else 1
        self.critic_shape = CriticShape(
            self.agents, nodes + 2 + tokens, nodes, links.numel(), self.shape.actions, heads
        )
        seeded = torch.Generator().manual_seed(settings.seed)
        # `actors` holds all agents stacked, without gradients; `leaves` are views of it, one dict per agent, so that
        # an agent's update is seen by the stacked networks at once.
        self.actors = {k: v.to(self.device) for k, v in actor_parameters(self.shape, self.agents, seeded).items()}
        self.leaves = [
            {k: v[n : n + 1].detach().requires_grad_(True) for k, v in self.actors.items()} for n in range(self.agents)
        ]
        self.critics = {k: v.to(self.device) for k, v in critic_parameters(self.critic_shape, 2, seeded).items()}
        self.targets = {k: v.clone() for k, v in self.critics.items()}
        for tensor in self.critics.values():
            tensor.requires_grad_(True)
        self.actor_optimisers = [
            torch.optim.Adam(list(leaf.values()), lr=settings.actor_lr, fused=True) for leaf in self.leaves
        ]
        self.critic_optimiser = torch.optim.Adam(list(self.critics.values()), lr=settings.critic_lr, fused=True)
        self.masks = cast(tuple[Tensor, Tensor, Tensor], action_masks(self.network, self.services, self.device))
        self.noise = torch.Generator(device=self.device).manual_seed(settings.seed + 1)
        self.rng = np.random.default_rng([settings.seed, 1])
        self.replay = Replay(settings.buffer, self.services, nodes, self.device)
        self.scale = RewardScale(heads, self.device)
        self.updates = 0

    def run(self, run: Run, resume: bool = False) -> Parameters:
        """Algorithm 1 to the end (or the time limit); writes the artifact `actors` and returns the last actors."""
        settings, step = self.settings, 0
        if resume:
            step, saved = run.load_checkpoint(self.rng)
            self._restore(saved)
        run.open(step)
        if not resume:
            self.prefill()
            for _ in range(settings.warmup if settings.prefill else 0):
                self.update(settings.alpha, actors=False)
        held_out = draw_slots(self.network, settings.load(), settings.evaluation_slots, np.random.default_rng(10_000))
        loss, speed = 0.0, Speed(run.elapsed_s(), step, self.updates, self.updates * settings.minibatch)
        while True:
            figures = score(self.network, self._policy(), held_out)
            rates = speed.rates(run.elapsed_s(), step, self.updates, self.updates * settings.minibatch)
            run.report(step, {**figures, "critic_loss": loss, "alpha": settings.alpha_at(run.share(step)), **rates})
            if step >= settings.steps or run.out_of_time():
                break
            if step % settings.checkpoint_every == 0:
                run.save_checkpoint(step, self._state(), self.rng)
            target = min(step + settings.evaluate_every, settings.steps)
            while step < target and not run.out_of_time():
                before = step // settings.interval
                self.collect(settings.environments)
                step += settings.environments
                for _ in range(step // settings.interval - before):
                    share = run.share(step)
                    self.set_rates(settings.lr_factor(share))
                    actors = self.updates % settings.actor_every == 0
                    loss = self.update(settings.alpha_at(share), actors)
        run.save_checkpoint(step, self._state(), self.rng)
        record = {"steps": step, "updates": self.updates, "processor_s": run.elapsed_s(), **figures}
        save_artifact(run.folder / "actors", settings, self.shape, self.actors, record)
        return self.actors

    def set_rates(self, factor: float) -> None:
        """Set both learning rates to a share of the settings'."""
        for optimiser in self.actor_optimisers:
            set_learning_rate(optimiser, factor * self.settings.actor_lr)
        set_learning_rate(self.critic_optimiser, factor * self.settings.critic_lr)

    def collect(self, count: int) -> None:
        """Play one slot in each of `count` environments with sampled actions (Lines 5 to 12)."""
        slots = draw_slots(self.network, self.settings.load(), count, self.rng)
        observation = self._observation(
            torch.as_tensor(critic_requests(self.network, slots), dtype=torch.float32, device=self.device),
            torch.as_tensor(node_features(slots), dtype=torch.float32, device=self.device),
        )
        with torch.no_grad():
            log_probs = actor_log_probs(self.shape, self.actors, observation, self.masks)
            picked = [straight_through(p, self.noise).argmax(dim=2).T for p in log_probs]
        self._remember(slots, torch.stack(picked, dim=2).cpu().numpy())

    def update(self, alpha: float, actors: bool = True) -> float:
        """One update of critics, actors in random order, and targets (Lines 13 to 20); returns the critic loss."""
        settings = self.settings
        batch = self._draw()
        rewards = batch.rewards if settings.hra else batch.rewards.sum(dim=1, keepdim=True)
        if settings.discount > 0:
            rewards = rewards + settings.discount * self._next_values(alpha)
        with self._low_precision():
            state = critic_state(self.critic_shape, self.critics, batch.requests, batch.nodes, self.links)
            values = critic_values(self.critic_shape, self.critics, state, self._one_hot(batch.actions))
        loss = ((values.float() - self.scale.learned(rewards)) ** 2).sum(dim=2).mean(dim=1).sum()  # Eq. 32
        self.critic_optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.critic_optimiser.step()
        if actors:
            self._update_actors(batch, alpha)
        with torch.no_grad():  # Eq. 34
            for name, target in self.targets.items():
                target.mul_(settings.tau).add_(self.critics[name], alpha=1.0 - settings.tau)
        self.updates += 1
        return float(loss.detach())

    def _update_actors(self, batch: Batch, alpha: float) -> None:
        """Eq. 33 for every agent in random order; later agents see the new actions of earlier ones."""
        observation = self._observation(batch.requests, batch.nodes)
        exact = torch.float32 if not self.settings.bfloat16 else torch.bfloat16
        frozen = {k: v.detach().to(exact) for k, v in self.critics.items()}
        with torch.no_grad():
            parts = [part.to(exact) for part in (batch.requests, batch.nodes, self.links)]
            state = critic_state(self.critic_shape, frozen, *parts)
            log_probs = actor_log_probs(self.shape, self.actors, observation, self.masks)
            joint = torch.cat([straight_through(p, self.noise) for p in log_probs], dim=2).transpose(0, 1).contiguous()
        for n in self.rng.permutation(self.agents):
            seen = observation[n : n + 1]
            masks = cast(tuple[Tensor, Tensor, Tensor], tuple(m[n : n + 1] for m in self.masks))
            found = actor_log_probs(self.shape, self.leaves[n], seen, masks)
            actions = [straight_through(p, self.noise) for p in found]
            log_prob = torch.stack([(a * p).sum(dim=2) for a, p in zip(actions, found, strict=True)]).sum(dim=0)[0]
            mixed = joint.clone()
            mixed[:, n] = torch.cat(actions, dim=2)[0]
            values = critic_values(self.critic_shape, frozen, state, mixed.to(exact)).float()
            loss = (alpha * log_prob - self.scale.rewards(values.min(dim=0).values).sum(dim=1)).mean()
            self.actor_optimisers[n].zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.actor_optimisers[n].step()
            with torch.no_grad():
                fresh = actor_log_probs(self.shape, self.leaves[n], seen, masks)
                joint[:, n] = torch.cat([straight_through(p, self.noise) for p in fresh], dim=2)[0]

    def _next_values(self, alpha: float) -> Tensor:
        """V of Eq. 31 at the next slot, (B, heads): slots are independent, so any stored slot is a next one."""
        batch = self._draw()
        with torch.no_grad():
            observation = self._observation(batch.requests, batch.nodes)
            found = actor_log_probs(self.shape, self.actors, observation, self.masks)
            actions = [straight_through(p, self.noise) for p in found]
            log_prob = sum((a * p).sum(dim=2).sum(dim=0) for a, p in zip(actions, found, strict=True))
            state = critic_state(self.critic_shape, self.targets, batch.requests, batch.nodes, self.links)
            joint = torch.cat(actions, dim=2).transpose(0, 1)
            values = critic_values(self.critic_shape, self.targets, state, joint).min(dim=0).values
        return self.scale.rewards(values) - alpha * cast(Tensor, log_prob)[:, None]

    def _draw(self) -> Batch:
        rows = self.rng.integers(self.replay.filled, size=self.settings.minibatch)
        return self.replay.take(torch.as_tensor(rows, device=self.device))

    def _low_precision(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.settings.bfloat16)

    def _observation(self, requests: Tensor, nodes: Tensor) -> Tensor:
        """(U, B, size): the agents' observations (layout `paper`) from the buffer's compact features."""
        own = requests[:, :, : self.network.nodes + 2].transpose(0, 1)
        shared = nodes.unsqueeze(0).expand(self.agents, -1, -1)
        links = self.links.expand(self.agents, len(requests), -1)
        return torch.cat([own, shared, links], dim=2)

    def _one_hot(self, actions: Tensor) -> Tensor:
        """(B, U, C + M + K) from indices (B, U, 3)."""
        parts = [torch.nn.functional.one_hot(actions[:, :, d], size) for d, size in enumerate(self.shape.actions)]
        return torch.cat(parts, dim=2).float()

    def _remember(self, slots: Slots, placements: IntArray) -> None:
        self.replay.add(slots, placements, self.network.evaluate(slots, placements).reward_parts)

    def prefill(self) -> None:
        """Fill the buffer before training (9e4 slots in the paper) with a rule's placements; find the units."""
        settings, network = self.settings, self.network
        rules: dict[str, PlacementPolicy] = {"random": RandomRule(network)}
        if settings.prefill_rule in ("convention", "mixed"):
            rules["convention"] = Convention(network, settings.load(), settings.seed)
        if settings.prefill_rule in ("heuristic", "mixed"):
            rules["heuristic"] = Heuristic(network)
        if settings.prefill_rule not in (*rules, "mixed"):
            raise ValueError(f"prefill_rule is {settings.prefill_rule!r}; use random, heuristic, convention or mixed")
        names = list(rules) if settings.prefill_rule == "mixed" else [settings.prefill_rule]
        for first in range(0, settings.prefill, 1000):
            count = min(1000, settings.prefill - first)
            slots = draw_slots(network, settings.load(), count, self.rng)
            self._remember(slots, rules[names[first // 1000 % len(names)]].decide(slots, self.rng))
        if settings.normalise and self.replay.filled > 1:
            rewards = self.replay.rewards[: self.replay.filled]
            self.scale.fit(rewards if settings.hra else rewards.sum(dim=1, keepdim=True))

    def _policy(self) -> LearnedPolicy:
        artifact = artifact_of(self.settings, self.network, self.shape, self.actors)
        return LearnedPolicy(self.settings.algorithm, self.network, artifact, sequential=False)

    def _state(self) -> Parameters:
        """Networks, optimisers, buffer, noise: a resumed run goes on exactly."""
        tensors = {f"actor.{k}": v for k, v in self.actors.items()}
        tensors |= {f"critic.{k}": v for k, v in self.critics.items()}
        tensors |= {f"target.{k}": v for k, v in self.targets.items()}
        for name, optimiser, leaves in self._optimisers():
            tensors |= optimiser_state(name, optimiser, leaves)
        tensors |= {"noise": self.noise.get_state(), "updates": torch.tensor(self.updates)}
        return tensors | self.scale.state() | self.replay.state()

    def _restore(self, saved: Parameters) -> None:
        with torch.no_grad():
            for prefix, tensors in (("actor", self.actors), ("critic", self.critics), ("target", self.targets)):
                for name, tensor in tensors.items():
                    tensor.copy_(saved[f"{prefix}.{name}"])
        for name, optimiser, leaves in self._optimisers():
            restore_optimiser(name, optimiser, leaves, saved)
        self.noise.set_state(saved["noise"])
        self.scale.restore(saved)
        self.replay.restore(saved)
        self.updates = int(saved["updates"])

    def _optimisers(self) -> list[tuple[str, torch.optim.Optimizer, Parameters]]:
        actors = [(f"agent{n}", o, self.leaves[n]) for n, o in enumerate(self.actor_optimisers)]
        return [*actors, ("critics", self.critic_optimiser, self.critics)]


def train_soft(settings: Settings, folder: Path, resume: bool = False) -> Parameters:
    """Train and write `folder`/actors.{safetensors,json}, curve.jsonl, checkpoint and TensorBoard events."""
    return SoftLearner(settings).run(Run(settings, folder), resume)
