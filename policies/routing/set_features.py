"""What `learned-set` sees of a service of any size, and how its one number becomes a table (numpy; also serves live).

Instances fall into three roles: the heaviest variant's, the lightest's, and those between. Per role the vector holds
the distribution of queue lengths over its instances and the means of elapsed service time and of the ages, that is
`features.py` averaged: its length depends on no number of instances, and their order cannot matter. Two facts per
role say how many instances that was averaged over and how much of the whole speed they have.

The network answers with the heaviest variant's share. The others follow (`shares`), and within a variant instances
share by what each can still serve in the slot (`spread`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from policies.routing.contract import AGES, FloatArray, InstanceKind, IntArray, RoutingError

PLACES = 15
"""Longer queues count as this long; the same for every service, whatever its capacities."""
SLOT_S = 1.0
"""How long a table stands."""
ROLES = 3
PER_ROLE = (PLACES + 1) + 1 + AGES + 2
"""One-hot length, elapsed service time, ages; 1 / sqrt(instances) and share of the speed."""
SIZE = ROLES * PER_ROLE
"""Length of the vector."""
SAFE_LOAD = 0.6
"""How far the heaviest instances may be loaded where lighter ones exist; only how it compares between variants counts.

In an M/D/1 queue the chance to wait longer than a given time depends on (1 - load) / service time, so this ratio is
what `shares` keeps equal.
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """A service's instances as the network needs them; n instances of k variants, heaviest first.

    variant: int64[n], 0 to k - 1; role: int64[n]; weight: float64[n], 1 / (instances of the role);
    elapsed_s: float64[n], service times; age_s: normaliser of ages; facts: float64[ROLES, 2];
    per_heavy: float64[k]: a variant's share at which it is as safe as the heaviest, per unit of the heaviest's share.
    """

    variant: IntArray
    role: IntArray
    weight: FloatArray
    elapsed_s: FloatArray
    age_s: float
    facts: FloatArray
    per_heavy: FloatArray


def describe(kinds: Sequence[InstanceKind]) -> Shape:
    """The shape of these instances; of one variant as of many, whatever numbers their ranks have."""
    if not kinds:
        raise RoutingError("kinds is empty: learned-set needs at least one instance")
    ranks, first, variant, counts = np.unique(
        [k.rank for k in kinds], return_index=True, return_inverse=True, return_counts=True
    )
    k = len(ranks)
    service_s = np.array([kinds[i].service_s for i in first])
    role_of = np.where(np.arange(k) == 0, 0, np.where(np.arange(k) == k - 1, ROLES - 1, 1))
    role = role_of[variant]
    speed = counts / service_s
    instances = np.bincount(role, minlength=ROLES)
    facts = np.zeros((ROLES, 2))
    there = instances > 0
    facts[there, 0] = instances[there] ** -0.5
    facts[:, 1] = np.bincount(role_of, weights=speed, minlength=ROLES) / speed.sum()
    safe = speed * (1.0 - (1.0 - SAFE_LOAD) * np.minimum(service_s / service_s[0], 1.0))
    return Shape(
        variant=variant.astype(np.int64),
        role=role.astype(np.int64),
        weight=1.0 / instances[role],
        elapsed_s=np.array([kind.service_s for kind in kinds]),
        age_s=PLACES * float(service_s.max()),
        facts=facts,
        per_heavy=safe / safe[0],
    )


def add_instance(out: Any, role: int, weight: float, length: int, elapsed: float, ages: Any, age_s: float) -> None:
    """Add one instance to its role's averages in out[SIZE]; elapsed is already normalised, ages are in seconds.

    Scalars and indexing only: the simulator compiles this very function.
    """
    at = role * PER_ROLE
    out[at + min(length, PLACES)] += weight
    out[at + PLACES + 1] += weight * min(elapsed, 1.0)
    at += PLACES + 2
    for k in range(min(length, AGES)):
        out[at + k] += weight * min(ages[k] / age_s, 1.0)


def add_facts(out: Any, facts: Any) -> None:
    """Write what does not change, `Shape.facts`, into out[SIZE]. Compiled by the simulator, too."""
    for role in range(ROLES):
        for k in range(2):
            out[role * PER_ROLE + PER_ROLE - 2 + k] = facts[role][k]


def shares(shape: Shape, heavy: FloatArray) -> FloatArray:
    """Shares per variant float64[E, k] from those of the heaviest, float64[E].

    Next ones get as much as makes them as safe as the heaviest, while there is something left; the lightest the rest.
    """
    k = len(shape.per_heavy)
    before = np.minimum(heavy[:, None] * np.cumsum(shape.per_heavy), 1.0)
    before[:, k - 1] = 1.0
    return np.diff(before, axis=1, prepend=0.0)


def spread(shape: Shape, share: FloatArray, length: IntArray) -> FloatArray:
    """Tables float64[E, n] from shares per variant float64[E, k] and queue lengths int64[E, n].

    Within a variant by what each instance can still serve in the slot. (By free places instead, an instance that is
    full now gets next to nothing for a whole slot, and in a burst the others overflow: bursts lost 15% so.)
    """
    room = np.maximum(SLOT_S / shape.elapsed_s - length, 1.0)
    member = shape.variant[:, None] == np.arange(len(shape.per_heavy))
    return np.asarray(room * (share / (room @ member))[:, shape.variant])
