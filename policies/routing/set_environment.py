"""The slotted decision process as `learned-set` meets it: services of any size, one size of vector, one number back."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.routing.compiled import jit, kernel
from policies.routing.contract import AGES, FloatArray
from policies.routing.environment import SlotEnvironments
from policies.routing.queueing_model import (
    HEAD,
    LENGTH,
    NOW_S,
    RING,
    SERVING,
    STARTED_S,
    ArrivalModel,
    ServiceModel,
    State,
)
from policies.routing.set_features import SIZE, SLOT_S, add_facts, add_instance, describe, shares, spread

_add_instance, _add_facts = jit(add_instance), jit(add_facts)


@kernel
def _observe(s: State, out: Any, ages: Any, role: Any, weight: Any, elapsed_s: Any, age_s: float, facts: Any) -> None:
    ring = (s.queue.shape[2] - RING) >> 1
    for e in range(s.queue.shape[0]):
        now_s = s.clock[e, NOW_S]
        for c in range(out.shape[1]):
            out[e, c] = 0.0
        for i in range(s.queue.shape[1]):
            length = s.queue[e, i, LENGTH]
            k = s.queue[e, i, HEAD]
            for j in range(min(length, AGES)):
                ages[j] = now_s - s.times[e, i, RING + k]
                k = k + 1 if k + 1 < ring else 0
            elapsed = 0.0
            if s.queue[e, i, SERVING] > 0:
                elapsed = (now_s - s.times[e, i, STARTED_S]) / elapsed_s[i]
            _add_instance(out[e], role[i], weight[i], length, elapsed, ages, age_s)
        _add_facts(out[e], facts)


class SetEnvironments:
    """E copies of one service under one workload: `observe` gives float32[E, SIZE]; `step` takes a table each."""

    def __init__(
        self, service: ServiceModel, arrivals: ArrivalModel, environments: int, seed: int, threads: int = 1
    ) -> None:
        self.slots = SlotEnvironments(service, arrivals, environments, seed, slot_s=SLOT_S, threads=threads)
        self.shape = describe(service.kinds)
        self._ages = np.zeros(AGES)

    def observe(self, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Features float32[E, SIZE] at the current boundary, written into `out` if given."""
        if out is None:
            out = np.zeros((self.slots.environments, SIZE), dtype=np.float32)
        shape = self.shape
        _observe(self.slots.state, out, self._ages, shape.role, shape.weight, shape.elapsed_s, shape.age_s, shape.facts)
        return out

    def step(self, heavy: FloatArray) -> FloatArray:
        """One slot with these shares float64[E] of the heaviest variant; returns the rewards float64[E] of Eq. 2."""
        return self.slots.step(spread(self.shape, shares(self.shape, heavy), self.slots.state.queue[:, :, LENGTH]))
