"""The slotted decision process over the simulator: tables in, feature vectors and rewards out, many environments.

The reward of a slot is Eq. 2 of Tan. `exogenous` gives what happened to the slot that no policy can change (arrivals
and phases), so that training can take its share out of the reward's noise.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.routing.compiled import jit, kernel
from policies.routing.contract import AGES, BATCH_SIZES, FloatArray, IntArray
from policies.routing.features import Layout, fill_instance, layout_for
from policies.routing.queueing_model import (
    ARRIVED,
    HEAD,
    LENGTH,
    NOW_S,
    PERIODIC,
    PHASE,
    REWARD,
    RING,
    SERVING,
    SINCE_S,
    STARTED_S,
    ArrivalModel,
    ServiceModel,
    State,
    build,
)
from policies.routing.simulator import run_tables

PAIRS = tuple((low, high) for low in BATCH_SIZES for high in BATCH_SIZES if high >= low)
"""The batch limits (minimum, maximum) that a policy may choose per variant."""

_fill_instance = jit(fill_instance)


@kernel
def _observe(
    s: State, out: Any, ages: Any, elapsed_s: Any, places: int, per_instance: int, age_s: float, batching: bool,
    phases: int, since_s: float,
) -> None:  # fmt: skip
    n = s.queue.shape[1]
    ring = (s.queue.shape[2] - RING) >> 1
    for e in range(s.queue.shape[0]):
        now_s = s.clock[e, NOW_S]
        for i in range(n):
            length, serving = s.queue[e, i, LENGTH], s.queue[e, i, SERVING]
            k = s.queue[e, i, HEAD]
            for j in range(min(length, AGES)):
                ages[j] = now_s - s.times[e, i, RING + k]
                k = k + 1 if k + 1 < ring else 0
            elapsed = 0.0
            if serving > 0:
                elapsed = (now_s - s.times[e, i, STARTED_S]) / elapsed_s[i]
            _fill_instance(out[e], i * per_instance, places, batching, length, serving, elapsed, ages, age_s)
        at = n * per_instance
        for h in range(phases):
            out[e, at + h] = 1.0 if s.marks[e, PHASE] == h else 0.0
        if since_s > 0.0:
            out[e, at + phases] = min((now_s - s.clock[e, SINCE_S]) / since_s, 1.0)


class SlotEnvironments:
    """E copies of one service under one workload, stepped slot by slot together.

    `observe` gives float32[E, features]; `step` takes probabilities float64[E, n] and batch limits int64[E, ranks]
    and gives rewards float64[E]. at_changes: a change of phase also ends a step, so that whoever sees the phase can
    decide at once (Tan 6.2 allows decisions triggered by events); steps then are slots or parts of slots.
    """

    def __init__(
        self,
        service: ServiceModel,
        arrivals: ArrivalModel,
        environments: int,
        seed: int,
        *,
        batching: bool = False,
        observable: bool = False,
        slot_s: float = 1.0,
        at_changes: bool = False,
        threads: int = 1,
    ) -> None:
        self.system, self.state = build(service, arrivals, environments, seed, batching=batching)
        since_s = 0.0
        if observable and arrivals.kind == PERIODIC and arrivals.hold_s is not None:
            since_s = float(arrivals.hold_s.max())
        self.layout: Layout = layout_for(
            service.kinds, batching=batching, phases=arrivals.phases if observable else 0, since_s=since_s
        )
        self.slot_s = slot_s
        self.slots = 0
        self._at_changes = at_changes
        self._arrived = np.zeros((environments, arrivals.phases))
        self._threads = threads
        self._ages = np.zeros(AGES)
        self._elapsed_s = np.array(self.layout.elapsed_s)

    @property
    def environments(self) -> int:
        """Number of environments."""
        return len(self.state.clock)

    def observe(self, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Features float32[E, size] at the current boundary, written into `out` if given."""
        if out is None:
            out = np.zeros((self.environments, self.layout.size), dtype=np.float32)
        layout = self.layout
        _observe(
            self.state, out, self._ages, self._elapsed_s, layout.places, layout.per_instance, layout.age_s,
            layout.batching, layout.phases, layout.since_s,
        )  # fmt: skip
        return out

    def step(
        self, probabilities: FloatArray, minimum: IntArray | None = None, maximum: IntArray | None = None
    ) -> FloatArray:
        """One slot, or what is left of it after a change of phase; returns the rewards float64[E] of Eq. 2."""
        state = self.state
        self.slots += 1
        state.clock[:, REWARD] = 0.0
        before = state.tally[:, :, ARRIVED].copy()
        until_s: float | FloatArray = self.slots * self.slot_s
        if self._at_changes:
            until_s = (np.floor(state.clock[:, NOW_S] / self.slot_s + 1e-9) + 1.0) * self.slot_s
        run_tables(self.system, state, probabilities, until_s, minimum, maximum, self._threads, stop=self._at_changes)
        self._arrived = state.tally[:, :, ARRIVED] - before
        return state.clock[:, REWARD].copy()

    def exogenous(self) -> FloatArray:
        """What the last slot met, whatever the policy: float64[E, 9 m] for m phases.

        The arrivals per phase; then, one-hot by the phase at its end and by how long that phase had lasted (under
        1, 2, 3 slots or longer), a constant and the arrivals.
        """
        state, m = self.state, self._arrived.shape[1]
        age = (state.clock[:, NOW_S] - state.clock[:, SINCE_S]) / self.slot_s
        bucket = state.marks[:, PHASE] * 4 + np.clip(age, 0, 3).astype(np.int64)
        hot = np.zeros((self.environments, 4 * m))
        hot[np.arange(self.environments), bucket] = 1.0
        return np.hstack([self._arrived, hot, hot * self._arrived.sum(axis=1, keepdims=True)])

    def take_counts(self) -> FloatArray:
        """Counters float64[phases, COUNTERS] summed over environments since the last call; they start again at 0."""
        total = np.asarray(self.state.tally.sum(axis=0))
        self.state.tally[:] = 0.0
        return total
