"""How fast routing is: simulated arrivals per second of one core, and nanoseconds per decision in plain Python."""

import random
import resource
import time
from collections.abc import Callable
from timeit import timeit

import numpy as np

from policies.routing.draw import by_alias, by_bisection
from policies.routing.estimation import new_margin
from policies.routing.presets import paper_service
from policies.routing.queueing_model import ARRIVED, build, paper_arrivals
from policies.routing.rules import deadline
from policies.routing.simulator import run_rule, run_tables

SIZES = (4, 16, 64, 256)
"""Numbers of instances at which decisions are measured."""


def measure(seconds: float) -> dict[str, float]:
    """Figures by name: `simulator_*_per_s` (arrivals per second of CPU time), `*_ns` (per decision)."""
    table = np.array([[0.1, 0.1, 0.4, 0.4]])
    found = {
        "simulator_fixed_table_per_s": _arrivals_per_s(
            lambda system, state, until: run_tables(system, state, table, until), seconds
        ),
        "simulator_deadline_per_s": _arrivals_per_s(
            lambda system, state, until: run_rule(system, state, "deadline", until), seconds
        ),
    }
    found |= {f"draw_{method}_{n}_ns": ns for method, costs in draw_costs(seconds).items() for n, ns in costs.items()}
    for n in SIZES:
        rng = random.Random(n)
        arrays = ([rng.randrange(4) for _ in range(n)], [15] * n, [rng.random() * 0.1 for _ in range(n)], [0.02] * n)
        rank, margin = [i % 2 for i in range(n)], new_margin()
        length, capacity, clear_s, service_s = arrays
        found[f"deadline_{n}_ns"] = _nanoseconds(
            lambda le=length, c=capacity, cl=clear_s, s=service_s, r=rank, m=margin: deadline(  # type: ignore[misc]
                0.05, 0.3, 0.6180339, le, c, cl, s, r, m
            ),
            seconds,
        )
    return found


def draw_costs(seconds: float) -> dict[str, dict[int, float]]:
    """Nanoseconds per draw from a table, by method and number of instances."""
    found: dict[str, dict[int, float]] = {"bisection": {}, "alias": {}}
    for n in SIZES:
        rng = random.Random(n)
        weights = [rng.random() for _ in range(n)]
        for method, draw in (("bisection", by_bisection(weights)), ("alias", by_alias(weights))):
            found[method][n] = _nanoseconds(lambda draw=draw: draw(0.6180339), seconds)  # type: ignore[misc]
    return found


def training_speed(policy: str, threads: int, updates: int) -> dict[str, float]:
    """Slots per second of a training with preset `paper`, updates included: the median after a first one, which
    compiles; `peak_gb` is the process's memory at its largest."""
    from policies.routing.ppo import Progress, Trainer
    from policies.routing.presets import preset
    from policies.routing.train import paper_task

    trainer = Trainer(paper_task(policy, "paper"), preset("paper"), 1, threads)
    speeds: list[float] = []

    def after(progress: Progress) -> None:
        speeds.append(progress.slots_per_s)

    trainer.run((updates + 1) * trainer.preset.slots_per_update, after)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"threads": threads, "slots_per_s": float(np.median(speeds[1:])), "peak_gb": peak_gb}


def _arrivals_per_s(run: Callable[..., None], seconds: float) -> float:
    system, state = build(paper_service(), paper_arrivals(), 1, 1)
    until_s = 1.0
    run(system, state, until_s)
    state.tally[:] = 0.0
    began = time.process_time()
    while time.process_time() - began < seconds:
        until_s += 5_000.0
        run(system, state, until_s)
    return float(state.tally[:, :, ARRIVED].sum()) / (time.process_time() - began)


def _nanoseconds(call: Callable[[], object], seconds: float) -> float:
    """Best of three, less the cost of an empty call."""
    number = max(1000, int(20_000 * seconds))
    empty = min(timeit(lambda: None, number=number) for _ in range(3))
    best = min(timeit(call, number=number) for _ in range(3))
    return max(best - empty, 0.0) / number * 1e9
