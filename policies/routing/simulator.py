"""The simulator: first come first served queues, event by event within the slot, over many environments at once.

A request's life: the arrival process makes it (`_next_arrival`), a table or a rule picks an instance, the instance
admits it (`_admit`), starts it (`_start`) and finishes it (`_finish`); at the slot boundary the next action is set.
Instances only meet through the decider, so under a table each is advanced by itself and exactly as far as needed;
under a rule, events are taken in order of time, because what the decider believes depends on them.

Names in compiled code: p the `Settings`, kind what instances are, q and f one environment's `queue` and `times`,
x and z its `clock` and `marks`, count its `tally`, random its streams; i an instance, k a place in its ring.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from policies.routing import estimation, rules
from policies.routing.compiled import jit, kernel
from policies.routing.contract import HOLD, FloatArray, IntArray, RoutingError
from policies.routing.queueing_model import (
    ARRIVED,
    BOUNCED,
    CAPACITY,
    CENTRAL_HEAD,
    CENTRAL_LENGTH,
    DETERMINISTIC,
    EXPIRED,
    FINISH_S,
    GAIN,
    GAMMA,
    GOODPUT,
    HEAD,
    IN_TIME,
    LATE,
    LENGTH,
    LOGNORMAL,
    MARKOVIAN,
    MEAN_S,
    NOW_S,
    OWN_SERVICE_S,
    PENDING_S,
    PERIODIC,
    PHASE,
    POSITION,
    QUEUE_FULL,
    RANK,
    REFRESHES,
    REWARD,
    RING,
    SCORE,
    SERVING,
    SINCE_S,
    SLOW,
    SOJOURN_S,
    STARTED_S,
    TO_HEAVY,
    TRACE,
    UNAVAILABLE,
    Settings,
    State,
    System,
)
from policies.routing.randomness import (
    ARRIVAL_STREAM,
    ROUTE_STREAM,
    SERVICE_STREAM,
    draw_exponential,
    draw_gamma,
    draw_normal,
    draw_uniform,
)

RULE_NUMBERS = {name: k for k, name in enumerate(rules.RULES)}
"""Number by which compiled code knows a rule (an integer keeps one cached compilation for all rules)."""

_uniform = jit(rules.uniform)
_light_only = jit(rules.light_only)
_heavy_only = jit(rules.heavy_only)
_single_queue = jit(rules.single_queue)
_single_queue_random = jit(rules.single_queue_random)
_deadline = jit(rules.deadline)
_batch_size = jit(rules.batch_size)
_cannot_finish = jit(rules.cannot_finish)
_arrive = jit(estimation.arrive)
_depart = jit(estimation.depart)
_learn_service = jit(estimation.learn_service)
_learn_margin = jit(estimation.learn_margin)


@jit
def _choose(
    rule: int, now_s: float, budget_s: float, draw: float, length: Any, capacity: Any, clear_s: Any, service_s: Any,
    rank: Any, margin: Any,
) -> int:  # fmt: skip
    if rule == 6:
        return _deadline(now_s, budget_s, draw, length, capacity, clear_s, service_s, rank, margin)
    if rule == 0:
        return _uniform(now_s, budget_s, draw, length, capacity, clear_s, service_s, rank, margin)
    if rule == 1:
        return _light_only(now_s, budget_s, draw, length, capacity, clear_s, service_s, rank, margin)
    if rule == 4:
        return _single_queue(now_s, budget_s, draw, length, capacity, clear_s, service_s, rank, margin)
    if rule == 5:
        return _single_queue_random(now_s, budget_s, draw, length, capacity, clear_s, service_s, rank, margin)
    return _heavy_only(now_s, budget_s, draw, length, capacity, clear_s, service_s, rank, margin)


@jit
def _service_s(p: Settings, kind: Any, grid_s: Any, random: Any, i: int, batch: int, now_s: float) -> float:
    b = (batch - 1) >> 1
    mean_s = kind[i, MEAN_S + b]
    if now_s >= p.slow_at_s:
        mean_s *= kind[i, SLOW]
    if p.law == DETERMINISTIC:
        return float(mean_s)
    if p.law == GAMMA:
        shape = 1.0 / (p.cv * p.cv)
        return float(mean_s * draw_gamma(random, SERVICE_STREAM, shape) / shape)
    if p.law == LOGNORMAL:
        variance = math.log(1.0 + p.cv * p.cv)
        z = draw_normal(random, SERVICE_STREAM)
        return float(mean_s * math.exp(math.sqrt(variance) * z - 0.5 * variance))
    x = draw_uniform(random, SERVICE_STREAM) * 100.0
    j = int(x)
    value = grid_s[i, b, j] + (x - j) * (grid_s[i, b, j + 1] - grid_s[i, b, j])
    return float(value * mean_s / kind[i, MEAN_S + b])


@jit
def _expected_s(kind: Any, f: Any, i: int, batch: int) -> float:
    """The worker's estimate of the service time of a batch."""
    if batch == 1:
        return float(f[i, OWN_SERVICE_S])
    return float(f[i, OWN_SERVICE_S] * kind[i, MEAN_S + ((batch - 1) >> 1)] / kind[i, MEAN_S])


