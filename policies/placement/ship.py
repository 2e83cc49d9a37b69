"""Copy a run's artifact to `policies/pretrained/placement/` in half precision: `python -m policies.placement.ship`.

Half precision keeps the repository small; `actors.load_artifact` widens the weights again on loading.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from policies.placement.actors import PRETRAINED
from policies.placement.train import preset

# Where and how often a run looked at itself: nothing that its result depends on.
_INCIDENTAL = ("preset", "device", "checkpoint_every")


def training_command(settings: Mapping[str, Any], name: str) -> str:
    """The command that trains with a run's settings: its preset, and a --set for everything that differs from it.

    Raises ValueError if the run's preset does not exist any more.
    """
    usual = asdict(preset(settings["preset"]))
    changed = {k: v for k, v in settings.items() if k not in _INCIDENTAL and v != usual.get(k)}
    options = "".join(f" --set {key}={value}" for key, value in changed.items())
    return f"tidegate placement train --preset {settings['preset']} --out runs/{name}{options}"


def ship(run: Path, name: str, directory: Path) -> None:
    """Write `directory`/`name`.{safetensors,json} from `run`/actors.* and the run's curve."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = load_file(run / "actors.safetensors")
    save_file({k: v.astype(np.float16) for k, v in weights.items()}, directory / f"{name}.safetensors")
    text = json.loads((run / "actors.json").read_text())
    text["settings"]["device"] = "cpu"
    text["record"]["command"] = training_command(text["settings"], name)
    text["record"]["curve"] = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    (directory / f"{name}.json").write_text(json.dumps(text) + "\n")


def main() -> None:
    """Parse the command line and copy."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("name", help="hisper-8, hisper-sequential, hasac-10, ...")
    parser.add_argument("--directory", type=Path, default=PRETRAINED / "placement")
    arguments = parser.parse_args()
    ship(arguments.run, arguments.name, arguments.directory)


if __name__ == "__main__":
    main()
