"""Train `learned-set`, one table network for any number of instances (torch; training only).

    python -m policies.routing.set_training --slots 30000000 --seed 1 --out runs/set
    tidegate routing evaluate --size 3x16 --policy learned-set --artifact learned-set=runs/set/learned-set.json

Writes what `train.py` writes: checkpoint, curve, TensorBoard files, and the artifact, renewed at every examination.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from policies.routing.checkpoint import load
from policies.routing.ppo import Progress
from policies.routing.presets import Preset
from policies.routing.set_ppo import SetTrainer
from policies.routing.train import line, train

MIX = {"2x2": 150, "2x8": 60, "3x4": 90, "2x32": 30, "2x1": 30, "1+2": 60, "2+1": 60}
"""How many environments of every size an update looks at (`set_sizes.py` says what the names mean)."""
SETTINGS = Preset(
    slots=30_000_000, environments=sum(MIX.values()), slots_per_update=100 * sum(MIX.values()), minibatch=10_000,
    learning_rate=1e-3, final_rate=0.05, gamma=0.9, sigma=0.5,
)  # fmt: skip
"""Larger steps, a shorter horizon and less noise than the preset `paper`: one number to learn, not four."""
EXAMINE_EVERY = 40


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m policies.routing.set_training", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, curve and artifact")
    parser.add_argument("--slots", type=int, default=SETTINGS.slots, help="length of the run, all sizes together")
    parser.add_argument("--stop-at", type=int, default=None, help="stop at this many slots; --resume goes on later")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt if it exists")
    given = parser.parse_args(arguments)
    trainer = SetTrainer(MIX, replace(SETTINGS, slots=given.slots), given.seed, given.threads)
    if given.resume and (given.out / "checkpoint.pt").exists():
        load(trainer, given.out / "checkpoint.pt")

    def report(progress: Progress, point: dict[str, Any] | None) -> None:
        if point is not None:
            print(line(progress, point), flush=True)
        elif sys.stderr.isatty():
            print(line(progress, None), end="\r", file=sys.stderr, flush=True)

    command = "python -m policies.routing.set_training " + " ".join(
        arguments if arguments is not None else sys.argv[1:]
    )
    until = min(given.slots, given.stop_at or given.slots)
    try:
        train(
            trainer, given.out, until_slots=until, examine_every=EXAMINE_EVERY, record={"command": command},
            report=report,
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"stopped at {trainer.slots} slots; go on with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
