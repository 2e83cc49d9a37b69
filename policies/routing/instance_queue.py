"""One simulated instance in compiled code: its bounded first come first served queue, its batches and its service.

A request is admitted (`admit`), started with others (`start`) and finished (`finish`); `clear_at_s` is what the worker
would say when asked how long it is busy. The live counterpart is `queueing.py`, under the same rules.

Names in compiled code: p the `Settings`, kind what instances are, q and f one environment's `queue` and `times`,
x its `clock`, count its `tally`, random its streams; i an instance, k a place in its ring.
"""

import math
from typing import Any

import numpy as np

from policies.routing import rules
from policies.routing.compiled import jit
from policies.routing.queueing_model import (
    CAPACITY,
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
    MEAN_S,
    OWN_SERVICE_S,
    QUEUE_FULL,
    RANK,
    REWARD,
    RING,
    SCORE,
    SERVING,
    SLOW,
    SOJOURN_S,
    STARTED_S,
    TO_HEAVY,
    Settings,
)
from policies.routing.randomness import SERVICE_STREAM, draw_gamma, draw_normal, draw_uniform

_batch_size = jit(rules.batch_size)
_cannot_finish = jit(rules.cannot_finish)


@jit
def draw_service_s(p: Settings, kind: Any, grid_s: Any, random: Any, i: int, batch: int, now_s: float) -> float:
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
def expected_s(kind: Any, f: Any, i: int, batch: int) -> float:
    """The worker's estimate of the service time of a batch."""
    if batch == 1:
        return float(f[i, OWN_SERVICE_S])
    return float(f[i, OWN_SERVICE_S] * kind[i, MEAN_S + ((batch - 1) >> 1)] / kind[i, MEAN_S])


@jit
def start(
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
    while p.expire and q[i, LENGTH] > 0:
        k = q[i, HEAD]
        if not _cannot_finish(now_s, f[i, RING + k] + p.requirement_s, now_s, f[i, OWN_SERVICE_S]):
            break
        count[q[i, RING + k] & 255, EXPIRED] += 1
        x[REWARD] -= p.alpha
        q[i, HEAD] = k + 1 if k + 1 < places else 0
        q[i, LENGTH] -= 1
    if q[i, LENGTH] == 0:
        return
    batch = 1
    if p.batching:
        r = int(kind[i, RANK])
        batch = _batch_size(q[i, LENGTH], limits[0, r], limits[1, r])
        if batch == 0:
            return
    q[i, SERVING] = batch
    f[i, STARTED_S] = now_s
    f[i, FINISH_S] = now_s + draw_service_s(p, kind, grid_s, random, i, batch, now_s)


@jit
def finish(p: Settings, kind: Any, q: Any, f: Any, x: Any, count: Any, log: Any, i: int) -> None:
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
def clear_at_s(kind: Any, q: Any, f: Any, i: int, now_s: float) -> float:
    """When instance i will be clear of everything it holds, by the worker's own estimate of its service time."""
    waiting = q[i, LENGTH] - q[i, SERVING]
    if q[i, SERVING] > 0:
        now_s = max(f[i, STARTED_S] + expected_s(kind, f, i, q[i, SERVING]), now_s)
    return float(now_s + waiting * f[i, OWN_SERVICE_S])


@jit
def drained_at_s(kind: Any, q: Any, f: Any, limits: Any, i: int, now_s: float) -> float:
    """Like `clear_at_s` for an instance that batches: as `ServiceTimes.drain_s` has it, sizes between in proportion."""
    waiting = q[i, LENGTH] - q[i, SERVING]
    if q[i, SERVING] > 0:
        now_s = max(f[i, STARTED_S] + expected_s(kind, f, i, q[i, SERVING]), now_s)
    r = int(kind[i, RANK])
    while waiting > 0:
        batch = _batch_size(waiting, limits[0, r], limits[1, r])
        if batch == 0:
            batch = waiting
        known = batch - 1 + (batch & 1)
        now_s += expected_s(kind, f, i, known) * batch / known
        waiting -= batch
    return float(now_s)


@jit
def batch_left_s(kind: Any, q: Any, f: Any, i: int, now_s: float) -> float:
    """How much longer the batch in service at instance i is expected to take, 0 when idle."""
    if q[i, SERVING] == 0:
        return 0.0
    return float(max(f[i, STARTED_S] + expected_s(kind, f, i, q[i, SERVING]) - now_s, 0.0))


@jit
def admit(
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
        start_s = drained_at_s(kind, q, f, limits, i, now_s) if p.batching else clear_at_s(kind, q, f, i, now_s)
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
        start(p, kind, grid_s, random, q, f, x, limits, count, i, now_s)
    return True
