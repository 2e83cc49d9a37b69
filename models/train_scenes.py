"""Train the small detectors of the rendered scenes and export them to ONNX, with the record of how.

    python -m models.train_scenes scenes_detector_large --out runs/large

Seeded: the same command takes the same steps. It checkpoints and, started again with the same `--out`, goes on
where it stopped; `--minutes` stops it early in that way. Training frames are rendered once into `--frames`
(train_scenes_data.py); what is trained and scored is in train_scenes_tasks.py: COCO mAP, on scenes that are never
trained on.
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from models.architectures.small_detectors import HEIGHT, WIDTH
from models.train_scenes_data import FrameStore, open_store
from models.train_scenes_tasks import CHECKPOINT, TASKS, Task

PRETRAINED = Path(__file__).parent / "pretrained"
WARM_UP = 0.08  # share of the steps in which the learning rate rises
CURVE_EVERY = 25  # steps per line of curve.jsonl; a line holds the mean losses since the last one or the start


def rate_at(step: int, steps: int, highest: float) -> float:
    """The learning rate: a straight rise over `WARM_UP` of the steps, then half a cosine down to a hundredth."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return highest * (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return highest * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def train(
    task: Task,
    store: FrameStore,
    folder: Path,
    *,
    seed: int,
    steps: int,
    checkpoint_every: int,
    stop_after_s: float,
    detector: Path | None,
    progress: Progress,
) -> tuple[nn.Module, float] | None:
    """The trained network and the seconds it took, over all sittings; None if time ran out before (go on later)."""
    torch.manual_seed(seed)
    network = task.build(detector)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=task.learning_rate, weight_decay=0.02)
    checkpoint = folder / CHECKPOINT
    first, spent_s = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        _refuse_other_run(state, seed, steps, checkpoint)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent_s = state["step"], state["train_s"]
    started = time.monotonic()
    bar = progress.add_task("training", total=steps, completed=first)
    network.train()
    seen: dict[str, list[float]] = {}
    for step in range(first, steps):
        torch.manual_seed(1_000_003 * seed + step)  # which proposals are sampled depends on the step alone
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, task.learning_rate)
        losses = task.losses(network, store, seed, step)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learning, 10.0)
        optimizer.step()
        for name, loss in losses.items():
            seen.setdefault(name, []).append(float(loss.detach()))
        progress.update(bar, advance=1, description=f"training, loss {float(total.detach()):.3f}")
        done, train_s = step + 1, spent_s + time.monotonic() - started
        if done % CURVE_EVERY == 0:
            means = {name: sum(values) / len(values) for name, values in seen.items()}
            _add_line(folder / "curve.jsonl", {"step": done, "train_s": train_s, **means})
            seen = {}
        out_of_time = train_s - spent_s >= stop_after_s and done < steps
        if done % checkpoint_every == 0 or done == steps or out_of_time:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            _save(state | {"seed": seed, "steps": steps, "train_s": train_s}, checkpoint)
        if out_of_time:
            return None
    return network.eval(), spent_s + time.monotonic() - started


def export(served: nn.Module, outputs: Sequence[str], file: Path) -> Path:
    """Write `served` for one normalised picture, "image" [1, 3, h, w], sides multiples of 32."""
    file.parent.mkdir(parents=True, exist_ok=True)
    served.eval()
    with torch.no_grad(), warnings.catch_warnings():
        # The exporter by tracing is deprecated, and warns of everything that it fixes: tests compare the file at
        # other sizes than the traced one.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            served,
            (torch.rand(1, 3, HEIGHT, WIDTH),),
            str(file),
            input_names=["image"],
            output_names=list(outputs),
            dynamic_axes={"image": {2: "height", 3: "width"}} | {name: {0: "found"} for name in outputs},
            opset_version=17,
            dynamo=False,
        )
    onnx.checker.check_model(onnx.load(file))
    return file


def main() -> None:
    """Command line: train (or go on), score, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(TASKS))
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, curve and record")
    parser.add_argument("--frames", type=Path, default=Path("runs/frames"), help="folder of the rendered frames")
    parser.add_argument("--scenes", type=int, default=1200, help="training scenes, four frames each")
    parser.add_argument("--detector", type=Path, help="scenes_qdtrack: the large detector's --out folder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="instead of the planned number")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long; start again to go on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint-every", type=int, default=200, help="steps")
    parser.add_argument("--held-out", type=int, default=400, help="held-out scenes to score on")
    parser.add_argument("--export-to", type=Path, default=PRETRAINED, help="model repository to export into")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = TASKS[options.name]
    steps = options.steps or task.steps
    options.out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("rendering", total=options.scenes)
        store = open_store(
            options.frames, options.scenes, options.seed, lambda done, _: progress.update(bar, completed=done)
        )
        progress.update(bar, completed=options.scenes)
        result = train(
            task,
            store,
            options.out,
            seed=options.seed,
            steps=steps,
            checkpoint_every=options.checkpoint_every,
            stop_after_s=60 * options.minutes,
            detector=options.detector,
            progress=progress,
        )
    if result is None:
        console.print(f"time is up; start again with --out {options.out} to go on", highlight=False)
        return
    network, train_s = result
    served = task.served(network).eval()
    console.print(f"scoring on {options.held_out} held-out scenes")
    scores = task.scores(network, served, options.held_out)
    export(served, task.outputs, options.export_to / options.name / "1" / "model.onnx")
    command = f"python -m models.train_scenes {options.name} --seed {options.seed} --scenes {options.scenes}"
    record = {
        "command": f"{command} --steps {steps}" + (" --detector DIR" if options.detector else ""),
        "data": f"{len(store)} rendered frames of {options.scenes} scenes",
        "torch": torch.__version__,
        "train_s": round(train_s, 1),
        "threads": options.threads,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "held_out_scenes": options.held_out,
        "held_out": scores,
    }
    (options.export_to / options.name / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({"name": options.name, **record}))


def _refuse_other_run(state: dict[str, Any], seed: int, steps: int, file: Path) -> None:
    """A checkpoint of another seed or length cannot be gone on from: its learning rates were others."""
    if (state["seed"], state["steps"]) != (seed, steps):
        raise SystemExit(
            f"{file} is of --seed {state['seed']} --steps {state['steps']}; give these again, or another --out"
        )


def _save(state: dict[str, Any], file: Path) -> None:
    """Write beside and rename, so that a checkpoint is never half written."""
    beside = file.with_suffix(".new")
    torch.save(state, beside)
    beside.replace(file)


def _add_line(file: Path, values: dict[str, float]) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps({key: round(value, 4) for key, value in values.items()}) + "\n")


if __name__ == "__main__":
    main()
