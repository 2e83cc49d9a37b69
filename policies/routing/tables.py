"""Rules that set a table every slot: `threshold`, `infaas` and `stationary` (numpy only, so they also serve live).

Each is a `SlotPolicy`; `tables` is the same decision for many environments at once, from queue lengths int64[E, n]
(and phases int64[E] where needed), which is how the simulator asks.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from policies.routing.contract import Action, FloatArray, InstanceKind, IntArray, Observation, RoutingError
from policies.routing.stationary import best_heavy_share


class TableRule(Protocol):
    """A per-slot rule over queue lengths."""

    @property
    def name(self) -> str:
        """The router's name."""

    @property
    def slot_s(self) -> float:
        """How long a table stands."""

    @property
    def needs_phase(self) -> bool:
        """Whether the phase must be observed."""

    def tables(self, length: IntArray, phase: IntArray) -> FloatArray:
        """Probabilities float64[E, n]."""


def shares(rank: IntArray, heavy: FloatArray) -> FloatArray:
    """Tables float64[E, n] that give heavy[e] to the instances of rank 0, equally, and the rest to the lightest."""
    is_heavy, is_light = rank == 0, rank == rank.max()
    if is_heavy.all():
        return np.tile(is_heavy / is_heavy.sum(), (len(heavy), 1))
    return np.asarray(heavy[:, None] * is_heavy / is_heavy.sum() + (1.0 - heavy)[:, None] * is_light / is_light.sum())


@dataclass(frozen=True)
class Threshold:
    """97% to the heavy instances when every light queue is empty at the boundary, else 13% (papers/README.md).

    And the heavy instances must not be jammed either: in the first slot of a burst they get nearly everything, so
    the light queues are still empty at its end, and a rule that looks at those alone stays wrong for seconds
    (measured: 67% goodput instead of 79%). Together they may hold fewer than `heavy_held` requests.
    The numbers are those found at service times of 43 and 11.5 ms; a learned table has to beat this rule.
    """

    kinds: tuple[InstanceKind, ...]
    calm: float = 0.97
    busy: float = 0.13
    heavy_held: int = 4
    slot_s: float = 1.0
    name: str = "threshold"
    needs_phase: bool = False

    def tables(self, length: IntArray, phase: IntArray) -> FloatArray:
        """Probabilities float64[E, n]."""
        rank = np.array([k.rank for k in self.kinds])
        empty = (length[:, rank == rank.max()] == 0).all(axis=1)
        calm = empty & (length[:, rank == 0].sum(axis=1) < self.heavy_held)
        return shares(rank, np.where(calm, self.calm, self.busy))

    def act(self, observation: Observation, rng: np.random.Generator) -> Action:
        """The table for the coming slot."""
        return Action(self.tables(observation.length[None], np.array([observation.phase]))[0])


@dataclass(frozen=True)
class Infaas:
    """Balance load over the instances that are not overloaded (Tan 5.1.7, after INFaaS), in slots of 0.1 s.

    Tan does not say when an instance counts as overloaded: here, when it holds at least one slot's worth of work.
    """

    kinds: tuple[InstanceKind, ...]
    slot_s: float = 0.1
    name: str = "infaas"
    needs_phase: bool = False

    def tables(self, length: IntArray, phase: IntArray) -> FloatArray:
        """Probabilities float64[E, n]."""
        work_s = length * np.array([k.service_s for k in self.kinds])
        free = (work_s < self.slot_s).astype(np.float64)
        free[free.sum(axis=1) == 0.0] = 1.0
        return np.asarray(free / free.sum(axis=1, keepdims=True))

    def act(self, observation: Observation, rng: np.random.Generator) -> Action:
        """The table for the coming slot."""
        return Action(self.tables(observation.length[None], np.array([observation.phase]))[0])


@dataclass(frozen=True)
class Stationary:
    """One fixed table per phase, as if each phase lasted for ever (Tan's SA, Appendix F); needs the phase.

    heavy: share of the heavy instances by phase; `solve` finds it.
    """

    kinds: tuple[InstanceKind, ...]
    heavy: tuple[float, ...]
    slot_s: float = 1.0
    name: str = "stationary"
    needs_phase: bool = True

    @classmethod
    def solve(
        cls, kinds: tuple[InstanceKind, ...], phase_rates: tuple[float, ...], requirement_s: float, promise: float
    ) -> "Stationary":
        """The largest heavy share per phase that keeps the promise by the waiting times of M/D/1 queues."""
        return cls(kinds, tuple(best_heavy_share(kinds, rate, requirement_s, promise) for rate in phase_rates))

    def tables(self, length: IntArray, phase: IntArray) -> FloatArray:
        """Probabilities float64[E, n]."""
        if phase.min() < 0:
            raise RoutingError("stationary needs the workload's phase, which nobody reports here")
        return shares(np.array([k.rank for k in self.kinds]), np.array(self.heavy)[phase])

    def act(self, observation: Observation, rng: np.random.Generator) -> Action:
        """The table for the coming slot."""
        return Action(self.tables(observation.length[None], np.array([observation.phase]))[0])
