"""A training on disk, from which it goes on bit for bit: networks, optimiser, random numbers and simulated systems."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from policies.routing.ppo import Trainer


def save(trainer: Trainer, path: Path) -> None:
    """Write a checkpoint; a crash while writing leaves the one before."""
    simulated = {}
    for name, env in (("train", trainer.environments), ("examined", trainer.examined)):
        simulated[name] = {k: torch.from_numpy(v.view(np.int64)) for k, v in env.state._asdict().items()}
    part = path.with_suffix(".part")
    torch.save(
        {
            "network": trainer.network.state_dict(),
            "adam": trainer.adam.state_dict(),
            "noise": trainer.noise.get_state(),
            "update": trainer.update,
            "value": [trainer.value_mean, trainer.value_scale],
            "simulated": simulated,
            "steps": [trainer.environments.slots, trainer.examined.slots],
            "preset": json.dumps(asdict(trainer.preset)),
        },
        part,
    )
    part.replace(path)


def load(trainer: Trainer, path: Path) -> None:
    """Go on from a checkpoint of a run with the same task; the preset's length and rates may have changed."""
    kept = torch.load(path, weights_only=True)
    trainer.network.load_state_dict(kept["network"])
    trainer.adam.load_state_dict(kept["adam"])
    trainer.noise.set_state(kept["noise"])
    trainer.update = kept["update"]
    trainer.value_mean, trainer.value_scale = kept["value"]
    for name, env in (("train", trainer.environments), ("examined", trainer.examined)):
        for key, array in env.state._asdict().items():
            array.view(np.int64)[...] = kept["simulated"][name][key].numpy()
    trainer.environments.slots, trainer.examined.slots = kept["steps"]
