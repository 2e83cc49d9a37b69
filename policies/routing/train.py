"""Train a learned router: `python -m policies.routing.train --policy learned-po --preset paper --out runs/po`.

Writes to the folder: `checkpoint.pt` (resume with --resume), `curve.json` (learning curves: scores without noise),
TensorBoard event files, and the artifact `NAME.safetensors` + `NAME.json`, renewed at every examination.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from policies.routing.checkpoint import load, save
from policies.routing.ppo import Progress, Task, Trainer
from policies.routing.presets import paper_service, preset, workload
from policies.routing.set_ppo import SetTrainer
from policies.routing.warm_start import start_from

FORMS = {
    "learned-po": (False, False),
    "learned-fo": (True, False),
    "learned-po-batch": (False, True),
    "learned-fo-batch": (True, True),
}
"""Learned routers by name: (phase observable, batching)."""


def paper_task(
    policy: str, workload_name: str, requirement_s: float = 0.3, without: frozenset[int] = frozenset()
) -> Task:
    """The task of one of Tan's learned routers on his service, `without` some of its instances (by number)."""
    observable, batching = FORMS[policy]
    service = paper_service(requirement_s)
    if without:
        service = service.with_instances([i for i in range(len(service.kinds)) if i not in without])
    return Task(policy, service, workload(workload_name), observable, batching, workload=workload_name)


def train(
    trainer: Trainer | SetTrainer,
    folder: Path,
    *,
    until_slots: int,
    examine_every: int = 20,
    record: dict[str, Any] | None = None,
    report: Callable[[Progress, dict[str, Any] | None], None] | None = None,
) -> list[dict[str, Any]]:
    """Run a trainer to `until_slots`, keeping checkpoint, curve, TensorBoard files and artifact in `folder`.

    Returns the learning curve: one entry per examination, with slots, the scores without noise and
    (with batching) the mean batch limits per variant. Interrupted, it loses at most `examine_every` updates.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder.mkdir(parents=True, exist_ok=True)
    curve_path = folder / "curve.json"
    curve: list[dict[str, Any]] = json.loads(curve_path.read_text()) if trainer.update and curve_path.exists() else []
    writer = SummaryWriter(str(folder))

    def after(progress: Progress) -> None:
        point: dict[str, Any] | None = None
        if progress.update % examine_every == 0 or trainer.slots >= until_slots:
            found, limits = trainer.examine()
            scores = {k: s.as_dict() for k, s in found.items()}
            point = {"slots": progress.slots, "scores": scores}
            if limits:
                point["batch_limits"] = limits
            curve.append(point)
            curve_path.write_text(json.dumps(curve))
            for phase, values in scores.items():
                for key in ("goodput_ratio", "violation_ratio", "heavy_ratio"):
                    writer.add_scalar(f"{phase}/{key}", values[key], progress.slots)
            writer.add_scalar("reward", progress.reward, progress.slots)
            trainer.export(folder, {**(record or {}), "examined": scores})
            save(trainer, folder / "checkpoint.pt")
        if report is not None:
            report(progress, point)

    try:
        trainer.run(until_slots, after)
    finally:
        writer.close()
    return curve


def line(progress: Progress, point: dict[str, Any] | None) -> str:
    """One line of progress for people."""
    text = f"{progress.slots / 1e6:8.2f} M slots  {progress.slots_per_s / 1e3:6.1f} k/s"
    text += f"  {progress.left_s / 60:6.1f} min left"
    if point is not None:
        parts = [f"  reward {progress.reward:9.4f}"]
        for name, s in point["scores"].items():
            goodput, violations = 100 * s["goodput_ratio"], 100 * s["violation_ratio"]
            parts.append(f"{name}: {goodput:.2f} v {violations:.2f} h {100 * s['heavy_ratio']:.1f}")
        text += "  |  ".join(parts)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m policies.routing.train", description=__doc__.split("\n")[0])
    parser.add_argument("--policy", choices=sorted(FORMS), required=True)
    parser.add_argument("--preset", default="paper", help="paper | quick")
    parser.add_argument("--workload", default="paper", help="paper | periodic")
    parser.add_argument("--slots", type=int, default=None, help="length of the run (default: the preset's)")
    parser.add_argument("--stop-at", type=int, default=None, help="stop at this many slots; --resume goes on later")
    parser.add_argument("--requirement-ms", type=float, default=300.0)
    parser.add_argument(
        "--without", type=int, action="append", default=[], metavar="I", help="leave out an instance (0, 1 heavy; 2, 3)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--start", type=Path, metavar="ARTIFACT", help="begin as this trained policy (the critic learns alone at first)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt if it exists")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a number of the preset"
    )
    parser.add_argument("--minutes", type=float, default=None, help="stop at the first update after this long")
    given = parser.parse_args(arguments)
    chosen = preset(given.preset, given.slots)
    if given.start is not None:
        chosen = replace(chosen, critic_first=20)
    for item in given.set:
        key, value = item.split("=", 1)
        chosen = replace(chosen, **{key: type(getattr(chosen, key))(float(value))})
    task = paper_task(given.policy, given.workload, given.requirement_ms / 1000.0, frozenset(given.without))
    trainer = Trainer(task, chosen, given.seed, given.threads)
    if given.resume and (given.out / "checkpoint.pt").exists():
        load(trainer, given.out / "checkpoint.pt")
    elif given.start is not None:
        start_from(trainer, given.start)
    stop_at = None if given.minutes is None else time.monotonic() + 60.0 * given.minutes

    def report(progress: Progress, point: dict[str, Any] | None) -> None:
        if point is not None:
            print(line(progress, point), flush=True)
            if stop_at is not None and time.monotonic() > stop_at:
                raise KeyboardInterrupt
        elif sys.stderr.isatty():
            print(line(progress, None), end="\r", file=sys.stderr, flush=True)

    until = min(chosen.slots, given.stop_at or chosen.slots)
    command = "python -m policies.routing.train " + " ".join(arguments if arguments is not None else sys.argv[1:])
    try:
        train(trainer, given.out, until_slots=until, record={"command": command}, report=report)
    except KeyboardInterrupt:
        print(f"stopped at {trainer.slots} slots; go on with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
