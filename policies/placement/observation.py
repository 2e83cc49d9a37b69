"""What a placement agent sees, as numbers.

Two layouts, both functions only of what Huang's agents observe (Section IV-B: their own request, the nodes' system
workload and memory in use, the link bandwidths):
- `paper`: those figures, normalised;
- `derived`: the request, and per node what follows from it by the formulas: seconds of waiting, free memory, seconds
  and dollars of transfer, and the value of the best action on that node if the agent were alone. It needs no
  bandwidth matrix, so it means the same on another graph.
A layout is a tuple of groups; the networks embed each group by a layer of its own. The layout's hash stands in every
artifact, and loading one with another layout fails.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from policies.placement.contract import FloatArray, Slots
from policies.placement.edge_network import MEGABITS_PER_MEGABYTE, EdgeNetwork, NodeState, Options

LAYOUTS = ("paper", "derived")
# Normalisers (the paper gives none): typical upper ends of Section VI-B's ranges.
DEADLINE_S, DATA_MB, WORK_TFLOP, MEMORY_MB, BANDWIDTH_MBPS = 25.0, 20.0, 1.0, 4096.0, 400.0
# A node on which the request cannot run counts as this value among the derived features.
NO_VALUE = -3.0


@dataclass(frozen=True)
class Layout:
    """Which features, in which groups."""

    name: str
    nodes: int
    services: int

    def __post_init__(self) -> None:
        """Refuse names that do not exist."""
        if self.name not in LAYOUTS:
            raise ValueError(f"layout {self.name!r} is unknown; use one of {', '.join(LAYOUTS)}")

    @property
    def groups(self) -> tuple[int, ...]:
        """Sizes of the feature groups, in order."""
        nodes = self.nodes
        if self.name == "paper":
            return (nodes + 2, nodes, nodes, nodes * (nodes - 1) // 2)
        return (nodes + 3, nodes, nodes, nodes, nodes, nodes)

    @property
    def size(self) -> int:
        """Length of one agent's observation."""
        return sum(self.groups)

    @property
    def hash(self) -> str:
        """Identity of the layout, normalisers included."""
        text = f"{self.name} {self.groups} {DEADLINE_S} {DATA_MB} {WORK_TFLOP} {MEMORY_MB} {BANDWIDTH_MBPS} {NO_VALUE}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def request_features(slots: Slots, u: int, nodes: int) -> FloatArray:
    """(E, K + 2): one-hot local node, deadline and data size of request u."""
    features = np.zeros((slots.slots, nodes + 2))
    features[np.arange(slots.slots), np.maximum(slots.local[:, u], 0)] = 1.0
    features[:, nodes] = slots.deadline_s[:, u] / DEADLINE_S
    features[:, nodes + 1] = slots.data_mb[:, u] / DATA_MB
    return features


def bandwidth_features(network: EdgeNetwork) -> FloatArray:
    """(K (K - 1) / 2,): the upper half of the bandwidth matrix W."""
    return network.graph.bandwidth_matrix()[np.triu_indices(network.nodes, 1)] / BANDWIDTH_MBPS


def observe(
    network: EdgeNetwork, layout: Layout, state: NodeState, slots: Slots, u: int, options: Options | None = None
) -> FloatArray:
    """(E, size): what the agent of request u sees in every slot, given the nodes' state.

    `options` are `network.options(state, slots, u)`, for callers that have them already.
    """
    request = request_features(slots, u, network.nodes)
    rows = slots.slots
    if layout.name == "paper":
        bandwidths = np.broadcast_to(bandwidth_features(network), (rows, layout.groups[3]))
        parts = [request, state.waiting_tflop / WORK_TFLOP, state.memory_used_mb / MEMORY_MB, bandwidths]
        return np.concatenate(parts, axis=1)
    options = options or network.options(state, slots, u)
    best = np.where(options.feasible, options.value, NO_VALUE).max(axis=(1, 2))
    v = np.maximum(slots.local[:, u], 0)
    megabits = MEGABITS_PER_MEGABYTE * slots.data_mb[:, u, None]
    uplink = 36.0 / network.graph.uplink_mbps[v][:, None]
    parts = [
        request,
        uplink,
        state.waiting_tflop / network.graph.tflops,
        (network.graph.memory_mb - state.memory_used_mb) / MEMORY_MB,
        megabits * network.paths.s_per_megabit[v],
        megabits * network.paths.usd_per_megabit[v],
        best,
    ]
    return np.concatenate(parts, axis=1)


def observe_all(network: EdgeNetwork, layout: Layout, slots: Slots) -> FloatArray:
    """(U, E, size): what every agent sees before anything is placed (agents that cannot see each other)."""
    state = network.start(slots)
    return np.stack([observe(network, layout, state, slots, u) for u in range(slots.requests)])


def critic_requests(network: EdgeNetwork, slots: Slots) -> FloatArray:
    """(E, U, K + 2 + S): every request's features with its service token, for critics."""
    features = np.stack([request_features(slots, u, network.nodes) for u in range(slots.requests)], axis=1)
    token = slots.service[..., None] == np.arange(len(network.tables))
    return np.concatenate([features, token], axis=2)


def node_features(slots: Slots) -> FloatArray:
    """(E, 2K): system workload and memory in use, for critics."""
    return np.concatenate([slots.system_tflop / WORK_TFLOP, slots.memory_used_mb / MEMORY_MB], axis=1)
