"""What every placement policy receives and returns.

A `Slots` value holds E independent slots (placement windows) with up to U requests each on K nodes; one live
window is simply E = 1. Requests stand in arrival order: where several are placed on one node they are served in
that order (Huang, Section III-D). A placement is three integers (configuration, variant, node); `REJECT` in all
three means that the request is turned away.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

RULES = ("random", "heuristic", "convention", "sequential", "two-tier", "beam")
SOLVERS = ("exact", "exact-30ms")
LEARNED = ("prices", "hisper", "hisper-sequential", "hisper-paper", "hasac", "happo")
ALL = (*RULES, *SOLVERS, *LEARNED)
"""The policies' names; a learned one needs an artifact that fits the network."""

REJECT = -1
ABSENT = -1


class ArtifactError(ValueError):
    """An artifact does not fit what it is loaded for; the message names both sides."""


@dataclass(frozen=True, slots=True)
class Slots:
    """E slots of up to U requests on K nodes. Arrays are never written to by a policy."""

    service: IntArray  # (E, U) index of the service table; ABSENT where a slot has fewer requests
    local: IntArray  # (E, U) the node that the request enters at
    deadline_s: FloatArray  # (E, U) longest acceptable inference delay
    data_mb: FloatArray  # (E, U) megabytes of the request's data at the highest configuration
    system_tflop: FloatArray  # (E, K) work already waiting on each node (H_sys)
    memory_used_mb: FloatArray  # (E, K) memory already taken (H_mem)
    deployed: BoolArray  # (E, K, V) variants that this slot's earlier waves have deployed

    @property
    def slots(self) -> int:
        """Number of slots E."""
        return int(self.service.shape[0])

    @property
    def requests(self) -> int:
        """Number of request positions U per slot."""
        return int(self.service.shape[1])

    def take(self, rows: IntArray | slice) -> "Slots":
        """The chosen slots, as a new value."""
        return Slots(
            self.service[rows],
            self.local[rows],
            self.deadline_s[rows],
            self.data_mb[rows],
            self.system_tflop[rows],
            self.memory_used_mb[rows],
            self.deployed[rows],
        )

    def columns(self, first: int, last: int) -> "Slots":
        """The requests first..last-1 of every slot, with the same node state."""
        return replace(
            self,
            service=self.service[:, first:last],
            local=self.local[:, first:last],
            deadline_s=self.deadline_s[:, first:last],
            data_mb=self.data_mb[:, first:last],
        )


def join(parts: Sequence[Slots]) -> Slots:
    """Stack slots with equal U, K and V one after the other."""
    names = ("service", "local", "deadline_s", "data_mb", "system_tflop", "memory_used_mb", "deployed")
    return Slots(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class PlacementPolicy(Protocol):
    """A decision maker for whole slots."""

    @property
    def name(self) -> str:
        """The policy's one name (command line, JSON, docs)."""
        ...

    def decide(self, slots: Slots, rng: np.random.Generator) -> IntArray:
        """Placements (E, U, 3): configuration, variant, node; REJECT in all three for a rejected request."""
        ...
