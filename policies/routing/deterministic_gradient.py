"""What Tan tried in vain (Section 4): a deterministic policy gradient in the manner of DDPG (torch; training only).

The actor gives one table, softmax(f); a second network learns the value of an observation and a table from replayed
slots; the actor climbs it. Exploration is the noise of Eq. 8. Start, reward and what is taken out of it are those of
`ppo.py`, so that nothing but the algorithm differs.
"""

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from policies.routing.network import tower
from policies.routing.ppo import Rollout, Task, Trainer
from policies.routing.presets import Preset

KEPT_ROLLOUTS = 6
"""Rollouts in the replay memory."""
FOLLOW = 0.005
"""How far the target networks follow at each step."""


class DeterministicTrainer(Trainer):
    """As many gradient steps per rollout, of the same size, as PPO would do."""

    def __init__(self, task: Task, preset: Preset, seed: int) -> None:
        super().__init__(task, preset, seed)
        if task.batching:
            raise ValueError(f"task {task.name}: a deterministic gradient needs continuous actions; batches are not")
        torch.manual_seed(seed)
        self.worth = tower(self.layout.size + self.network.instances, 1, 1.0)
        self._targets = copy.deepcopy(self.network.actor), copy.deepcopy(self.worth)
        self.adam = torch.optim.Adam(self.network.actor.parameters(), lr=preset.learning_rate)
        self._worth_adam = torch.optim.Adam(self.worth.parameters(), lr=preset.learning_rate)
        self._kept: list[tuple[Tensor, ...]] = []

    def _learn(self, r: Rollout, reward: NDArray[np.float32]) -> None:
        p = self.preset
        now, after = torch.from_numpy(r.seen[:-1]).flatten(0, 1), torch.from_numpy(r.seen[1:]).flatten(0, 1)
        # Values are learned in units of the rewards' spread in the first rollout's returns.
        gained = torch.from_numpy(reward / self.value_scale).flatten()
        self._kept = [*self._kept[1 - KEPT_ROLLOUTS :], (now, r.log_y.flatten(0, 1).exp(), gained, after)]
        self._slow_down()
        for _ in range(p.epochs * (len(now) // p.minibatch)):
            drawn = self._kept[int(torch.randint(len(self._kept), (1,), generator=self.noise))]
            rows = torch.randint(len(now), (p.minibatch,), generator=self.noise)
            self.climb(*[part[rows] for part in drawn])

    def climb(self, now: Tensor, table: Tensor, reward: Tensor, after: Tensor) -> None:
        """One step of both networks, and of their targets after them."""
        actor, old_actor, old_worth = self.network.actor, *self._targets
        with torch.no_grad():
            later = old_worth(torch.cat([after, torch.softmax(old_actor(after), -1)], -1)).squeeze(-1)
        found = self.worth(torch.cat([now, table], -1)).squeeze(-1)
        self._worth_adam.zero_grad()
        (found - (reward + self.preset.gamma * later)).square().mean().backward()
        self._worth_adam.step()
        self.adam.zero_grad()
        (-self.worth(torch.cat([now, torch.softmax(actor(now), -1)], -1)).mean()).backward()
        self.adam.step()
        pairs: tuple[tuple[nn.Module, nn.Module], ...] = ((actor, old_actor), (self.worth, old_worth))
        with torch.no_grad():
            for new, old in pairs:
                for a, b in zip(new.parameters(), old.parameters(), strict=True):
                    b.lerp_(a, FOLLOW)
