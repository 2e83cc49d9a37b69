"""The edge network: what a joint placement costs, how long it takes and which requests are accepted.

The one implementation of Huang's Eqs. 1 to 11, constraints 13 to 15 and reward (Eqs. 19 to 21), for training,
evaluation and live accounting, vectorised over E slots. Readings that the paper leaves open:
- requests of a slot are served on a node in the order in which they stand in the slot (arrival order);
- a request that misses its deadline or finds no memory is not accepted: it gets the penalty in place of accuracy,
  is not processed, and so adds no delay, no cost, no work and no memory (admission in arrival order);
- one deployed instance per variant and node is shared (Eq. 13 as its text says, not as printed); its memory is
  charged to the first request that uses it;
- memory (Eq. 14) counts the requests placed on that node and what is already in use (H_mem);
- data is in megabits where it meets bandwidths and routing prices (Eqs. 3, 4, 8), in megabytes for memory;
- Eq. 10 bills one inference as printed; `Prices.bill_inferences` bills all of them;
- 1 GB = 1024 MB.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from policies.placement.contract import ABSENT, REJECT, BoolArray, FloatArray, IntArray, Slots
from policies.placement.graph import EdgeGraph, shortest_paths
from policies.placement.tables import ServiceTable

MEGABITS_PER_MEGABYTE = 8.0

# Why a request ended as it did (`Outcome.reason`).
ACCEPTED, NOT_PLACED, TOO_LATE, NO_MEMORY, NO_REQUEST = 0, 1, 2, 3, 4
REASONS = ("accepted", "not placed by the policy", "misses its deadline", "no memory on the node", "no request")


class PlacementError(ValueError):
    """Slots or placements that make no sense; the message names the array, the value and what would be right."""


@dataclass(frozen=True)
class Prices:
    """Unit costs (Section VI-B) and the penalty of Eq. 20."""

    compute_usd_per_s: float = 0.0003
    memory_usd_per_mb: float = 0.016 / 1024
    bill_inferences: bool = False
    penalty: float = -100.0


@dataclass(frozen=True)
class Outcome:
    """What a joint placement led to, per slot and request; everything is 0 where a request is not accepted."""

    reason: IntArray  # (E, U) index into REASONS
    accuracy: FloatArray  # (E, U) Eq. 1
    standard_accuracy: FloatArray  # (E, U) Eq. 20: Eq. 19 where accepted, the penalty where not, 0 where absent
    access_s: FloatArray  # (E, U) Eq. 3
    transmission_s: FloatArray  # (E, U) Eq. 4
    compute_s: FloatArray  # (E, U) Eq. 5
    routing_usd: FloatArray  # (E, U) Eq. 8
    compute_usd: FloatArray  # (E, U) Eq. 10
    memory_usd: FloatArray  # (E, U) Eq. 9, charged to the first user of an instance

    @property
    def accepted(self) -> BoolArray:
        """(E, U) true where the request is served in time."""
        return cast(BoolArray, self.reason == ACCEPTED)

    @property
    def delay_s(self) -> FloatArray:
        """(E, U) Eq. 6."""
        return self.access_s + self.transmission_s + self.compute_s

    @property
    def cost_usd(self) -> FloatArray:
        """(E, U) Eq. 11, by request."""
        return self.routing_usd + self.compute_usd + self.memory_usd

    @property
    def reward_parts(self) -> FloatArray:
        """(E, 3) the sub-rewards r1, r2, r3 of Section V-C: accuracy, minus delay, minus cost."""
        parts = (self.standard_accuracy.sum(1), -self.delay_s.sum(1), -self.cost_usd.sum(1))
        return np.stack(parts, axis=1)

    @property
    def reward(self) -> FloatArray:
        """(E,) Eq. 21 over all agents."""
        return cast(FloatArray, self.reward_parts.sum(axis=1))


@dataclass
class NodeState:
    """What the requests placed so far leave on the nodes; `EdgeNetwork.place` writes to it."""

    waiting_tflop: FloatArray  # (E, K) H of Eq. 5: system workload and earlier requests
    memory_used_mb: FloatArray  # (E, K)
    deployed: BoolArray  # (E, K, V)


@dataclass(frozen=True)
class Options:
    """Every action of one request in each of E slots, with actions laid out (configuration, variant, node)."""

    value: FloatArray  # (E, C, M, K) this request's own share of Eq. 21 if it is placed so now
    delay_s: FloatArray  # (E, C, M, K)
    feasible: BoolArray  # (E, C, M, K) meets the deadline and fits the memory


class EdgeNetwork:
    """A graph, its services and prices, with all derived figures at hand. Immutable after construction."""

    def __init__(self, graph: EdgeGraph, tables: Sequence[ServiceTable], prices: Prices = Prices()) -> None:
        """Stack the tables (padded to the largest service) and find the shortest paths."""
        if not tables:
            raise PlacementError("no service tables; give at least one")
        self.graph, self.tables, self.prices = graph, tuple(tables), prices
        self.paths = shortest_paths(graph)
        self.nodes = graph.nodes
        self.configurations = max(len(t.configurations) for t in tables)
        self.variants = max(len(t.variants) for t in tables)
        self.first_variant = np.cumsum([0] + [len(t.variants) for t in tables])  # column of a service in `deployed`
        self.variant_columns = int(self.first_variant[-1])
        services, shape = len(tables), (len(tables), self.configurations, self.variants)
        self.valid = np.zeros(shape, dtype=bool)
        self.accuracy, self.standard_accuracy = np.zeros(shape), np.zeros(shape)
        self.size_factor = np.ones((services, self.configurations))
        self.work_tflop = np.zeros(shape)  # A_j I_i
        self.billed_tflop = np.zeros(shape)  # what Eq. 10 bills
        self.variant_mb = np.zeros((services, self.variants))
        for s, table in enumerate(tables):
            c, m = table.accuracy.shape
            self.valid[s, :c, :m] = True
            self.accuracy[s, :c, :m] = table.accuracy
            self.standard_accuracy[s, :c, :m] = table.standard_accuracy
            self.size_factor[s, :c] = table.size_factor
            self.work_tflop[s, :c, :m] = table.inferences[:, None] * table.tflop
            billed = self.work_tflop[s, :c, :m] if prices.bill_inferences else table.tflop
            self.billed_tflop[s, :c, :m] = billed
            self.variant_mb[s, :m] = table.memory_mb
        # Seconds per megabit from a user at local node v to node k: uplink (Eq. 3), then links (Eq. 4).
        self.s_per_megabit = 1.0 / graph.uplink_mbps[:, None] + self.paths.s_per_megabit

    def start(self, slots: Slots) -> NodeState:
        """The nodes' state before any request of the slots is placed."""
        return NodeState(slots.system_tflop.copy(), slots.memory_used_mb.copy(), slots.deployed.copy())

    def evaluate(self, slots: Slots, placements: IntArray) -> Outcome:
        """What the joint placements (E, U, 3) lead to. Raises PlacementError on nonsense."""
        self.check_slots(slots)
        self.check_placements(slots, placements)
        state = self.start(slots)
        columns = [self.place(state, slots, u, placements[:, u]) for u in range(slots.requests)]
        if not columns:
            raise PlacementError("slots without requests; give at least one request position")
        return Outcome(*(np.stack(arrays, axis=1) for arrays in zip(*columns, strict=True)))

    def place(self, state: NodeState, slots: Slots, u: int, placement: IntArray) -> tuple[IntArray | FloatArray, ...]:
        """Place request u of every slot by (E, 3) placements; updates state, returns Outcome's columns (E,)."""
        rows = np.arange(slots.slots)
        service, local = slots.service[:, u], slots.local[:, u]
        present, asked = service != ABSENT, placement[:, 2] != REJECT
        s, v = np.maximum(service, 0), np.maximum(local, 0)
        i, j, k = (np.maximum(placement[:, d], 0) for d in range(3))
        data_mb = self.size_factor[s, i] * slots.data_mb[:, u]  # Eq. 2
        megabits = MEGABITS_PER_MEGABYTE * data_mb
        tflops = self.graph.tflops[k]
        access_s = megabits / self.graph.uplink_mbps[v]
        transmission_s = megabits * self.paths.s_per_megabit[v, k]
        compute_s = (self.work_tflop[s, i, j] + state.waiting_tflop[rows, k]) / tflops
        column = self.first_variant[s] + j
        new = ~state.deployed[rows, k, column]
        variant_mb = np.where(new, self.variant_mb[s, j], 0.0)
        in_time = access_s + transmission_s + compute_s <= slots.deadline_s[:, u]
        fits = state.memory_used_mb[rows, k] + variant_mb + data_mb <= self.graph.memory_mb[k]
        taken = present & asked & in_time & fits
        reason = np.select([~present, ~asked, ~in_time, ~fits], [NO_REQUEST, NOT_PLACED, TOO_LATE, NO_MEMORY], ACCEPTED)
        state.waiting_tflop[rows, k] += np.where(taken, self.work_tflop[s, i, j], 0.0)
        state.memory_used_mb[rows, k] += np.where(taken, variant_mb + data_mb, 0.0)
        state.deployed[rows, k, column] |= taken
        price, memory_price = self.prices.compute_usd_per_s, self.prices.memory_usd_per_mb
        standard = np.where(taken, self.standard_accuracy[s, i, j], np.where(present, self.prices.penalty, 0.0))
        figures = (
            self.accuracy[s, i, j],
            access_s,
            transmission_s,
            compute_s,
            megabits * self.paths.usd_per_megabit[v, k],
            price * self.billed_tflop[s, i, j] / tflops + memory_price * data_mb,
            memory_price * variant_mb,
        )
        accuracy, *rest = (np.where(taken, figure, 0.0) for figure in figures)
        return (reason.astype(np.int64), accuracy, standard, *rest)

    def options(self, state: NodeState, slots: Slots, u: int) -> Options:
        """All actions of request u in every slot, given what is on the nodes now."""
        s, v = np.maximum(slots.service[:, u], 0), np.maximum(slots.local[:, u], 0)
        data_mb = self.size_factor[s] * slots.data_mb[:, u, None]  # (E, C)
        megabits = MEGABITS_PER_MEGABYTE * data_mb
        per_tflops = 1.0 / self.graph.tflops
        transfer_s = megabits[:, :, None] * self.s_per_megabit[v][:, None, :]  # (E, C, K)
        work_s = (self.work_tflop[s][..., None] + state.waiting_tflop[:, None, None, :]) * per_tflops
        delay_s = transfer_s[:, :, None, :] + work_s
        columns = np.minimum(self.first_variant[s][:, None] + np.arange(self.variants), self.variant_columns - 1)
        there = state.deployed[np.arange(slots.slots)[:, None], :, columns]  # (E, M, K)
        variant_mb = np.where(there, 0.0, self.variant_mb[s][:, :, None])
        free_mb = self.graph.memory_mb - state.memory_used_mb
        fits = data_mb[:, :, None, None] + variant_mb[:, None] <= free_mb[:, None, None, :]
        feasible = (
            fits
            & (delay_s <= slots.deadline_s[:, u, None, None, None])
            & self.valid[s][..., None]
            & (slots.service[:, u] != ABSENT)[:, None, None, None]
        )
        memory_price = self.prices.memory_usd_per_mb
        moved_usd = megabits[:, :, None] * self.paths.usd_per_megabit[v][:, None, :] + memory_price * data_mb[..., None]
        value = self.standard_accuracy[s][..., None] - delay_s
        value -= moved_usd[:, :, None, :]
        value -= self.prices.compute_usd_per_s * self.billed_tflop[s][..., None] * per_tflops
        value -= (memory_price * variant_mb)[:, None]
        return Options(value, delay_s, feasible)

    def check_slots(self, slots: Slots) -> None:
        """Refuse unknown services and nodes, wrong shapes, and figures that are NaN, infinite or not positive."""
        shape, nodes = slots.service.shape, (slots.slots, self.nodes)
        for name in ("local", "deadline_s", "data_mb"):
            _shape(name, getattr(slots, name), shape)
        for name in ("system_tflop", "memory_used_mb"):
            array = getattr(slots, name)
            _shape(name, array, nodes)
            if not np.isfinite(array).all() or (array < 0).any():
                raise PlacementError(f"{name} holds NaN, infinite or negative figures; give what is in use")
        _shape("deployed", slots.deployed, (*nodes, self.variant_columns))
        present = slots.service != ABSENT
        _range("service", slots.service[present], len(self.tables))
        _range("local", slots.local[present], self.nodes)
        for name in ("deadline_s", "data_mb"):
            asked = getattr(slots, name)[present]
            if not np.isfinite(asked).all() or (asked <= 0).any():
                bad = asked[~(np.isfinite(asked) & (asked > 0))][0]
                raise PlacementError(f"{name} holds {bad}; every request needs a finite figure above 0")

    def check_placements(self, slots: Slots, placements: IntArray) -> None:
        """Refuse placements whose shape or indices do not exist for their services."""
        _shape("placements", placements, (*slots.service.shape, 3))
        asked = (placements[..., 2] != REJECT) & (slots.service != ABSENT)
        i, j, k = (placements[..., d][asked] for d in range(3))
        _range("placements (node)", k, self.nodes)
        _range("placements (configuration)", i, self.configurations)
        _range("placements (variant)", j, self.variants)
        if not self.valid[slots.service[asked], i, j].all():
            raise PlacementError("placements name a configuration or variant that the request's service does not have")


def _shape(name: str, array: FloatArray | IntArray | BoolArray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise PlacementError(f"{name} has shape {array.shape}; {shape} is right here")


def _range(name: str, values: IntArray, count: int) -> None:
    if values.size and (values.min() < 0 or values.max() >= count):
        bad = int(values[(values < 0) | (values >= count)][0])
        raise PlacementError(f"{name} holds {bad}; there are 0 to {count - 1}")
