"""How fast routing is: simulated arrivals per second of one core, and nanoseconds per decision in plain Python."""

import random
import time
from collections.abc import Callable
from timeit import timeit

import numpy as np

from policies.routing.draw import by_alias, by_bisection
from policies.routing.presets import paper_service
from policies.routing.queueing_model import ARRIVED, build, paper_arrivals
from policies.routing.rules import deadline
from policies.routing.simulator import run_rule, run_tables


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
    for n in (4, 16, 64, 256):
        rng = random.Random(n)
        weights = [rng.random() for _ in range(n)]
        for name, draw in (("bisection", by_bisection(weights)), ("alias", by_alias(weights))):
            found[f"draw_{name}_{n}_ns"] = _nanoseconds(lambda draw=draw: draw(0.6180339), seconds)  # type: ignore[misc]
        arrays = ([rng.randrange(4) for _ in range(n)], [15] * n, [rng.random() * 0.1 for _ in range(n)], [0.02] * n)
        rank, margin = [i % 2 for i in range(n)], [0.5]
        length, capacity, clear_s, service_s = arrays
        found[f"deadline_{n}_ns"] = _nanoseconds(
            lambda le=length, c=capacity, cl=clear_s, s=service_s, r=rank, m=margin: deadline(  # type: ignore[misc]
                0.05, 0.3, 0.6180339, le, c, cl, s, r, m
            ),
            seconds,
        )
    return found


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
