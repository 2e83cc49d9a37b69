"""A learned routing policy as it serves: plain numpy, no torch (Tan 5.1.6: acts without noise)."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from policies.routing.artifact import read_artifact, shipped
from policies.routing.contract import BATCH_SIZES, Action, InstanceKind, Observation, RoutingError
from policies.routing.features import Layout, features

PAIRS = tuple((low, high) for low in BATCH_SIZES for high in BATCH_SIZES if high >= low)
"""Batch limits (minimum, maximum) in the order of the network's outputs."""


class LearnedPolicy:
    """A `SlotPolicy` from an artifact. `forward` maps features to the actor's outputs, as torch would."""

    def __init__(
        self, name: str, layout: Layout, tensors: dict[str, NDArray[np.float32]], slot_s: float, variants: int = 0
    ) -> None:
        self.name, self.layout, self.slot_s = name, layout, slot_s
        missing = [key for k in (0, 2, 4) for key in (f"{k}.weight", f"{k}.bias") if key not in tensors]
        if missing:
            raise RoutingError(f"{name}: the network lacks {', '.join(missing)}; train it again")
        self._layers = [(np.ascontiguousarray(tensors[f"{k}.weight"].T), tensors[f"{k}.bias"]) for k in (0, 2, 4)]
        self._variants = variants
        outputs = len(layout.variants) + variants * len(PAIRS)
        if self._layers[0][0].shape[0] != layout.size or self._layers[-1][0].shape[1] != outputs:
            raise RoutingError(
                f"{name}: the network maps {self._layers[0][0].shape[0]} to {self._layers[-1][0].shape[1]} numbers, "
                f"but its layout has {layout.size} features and needs {outputs} outputs"
            )

    @property
    def needs_phase(self) -> bool:
        """Whether the workload's phase must be observed."""
        return self.layout.phases > 0

    @property
    def batching(self) -> bool:
        """Whether actions carry batch limits."""
        return self._variants > 0

    def forward(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Actor outputs float32[..., n + variants * 6] for features float32[..., size]."""
        x = inputs
        for weight, bias in self._layers[:-1]:
            x = np.tanh(x @ weight + bias)
        weight, bias = self._layers[-1]
        return np.asarray(x @ weight + bias, dtype=np.float32)

    def tables(self, inputs: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """For features float32[E, size]: probabilities float64[E, n], minimum and maximum int64[E, variants]."""
        out = self.forward(inputs).astype(np.float64)
        n = len(self.layout.variants)
        f = out[:, :n]
        y = np.exp(f - f.max(axis=1, keepdims=True))
        y /= y.sum(axis=1, keepdims=True)
        chosen = out[:, n:].reshape(len(out), self._variants, len(PAIRS)).argmax(axis=2)
        limits = np.array(PAIRS, dtype=np.int64)[chosen]
        return y, limits[:, :, 0], limits[:, :, 1]

    def act(self, observation: Observation, rng: np.random.Generator) -> Action:
        """The table for the coming slot, without noise (rng is not used)."""
        y, low, high = self.tables(features(self.layout, observation)[None, :])
        return Action(y[0], tuple(low[0].tolist()), tuple(high[0].tolist()))


def load_policy(path: Path | str, kinds: tuple[InstanceKind, ...] | None = None) -> LearnedPolicy:
    """The learned policy of an artifact: a path, or a name among the pretrained (`learned-po`).

    kinds: the instances it is to serve, in order of their ids; an error says how they differ from those that it
    was trained for.
    """
    where = shipped(path)
    record, layout, tensors = read_artifact(where)
    if kinds is not None and tuple(k.variant for k in kinds) != layout.variants:
        raise RoutingError(
            f"artifact {where}: trained for instances of {list(layout.variants)}, "
            f"but {[k.variant for k in kinds]} exist"
        )
    outputs = len(tensors.get("4.bias", ())) - len(layout.variants)
    return LearnedPolicy(record["name"], layout, tensors, record["slot_s"], outputs // len(PAIRS))