@jit
def _start(
    p: Settings,
    kind: Any,
    grid_s: Any,
    random: Any,
    q: Any,
    f: Any,
    x: Any,
    limits: Any,
    count: Any,
    i: int,
    now_s: float,
) -> None:
    """Instance i, idle at now_s, starts its next batch if the batching rule lets it; the expired are dropped first."""
    places = (q.shape[1] - RING) >> 1
    while q[i, LENGTH] > 0:
        batch = 1
        if p.batching:
            r = int(kind[i, RANK])
            batch = _batch_size(q[i, LENGTH], limits[0, r], limits[1, r])
            if batch == 0:
                return
        if p.expire:
            k = q[i, HEAD]
            if _cannot_finish(now_s, f[i, RING + k] + p.requirement_s, now_s, _expected_s(kind, f, i, batch)):
                count[q[i, RING + k] & 255, EXPIRED] += 1
                x[REWARD] -= p.alpha
                q[i, HEAD] = k + 1 if k + 1 < places else 0
                q[i, LENGTH] -= 1
                continue
        q[i, SERVING] = batch
        f[i, STARTED_S] = now_s
        f[i, FINISH_S] = now_s + _service_s(p, kind, grid_s, random, i, batch, now_s)
        return


@jit
def _finish(p: Settings, kind: Any, q: Any, f: Any, x: Any, count: Any, log: Any, i: int) -> None:
    """The batch in service at instance i ends and its answers are counted."""
    now_s = f[i, FINISH_S]
    batch = q[i, SERVING]
    places = (q.shape[1] - RING) >> 1
    k = q[i, HEAD]
    for _ in range(batch):
        phase = q[i, RING + k] & 255
        sojourn_s = now_s - f[i, RING + k]
        count[phase, SOJOURN_S] += sojourn_s
        if sojourn_s <= p.requirement_s:
            count[phase, IN_TIME] += 1
            count[phase, GOODPUT] += kind[i, SCORE]
            x[REWARD] += kind[i, GAIN]
        else:
            count[phase, LATE] += 1
            x[REWARD] -= 1.0
        if log.shape[0] > 0:
            ident = q[i, RING + places + k]
            if ident < log.shape[0]:
                log[ident, 0] = i
                log[ident, 1] = now_s
        k = k + 1 if k + 1 < places else 0
    q[i, HEAD] = k
    q[i, LENGTH] -= batch
    q[i, SERVING] = 0
    f[i, FINISH_S] = np.inf


@jit
def _clear_s(kind: Any, q: Any, f: Any, i: int, now_s: float) -> float:
    """When instance i will be clear of everything it holds, by the worker's own estimate of its service time."""
    waiting = q[i, LENGTH] - q[i, SERVING]
    if q[i, SERVING] > 0:
        now_s = max(f[i, STARTED_S] + _expected_s(kind, f, i, q[i, SERVING]), now_s)
    return float(now_s + waiting * f[i, OWN_SERVICE_S])


