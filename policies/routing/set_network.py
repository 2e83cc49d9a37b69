"""`learned-set`: one table network for any number of instances and variants (numpy; what serves).

Tan's networks have a place for every instance, so each system needs one of its own. This one sees averages over the
instances that are ready (`set_features.py`) and says what share the heaviest variant gets, so that it serves what is
left of a set, too. Trained by `set_training.py`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from policies.routing.artifact import read_record, shipped
from policies.routing.contract import Action, BoolArray, FloatArray, InstanceKind, IntArray, Observation, RoutingError
from policies.routing.set_features import SIZE, SLOT_S, Shape, add_facts, add_instance, describe, shares, spread

NAME = "learned-set"
LAYERS = ("0", "2", "4")


class SetPolicy:
    """A `SlotPolicy` for the instances of `kinds`, whatever their number, ready or not.

    tensors: weights [out, in] and biases of three layers, SIZE features to two logits, the heaviest variant's and
    that of all others.
    """

    name, slot_s, needs_phase = NAME, SLOT_S, False

    def __init__(self, tensors: dict[str, NDArray[np.float32]], kinds: Sequence[InstanceKind]) -> None:
        self.kinds = tuple(kinds)
        self.shape = describe(self.kinds)
        self._shapes: dict[bytes, Shape] = {}
        self._layers = []
        inputs: int | None = SIZE
        for key in LAYERS:
            weight, bias = tensors.get(f"{key}.weight"), tensors.get(f"{key}.bias")
            if weight is None or bias is None:
                raise RoutingError(f"{NAME}: the network lacks layer {key}; train it again")
            outputs = 2 if key == LAYERS[-1] else len(bias)
            if weight.shape != (outputs, inputs) or bias.shape != (outputs,):
                raise RoutingError(
                    f"{NAME}: {key}.weight has shape {weight.shape} and {key}.bias {bias.shape}, but "
                    f"{(outputs, inputs)} and {(outputs,)} are needed; train it again"
                )
            if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise RoutingError(f"{NAME}: layer {key} holds NaN or infinity; train it again")
            self._layers.append((np.ascontiguousarray(weight.T), bias))
            inputs = outputs

    def heavy(self, seen: NDArray[np.float32]) -> FloatArray:
        """The heaviest variant's share float64[E] for features float32[E, SIZE]."""
        x = seen
        for weight, bias in self._layers[:-1]:
            x = np.tanh(x @ weight + bias)
        weight, bias = self._layers[-1]
        logits = (x @ weight + bias).astype(np.float64)
        return np.asarray(1.0 / (1.0 + np.exp(logits[:, 1] - logits[:, 0])))

    def tables(self, seen: NDArray[np.float32], length: IntArray) -> FloatArray:
        """Tables float64[E, n] for features and queue lengths int64[E, n], all instances being ready."""
        return spread(self.shape, shares(self.shape, self.heavy(seen)), length)

    def act(self, observation: Observation, rng: np.random.Generator) -> Action:
        """The table for the coming slot, without noise (rng is not used); only instances that are ready count."""
        ready = observation.ready
        if len(ready) != len(self.kinds):
            raise RoutingError(f"observation of {len(ready)} instances, but {NAME} was made for {len(self.kinds)}")
        probabilities = np.zeros(len(ready))
        if ready.any():
            shape, length = self._of(ready), observation.length[ready]
            seen = observed(shape, observation, ready)
            probabilities[ready] = spread(shape, shares(shape, self.heavy(seen[None])), length[None])[0]
        return Action(probabilities)

    def remark(self, ready: BoolArray) -> str:
        """What is unusual about the set that is served now; empty when all instances are ready."""
        left = int(ready.sum())
        return "" if left == len(ready) else f"{left} of {len(ready)} instances are ready: {NAME} counts those alone"

    def _of(self, ready: BoolArray) -> Shape:
        key = ready.tobytes()
        if key not in self._shapes:
            self._shapes = {key: describe([kind for kind, one in zip(self.kinds, ready, strict=True) if one])}
        return self._shapes[key]


def observed(shape: Shape, observation: Observation, ready: BoolArray) -> NDArray[np.float32]:
    """The vector float32[SIZE] of the ready instances; `shape` is theirs."""
    out = [0.0] * SIZE
    length, ages = observation.length[ready].tolist(), observation.ages_s[ready].tolist()
    elapsed = (observation.elapsed_s[ready] / shape.elapsed_s).tolist()
    role, weight = shape.role.tolist(), shape.weight.tolist()
    for i in range(len(length)):
        add_instance(out, role[i], weight[i], length[i], elapsed[i], ages[i], shape.age_s)
    add_facts(out, shape.facts.tolist())
    return np.array(out, dtype=np.float32)


def load_set_policy(source: Path | str, kinds: Sequence[InstanceKind]) -> SetPolicy:
    """The policy of an artifact, a path or `learned-set` for the shipped one, for these instances.

    Raises `RoutingError` if it is not there, broken, or not of this kind.
    """
    path = shipped(source)
    record, tensors = read_record(path)
    if record["name"] != NAME or record.get("features") != SIZE or record["slot_s"] != SLOT_S:
        raise RoutingError(
            f"artifact {path}: a {record['name']} with {record.get('features')} features and slots of "
            f"{record['slot_s']} s, but {NAME} has {SIZE} and {SLOT_S} s; train it again"
        )
    return SetPolicy(tensors, kinds)
