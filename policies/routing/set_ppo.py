"""PPO for `learned-set`: services of several sizes in one update (torch; training only).

As `ppo.py`, with the same networks and compiled passes, but the action is one number: the table of two that Eq. 8
gives is (the heaviest variant, all others), and `set_features.py` makes the service's table of it. Rewards count per
load of the paper's service; the input baseline, the scale of returns and the spread of advantages are each size's
own, so that no size drowns another. The policy's noise falls with the rate: with all of it to the end, the mean keeps
away from loads that only the noise makes dangerous.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policies.routing import fused, towers
from policies.routing.artifact import write_record
from policies.routing.contract import IntArray
from policies.routing.descent import descend
from policies.routing.environment import SlotEnvironments
from policies.routing.network import Scheduler, log_density
from policies.routing.ppo import Progress
from policies.routing.presets import Preset
from policies.routing.queueing_model import paper_arrivals
from policies.routing.returns import advantages, without_input
from policies.routing.scores import Scores, scores_of
from policies.routing.set_environment import SetEnvironments
from policies.routing.set_features import SIZE, SLOT_S
from policies.routing.set_network import NAME
from policies.routing.set_sizes import sized

FINAL_NOISE = 0.3
"""What is left of the preset's sigma at the end of the run."""
PHASES = ("bursty", "normal")


@dataclass
class Size:
    """One size of service in training. rows: its environments among all; mean, scale: of its returns."""

    name: str
    rows: slice
    environments: SetEnvironments
    load: float
    mean: float = 0.0
    scale: float = 0.0


@dataclass
class Rollout:
    """T slots of all E environments: features, logits, log shares, rewards, exogenous input and values."""

    seen: NDArray[np.float32]
    outputs: Tensor
    log_y: Tensor
    reward: NDArray[np.float32]
    given: NDArray[np.float64]
    value: NDArray[np.float32]


def sizes_of(mix: dict[str, int], seed: int) -> list[Size]:
    """Environments of every size in the mix (name: how many), each size with its own seed."""
    found, at = [], 0
    for k, (name, count) in enumerate(mix.items()):
        service, load = sized(name)
        environments = SetEnvironments(service, paper_arrivals(load), count, seed + 10 * k)
        found.append(Size(name, slice(at, at + count), environments, load))
        at += count
    return found


