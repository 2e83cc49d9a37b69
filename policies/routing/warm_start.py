"""Start a training from a trained actor instead of from nothing: same instances or some of them, another task.

The actor of an artifact is carried over column by column, by what each feature means: normalisers may differ, and
features that the old policy did not have (batch in service, phase) start without influence. So the new policy acts
as the old one did until it learns better; only its choice of batches, if the old one made none, is a new start.
Where instances are missing it acts as the old one does when these are masked and idle.
The critic is not part of an artifact: `Preset.critic_first` gives it some updates to catch up.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from policies.routing.artifact import read_artifact
from policies.routing.contract import AGES, FloatArray, IntArray, RoutingError
from policies.routing.features import Layout
from policies.routing.ppo import Trainer


def places_of(old: Layout, new: Layout) -> list[int]:
    """Which of the old layout's instances each of the new one's is; an error if one is not there."""
    left = list(range(len(old.variants)))
    found = []
    for variant in new.variants:
        match = next((i for i in left if old.variants[i] == variant), None)
        if match is None or old.places != new.places:
            raise RoutingError(
                f"an actor for instances of {list(old.variants)} with {old.places} places cannot start one for "
                f"{list(new.variants)} with {new.places}"
            )
        left.remove(match)
        found.append(match)
    return found


def columns(old: Layout, new: Layout) -> tuple[IntArray, FloatArray]:
    """For each feature of `new`: the index of the same feature in `old` (-1: it has none), and old value / new value.

    Both int64 and float64 [new.size]. An error says how the layouts differ if no policy can be carried over.
    """
    index, scale = np.full(new.size, -1, dtype=np.int64), np.ones(new.size)
    for i, before in enumerate(places_of(old, new)):
        a, b = before * old.per_instance, i * new.per_instance
        shared = new.places + 2 + AGES + (4 if old.batching and new.batching else 0)
        index[b : b + shared] = np.arange(a, a + shared)
        scale[b + new.places + 1] = new.elapsed_s[i] / old.elapsed_s[before]
        scale[b + new.places + 2 : b + new.places + 2 + AGES] = new.age_s / old.age_s
    a, b = len(old.variants) * old.per_instance, len(new.variants) * new.per_instance
    if old.phases == new.phases:
        index[b : b + new.phases] = np.arange(a, a + old.phases)
        if old.since_s > 0.0 and new.since_s > 0.0:
            index[-1] = old.size - 1
            scale[-1] = new.since_s / old.since_s
    return index, scale


def start_from(trainer: Trainer, path: Path) -> None:
    """Give a trainer that has not begun the actor of the artifact at `path`."""
    _, old, tensors = read_artifact(path)
    index, scale = columns(old, trainer.layout)
    n = len(old.variants)
    first, last = trainer.network.actor[0], trainer.network.actor[-1]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    carried = np.where(index >= 0, tensors["0.weight"][:, np.maximum(index, 0)] * scale, 0.0)
    bias = tensors["0.bias"].copy()
    # One-hot lengths: an idle instance that is left out would have shown the first of its features.
    for missing in set(range(n)) - set(places := places_of(old, trainer.layout)):
        bias += tensors["0.weight"][:, missing * old.per_instance]
    rows = list(places)
    if trainer.variants and len(tensors["4.bias"]) > n:
        rows += range(n, len(tensors["4.bias"]))
    with torch.no_grad():
        first.weight.copy_(torch.from_numpy(carried))
        for name, value in trainer.network.actor.named_parameters():
            if name in ("0.bias", "2.weight", "2.bias"):
                value.copy_(torch.from_numpy(bias if name == "0.bias" else tensors[name]))
        last.weight[: len(rows)] = torch.from_numpy(tensors["4.weight"][rows])
        last.bias[: len(rows)] = torch.from_numpy(tensors["4.bias"][rows])
