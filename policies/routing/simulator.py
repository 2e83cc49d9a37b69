"""The simulator: first come first served queues, event by event within the slot, over many environments at once.

A request's life: the arrival process makes it (`arrival_process.py`), a table or a rule picks an instance, the
instance admits it, starts it and finishes it (`instance_queue.py`); at the slot boundary the next action is set.
Instances only meet through the decider, so under a table each is advanced by itself and exactly as far as needed;
under a rule, events are taken in order of time, because what the decider believes depends on them
(`gateway_views.py`).

Names in compiled code: p the `Settings`, kind what instances are, q and f one environment's `queue` and `times`,
x and z its `clock` and `marks`, count its `tally`, random its streams; i an instance.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from policies.routing.arrival_process import next_arrival
from policies.routing.compiled import jit, kernel
from policies.routing.contract import FloatArray, IntArray, RoutingError
from policies.routing.gateway_views import LEARNED_REQUEST, RULE_NUMBERS, run_rule_in
from policies.routing.instance_queue import admit, finish, start
from policies.routing.per_request import WEIGHTS
from policies.routing.queueing_model import ARRIVED, FINISH_S, LENGTH, NOW_S, PHASE, POSITION, SERVING, State, System
from policies.routing.randomness import ROUTE_STREAM, draw_uniform


@jit
def _run_table(y: System, s: State, e: int, sums: Any, until_s: float, stop: bool) -> None:
    """Environment e to until_s under fixed tables, cumulative: one row, or one per phase of the workload.

    stop: only to the next change of phase, if that comes before.
    """
    p, kind, grid_s = y.set, y.kind, y.grid_s
    random, x, z, q, f = s.random[e], s.clock[e], s.marks[e], s.queue[e], s.times[e]
    limits, count, log = s.limits[e], s.tally[e], s.log
    n = kind.shape[0]
    by_phase = sums.shape[0] > 1
    while next_arrival(y, p, random, x, z, until_s, stop):
        now_s = x[NOW_S]
        h = z[PHASE]
        count[h, ARRIVED] += 1
        u = draw_uniform(random, ROUTE_STREAM)
        row = h if by_phase else 0
        i = 0
        while i < n - 1 and u >= sums[row, i]:
            i += 1
        while f[i, FINISH_S] <= now_s:
            free_s = f[i, FINISH_S]
            finish(p, kind, q, f, x, count, log, i)
            start(p, kind, grid_s, random, q, f, x, limits, count, i, free_s)
        admit(p, kind, grid_s, random, q, f, x, limits, count, i, now_s, now_s, h, z[POSITION] - 1, 0.0)
    until_s = x[NOW_S]
    for i in range(n):
        while f[i, FINISH_S] <= until_s:
            free_s = f[i, FINISH_S]
            finish(p, kind, q, f, x, count, log, i)
            start(p, kind, grid_s, random, q, f, x, limits, count, i, free_s)


@kernel
def _set_batches(y: System, s: State, e: int, minimum: Any, maximum: Any) -> None:
    """New batch limits at a boundary; an instance that waited for a larger batch looks again."""
    x, q, f, limits = s.clock[e], s.queue[e], s.times[e], s.limits[e]
    for r in range(limits.shape[1]):
        limits[0, r] = minimum[r]
        limits[1, r] = maximum[r]
    for i in range(y.kind.shape[0]):
        if q[i, SERVING] == 0 and q[i, LENGTH] > 0:
            start(y.set, y.kind, y.grid_s, s.random[e], q, f, x, limits, s.tally[e], i, x[NOW_S])


@kernel
def _tables(
    y: System, s: State, sums: Any, minimum: Any, maximum: Any, until_s: Any, stop: bool, lo: int, hi: int
) -> None:
    for e in range(lo, hi):
        if y.set.batching:
            _set_batches(y, s, e, minimum[e], maximum[e])
        _run_table(y, s, e, sums[e], until_s[e], stop)


@kernel
def _rules(y: System, s: State, rule: int, until_s: float, lo: int, hi: int) -> None:
    for e in range(lo, hi):
        run_rule_in(y, s, e, rule, until_s)


def _spread(threads: int, environments: int, work: Any) -> None:
    """work(lo, hi) over the environments, in `threads` chunks side by side."""
    if threads <= 1 or environments < 2 * threads:
        work(0, environments)
        return
    edges = np.linspace(0, environments, threads + 1).astype(int)
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, int(edges[t]), int(edges[t + 1])) for t in range(threads)]:
            done.result()


def run_tables(
    system: System,
    state: State,
    probabilities: FloatArray,
    until_s: float | FloatArray,
    minimum: IntArray | None = None,
    maximum: IntArray | None = None,
    threads: int = 1,
    stop: bool = False,
) -> None:
    """Every environment to until_s under its own table.

    probabilities float64[E, n], or float64[E, m, n] for a table per phase, changed the moment the phase does;
    minimum, maximum int64[E, ranks]: batch limits, for a system that is batching; until_s: one time, or one per
    environment; stop: an environment stops early at a change of phase (its clock says when).
    Counts and rewards are added to `State.tally` and to column REWARD of `State.clock`.
    """
    tables = probabilities[:, None, :] if probabilities.ndim == 2 else probabilities
    if not np.isfinite(tables).all() or (tables < 0.0).any():
        raise RoutingError("probabilities hold values that are negative or not finite")
    sums = np.cumsum(tables, axis=2)
    ends = np.broadcast_to(np.asarray(until_s, dtype=np.float64), len(probabilities)).copy()
    low = state.limits[:, 0] if minimum is None else minimum
    high = state.limits[:, 1] if maximum is None else maximum
    _spread(
        threads,
        len(probabilities),
        lambda lo, hi: _tables(system, state, sums, low, high, ends, stop, lo, hi),
    )


def run_rule(system: System, state: State, rule: str, until_s: float, threads: int = 1) -> None:
    """Every environment to until_s under the per-request rule of this name; an error lists the names.

    `learned-request` runs with the weights that the system was built with.
    """
    if rule == "learned-request":
        if len(system.weights) != WEIGHTS:
            raise RoutingError(f"rule = {rule!r}: build the system with its {WEIGHTS} weights")
        number = LEARNED_REQUEST
    elif rule in RULE_NUMBERS:
        number = RULE_NUMBERS[rule]
    else:
        raise RoutingError(f"rule = {rule!r}: must be learned-request or one of {sorted(RULE_NUMBERS)}")
    _spread(threads, len(state.clock), lambda lo, hi: _rules(system, state, number, float(until_s), lo, hi))