@jit
def _admit(
    p: Settings, kind: Any, grid_s: Any, random: Any, q: Any, f: Any, x: Any, limits: Any, count: Any, i: int,
    now_s: float, arrived_s: float, tag: int, ident: int, foreseen_s: float,
) -> bool:  # fmt: skip
    """Instance i takes the request in, or refuses it: full, or (expiry on) certain to miss."""
    if kind[i, RANK] == 0.0:
        count[tag & 255, TO_HEAVY] += 1
    length = q[i, LENGTH]
    if length >= kind[i, CAPACITY]:
        count[tag & 255, QUEUE_FULL] += 1
        x[REWARD] -= p.alpha
        return False
    if p.expire:
        start_s = _clear_s(kind, q, f, i, now_s)
        if _cannot_finish(now_s, arrived_s + p.requirement_s, start_s, f[i, OWN_SERVICE_S]):
            count[tag & 255, EXPIRED] += 1
            x[REWARD] -= p.alpha
            return False
    places = (q.shape[1] - RING) >> 1
    k = q[i, HEAD] + length
    if k >= places:
        k -= places
    f[i, RING + k] = arrived_s
    f[i, RING + places + k] = foreseen_s
    q[i, RING + k] = tag
    q[i, RING + places + k] = ident
    q[i, LENGTH] = length + 1
    if q[i, SERVING] == 0:
        _start(p, kind, grid_s, random, q, f, x, limits, count, i, now_s)
    return True


@jit
def _next_arrival(y: System, p: Settings, random: Any, x: Any, z: Any, until_s: float, stop: bool) -> bool:
    """Move the arrival process to its next arrival, or to until_s if none comes before (then False).

    stop: also return False, at that moment, when the phase changes without an arrival (not for traces).
    """
    if p.arrivals == TRACE:
        j = z[POSITION]
        if j >= y.trace_s.shape[0] or y.trace_s[j] > until_s:
            x[NOW_S] = until_s
            return False
        x[NOW_S] = y.trace_s[j]
        if y.trace_phase[j] != z[PHASE]:
            z[PHASE] = y.trace_phase[j]
            x[SINCE_S] = x[NOW_S]
        z[POSITION] = j + 1
        return True
    while True:
        h = z[PHASE]
        if p.arrivals == PERIODIC:
            change_s = x[SINCE_S] + y.hold_s[h]
            if change_s <= x[PENDING_S] and change_s <= until_s:
                h = h + 1 if h + 1 < y.hold_s.shape[0] else 0
                z[PHASE] = h
                x[SINCE_S] = change_s
                x[PENDING_S] = change_s + draw_exponential(random, ARRIVAL_STREAM) / y.event_rate[h]
                if stop:
                    x[NOW_S] = change_s
                    return False
                continue
        now_s = x[PENDING_S]
        if now_s > until_s:
            x[NOW_S] = until_s
            return False
        x[NOW_S] = now_s
        arrival = True
        if p.arrivals == MARKOVIAN:
            m = y.event_rate.shape[0]
            u = draw_uniform(random, ARRIVAL_STREAM)
            j = 0
            while u >= y.event_sums[h, j]:
                j += 1
            arrival = j >= m
            to = j - m if arrival else j
            if to != h:
                h = to
                z[PHASE] = h
                x[SINCE_S] = now_s
        x[PENDING_S] = now_s + draw_exponential(random, ARRIVAL_STREAM) / y.event_rate[h]
        if arrival:
            z[POSITION] += 1
            return True
        if stop:
            return False


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
    while _next_arrival(y, p, random, x, z, until_s, stop):
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
            _finish(p, kind, q, f, x, count, log, i)
            _start(p, kind, grid_s, random, q, f, x, limits, count, i, free_s)
        _admit(p, kind, grid_s, random, q, f, x, limits, count, i, now_s, now_s, h, z[POSITION] - 1, 0.0)
    until_s = x[NOW_S]
    for i in range(n):
        while f[i, FINISH_S] <= until_s:
            free_s = f[i, FINISH_S]
            _finish(p, kind, q, f, x, count, log, i)
            _start(p, kind, grid_s, random, q, f, x, limits, count, i, free_s)


