"""From a service and a workload to a router: train for a stated time, score everything, keep the winner.

A trace is first fitted by a two-phase process (`fit.py`), since learning needs endless arrivals; the scores that
decide are taken on the trace itself.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from policies.routing.evaluate import Result, evaluate
from policies.routing.fit import fit
from policies.routing.learned import load_policy
from policies.routing.ppo import Progress, Task, Trainer
from policies.routing.presets import Preset, preset
from policies.routing.queueing_model import TRACE, ArrivalModel, ServiceModel, markovian
from policies.routing.workload import Arrivals

CANDIDATES = ("deadline", "threshold", "infaas", "uniform", "light-only", "single-queue", "single-queue-random")
"""Rules that run live on the same instances without knowing the phase."""


class _BudgetSpent(Exception):
    """The time for training is over."""


@dataclass(frozen=True, slots=True)
class Learned:
    """winner: a router; results: scores of all, best first; artifact: the trained policy; slots: its training."""

    winner: str
    results: tuple[Result, ...]
    artifact: Path
    slots: int


def trainable(arrivals: ArrivalModel) -> ArrivalModel:
    """Arrivals without an end: the process itself, or the one fitted to a trace."""
    if arrivals.kind != TRACE or arrivals.time_s is None:
        return arrivals
    process = fit(Arrivals(np.ascontiguousarray(arrivals.time_s), None, float(arrivals.time_s[-1]))).process
    return markovian(process.d0, process.d1, ("bursty", "normal"))


def rank(results: list[Result], promise: float) -> list[Result]:
    """Best first: those that keep the promise by goodput, then the others by fewest violations."""

    def key(result: Result) -> tuple[bool, float]:
        overall = result.scores["overall"]
        broken = overall.violation_ratio > promise
        return broken, overall.violation_ratio if broken else -overall.goodput_ratio

    return sorted(results, key=key)


def learn(
    service: ServiceModel,
    arrivals: ArrivalModel,
    folder: Path,
    *,
    minutes: float,
    promise: float = 0.02,
    slots: int = 60_000,
    seed: int = 1,
    threads: int = 2,
    settings: Preset | None = None,
    report: Callable[[str, float], None] | None = None,
) -> Learned:
    """Train `learned-po` for about `minutes` and score it against every rule; writes artifact and `ranking.json`.

    report(what, share done) is called along the way. slots: length of the evaluation runs.
    """

    def tell(what: str, share: float) -> None:
        if report is not None:
            report(what, share)

    chosen = settings or preset("quick")
    task = Task("learned-po", service, trainable(arrivals), workload="learned from the system")
    trainer = Trainer(task, chosen, seed, threads)
    began = time.monotonic()

    def after(progress: Progress) -> None:
        spent = (time.monotonic() - began) / (60.0 * minutes)
        tell(f"training, {progress.slots / 1e6:.2f} M slots", min(spent, 1.0))
        if spent >= 1.0:
            raise _BudgetSpent

    with suppress(_BudgetSpent):
        trainer.run(chosen.slots, after)
    trainer.export(folder, {"command": "tidegate routing learn", "minutes": minutes})
    artifact = folder / "learned-po.json"
    results = []
    for at, router in enumerate((*CANDIDATES, "learned-po")):
        tell(f"scoring {router}", at / (len(CANDIDATES) + 1))
        policy = None if router != "learned-po" else load_policy(artifact)
        results.append(
            evaluate(
                router, service, arrivals, slots=slots, seed=seed + 1, policy=policy, promise=promise, threads=threads
            )
        )
    ranked = rank(results, promise)
    record = {"winner": ranked[0].router, "promise": promise, "results": {r.router: r.as_dict() for r in ranked}}
    (folder / "ranking.json").write_text(json.dumps(record, indent=1) + "\n")
    return Learned(ranked[0].router, tuple(ranked), artifact, trainer.slots)
