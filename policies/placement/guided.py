"""Actors trained on the true value of their actions: HISPER's soft policy iteration without a critic.

Beyond the paper. Eq. 28 projects the policy on exp(Q / alpha); `counterfactual.py` computes that Q exactly for all
of an agent's actions at once, so the gradient of the expected reward is a full sum instead of a sampled estimate
through a learned critic and the Gumbel-softmax. The actors are HISPER's (Fig. 2).

Guided actors (`guide` > 0) score an action by its own formula value plus guide x log-probability: an untrained one
is the rule `heuristic` (blind) or `sequential`, and what training adds is what an action costs or gains the others.
With `start=prices` the value is that of `prices.py`, learned first and kept in the artifact, and so is the start.
The softmax's temperature falls geometrically; serving takes the best score.
"""

from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from policies.placement.actors import LearnedPolicy
from policies.placement.contract import REJECT, FloatArray, IntArray, Slots
from policies.placement.counterfactual import Later, with_others_answering, with_others_fixed
from policies.placement.edge_network import EdgeNetwork, NodeState, Options
from policies.placement.networks import ActorShape, Parameters, actor_log_probs, actor_parameters
from policies.placement.observation import Layout, observe
from policies.placement.price_training import price_settings
from policies.placement.prices import Prices, learn_prices
from policies.placement.rules import Convention
from policies.placement.speed import Speed
from policies.placement.training import Run, Settings, action_masks, actor_shape, artifact_of, save_artifact, score
from policies.placement.workload import draw_slots

MAX_GRADIENT = 1.0
# Values below the agent's best action by more than this weigh no more: a lost request is lost.
FLOOR = -100.0
# How much value a node owned by another agent has to offer at the start from `convention`.
OWNED = 1.0


