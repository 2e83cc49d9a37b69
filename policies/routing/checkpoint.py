"""A training on disk, from which it goes on bit for bit: networks, optimiser, random numbers and simulated systems."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from policies.routing.environment import SlotEnvironments
from policies.routing.network import Scheduler
from policies.routing.presets import Preset


class Resumable(Protocol):
    """A training that can be kept: `ppo.Trainer` and `set_ppo.SetTrainer`. scaling: how it scales returns."""

    network: Scheduler
    adam: torch.optim.Adam
    noise: torch.Generator
    update: int
    preset: Preset
    scaling: list[float]

    def simulated(self) -> dict[str, SlotEnvironments]:
        """All simulated systems by name."""


def save(trainer: Resumable, path: Path) -> None:
    """Write a checkpoint; a crash while writing leaves the one before."""
    simulated = {}
    for name, env in trainer.simulated().items():
        simulated[name] = {k: torch.from_numpy(v.view(np.int64)) for k, v in env.state._asdict().items()}
    part = path.with_suffix(".part")
    torch.save(
        {
            "network": trainer.network.state_dict(),
            "adam": trainer.adam.state_dict(),
            "noise": trainer.noise.get_state(),
            "update": trainer.update,
            "value": trainer.scaling,
            "simulated": simulated,
            "steps": [env.slots for env in trainer.simulated().values()],
            "preset": json.dumps(asdict(trainer.preset)),
        },
        part,
    )
    part.replace(path)


def load(trainer: Resumable, path: Path) -> None:
    """Go on from a checkpoint of a run with the same task; the preset's length and rates may have changed."""
    kept = torch.load(path, weights_only=True)
    trainer.network.load_state_dict(kept["network"])
    trainer.adam.load_state_dict(kept["adam"])
    trainer.noise.set_state(kept["noise"])
    trainer.update = kept["update"]
    trainer.scaling = kept["value"]
    for (name, env), steps in zip(trainer.simulated().items(), kept["steps"], strict=True):
        env.slots = steps
        for key, array in env.state._asdict().items():
            array.view(np.int64)[...] = kept["simulated"][name][key].numpy()
