"""HISPER's replay buffer: the last slots with their joint actions and sub-rewards, as compact features.

A slot takes 236 bytes at 8 agents (the paper's 2.8e5 slots: 66 MB), so that a checkpoint can hold the whole buffer and
a resumed run goes on exactly. One-hot features are rebuilt when a minibatch is drawn.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from policies.placement.contract import FloatArray, IntArray, Slots
from policies.placement.observation import DATA_MB, DEADLINE_S, node_features


@dataclass(frozen=True)
class Batch:
    """A minibatch, on the device."""

    requests: Tensor  # (B, U, K + 2 + S): one-hot local node, deadline, data size, service token
    nodes: Tensor  # (B, 2K): system workload and memory in use
    actions: Tensor  # (B, U, 3) indices
    rewards: Tensor  # (B, 3) sub-rewards


class Replay:
    """A ring of `size` slots whose request u always belongs to service `services[u]`."""

    def __init__(self, size: int, services: IntArray, nodes: int, device: str) -> None:
        """Reserve the memory on the device."""
        self.size, self.node_count, self.filled, self.next = size, nodes, 0, 0
        agents = len(services)
        token = torch.as_tensor(services[:, None] == np.arange(services.max() + 1), dtype=torch.float32)
        self.token = token.to(device)
        self.local = torch.zeros(size, agents, dtype=torch.uint8, device=device)
        self.figures = torch.zeros(size, agents, 2, device=device)
        self.nodes = torch.zeros(size, 2 * nodes, device=device)
        self.actions = torch.zeros(size, agents, 3, dtype=torch.uint8, device=device)
        self.rewards = torch.zeros(size, 3, device=device)

    def add(self, slots: Slots, placements: IntArray, rewards: FloatArray) -> None:
        """Append E slots with placements (E, U, 3) and sub-rewards (E, 3); the oldest are overwritten."""
        rows = (self.next + np.arange(slots.slots)) % self.size
        figures = np.stack([slots.deadline_s / DEADLINE_S, slots.data_mb / DATA_MB], axis=2)
        arrays = (slots.local, figures, node_features(slots), np.maximum(placements, 0), rewards)
        for store, array in zip(self._stores().values(), arrays, strict=True):
            store[rows] = torch.as_tensor(array, dtype=store.dtype).to(store.device)
        self.next = int((self.next + slots.slots) % self.size)
        self.filled = min(self.size, self.filled + slots.slots)

    def take(self, rows: Tensor) -> Batch:
        """The named slots as features."""
        local = torch.nn.functional.one_hot(self.local[rows].long(), self.node_count)
        token = self.token.expand(len(rows), -1, -1)
        requests = torch.cat([local, self.figures[rows], token], dim=2)
        return Batch(requests, self.nodes[rows], self.actions[rows].long(), self.rewards[rows])

    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs."""
        found = {f"replay.{name}": store[: self.filled] for name, store in self._stores().items()}
        return found | {"replay.next": torch.tensor(self.next)}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        self.next, self.filled = int(saved["replay.next"]), len(saved["replay.rewards"])
        for name, store in self._stores().items():
            store[: self.filled] = saved[f"replay.{name}"].to(store.device)

    def _stores(self) -> dict[str, Tensor]:
        names = ("local", "figures", "nodes", "actions", "rewards")
        return {name: getattr(self, name) for name in names}
