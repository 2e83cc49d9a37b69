"""HASAC (Liu et al. 2024), Huang's first comparison algorithm: HISPER without its two additions.

One Q-value of the total reward instead of three heads, and the three sub-actions side by side instead of one after
the other; the same hidden layers, as Section VI-C asks. Everything else is `hisper.py`, which therefore also holds
the ablations (`hra` or `autoregressive` alone off).
"""

from dataclasses import replace
from pathlib import Path

from policies.placement.hisper import train_soft
from policies.placement.networks import Parameters
from policies.placement.training import Settings


def hasac_settings(settings: Settings) -> Settings:
    """The given run as HASAC."""
    return replace(settings, algorithm="hasac", hra=False, autoregressive=False)


def train_hasac(settings: Settings, folder: Path, resume: bool = False) -> Parameters:
    """Train and write `folder`/actors.{safetensors,json}, curve.jsonl, checkpoint and TensorBoard events."""
    return train_soft(hasac_settings(settings), folder, resume)
