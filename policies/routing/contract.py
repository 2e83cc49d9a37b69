"""The shapes that routing shares: observation in, action out, and what a per-request rule returns.

Data flow of one slot: status -> `Observation` -> `SlotPolicy.act` -> `Action` -> table.
Data flow of one request: a rule of `rules.py` or a draw from the table -> an instance number, `HOLD` or `REJECT`.

Instances of a service are numbered 0..n-1 in sorted order of their instance id, everywhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

HOLD = -1
"""A rule's answer: keep the request in the central queue until an instance is idle."""
REJECT = -2
"""A rule's answer: no instance can be routed to."""

AGES = 16
"""Length to which the ages of the requests in an instance are zero-padded (Tan 5.1.4)."""
BATCH_SIZES = (1, 3, 5)
"""Batch sizes that an adaptive-batching policy may choose from (Tan 5.2.2)."""

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

Indexable = Any
"""A Python list (live) or a numpy array (simulator) of length n; indexed only, never sliced or allocated."""

Rule = Callable[
    [float, float, float, Indexable, Indexable, Indexable, Indexable, Indexable, Indexable],
    int,
]
"""rule(now_s, budget_s, draw, length, capacity, clear_s, service_s, rank, margin) -> instance, HOLD or REJECT."""


class RoutingError(ValueError):
    """Bad input to routing: the message names the key, its value and what would be right."""


@dataclass(frozen=True, slots=True)
class InstanceKind:
    """What a routing policy knows of one instance before any request arrives.

    rank: 0 is the heaviest variant of the service; service_s: expected service time of a batch of one;
    accuracy: probability of a right answer, in [0, 1]; capacity: places, including the one in service;
    batch: how many it serves together, (minimum, maximum), while no table sets other limits; batch_s: expected service
    times of batches of 1, 3 and 5, None where nobody measured them.
    """

    variant: str
    rank: int
    service_s: float
    accuracy: float
    capacity: int = 15
    batch: tuple[int, int] = (1, 1)
    batch_s: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise RoutingError(f"rank = {self.rank}: must be 0 (heaviest) or more")
        if not self.service_s > 0.0:
            raise RoutingError(f"service_s = {self.service_s} of {self.variant}: must be above 0")
        if not 0.0 <= self.accuracy <= 1.0:
            raise RoutingError(f"accuracy = {self.accuracy} of {self.variant}: must be in [0, 1]")
        if self.capacity < 1:
            raise RoutingError(f"capacity = {self.capacity} of {self.variant}: must be at least 1")


@dataclass(frozen=True, slots=True)
class Observation:
    """The system at a slot boundary (Tan 3.2): the state of every instance and, if exposed, the phase.

    length     int64[n]        requests in the instance, waiting and in service (l)
    elapsed_s  float64[n]      elapsed service time of what is in service, 0 when idle (omega)
    ages_s     float64[n, 16]  ages of those requests, oldest first, zero-padded (phi)
    in_service int64[n]        size of the batch in service, 0 when idle
    ready      bool[n]         may be routed to
    phase      phase of the workload, or -1 when it is hidden
    since_s    time since the phase last changed, or -1 when it is hidden (periodic workload, Tan 5.2.3)
    """

    length: IntArray
    elapsed_s: FloatArray
    ages_s: FloatArray
    in_service: IntArray
    ready: BoolArray
    phase: int = -1
    since_s: float = -1.0


@dataclass(frozen=True, slots=True)
class Action:
    """What a per-slot policy sets for the coming slot.

    probabilities float64[n] over instances, summing to 1
    minimum, maximum: batch limits per rank (index = rank), from `BATCH_SIZES`; empty when not batching
    """

    probabilities: FloatArray
    minimum: tuple[int, ...] = ()
    maximum: tuple[int, ...] = ()


class SlotPolicy(Protocol):
    """A routing policy that sets a table every slot."""

    @property
    def name(self) -> str:
        """The router's name: the same in deployments, on the command line and in results."""

    @property
    def slot_s(self) -> float:
        """How long one table is meant to stand, in seconds."""

    @property
    def needs_phase(self) -> bool:
        """Whether the hidden phase of the workload must be observed."""

    def act(self, observation: Observation, rng: np.random.Generator) -> Action:
        """The action for the coming slot."""


@runtime_checkable
class Remarking(Protocol):
    """A slot policy that can tell what is unusual about the instances that it serves now."""

    def remark(self, ready: BoolArray) -> str:
        """In words; empty when all instances are ready."""


def masked(probabilities: FloatArray, ready: BoolArray) -> FloatArray:
    """Probabilities with the instances that are not ready set to 0 and the rest renormalised.

    If the policy gave everything to instances that are not ready, the ready ones share equally.
    Returns float64[n]; all zeros only when nothing is ready.
    """
    if len(probabilities) != len(ready):
        raise RoutingError(
            f"table for {len(probabilities)} instances, but {len(ready)} exist: build it for the sorted instance ids"
        )
    kept = np.where(ready, probabilities, 0.0)
    total = float(kept.sum())
    if total > 0.0:
        return np.asarray(kept / total, dtype=np.float64)
    count = int(ready.sum())
    if count == 0:
        return np.zeros(len(ready))
    return np.where(ready, 1.0 / count, 0.0)


def observation_of(
    length: Sequence[int],
    elapsed_s: Sequence[float],
    ages_s: Sequence[Sequence[float]],
    in_service: Sequence[int],
    ready: Sequence[bool],
    phase: int = -1,
    since_s: float = -1.0,
) -> Observation:
    """An `Observation` from plain per-instance values; ages beyond the 16 oldest are cut."""
    n = len(length)
    padded = np.zeros((n, AGES))
    for i, ages in enumerate(ages_s):
        kept = list(ages)[:AGES]
        padded[i, : len(kept)] = kept
    return Observation(
        length=np.asarray(length, dtype=np.int64),
        elapsed_s=np.asarray(elapsed_s, dtype=np.float64),
        ages_s=padded,
        in_service=np.asarray(in_service, dtype=np.int64),
        ready=np.asarray(ready, dtype=np.bool_),
        phase=phase,
        since_s=since_s,
    )
