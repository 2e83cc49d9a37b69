"""Algorithm 1 of Tan: proximal policy optimisation of the softmax-Gaussian scheduler (torch; training only).

One update: collect `slots_per_update` slots with the current policy, estimate advantages (Eq. 11), then some epochs
of minibatches on the clipped objective (Eq. 10) for the actor and on the mean squared error for the critic.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from policies.routing import fused, towers
from policies.routing.artifact import write_artifact
from policies.routing.contract import BATCH_SIZES
from policies.routing.descent import descend
from policies.routing.environment import PAIRS, SlotEnvironments
from policies.routing.network import Scheduler
from policies.routing.presets import Preset
from policies.routing.queueing_model import ArrivalModel, ServiceModel
from policies.routing.returns import advantages, without_input
from policies.routing.scores import Scores, scores_of

AS_THEY_COME = (1, BATCH_SIZES[-1])
"""The batch limits that never wait and take as many as there are."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be learned: a service under a workload, with or without the phase and batching."""

    name: str
    service: ServiceModel
    arrivals: ArrivalModel
    observable: bool = False
    batching: bool = False
    workload: str = "paper"
    slot_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Progress:
    """What a training reports after an update; scores are those of the noisy policy while collecting."""

    update: int
    slots: int
    slots_per_s: float
    left_s: float
    reward: float
    scores: dict[str, Scores]


class Rollout(NamedTuple):
    """T slots of E environments under the noisy policy, and the boundary after them.

    seen float32[T + 1, E, F]; outputs [T, E, outputs], log_y [T, E, n], pairs int64[T, E, variants]: torch tensors;
    reward float32[T, E]; given float64[T, E, K]: what no policy can change; value float32[T + 1, E].
    """

    seen: NDArray[np.float32]
    outputs: Tensor
    log_y: Tensor
    pairs: Tensor
    reward: NDArray[np.float32]
    given: NDArray[np.float64]
    value: NDArray[np.float32]


