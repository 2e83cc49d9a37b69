"""`learned-set`: one table network for any number of instances and variants (numpy; what serves).

Tan's networks have a place for every instance, so each system needs one of its own. This one looks at each instance
alone, averages what it saw over the instances of a variant, and weighs the variants against each other (deep sets,
Zaheer et al. 2017): its size depends on neither number, and the order of instances cannot matter. It sets each
variant's share; within a variant, instances share by their free places. Trained by `set_training.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.routing.contract import Action, FloatArray, InstanceKind, IntArray, Observation, RoutingError
from policies.routing.features import Layout, features, layout_for

SEEN, WIDTH = 24, 32
"""Units that look at one instance, and units of each of the two layers that weigh a variant."""
ABOUT = 4
"""Numbers that say what a variant is (`describe`)."""
START_HEAVY = 0.97
"""Where training starts: the heaviest variant's share (presets.py says why)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The instances of a service as the network needs them: variants in order of rank.

    member: float64[k, n], 1 / (instances of the variant) where instance i is of variant r, else 0;
    about: float64[k, ABOUT]; start: float64[k], log of the shares that the untrained network gives.
    """

    layout: Layout
    rank: IntArray
    capacity: IntArray
    member: FloatArray
    about: FloatArray
    start: FloatArray


def describe(kinds: Sequence[InstanceKind]) -> Shape:
    """The shape of a service with instances of at least two variants, ranks 0 to k - 1."""
    rank = np.array([k.rank for k in kinds], dtype=np.int64)
    variants = int(rank.max()) + 1
    counts = np.bincount(rank, minlength=variants)
    if variants < 2 or (counts == 0).any():
        raise RoutingError(
            f"ranks {sorted(set(rank.tolist()))}: learned-set needs two or more variants, numbered from 0"
        )
    one = [next(k for k in kinds if k.rank == r) for r in range(variants)]
    service_s, accuracy = np.array([k.service_s for k in one]), np.array([k.accuracy for k in one])
    speed = counts / service_s
    about = np.column_stack(
        [
            np.arange(variants) / (variants - 1),
            service_s / service_s.max(),
            10.0 * (accuracy.max() - accuracy),
            speed / speed.sum(),
        ]
    )
    start = np.full(variants, (1.0 - START_HEAVY) / (variants - 1))
    start[0] = START_HEAVY
    member = (rank[None, :] == np.arange(variants)[:, None]) / counts[:, None]
    capacity = np.array([k.capacity for k in kinds], dtype=np.int64)
    return Shape(layout_for(tuple(kinds)), rank, capacity, member, about, np.log(start))


def spread(shape: Shape, shares: FloatArray, length: IntArray) -> FloatArray:
    """Tables float64[E, n] from shares per variant float64[E, k]: within one, by free places (and one to spare)."""
    room = np.maximum(shape.capacity - length, 0) + 1.0
    total = room @ (shape.member > 0.0).T
    return np.asarray(room * (shares / total)[:, shape.rank])


class SetPolicy:
    """A `SlotPolicy` for the instances of `kinds`, whatever their number, from the tensors of `set_training.py`."""

    needs_phase = False

    def __init__(
        self, tensors: dict[str, NDArray[np.float32]], kinds: Sequence[InstanceKind], slot_s: float = 1.0
    ) -> None:
        self.name, self.slot_s = "learned-set", slot_s
        self.shape = describe(kinds)
        inputs = self.shape.layout.per_instance + ABOUT
        wanted = {
            "look": (SEEN, inputs),
            "weigh.0": (WIDTH, 2 * SEEN + ABOUT),
            "weigh.2": (WIDTH, WIDTH),
            "weigh.4": (1, WIDTH),
        }
        for key, size in wanted.items():
            found = tensors.get(f"{key}.weight")
            if found is None or found.shape != size or not np.isfinite(found).all():
                raise RoutingError(f"learned-set: {key}.weight must hold {size} finite numbers; train it again")
        self._layers = {key: (tensors[f"{key}.weight"].T, tensors[f"{key}.bias"]) for key in wanted}

    def shares(self, seen: NDArray[np.float32]) -> FloatArray:
        """Shares per variant float64[E, k] for features float32[E, n * per_instance]."""
        shape, layers = self.shape, self._layers
        e, n = len(seen), len(shape.rank)
        about = shape.about.astype(np.float32)
        x = np.concatenate([seen.reshape(e, n, -1), np.broadcast_to(about[shape.rank], (e, n, ABOUT))], axis=2)
        looked = np.tanh(x @ layers["look"][0] + layers["look"][1])
        pooled = np.einsum("kn,ens->eks", shape.member.astype(np.float32), looked)
        around = np.broadcast_to(pooled.mean(axis=1, keepdims=True), pooled.shape)
        v = np.concatenate([pooled, around, np.broadcast_to(about, (e, *about.shape))], axis=2)
        for key in ("weigh.0", "weigh.2"):
            v = np.tanh(v @ layers[key][0] + layers[key][1])
        f = (v @ layers["weigh.4"][0] + layers["weigh.4"][1])[:, :, 0] + shape.start
        y = np.exp(f - f.max(axis=1, keepdims=True))
        return np.asarray(y / y.sum(axis=1, keepdims=True), dtype=np.float64)

    def tables(self, seen: NDArray[np.float32], length: IntArray) -> FloatArray:
        """Tables float64[E, n] for features and queue lengths int64[E, n]."""
        return spread(self.shape, self.shares(seen), length)

    def act(self, observation: Observation, rng: np.random.Generator) -> Action:
        """The table for the coming slot, without noise (rng is not used)."""
        return Action(self.tables(features(self.shape.layout, observation)[None, :], observation.length[None, :])[0])
