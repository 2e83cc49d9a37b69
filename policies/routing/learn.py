"""From a service and a workload to a router: train for a stated time, score everything, keep the winner.

A trace is first fitted by a two-phase process (`fit.py`), since learning needs endless arrivals; the scores that
decide are taken on the trace itself, on the instances that are deployed.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from policies.routing.contract import RoutingError
from policies.routing.evaluate import Result, evaluate
from policies.routing.fit import fit
from policies.routing.learned import load_policy
from policies.routing.ppo import Progress, Task, Trainer
from policies.routing.presets import Preset, preset
from policies.routing.queueing_model import TRACE, ArrivalModel, ServiceModel, markovian
from policies.routing.workload import Arrivals

CANDIDATES = (
    "deadline",
    "threshold",
    "infaas",
    "uniform",
    "light-only",
    "heavy-only",
    "heavy-expire",
    "single-queue",
    "single-queue-random",
    "learned-set",
)
"""Rules that run live on the same instances without knowing the phase, and the shipped policy that fits any set."""
LEARNED = "learned-po"
MOST_SLOTS = 250_000_000
"""No training is longer, whatever its time: the paper's own."""
SURVIVORS_SHARE = 0.4
"""Share of the training time for the sets with one instance fewer, where they are asked for."""


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


def survivors(service: ServiceModel) -> dict[str, ServiceModel]:
    """The service with one instance fewer, for each variant that may lose one: by a name for its artifact."""
    found: dict[str, ServiceModel] = {}
    for lost, kind in enumerate(service.kinds):
        rest = [i for i in range(len(service.kinds)) if i != lost]
        if rest:
            found.setdefault(f"without-one-{kind.variant}", service.with_instances(rest))
    return found


def train_for(
    service: ServiceModel,
    arrivals: ArrivalModel,
    folder: Path,
    *,
    minutes: float,
    name: str = LEARNED,
    seed: int = 1,
    threads: int = 2,
    settings: Preset | None = None,
    command: str = "tidegate routing learn",
    report: Callable[[Progress, float], None] | None = None,
) -> tuple[Path, int]:
    """Train `learned-po` for about `minutes` and write it as the artifact `name`; its path and the slots of training.

    The time counts from the first update on. The learning rate falls as far as it allows: after some updates the length
    of the run is set to what the machine will manage. report(progress, share of the time) is called after each.
    """
    chosen = settings or preset("quick")
    most = settings.slots if settings is not None else MOST_SLOTS
    trainer = Trainer(
        Task(LEARNED, service, trainable(arrivals), workload="learned from the system"), chosen, seed, threads
    )
    began_s, began_slots = 0.0, 0

    def after(progress: Progress) -> None:
        nonlocal began_s, began_slots
        if progress.update == 1:  # the first update compiles, which a later run need not
            began_s, began_slots = time.monotonic(), progress.slots
        spent = (time.monotonic() - began_s) / (60.0 * minutes)
        if progress.update == 3 and spent > 0.0:
            planned = began_slots + int((progress.slots - began_slots) / spent)
            trainer.preset = replace(chosen, slots=min(most, max(planned, progress.slots)))
        if report is not None:
            report(progress, min(max(spent, progress.slots / trainer.preset.slots), 1.0))
        if spent >= 1.0 or progress.slots >= trainer.preset.slots:
            raise _BudgetSpent

    with suppress(_BudgetSpent):
        trainer.run(most, after)
    trainer.export(folder, {"command": command, "minutes": minutes})
    for suffix in (".json", ".safetensors"):
        (folder / LEARNED).with_suffix(suffix).rename(folder / f"{name}{suffix}")
    return folder / f"{name}.json", trainer.slots


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
    with_survivors: bool = False,
    settings: Preset | None = None,
    command: str = "tidegate routing learn",
    report: Callable[[str, float], None] | None = None,
) -> Learned:
    """Train `learned-po` for about `minutes` and score it against every rule; writes artifact and `ranking.json`.

    with_survivors: also train one for each set with one instance fewer, beside the artifact (`policy_set.py`).
    report(what, share done) is called along the way. slots: length of the evaluation runs. Raises `RoutingError` for
    a budget of no time.
    """
    if not minutes > 0.0:
        raise RoutingError(f"minutes = {minutes}: training needs a time above 0")
    sets = {LEARNED: (service, folder, minutes)}
    if with_survivors and (smaller := survivors(service)):
        sets[LEARNED] = (service, folder, minutes * (1.0 - SURVIVORS_SHARE))
        each = minutes * SURVIVORS_SHARE / len(smaller)
        sets |= {name: (fewer, folder / LEARNED, each) for name, fewer in smaller.items()}
    tell = report or (lambda what, share: None)
    spent_minutes, trained = 0.0, {}
    for name, (part, where, budget) in sets.items():
        spans = (spent_minutes, budget)

        def after(progress: Progress, share: float, name: str = name, spans: tuple[float, float] = spans) -> None:
            done = (spans[0] + share * spans[1]) / minutes
            tell(f"training {name}: {progress.slots / 1e6:.2f} M slots, {progress.slots_per_s / 1e3:.0f} k/s", done)

        trained[name] = train_for(
            part, arrivals, where, minutes=budget, name=name, seed=seed, threads=threads, settings=settings,
            command=command, report=after,
        )  # fmt: skip
        spent_minutes += budget
    artifact, trained_slots = trained[LEARNED]
    results = []
    for at, router in enumerate((*CANDIDATES, LEARNED)):
        tell(f"scoring {router}", at / (len(CANDIDATES) + 1))
        results.append(
            evaluate(
                router, service, arrivals, slots=slots, seed=seed + 1, promise=promise, as_deployed=True,
                policy=load_policy(artifact) if router == LEARNED else None, threads=threads,
            )
        )  # fmt: skip
    ranked = rank(results, promise)
    record = {
        "winner": ranked[0].router,
        "promise": promise,
        "trained_slots": trained_slots,
        "artifact": str(artifact),
        "results": {r.router: r.as_dict() for r in ranked},
    }
    (folder / "ranking.json").write_text(json.dumps(record, indent=1) + "\n")
    return Learned(ranked[0].router, tuple(ranked), artifact, trained_slots)
