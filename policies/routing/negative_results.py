"""The paper's negative results, tried once: `python -m policies.routing.negative_results --kind recurrent --out FILE`.

Trains the alternative for a small budget, and PPO itself for the same, from the same start, seed and preset; writes
both learning curves (scores without noise) to one JSON file.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from policies.routing.deterministic_gradient import DeterministicTrainer
from policies.routing.ppo import Progress, Trainer
from policies.routing.presets import Preset, preset
from policies.routing.recurrent import RecurrentTrainer
from policies.routing.train import line, paper_task

KINDS = {"ppo": Trainer, "recurrent": RecurrentTrainer, "deterministic": DeterministicTrainer}
"""Trainers by name."""


def curve(kind: str, settings: Preset, seed: int, *, every: int = 10, say: bool = True) -> list[dict[str, Any]]:
    """The learning curve of one algorithm on Tan's service, learned-po's task: slots and scores without noise."""
    trainer = KINDS[kind](paper_task("learned-po", "paper"), settings, seed)
    points: list[dict[str, Any]] = []

    def after(progress: Progress) -> None:
        if progress.update % every == 0 or trainer.slots >= settings.slots:
            scores = {phase: s.as_dict() for phase, s in trainer.examine()[0].items()}
            points.append({"slots": progress.slots, "scores": scores})
            if say:
                print(kind, line(progress, points[-1]), file=sys.stderr, flush=True)

    trainer.run(settings.slots, after)
    return points


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m policies.routing.negative_results", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--kind", choices=sorted(KINDS), required=True)
    parser.add_argument("--preset", default="quick", help="paper | quick (learns within a small budget)")
    parser.add_argument("--slots", type=int, default=2_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a number of the preset"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file; other kinds in it are kept")
    given = parser.parse_args(arguments)
    settings = preset(given.preset, given.slots)
    for item in given.set:
        key, value = item.split("=", 1)
        settings = replace(settings, **{key: type(getattr(settings, key))(float(value))})
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    found[given.kind] = curve(given.kind, settings, given.seed)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