class GuidedTrainer:
    """Trains one stack of actors by full gradients of the slot reward."""

    def __init__(self, settings: Settings) -> None:
        """Build networks and optimiser; nothing is written or drawn from global state."""
        self.settings = settings
        self.network: EdgeNetwork = settings.network()
        self.layout = Layout(settings.layout, self.network.nodes, len(self.network.tables))
        self.shape: ActorShape = actor_shape(settings, self.network)
        services = np.arange(len(self.network.tables))
        self.services: IntArray = services if settings.shared else np.repeat(services, settings.per_service)
        generator = torch.Generator().manual_seed(settings.seed)
        self.actors: Parameters = actor_parameters(self.shape, len(self.services), generator)
        for name, tensor in self.actors.items():
            if settings.guide > 0 and name.startswith("head"):
                tensor.zero_()  # an untrained guided actor is exactly the rule that it starts from
        if settings.start == "convention":
            self._start_from_convention()
        if settings.start == "prices" and (settings.shared or settings.sequential or not settings.guide > 0):
            raise ValueError("start=prices needs blind guided actors of their own (shared=false, guide above 0)")
        self.prices: Prices | None = None
        for tensor in self.actors.values():
            tensor.requires_grad_(True)
        self.masks = cast(tuple[Tensor, Tensor, Tensor], action_masks(self.network, self.services, "cpu"))
        self.optimiser = torch.optim.Adam(list(self.actors.values()), lr=settings.actor_lr)
        self.rng = np.random.default_rng([settings.seed, 1])

    def _start_from_convention(self) -> None:
        """Let the node head's bias keep every agent to the nodes that `convention` gives it."""
        if self.settings.shared or not self.settings.guide > 0:
            raise ValueError("start=convention needs guided actors of their own (shared=false, guide above 0)")
        owner = Convention(self.network, self.settings.load(), self.settings.seed, swaps=4000, slots=1000).owner
        bias = self.actors["head2.bias"]
        for agent in range(len(self.services)):
            bias[agent, 0] = torch.as_tensor(np.where(owner == agent, 0.0, -OWNED / self.settings.guide))

    def run(self, run: Run, resume: bool = False) -> Parameters:
        """Train to the end (or the time limit) and write the artifact `actors`; returns the best actors."""
        settings, step = self.settings, 0
        if resume:
            step, saved = run.load_checkpoint(self.rng)
            self._restore(saved)
        run.open(step)
        if settings.start == "prices":
            self.prices = learn_prices(self.network, settings.load(), price_settings(settings), settings.seed)
        held_out = draw_slots(self.network, settings.load(), settings.evaluation_slots, np.random.default_rng(10_000))
        best, best_actors, speed = -np.inf, self._snapshot(), Speed(run.elapsed_s(), step, 0, step)
        updates = 0
        while True:
            figures = score(self.network, self._policy(), held_out)
            rates = speed.rates(run.elapsed_s(), step, updates, step)
            run.report(step, {**figures, "temperature": settings.temperature_at(run.share(step)), **rates})
            if figures["reward"] > best:
                best, best_actors = figures["reward"], self._snapshot()
            run.save_checkpoint(step, self._state(), self.rng)
            if step >= settings.steps or run.out_of_time():
                break
            target = min(step + settings.evaluate_every, settings.steps)
            while step < target and not run.out_of_time():
                self.update(run.share(step))
                step, updates = step + settings.minibatch, updates + 1
        record = {"steps": step, "processor_s": run.elapsed_s(), "held_out_reward_per_slot": best}
        save_artifact(run.folder / "actors", settings, self.shape, best_actors, record, self.prices)
        return best_actors

    def update(self, share: float) -> float:
        """One gradient step on fresh slots, `share` of the run being over; returns the sampled mean reward."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.actor_lr * max(0.02, 1.0 - share)
        slots = draw_slots(self.network, self.settings.load(), self.settings.minibatch, self.rng)
        temperature, alpha = self.settings.temperature_at(share), self.settings.alpha_at(share)
        loss, reward = (self._sequential if self.settings.sequential else self._blind)(slots, temperature, alpha)
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(list(self.actors.values()), MAX_GRADIENT)
        self.optimiser.step()
        return reward

    def _blind(self, slots: Slots, temperature: float, alpha: float) -> tuple[Tensor, float]:
        """Agents that see the state before the slot; the others' sampled actions are fixed for each one's value."""
        state = self.network.start(slots)
        columns = range(slots.requests)
        seen = [self._options(state, slots, u) for u in columns]
        observation = np.stack([observe(self.network, self.layout, state, slots, u, seen[u]) for u in columns])
        log_probs = self._log_probs(torch.as_tensor(observation, dtype=torch.float32))
        policies, placements = [], np.empty((*slots.service.shape, 3), dtype=np.int64)
        for u in columns:
            policy = self._joint(seen[u], [p[u] for p in log_probs], temperature)
            placements[:, u] = self._draw(policy, seen[u])
            policies.append(policy)
        loss = torch.zeros(())
        for u in columns:
            values = with_others_fixed(self.network, slots, placements, u)
            loss = loss + self._loss(policies[u], values, alpha)
        return loss, float(self.network.evaluate(slots, placements).reward.mean())

    def _options(self, state: NodeState, slots: Slots, u: int) -> Options:
        """What `LearnedPolicy` looks at when it serves."""
        options = self.network.options(state, slots, u)
        return options if self.prices is None else self.prices.less(self.network, slots, u, options, u)

    def _sequential(self, slots: Slots, temperature: float, alpha: float) -> tuple[Tensor, float]:
        """Agents that see what was placed before; later ones answer with their best remaining node."""
        state = self.network.start(slots)
        policies, placements, seen, rewards = [], [], [], np.zeros(slots.slots)
        for u in range(slots.requests):
            options = self.network.options(state, slots, u)
            observation = torch.as_tensor(observe(self.network, self.layout, state, slots, u), dtype=torch.float32)
            actor = int(slots.service[0, u]) if self.settings.shared else u
            log_probs = self._one(observation, actor)
            policy = self._joint(options, log_probs, temperature)
            chosen = self._draw(policy, options)
            columns = self.network.place(state, slots, u, chosen)
            rewards += columns[2] - sum(columns[3:])
            policies.append(policy)
            placements.append(chosen)
            seen.append(options)
        later = [Later(np.where(o.feasible, o.value, -100.0).max(axis=(1, 2))) for o in seen]
        loss = torch.zeros(())
        for u in range(slots.requests):
            values = with_others_answering(self.network, slots, u, placements[u], seen[u], later[u + 1 :])
            loss = loss + self._loss(policies[u], values, alpha)
        return loss, float(rewards.mean())

    def _log_probs(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Blind agents' log-probabilities, (U, B, size) each."""
        if not self.settings.shared:
            return actor_log_probs(self.shape, self.actors, observation, self.masks)
        agents, rows, size = observation.shape
        stacked = observation.reshape(len(self.services), -1, size)
        found = actor_log_probs(self.shape, self.actors, stacked, self.masks)
        return cast(tuple[Tensor, Tensor, Tensor], tuple(p.reshape(agents, rows, -1) for p in found))

    def _one(self, observation: Tensor, actor: int) -> list[Tensor]:
        mine = {name: tensor[actor : actor + 1] for name, tensor in self.actors.items()}
        masks = cast(tuple[Tensor, Tensor, Tensor], tuple(m[actor : actor + 1] for m in self.masks))
        return [p[0] for p in actor_log_probs(self.shape, mine, observation[None], masks)]

    def _joint(self, options: Options, log_probs: list[Tensor], temperature: float) -> Tensor:
        """The joint distribution (B, C x M x K) over the feasible actions (over all where none is feasible)."""
        c, m, k = log_probs
        joint = c[:, :, None, None] + m[:, None, :, None] + k[:, None, None, :]
        if self.settings.guide > 0:
            joint = (torch.as_tensor(options.value, dtype=torch.float32) + self.settings.guide * joint) / temperature
        barred = torch.as_tensor(~options.feasible & options.feasible.any(axis=(1, 2, 3), keepdims=True))
        return torch.softmax(joint.masked_fill(barred, -1e9).flatten(1), dim=1)

    def _draw(self, policy: Tensor, options: Options) -> IntArray:
        """One sampled placement per slot; REJECT where nothing is feasible."""
        weights = policy.detach().numpy().astype(np.float64).cumsum(axis=1)
        picked = (self.rng.random((len(weights), 1)) * weights[:, -1:] > weights).sum(axis=1)
        shape = options.value.shape[1:]
        placements = np.stack(np.unravel_index(np.minimum(picked, weights.shape[1] - 1), shape), axis=1)
        placements[~options.feasible.any(axis=(1, 2, 3))] = REJECT
        return placements.astype(np.int64)

    def _loss(self, policy: Tensor, values: FloatArray, alpha: float) -> Tensor:
        flat = values.reshape(len(values), -1)
        flat = np.maximum(flat - flat.max(axis=1, keepdims=True), FLOOR)
        loss = -(policy * torch.as_tensor(flat, dtype=torch.float32)).sum(dim=1).mean()
        if self.settings.guide == 0:
            loss = loss + alpha * (policy * torch.log(policy + 1e-9)).sum(dim=1).mean()
        return loss

    def _policy(self) -> LearnedPolicy:
        artifact = artifact_of(self.settings, self.network, self.shape, self.actors, self.prices)
        return LearnedPolicy(self.settings.algorithm, self.network, artifact, self.settings.sequential)

    def _snapshot(self) -> Parameters:
        return {k: v.detach().clone() for k, v in self.actors.items()}

    def _state(self) -> Parameters:
        tensors = {f"actor.{k}": v for k, v in self.actors.items()}
        for name, tensor in self.actors.items():
            for key, value in self.optimiser.state.get(tensor, {}).items():
                tensors[f"optimiser.{key}.{name}"] = value
        return tensors

    def _restore(self, saved: Parameters) -> None:
        with torch.no_grad():
            for name, tensor in self.actors.items():
                tensor.copy_(saved[f"actor.{name}"])
                keys = [k for k in saved if k.startswith("optimiser.") and k.split(".", 2)[2] == name]
                self.optimiser.state[tensor] = {k.split(".", 2)[1]: saved[k].clone() for k in keys}


def train_guided(settings: Settings, folder: Path, resume: bool = False) -> Parameters:
    """Train and write `folder`/actors.{safetensors,json}, curve.jsonl, checkpoint and TensorBoard events."""
    return GuidedTrainer(settings).run(Run(settings, folder), resume)