class SetTrainer:
    """A training run like `ppo.Trainer`; the same seed repeats it bit for bit."""

    def __init__(self, mix: dict[str, int], preset: Preset, seed: int, threads: int = 1) -> None:
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        self.preset, self.seed, self.mix = preset, seed, mix
        self.sizes = sizes_of(mix, seed)
        self.examined = sizes_of(mix, seed + 5)
        self.network = Scheduler(SIZE, 2)
        self.network.lean([preset.heavy_start, 1.0 - preset.heavy_start], [])
        self.adam = torch.optim.Adam(self.network.parameters(), lr=preset.learning_rate, fused=True)
        self.noise = torch.Generator().manual_seed(seed + 1)
        self.update = 0
        self._fix()
        self._scratch = [(fused.scratch_for(self._actor), fused.scratch_for(self._critic)) for _ in range(threads)]

    @property
    def slots(self) -> int:
        """Slots simulated so far, of services of all sizes together."""
        return self.update * self.preset.slots_per_update

    @property
    def done(self) -> float:
        """How much of the run is behind, 0 to 1."""
        return min(self.slots / self.preset.slots, 1.0)

    @property
    def sigma(self) -> float:
        """The policy's noise in this update."""
        return self.preset.sigma * (1.0 - (1.0 - FINAL_NOISE) * self.done)

    def simulated(self) -> dict[str, SlotEnvironments]:
        """All simulated systems by name, for checkpoints."""
        parts = {"train": self.sizes, "examined": self.examined}
        return {f"{part} {size.name}": size.environments.slots for part, sizes in parts.items() for size in sizes}

    @property
    def scaling(self) -> list[float]:
        """How returns are scaled, for checkpoints."""
        return [number for size in self.sizes for number in (size.mean, size.scale)]

    @scaling.setter
    def scaling(self, numbers: list[float]) -> None:
        for k, size in enumerate(self.sizes):
            size.mean, size.scale = numbers[2 * k : 2 * k + 2]

    def run(self, until_slots: int, report: Callable[[Progress], None]) -> None:
        """Update until `until_slots` slots have been seen; `report` is called after every update."""
        while self.slots < until_slots:
            began = time.perf_counter()
            rollout = self._collect()
            self._learn(rollout)
            self.update += 1
            speed = self.preset.slots_per_update / (time.perf_counter() - began)
            left_s = (until_slots - self.slots) / speed
            scores = self._scores(self.sizes)
            report(Progress(self.update, self.slots, speed, left_s, float(rollout.reward.mean()), scores))

    def examine(self, slots: int = 100) -> tuple[dict[str, Scores], list[list[float]]]:
        """Scores 50:50 by size without noise, over `slots` more slots of environments kept for this (and no limits)."""
        self._fix()
        for _ in range(slots):
            for size in self.examined:
                out = self._look(self._actor, size.environments.observe(), 2)
                size.environments.step(torch.softmax(torch.from_numpy(out).double(), 1)[:, 0].numpy())
        return self._scores(self.examined), []

    def export(self, folder: Path, record: dict[str, Any]) -> None:
        """Write the actor as an artifact (safetensors + JSON) with the training record."""
        tensors = {k: v.detach().numpy().copy() for k, v in self.network.actor.state_dict().items()}
        training = {
            "preset": asdict(self.preset), "mix": self.mix, "final_noise": FINAL_NOISE, "seed": self.seed,
            "slots": self.slots, **record,
        }  # fmt: skip
        about = {"slot_s": SLOT_S, "features": SIZE, "workload": "paper", "training": training}
        write_record(folder, NAME, tensors, about)

    @staticmethod
    def _scores(sizes: list[Size]) -> dict[str, Scores]:
        return {s.name: scores_of(s.environments.slots.take_counts(), PHASES)["overall_50_50"] for s in sizes}

    def _fix(self) -> None:
        """Take the weights as they are for the coming looks."""
        self._actor, self._critic = towers.pack(self.network.actor), towers.pack(self.network.critic)

    def _look(self, tower: towers.Tower, seen: NDArray[np.float32], outputs: int) -> NDArray[np.float32]:
        scratch = self._scratch[0][0 if tower is self._actor else 1]
        return fused.forward(tower, scratch, towers.compact(seen), outputs)

    def _collect(self) -> Rollout:
        e = sum(self.mix.values())
        steps = self.preset.slots_per_update // e
        r = Rollout(
            seen=np.zeros((steps + 1, e, SIZE), dtype=np.float32),
            outputs=torch.zeros((steps, e, 2)),
            log_y=torch.zeros((steps, e, 2)),
            reward=np.zeros((steps, e), dtype=np.float32),
            given=np.zeros((steps, e, 9 * len(PHASES))),
            value=np.zeros((steps + 1, e), dtype=np.float32),
        )
        self._fix()
        for t in range(steps + 1):
            for size in self.sizes:
                size.environments.observe(r.seen[t, size.rows])
            r.value[t] = self._look(self._critic, r.seen[t], 1)[:, 0]
            if t == steps:
                break
            r.outputs[t] = torch.from_numpy(self._look(self._actor, r.seen[t], 2))
            noisy = r.outputs[t] + self.sigma * torch.randn((e, 2), generator=self.noise)
            r.log_y[t] = torch.log_softmax(noisy, 1)
            heavy = np.exp(r.log_y[t, :, 0].numpy().astype(np.float64))
            for size in self.sizes:
                r.reward[t, size.rows] = size.environments.step(heavy[size.rows]) / size.load
                r.given[t, size.rows] = size.environments.slots.exogenous()
        return r

    def _judge(self, r: Rollout) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Advantages and the critic's targets [T, E]; follows each size's returns."""
        advantage, target = np.zeros_like(r.reward), np.zeros_like(r.reward)
        for size in self.sizes:
            rows = size.rows
            reward = without_input(r.reward[:, rows], r.given[:, rows])
            value = r.value[:, rows] * size.scale + size.mean
            gain = advantages(reward, value, self.preset.gamma, self.preset.gae_lambda)
            returns = gain + value[:-1]
            pace = 0.05 if size.scale else 1.0
            size.mean += pace * (float(returns.mean()) - size.mean)
            size.scale += pace * (max(float(returns.std()), 1e-3) - size.scale)
            target[:, rows] = (returns - size.mean) / size.scale
            advantage[:, rows] = (gain - gain.mean()) / (gain.std() + 1e-8)
        return advantage, target

    def _learn(self, r: Rollout) -> None:
        advantage, target = self._judge(r)
        for group in self.adam.param_groups:
            group["lr"] = self.preset.learning_rate * (1.0 - (1.0 - self.preset.final_rate) * self.done)
        old = log_density(r.outputs, r.log_y, self.sigma)
        nothing: IntArray = np.zeros((old.numel(), 0), dtype=np.int64)
        seen = towers.Seen(
            r.log_y.flatten(0, 1).numpy(), nothing, old.flatten().numpy(), advantage.ravel(), target.ravel()
        )
        rows = towers.compact(r.seen[:-1].reshape(-1, SIZE))
        descend(self.network, self.adam, rows, seen, self.preset, self._scratch, self.noise, sigma=self.sigma)
