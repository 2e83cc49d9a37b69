"""What Tan tried in vain (Section 4): a recurrent policy, to remember past observations (torch; training only).

Everything is as in `ppo.py` but the network: one gated recurrent layer over the slots, with actor and critic on top.
Gradients run back through SPAN slots; each span starts from the memory that the acting policy had there.
"""

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from policies.routing.environment import SlotEnvironments
from policies.routing.network import HIDDEN, Scheduler
from policies.routing.ppo import Rollout, Task, Trainer
from policies.routing.presets import Preset
from policies.routing.returns import advantages

SPAN = 25
"""Slots through which a gradient runs back: what memory can be good for lies a few slots back."""


class RecurrentScheduler(Scheduler):
    """A scheduler whose actor and critic read the state of a recurrent layer instead of the features."""

    def __init__(self, inputs: int, instances: int) -> None:
        super().__init__(HIDDEN[1], instances)
        self.memory = nn.GRU(inputs, HIDDEN[1])

    def over_time(self, seen: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For seen [T, B, F] from memory start [B, H]: outputs [T, B, n], values [T, B], memory after [B, H]."""
        states, last = self.memory(seen, start.unsqueeze(0))
        return self.actor(states), self.critic(states).squeeze(-1), last.squeeze(0)


class RecurrentTrainer(Trainer):
    """PPO with a memory; the updates per rollout, their size and the rates are the preset's."""

    def __init__(self, task: Task, preset: Preset, seed: int) -> None:
        super().__init__(task, preset, seed)
        if task.batching:
            raise ValueError(f"task {task.name}: the recurrent policy was built for tables alone")
        torch.manual_seed(seed)
        start = self.network.actor[-1].get_parameter("bias")
        self.recurrent = RecurrentScheduler(self.layout.size, self.network.instances)
        with torch.no_grad():
            self.recurrent.actor[-1].get_parameter("bias").copy_(start)
        self.network = self.recurrent
        self.adam = torch.optim.Adam(self.network.parameters(), lr=preset.learning_rate)
        self._memory = {id(e): torch.zeros(e.environments, HIDDEN[1]) for e in (self.environments, self.examined)}
        self._starts: list[Tensor] = []

    def _look(self, environments: SlotEnvironments, seen: NDArray) -> tuple[Tensor, NDArray]:  # type: ignore[type-arg]
        before = self._memory[id(environments)]
        if environments is self.environments:
            self._starts.append(before)
        with torch.no_grad():
            out, value, after = self.recurrent.over_time(torch.from_numpy(seen).unsqueeze(0), before)
        self._memory[id(environments)] = after
        return out[0], value[0].numpy()

    def _collect(self) -> Rollout:
        self._starts.clear()
        rollout = super()._collect()
        # The last boundary was looked at for its value only: it is seen again as the first of the next rollout.
        self._memory[id(self.environments)] = self._starts[-1]
        return rollout

    def _learn(self, r: Rollout, reward: NDArray) -> None:  # type: ignore[type-arg]
        p = self.preset
        advantage = torch.from_numpy(advantages(reward, r.value, p.gamma, p.gae_lambda))
        target = (advantage + torch.from_numpy(r.value[:-1]) - self.value_mean) / self.value_scale
        old = self.network.log_prob(r.outputs, r.log_y, r.pairs, p.sigma)
        steps, e = reward.shape
        starts = torch.stack(self._starts[:steps:SPAN])
        spans = [(k, i) for k in range(steps // SPAN) for i in range(e)]
        together = max(p.minibatch // SPAN, 1)
        self._slow_down()
        for _ in range(p.epochs):
            order = torch.randperm(len(spans), generator=self.noise)
            for at in range(0, len(order), together):
                k, i = torch.tensor([spans[j] for j in order[at : at + together]]).unbind(1)
                t = k * SPAN + torch.arange(SPAN).unsqueeze(1)
                out, value, _ = self.recurrent.over_time(torch.from_numpy(r.seen)[t, i], starts[k, i])
                new = self.network.log_prob(out, r.log_y[t, i], r.pairs[t, i], p.sigma)
                gain = advantage[t, i]
                gain = (gain - gain.mean()) / (gain.std() + 1e-8)
                ratio = (new - old[t, i]).exp()
                objective = torch.minimum(ratio * gain, ratio.clamp(1.0 - p.clip, 1.0 + p.clip) * gain).mean()
                loss = (value - target[t, i]).square().mean() - objective
                self.adam.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self.adam.step()
