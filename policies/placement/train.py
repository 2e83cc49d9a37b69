"""Train a placement policy: `python -m policies.placement.train --preset hisper --out runs/hisper`.

`tidegate placement train` is the same with a friendlier face; this entry needs only numpy, torch and safetensors.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from policies.placement.guided import train_guided
from policies.placement.happo import train_happo
from policies.placement.hasac import hasac_settings
from policies.placement.hisper import train_soft
from policies.placement.price_training import train_prices
from policies.placement.training import Settings, with_overrides

_GUIDED = Settings(
    algorithm="guided", layout="derived", guide=0.1, masked=True, minibatch=128, evaluate_every=12_800, actor_lr=1e-3
)
# Blind agents start as `prices`: from a softer start they end below `convention` (see the results page).
_BLIND = replace(
    _GUIDED,
    start="prices",
    temperature=0.01,
    temperature_end=0.001,
    actor_lr=3e-4,
    steps=32_000,
    evaluate_every=3_200,
    evaluation_slots=2_000,
)
_HAPPO = Settings(algorithm="happo", hra=False, autoregressive=False, minibatch=500, actor_lr=5e-4)
# Every preset that the results page uses, by name. `paper` ones follow Section VI-B (alpha 2 at 8 agents, 2.5 at 10).
PRESETS: dict[str, Settings] = {
    "paper": Settings(),  # Section VI-B at 8 agents; its policy is called hisper-paper
    "hisper-paper": Settings(),
    "hisper-paper-10": Settings(per_service=5, alpha=2.5, alpha_end=2.5),
    "hasac": hasac_settings(Settings()),
    "hasac-10": hasac_settings(Settings(per_service=5, alpha=2.5, alpha_end=2.5)),
    "happo": _HAPPO,
    "happo-10": replace(_HAPPO, per_service=5),
    "happo-discounted": replace(_HAPPO, discount=0.99),
    "happo-discounted-10": replace(_HAPPO, discount=0.99, per_service=5),
    "hisper-no-hra": Settings(hra=False),
    "hisper-no-autoregression": Settings(autoregressive=False),
    # The temperature falls so that agents end up predictable to each other; see the results page.
    "hisper-annealed": Settings(alpha_end=0.02),
    "hisper": _BLIND,
    "hisper-10": replace(_BLIND, per_service=5),
    "prices": Settings(algorithm="prices", start="convention"),
    "prices-10": Settings(algorithm="prices", start="convention", per_service=5),
    "prices-from-nothing": Settings(algorithm="prices", price_rounds=50),
    "hisper-sequential": replace(
        _GUIDED, shared=True, sequential=True, temperature=0.02, temperature_end=0.002, actor_lr=3e-4, steps=600_000
    ),
}


def preset(name: str) -> Settings:
    """A preset by name, its name filled in. Raises ValueError that lists the names."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; use one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], preset=name)


def train(settings: Settings, folder: Path, resume: bool = False) -> None:
    """Train by the settings' algorithm. Raises ValueError for an unknown one."""
    trainers: dict[str, Callable[[Settings, Path, bool], object]] = {
        "hisper": train_soft,
        "hasac": train_soft,
        "happo": train_happo,
        "guided": train_guided,
        "prices": train_prices,
    }
    if settings.algorithm not in trainers:
        raise ValueError(f"algorithm {settings.algorithm!r} is unknown; use one of {', '.join(trainers)}")
    trainers[settings.algorithm](settings, folder, resume)


def main() -> int:
    """Parse the command line and train; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="hisper-paper", help=", ".join(PRESETS))
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    try:
        overrides = dict(item.split("=", 1) for item in arguments.set)
        train(with_overrides(preset(arguments.preset), overrides), arguments.out, arguments.resume)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; go on with --resume --out {arguments.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