class Trainer:
    """A training run: `run` to the end, `checkpoint.py` keeps it in between; the same seed repeats it bit for bit."""

    def __init__(self, task: Task, preset: Preset, seed: int, threads: int = 1) -> None:
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        self.task, self.preset, self.seed, self.threads = task, preset, seed, threads
        kinds = task.service.kinds
        self.environments = self._environments(preset.environments, seed)
        self.layout = self.environments.layout
        self.variants = max(k.rank for k in kinds) + 1 if task.batching else 0
        self.network = Scheduler(self.layout.size, len(kinds), self.variants, len(PAIRS) if self.variants else 0)
        heavy = sum(k.rank == 0 for k in kinds)
        light = len(kinds) - heavy
        share = preset.heavy_start if light else 1.0
        rest = (1.0 - preset.batch_start) / (len(PAIRS) - 1)
        self.network.lean(
            [share / heavy if k.rank == 0 else (1.0 - share) / light for k in kinds],
            [preset.batch_start if pair == AS_THEY_COME else rest for pair in PAIRS],
        )
        self.adam = torch.optim.Adam(self.network.parameters(), lr=preset.learning_rate, fused=True)
        self._fix()
        self._scratch = [(fused.scratch_for(self._actor), fused.scratch_for(self._critic)) for _ in range(threads)]
        self.noise = torch.Generator().manual_seed(seed + 1)
        self.update = 0
        self.value_mean, self.value_scale = 0.0, 0.0
        self.examined = self._environments(200, seed + 2)

    def _environments(self, count: int, seed: int) -> SlotEnvironments:
        return SlotEnvironments(
            self.task.service,
            self.task.arrivals,
            count,
            seed,
            batching=self.task.batching,
            observable=self.task.observable,
            slot_s=self.task.slot_s,
            at_changes=self.task.observable,
        )

    @property
    def slots(self) -> int:
        """Slots simulated so far."""
        return self.update * self.preset.slots_per_update

    def simulated(self) -> dict[str, SlotEnvironments]:
        """The simulated systems by name, for checkpoints."""
        return {"train": self.environments, "examined": self.examined}

    @property
    def scaling(self) -> list[float]:
        """How returns are scaled, for checkpoints."""
        return [self.value_mean, self.value_scale]

    @scaling.setter
    def scaling(self, numbers: list[float]) -> None:
        self.value_mean, self.value_scale = numbers

    def run(self, until_slots: int, report: Callable[[Progress], None]) -> None:
        """Update until `until_slots` slots have been seen; `report` is called after every update."""
        while self.slots < until_slots:
            began = time.perf_counter()
            reward = self._one_update()
            took = time.perf_counter() - began
            speed = self.preset.slots_per_update / took
            scores = scores_of(self.environments.take_counts(), self.task.arrivals.phase_names)
            left_s = (until_slots - self.slots) / speed
            report(Progress(self.update, self.slots, speed, left_s, reward, scores))

    def _one_update(self) -> float:
        rollout = self._collect()
        mean_reward = float(rollout.reward.mean())
        reward = without_input(rollout.reward, rollout.given) if self.preset.input_baseline else rollout.reward
        self._rescale(reward, rollout.value)
        self._learn(rollout, reward)
        self.update += 1
        return mean_reward

    def _collect(self) -> Rollout:
        p, e = self.preset, self.preset.environments
        steps = p.slots_per_update // e
        r = Rollout(
            np.zeros((steps + 1, e, self.layout.size), dtype=np.float32),
            torch.zeros((steps, e, self.network.outputs)),
            torch.zeros((steps, e, self.network.instances)),
            torch.zeros((steps, e, self.variants), dtype=torch.int64),
            np.zeros((steps, e), dtype=np.float32),
            np.zeros((steps, e, 9 * self.task.arrivals.phases)),
            np.zeros((steps + 1, e), dtype=np.float32),
        )
        self._fix()
        for t in range(steps + 1):
            self.environments.observe(r.seen[t])
            out, values = self._look(self.environments, r.seen[t])
            r.value[t] = values * (self.value_scale or 1.0) + self.value_mean
            if t == steps:
                break
            r.outputs[t] = out
            r.log_y[t], r.pairs[t] = self._act(out, p.sigma)
            r.reward[t] = self._step(self.environments, r.log_y[t], r.pairs[t])
            r.given[t] = self.environments.exogenous()
        return r

    def _fix(self) -> None:
        """Take the weights as they are for the coming looks."""
        self._actor, self._critic = towers.pack(self.network.actor), towers.pack(self.network.critic)

    def _look(self, environments: SlotEnvironments, seen: NDArray[np.float32]) -> tuple[Tensor, NDArray[np.float32]]:
        """Actor outputs [E, outputs] and values [E], in the critic's units, for what was seen of the environments."""
        (actor, critic), rows = self._scratch[0], towers.compact(seen)
        out = fused.forward(self._actor, actor, rows, self.network.outputs)
        return torch.from_numpy(out), fused.forward(self._critic, critic, rows, 1)[:, 0]

    def _act(self, out: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities [E, n] and batch choices [E, variants]; sigma = 0 gives the most likely ones."""
        f, logits = self.network.heads(out) if self.variants else (out, None)
        pairs = torch.zeros((len(out), self.variants), dtype=torch.int64)
        if sigma > 0.0:
            f = f + sigma * torch.randn(f.shape, generator=self.noise)
        if logits is not None:
            if sigma > 0.0:
                flat = torch.softmax(logits, -1).flatten(0, 1)
                pairs = torch.multinomial(flat, 1, generator=self.noise).reshape(pairs.shape)
            else:
                pairs = logits.argmax(-1)
        return torch.log_softmax(f, -1), pairs

    def _step(self, environments: SlotEnvironments, log_y: Tensor, pairs: Tensor) -> NDArray[np.float64]:
        table = np.exp(log_y.numpy().astype(np.float64))
        if not self.variants:
            return environments.step(table)
        limits = np.array(PAIRS, dtype=np.int64)[pairs.numpy()]
        return environments.step(table, limits[:, :, 0], limits[:, :, 1])

    def _rescale(self, reward: NDArray[np.float32], value: NDArray[np.float32]) -> None:
        """Follow the mean and spread of the returns; the critic's last layer changes so that its values do not."""
        gamma = self.preset.gamma
        returns = np.zeros_like(reward)
        running = value[-1] if self.value_scale else np.full(reward.shape[1], reward.mean() / (1.0 - gamma))
        for t in range(len(reward) - 1, -1, -1):
            running = reward[t] + gamma * running
            returns[t] = running
        mean, scale = float(returns.mean()), max(float(returns.std()), 1e-3)
        if not self.value_scale:
            self.value_mean, self.value_scale = mean, scale
            value[:] = mean
            return
        old_mean, old_scale = self.value_mean, self.value_scale
        self.value_mean += 0.05 * (mean - old_mean)
        self.value_scale += 0.05 * (scale - old_scale)
        last = self.network.critic[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.weight.mul_(old_scale / self.value_scale)
            last.bias.mul_(old_scale).add_(old_mean - self.value_mean).div_(self.value_scale)

    def _slow_down(self) -> None:
        """The learning rate falls linearly over the run."""
        p = self.preset
        done = min(self.slots / p.slots, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = p.learning_rate * (1.0 - (1.0 - p.final_rate) * done)

    def _learn(self, r: Rollout, reward: NDArray[np.float32]) -> None:
        p = self.preset
        advantage = advantages(reward, r.value, p.gamma, p.gae_lambda)
        target = (advantage + r.value[:-1] - self.value_mean) / self.value_scale
        with torch.no_grad():
            old = self.network.log_prob(r.outputs, r.log_y, r.pairs, p.sigma)
        seen = towers.Seen(
            r.log_y.flatten(0, 1).numpy(), r.pairs.flatten(0, 1).numpy(), old.flatten().numpy(), advantage.ravel(),
            target.ravel(),
        )  # fmt: skip
        rows = towers.compact(r.seen[:-1].reshape(-1, self.layout.size))
        self._slow_down()
        descend(
            self.network, self.adam, rows, seen, p, self._scratch, self.noise, sigma=p.sigma,
            actor_moves=self.update >= p.critic_first,
        )  # fmt: skip

    def examine(self, slots: int = 100) -> tuple[dict[str, Scores], list[list[float]]]:
        """Scores of the policy without noise over `slots` more slots of 200 environments kept for this.

        Also the mean batch limits [minimum, maximum] that it chose per variant (empty without batching).
        """
        self._fix()
        limits = np.zeros((self.variants, 2))
        for _ in range(slots):
            out, _ = self._look(self.examined, self.examined.observe())
            log_y, pairs = self._act(out, 0.0)
            self._step(self.examined, log_y, pairs)
            limits += np.array(PAIRS, dtype=np.float64)[pairs.numpy()].mean(axis=0) / slots
        return scores_of(self.examined.take_counts(), self.task.arrivals.phase_names), limits.tolist()

    def export(self, folder: Path, record: dict[str, Any]) -> None:
        """Write the actor as an artifact (safetensors + JSON) with the training record."""
        tensors = {k: v.detach().numpy().copy() for k, v in self.network.actor.state_dict().items()}
        training = {"preset": asdict(self.preset), "seed": self.seed, "slots": self.slots, **record}
        write_artifact(
            folder, self.task.name, self.layout, tensors, slot_s=self.task.slot_s, workload=self.task.workload,
            training=training,
        )  # fmt: skip
