"""Slots drawn at random as in Huang, Section VI-B: requests, system workload and memory in use.

Each slot is drawn anew (instances are released, workloads redrawn), so nothing that is placed in one slot changes
the next. By default the requests of the first service come first (agents 1 to N of the paper's Fig. 10), then those
of the second; `mixed` shuffles the order of arrival.
"""

from dataclasses import dataclass

import numpy as np

from policies.placement.contract import ABSENT, Slots
from policies.placement.edge_network import EdgeNetwork, PlacementError


@dataclass(frozen=True)
class Load:
    """How slots are drawn: N requests per service and the nodes' own load."""

    per_service: int = 4
    system_tflop: tuple[float, float] = (0.1, 0.3)
    memory_used_mb: tuple[float, float] = (100.0, 900.0)
    mixed: bool = False
    present: float = 1.0  # probability that a request position is taken

    def __post_init__(self) -> None:
        """Refuse loads that draw nothing."""
        if self.per_service < 1:
            raise PlacementError(f"per_service is {self.per_service}; at least one request per service")
        if not 0.0 < self.present <= 1.0:
            raise PlacementError(f"present is {self.present}; a probability above 0")


def draw_slots(network: EdgeNetwork, load: Load, count: int, rng: np.random.Generator) -> Slots:
    """`count` independent slots of per_service x services requests."""
    services = len(network.tables)
    shape = (count, load.per_service * services)
    service = np.tile(np.repeat(np.arange(services), load.per_service), (count, 1))
    if load.mixed:
        service = rng.permuted(service, axis=1)
    deadline_s, data_mb = np.empty(shape), np.empty(shape)
    for s, table in enumerate(network.tables):
        chosen = service == s
        deadline_s[chosen] = rng.choice(table.deadlines_s, int(chosen.sum()))
        data_mb[chosen] = rng.uniform(*table.data_mb, int(chosen.sum()))
    local = rng.integers(network.nodes, size=shape)
    nodes = (count, network.nodes)
    system_tflop = rng.uniform(*load.system_tflop, nodes)
    memory_used_mb = np.minimum(rng.uniform(*load.memory_used_mb, nodes), network.graph.memory_mb)
    if load.present < 1.0:
        service = np.where(rng.random(shape) < load.present, service, ABSENT)
    return Slots(
        service=service,
        local=local,
        deadline_s=deadline_s,
        data_mb=data_mb,
        system_tflop=system_tflop,
        memory_used_mb=memory_used_mb,
        deployed=np.zeros((*nodes, network.variant_columns), dtype=bool),
    )
