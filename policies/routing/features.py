"""From an observation to the vector that a network sees: one function for the simulator and for the live system.

Per instance (Tan 5.1.4): one-hot queue length, elapsed service time in [0, 1], ages zero-padded to 16 in [0, 1];
with batching also the size of the batch in service, one-hot. Then, for the fully observable forms, the phase
one-hot and (periodic workload) the time since it changed. The paper does not give the normalisers: they are part
of the layout here, and an artifact carries the layout's hash.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.routing.contract import AGES, InstanceKind, Observation, RoutingError


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each feature lies and what it is divided by.

    places: length of the one-hot queue length less 1; elapsed_s, age_s: normalisers per instance and for all ages;
    phases: 0 when hidden; since_s: normaliser of the time since the phase changed, 0 when that is hidden.
    """

    variants: tuple[str, ...]
    places: int
    elapsed_s: tuple[float, ...]
    age_s: float
    batching: bool = False
    phases: int = 0
    since_s: float = 0.0

    @property
    def per_instance(self) -> int:
        """Features per instance."""
        return self.places + 1 + 1 + AGES + (4 if self.batching else 0)

    @property
    def size(self) -> int:
        """Length of the vector."""
        return len(self.variants) * self.per_instance + self.phases + (1 if self.since_s > 0.0 else 0)

    @property
    def hash(self) -> str:
        """Names this layout: two layouts with one hash give the same vector for the same observation."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def layout_for(
    kinds: tuple[InstanceKind, ...], *, batching: bool = False, phases: int = 0, since_s: float = 0.0
) -> Layout:
    """The layout for these instances; service times are normalised by that of the largest batch, ages by the
    longest time that a full heaviest queue takes."""
    factor = 3.4 if batching else 1.0
    return Layout(
        variants=tuple(k.variant for k in kinds),
        places=max(k.capacity for k in kinds),
        elapsed_s=tuple(k.service_s * factor for k in kinds),
        age_s=max(k.capacity * k.service_s for k in kinds),
        batching=batching,
        phases=phases,
        since_s=since_s,
    )


def fill_instance(
    out: Any, at: int, places: int, batching: bool, length: int, serving: int, elapsed: float, ages: Any, age_s: float
) -> None:
    """Write one instance's features into out[at:]; elapsed is already normalised, ages are in seconds.

    Scalars and indexing only: the simulator compiles this very function.
    """
    for k in range(places + 1):
        out[at + k] = 0.0
    out[at + min(length, places)] = 1.0
    at += places + 1
    out[at] = min(elapsed, 1.0)
    at += 1
    for k in range(16):
        out[at + k] = min(ages[k] / age_s, 1.0) if k < length else 0.0
    if batching:
        at += 16
        for k in range(4):
            out[at + k] = 0.0
        out[at + (serving + 1) // 2] = 1.0


def features(layout: Layout, observation: Observation) -> NDArray[np.float32]:
    """The vector float32[layout.size] of an observation; an error says what does not fit the layout."""
    n = len(layout.variants)
    if len(observation.length) != n:
        raise RoutingError(f"observation of {len(observation.length)} instances, but the policy was trained for {n}")
    if layout.phases and not 0 <= observation.phase < layout.phases:
        raise RoutingError(
            f"phase = {observation.phase}: this policy needs the workload's phase (0..{layout.phases - 1}); "
            "use a partially observable one (learned-po) where nobody reports it"
        )
    out = np.zeros(layout.size, dtype=np.float32)
    row = [0.0] * layout.size
    length, serving = observation.length.tolist(), observation.in_service.tolist()
    elapsed, ages = observation.elapsed_s.tolist(), observation.ages_s.tolist()
    for i in range(n):
        fill_instance(
            row,
            i * layout.per_instance,
            layout.places,
            layout.batching,
            length[i],
            serving[i],
            elapsed[i] / layout.elapsed_s[i],
            ages[i],
            layout.age_s,
        )
    at = n * layout.per_instance
    if layout.phases:
        row[at + observation.phase] = 1.0
        at += layout.phases
    if layout.since_s > 0.0:
        row[at] = min(max(observation.since_s, 0.0) / layout.since_s, 1.0)
    out[:] = row
    return out
