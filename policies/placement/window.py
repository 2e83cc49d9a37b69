"""One live placement window: requests by name in, slots (E = 1) out, and a reason for every refusal.

The scheduler's placement loop and the command line use this; training and evaluation draw slots directly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from policies.placement.contract import ABSENT, REJECT, BoolArray, FloatArray, IntArray, Slots
from policies.placement.edge_network import ACCEPTED, REASONS, TOO_LATE, EdgeNetwork, PlacementError


@dataclass(frozen=True)
class Request:
    """One inference request of a window (Section III-B)."""

    service: str
    node: int  # the local node, see `EdgeGraph.nearest_node`
    deadline_s: float
    data_mb: float


def window_slots(
    network: EdgeNetwork,
    requests: Sequence[Request],
    waiting_tflop: FloatArray,
    memory_used_mb: FloatArray,
    deployed: BoolArray | None = None,
) -> Slots:
    """The window as one slot, requests in the given (arrival) order; (K,) node loads, (K, V) instances already there.

    Raises PlacementError for an unknown service or node and for sizes that are not finite and above 0.
    """
    if not requests:
        raise PlacementError("the window holds no request; wait for one")
    names = [table.name for table in network.tables]
    for request in requests:
        if request.service not in names:
            raise PlacementError(f"service {request.service!r} is unknown; known: {', '.join(names)}")
        if not 0 <= request.node < network.nodes:
            raise PlacementError(f"node {request.node} is unknown; there are 0 to {network.nodes - 1}")
    slots = Slots(
        service=np.array([[names.index(r.service) for r in requests]]),
        local=np.array([[r.node for r in requests]]),
        deadline_s=np.array([[r.deadline_s for r in requests]], dtype=np.float64),
        data_mb=np.array([[r.data_mb for r in requests]], dtype=np.float64),
        system_tflop=np.asarray(waiting_tflop, dtype=np.float64)[None],
        memory_used_mb=np.asarray(memory_used_mb, dtype=np.float64)[None],
        deployed=np.zeros((1, network.nodes, network.variant_columns), dtype=bool)
        if deployed is None
        else deployed[None],
    )
    network.check_slots(slots)
    return slots


class Refusal(NamedTuple):
    """Why a request of a window is not served; `late`: for lack of time, not of room."""

    reason: str
    late: bool


def refusals(network: EdgeNetwork, slots: Slots, placements: IntArray) -> list[str | None]:
    """Per request of one slot: None where it is accepted, else why not, with the figures that decide."""
    return [refusal and refusal.reason for refusal in explained(network, slots, placements)]


def explained(network: EdgeNetwork, slots: Slots, placements: IntArray) -> list[Refusal | None]:
    """As `refusals`, and whether it was time that lacked."""
    reasons = network.evaluate(slots, placements[None]).reason[0]
    state = network.start(slots)
    found: list[Refusal | None] = []
    for u in range(slots.requests):
        if reasons[u] == ACCEPTED:
            found.append(None)
        elif slots.service[0, u] != ABSENT and placements[u, 2] == REJECT:
            options = network.options(state, slots, u)
            valid = network.valid[slots.service[0, u]]
            soonest = float(options.delay_s[0][valid].min())
            deadline = float(slots.deadline_s[0, u])
            if soonest > deadline:
                told = f"no action meets the deadline of {deadline:g} s; the soonest takes {soonest:.3g} s"
            elif not options.feasible.any():
                told = "no node has the memory for an action that meets the deadline"
            else:
                told = "the other requests of the window leave no node that can serve it in time"
            found.append(Refusal(told, soonest > deadline))
        else:
            found.append(Refusal(REASONS[int(reasons[u])], bool(reasons[u] == TOO_LATE)))
        network.place(state, slots, u, placements[None, u])
    return found