@kernel
def _set_batches(y: System, s: State, e: int, minimum: Any, maximum: Any) -> None:
    """New batch limits at a boundary; an instance that waited for a larger batch looks again."""
    x, q, f, limits = s.clock[e], s.queue[e], s.times[e], s.limits[e]
    for r in range(limits.shape[1]):
        limits[0, r] = minimum[r]
        limits[1, r] = maximum[r]
    for i in range(y.kind.shape[0]):
        if q[i, SERVING] == 0 and q[i, LENGTH] > 0:
            _start(y.set, y.kind, y.grid_s, s.random[e], q, f, x, limits, s.tally[e], i, x[NOW_S])


@kernel
def _tables(
    y: System, s: State, sums: Any, minimum: Any, maximum: Any, until_s: Any, stop: bool, lo: int, hi: int
) -> None:
    for e in range(lo, hi):
        if y.set.batching:
            _set_batches(y, s, e, minimum[e], maximum[e])
        _run_table(y, s, e, sums[e], until_s[e], stop)


@jit
def _believe(
    y: System, p: Settings, q: Any, f: Any, s: State, e: int, i: int, k: int, served: int, now_s: float
) -> None:
    """Gateways take in what the last `_finish` and `_start` of instance i made known; k: where its ring was before."""
    places = (q.shape[1] - RING) >> 1
    answered = 0
    while answered < served or k != q[i, HEAD]:
        g = q[i, RING + k] >> 8
        sojourn_s = now_s - f[i, RING + k] if answered < served else np.inf
        if p.learn_trust:
            _learn_margin(f[i, RING + places + k], sojourn_s, p.requirement_s, s.trust[e, g])
        _depart(now_s, i, q[i, LENGTH], s.view_length[e, g], s.view_clear_s[e, g], s.view_service_s[e, g])
        k = k + 1 if k + 1 < places else 0
        answered += 1


@jit
def _advance_in_order(y: System, s: State, e: int, until_s: float, rule: int) -> None:
    """All instances, the central queue and the gateways' views, in order of time up to until_s."""
    p, kind, grid_s = y.set, y.kind, y.grid_s
    random, x, z, q, f = s.random[e], s.clock[e], s.marks[e], s.queue[e], s.times[e]
    limits, count, log = s.limits[e], s.tally[e], s.log
    n = kind.shape[0]
    gateways = s.view_length.shape[1]
    while True:
        first = 0
        now_s = f[0, FINISH_S]
        for i in range(1, n):
            if f[i, FINISH_S] < now_s:
                first = i
                now_s = f[i, FINISH_S]
        if p.refresh_s > 0.0:
            refresh_s = (z[REFRESHES] + 1) * p.refresh_s / gateways
            if refresh_s <= until_s and refresh_s < now_s:
                g = z[REFRESHES] % gateways
                z[REFRESHES] += 1
                for i in range(n):
                    s.view_length[e, g, i] = q[i, LENGTH]
                    s.view_clear_s[e, g, i] = _clear_s(kind, q, f, i, refresh_s)
                continue
        if now_s > until_s:
            return
        served, head, began_s = q[first, SERVING], q[first, HEAD], f[first, STARTED_S]
        if p.learn_rate > 0.0:
            single_s = (now_s - began_s) * kind[first, MEAN_S] / kind[first, MEAN_S + ((served - 1) >> 1)]
            f[first, OWN_SERVICE_S] += p.learn_rate * (single_s - f[first, OWN_SERVICE_S])
            _learn_service(first, single_s, s.view_service_s[e, q[first, RING + head] >> 8], p.learn_rate)
        _finish(p, kind, q, f, x, count, log, first)
        _start(p, kind, grid_s, random, q, f, x, limits, count, first, now_s)
        _believe(y, p, q, f, s, e, first, head, served, now_s)
        if z[CENTRAL_LENGTH] > 0 and q[first, SERVING] == 0:
            j = z[CENTRAL_HEAD]
            budget_s = s.central_s[e, j] + p.requirement_s - now_s
            draw = draw_uniform(random, ROUTE_STREAM)
            length, clear_s, service_s = s.view_length[e, 0], s.view_clear_s[e, 0], s.view_service_s[e, 0]
            i = _choose(rule, now_s, budget_s, draw, length, y.capacity, clear_s, service_s, y.rank, s.trust[e, 0])
            if i >= 0:
                z[CENTRAL_HEAD] = j + 1 if j + 1 < s.central_s.shape[1] else 0
                z[CENTRAL_LENGTH] -= 1
                _arrive(now_s, i, length, clear_s, service_s)
                tag, ident = s.central[e, j, 0], s.central[e, j, 1]
                _admit(
                    p, kind, grid_s, random, q, f, x, limits, count, i, now_s, s.central_s[e, j], tag, ident, budget_s
                )


