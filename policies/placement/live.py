"""A live window: what the nodes say of themselves in, placements with their predicted figures out.

The scheduler decides so for everybody; a gateway that has to decide alone uses the same functions. Nothing here waits
or reads a clock.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Final, TypeVar, cast

import numpy as np

from policies.placement.contract import ABSENT, REJECT, BoolArray, FloatArray, IntArray, PlacementPolicy, Slots
from policies.placement.edge_network import ACCEPTED, EdgeNetwork, NodeState
from policies.placement.window import Request, explained, window_slots
from protocol.edge_records import EdgeRequest, NodeStatus, Placement

BY_POSITION: Final = frozenset({"convention", "prices"})
"""Policies whose agents are positions: the n-th request of the s-th service is agent s x per_service + n."""
HANDLING_S: Final = 0.1
"""What decoding and re-encoding at the local node take at most, as a rule: until then work is on its way."""


@dataclass(frozen=True)
class Loads:
    """The nodes at one moment. `closed`: nodes that must not be chosen, and why."""

    waiting_tflop: FloatArray  # (K,) H_sys
    memory_used_mb: FloatArray  # (K,) H_mem
    deployed: BoolArray  # (K, V)
    closed: Mapping[int, str]


def loads_of(
    network: EdgeNetwork,
    statuses: Mapping[int, NodeStatus],
    queue_capacity: int,
    closed: Mapping[int, str],
) -> Loads:
    """What nodes say, by index; one that says nothing, drains or is full is closed, and those that the caller closes.

    Idle variants count as loaded while memory is plenty. Where the largest variant would not fit beside them, they
    count as gone: the node evicts them, and a request that uses one after all finds it there, for less than predicted.
    """
    loads = Loads(
        waiting_tflop=np.zeros(network.nodes),
        memory_used_mb=np.zeros(network.nodes),
        deployed=np.zeros((network.nodes, network.variant_columns), dtype=bool),
        closed=(shut := dict(closed)),
    )
    columns = _columns(network)
    largest_mb = float(network.variant_mb.max()) + max(table.data_mb[1] for table in network.tables)
    for k in range(network.nodes):
        status = statuses.get(k)
        if status is None:
            shut[k] = "is not there"
            continue
        used_mb = status.memory_used_mb
        there = {*status.deployed, *status.loading}
        if float(network.graph.memory_mb[k]) - used_mb < largest_mb:
            idle = there.intersection(status.idle)
            used_mb = max(0.0, used_mb - sum(columns[one][1] for one in idle if one in columns))
            there -= idle
        loads.waiting_tflop[k] = max(0.0, status.waiting_tflop)
        loads.memory_used_mb[k] = used_mb
        for one in there:
            if one in columns:
                loads.deployed[k, columns[one][0]] = True
        if status.draining:
            shut[k] = "is draining"
        elif status.length >= queue_capacity:
            shut[k] = "has a full queue"
    return loads


def without_variant(network: EdgeNetwork, service: int, variant: int) -> EdgeNetwork:
    """The same network, on which nobody may choose that variant of that service."""
    reduced = copy(network)
    reduced.valid = network.valid.copy()
    reduced.valid[service, :, variant] = False
    return reduced


def _columns(network: EdgeNetwork) -> dict[str, tuple[list[int], float]]:
    """By variant name: its columns in `deployed`, and its memory."""
    found: dict[str, tuple[list[int], float]] = {}
    for s, table in enumerate(network.tables):
        for j, name in enumerate(table.variants):
            columns, _ = found.setdefault(name, ([], float(table.memory_mb[j])))
            columns.append(int(network.first_variant[s]) + j)
    return found


@dataclass(frozen=True)
class _Moving:
    until_s: float
    node: int
    work_tflop: float
    data_mb: float
    column: int
    variant_mb: float


class OnTheWay:
    """What was placed a moment ago and has not reached its node: a node's own status does not hold it yet.

    State: the placements, until they should have arrived.
    """

    def __init__(self, network: EdgeNetwork) -> None:
        """Nothing is on the way."""
        self._network = network
        self._moving: list[_Moving] = []

    def add(self, requests: Sequence[EdgeRequest], placements: Sequence[Placement], now_s: float) -> None:
        """Requests have been placed at `now_s`; refused ones are passed over."""
        network = self._network
        names = [table.name for table in network.tables]
        for request, placement in zip(requests, placements, strict=True):
            if placement.node == REJECT:
                continue
            s, i, j = names.index(request.service), placement.configuration, placement.variant
            self._moving.append(
                _Moving(
                    now_s + placement.access_s + placement.transmission_s + HANDLING_S,
                    placement.node,
                    float(network.work_tflop[s, i, j]),
                    float(network.size_factor[s, i]) * request.data_mb,
                    int(network.first_variant[s]) + j,
                    float(network.variant_mb[s, j]),
                )
            )

    def onto(self, loads: Loads, now_s: float) -> Loads:
        """The loads, with what is on its way as if it had arrived."""
        self._moving = [one for one in self._moving if one.until_s > now_s]
        if not self._moving:
            return loads
        waiting, used, deployed = loads.waiting_tflop.copy(), loads.memory_used_mb.copy(), loads.deployed.copy()
        for one in self._moving:
            waiting[one.node] += one.work_tflop
            used[one.node] += one.data_mb + (0.0 if deployed[one.node, one.column] else one.variant_mb)
            deployed[one.node, one.column] = True
        return replace(loads, waiting_tflop=waiting, memory_used_mb=used, deployed=deployed)


def place_window(
    network: EdgeNetwork,
    policy: PlacementPolicy,
    requests: Sequence[EdgeRequest],
    loads: Loads,
    per_service: int,
    rng: np.random.Generator,
) -> list[Placement]:
    """One placement per request, in order, with the environment's prediction or the reason of the refusal.

    More than `per_service` requests of a service: further waves, which see what the earlier ones left on the nodes.
    Raises PlacementError for a service or node that the network does not have.
    """
    state = NodeState(loads.waiting_tflop.copy(), loads.memory_used_mb.copy(), loads.deployed.copy())
    shut = sorted(loads.closed)
    state.memory_used_mb[shut] = network.graph.memory_mb[shut]  # nothing fits there
    found: list[Placement] = [Placement()] * len(requests)
    for wave in _waves(requests, per_service):
        asked = [Request(one.service, one.node, one.deadline_s, one.data_mb) for one in (requests[n] for n in wave)]
        slots = window_slots(network, asked, state.waiting_tflop, state.memory_used_mb, state.deployed)
        placements = _decided(network, policy, slots, per_service, rng)
        after = network.start(slots)
        figures = [network.place(after, slots, u, placements[None, u]) for u in range(slots.requests)]
        accepted = [bool(columns[0][0] == ACCEPTED) for columns in figures]
        refused = [None] * len(wave) if all(accepted) else explained(network, slots, placements)
        for u, number in enumerate(wave):
            refusal = refused[u]
            if refusal is not None:
                reason = _why(network, loads.closed, int(placements[u, 2]), refusal.reason)
                found[number] = Placement(reason=reason, late=refusal.late)
                continue
            _, accuracy, _, access_s, transmission_s, compute_s, *costs = (float(column[0]) for column in figures[u])
            i, j, k = (int(part) for part in placements[u])
            found[number] = Placement(
                i, j, k, "", False, accuracy, access_s, transmission_s, compute_s, float(sum(costs))
            )
        state = NodeState(after.waiting_tflop[0], after.memory_used_mb[0], after.deployed[0])
    return found


def _waves(requests: Sequence[EdgeRequest], per_service: int) -> list[list[int]]:
    """The requests' numbers, in waves of at most `per_service` of each service, in arrival order within each."""
    seen: dict[str, int] = {}
    waves: list[list[int]] = []
    for number, request in enumerate(requests):
        rank = seen[request.service] = seen.get(request.service, -1) + 1
        if rank // per_service == len(waves):
            waves.append([])
        waves[rank // per_service].append(number)
    return waves


def _decided(
    network: EdgeNetwork, policy: PlacementPolicy, slots: Slots, per_service: int, rng: np.random.Generator
) -> IntArray:
    """(U, 3) placements of the slot's requests."""
    if policy.name not in BY_POSITION:
        placements: IntArray = policy.decide(slots, rng)[0]
        return placements
    service = slots.service[0]
    rank = np.array([int((service[:u] == s).sum()) for u, s in enumerate(service)])
    at, size = service * per_service + rank, per_service * len(network.tables)
    agents = replace(
        slots,
        service=_spread(slots.service, at, size, ABSENT),
        local=_spread(slots.local, at, size, 0),
        deadline_s=_spread(slots.deadline_s, at, size, 1.0),
        data_mb=_spread(slots.data_mb, at, size, 1.0),
    )
    placements = policy.decide(agents, rng)[0, at]
    return placements


Array = TypeVar("Array", IntArray, FloatArray)


def _spread(values: Array, at: IntArray, size: int, absent: float) -> Array:
    """(1, size): the (1, U) values at their positions, `absent` elsewhere."""
    whole = np.full((1, size), absent, dtype=values.dtype)
    whole[0, at] = values[0]
    return cast(Array, whole)


def _why(network: EdgeNetwork, closed: Mapping[int, str], node: int, reason: str) -> str:
    """The reason of a refusal, with what the nodes that could not be chosen have to do with it."""
    if node in closed:
        return f"node {network.graph.names[node]}, which the policy chose, {closed[node]}"
    if not closed:
        return reason
    return f"{reason}; {len(closed)} of {network.nodes} nodes cannot be chosen"