@jit
def _run_rule(y: System, s: State, e: int, rule: int, until_s: float) -> None:
    """Environment e to until_s under a per-request rule, as one or several gateways would run it."""
    p, kind, grid_s = y.set, y.kind, y.grid_s
    random, x, z, q, f = s.random[e], s.clock[e], s.marks[e], s.queue[e], s.times[e]
    limits, count = s.limits[e], s.tally[e]
    gateways = s.view_length.shape[1]
    while _next_arrival(y, p, random, x, z, until_s, False):
        now_s = x[NOW_S]
        _advance_in_order(y, s, e, now_s, rule)
        g = 0
        if gateways > 1:
            g = int(draw_uniform(random, ROUTE_STREAM) * gateways)
        h = z[PHASE]
        tag = h + 256 * g
        ident = z[POSITION] - 1
        count[h, ARRIVED] += 1
        draw = draw_uniform(random, ROUTE_STREAM)
        length, clear_s, service_s, trust = (
            s.view_length[e, g],
            s.view_clear_s[e, g],
            s.view_service_s[e, g],
            s.trust[e, g],
        )
        i = _choose(rule, now_s, p.requirement_s, draw, length, y.capacity, clear_s, service_s, y.rank, trust)
        if i == HOLD:
            places = s.central_s.shape[1]
            if z[CENTRAL_LENGTH] >= places:
                count[h, QUEUE_FULL] += 1
                x[REWARD] -= p.alpha
                continue
            j = (z[CENTRAL_HEAD] + z[CENTRAL_LENGTH]) % places
            s.central_s[e, j] = now_s
            s.central[e, j, 0] = tag
            s.central[e, j, 1] = ident
            z[CENTRAL_LENGTH] += 1
            continue
        if i < 0:
            count[h, UNAVAILABLE] += 1
            x[REWARD] -= p.alpha
            continue
        if p.bounce and (
            q[i, LENGTH] >= y.capacity[i]
            or (
                q[i, LENGTH] > 0
                and _cannot_finish(
                    now_s, now_s + trust[0] * p.requirement_s, _clear_s(kind, q, f, i, now_s), f[i, OWN_SERVICE_S]
                )
            )
        ):
            # The worker refuses with its status; the gateway tries one other instance, once.
            count[h, BOUNCED] += 1
            clear_s[i] = _clear_s(kind, q, f, i, now_s)
            refused, held = i, q[i, LENGTH]
            length[i] = y.capacity[i]
            i = _choose(rule, now_s, p.requirement_s, draw, length, y.capacity, clear_s, service_s, y.rank, trust)
            length[refused] = held
        foreseen_s = max(clear_s[i] - now_s, 0.0) + service_s[i]
        _arrive(now_s, i, length, clear_s, service_s)
        if not _admit(p, kind, grid_s, random, q, f, x, limits, count, i, now_s, now_s, tag, ident, foreseen_s):
            length[i] = q[i, LENGTH]
            clear_s[i] = _clear_s(kind, q, f, i, now_s)
    _advance_in_order(y, s, e, until_s, rule)


@kernel
def _rules(y: System, s: State, rule: int, until_s: float, lo: int, hi: int) -> None:
    for e in range(lo, hi):
        _run_rule(y, s, e, rule, until_s)


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
    """Every environment to until_s under the per-request rule of this name; an error lists the names."""
    if rule not in RULE_NUMBERS:
        raise RoutingError(f"rule = {rule!r}: must be one of {sorted(RULE_NUMBERS)}")
    number = RULE_NUMBERS[rule]
    _spread(threads, len(state.clock), lambda lo, hi: _rules(system, state, number, float(until_s), lo, hi))
