"""Per-request rules in compiled code: what each simulated gateway believes, and what it does with a request.

The rules, and how beliefs follow sends and answers, are the live gateway's own functions (`rules.py`,
`estimation.py`). Events are taken in order of time, because beliefs depend on them.

Names in compiled code as in `instance_queue.py`; besides z is one environment's `marks`, g a gateway.
"""

from typing import Any

import numpy as np

from policies.routing import estimation, per_request, rules
from policies.routing.arrival_process import next_arrival
from policies.routing.compiled import jit
from policies.routing.contract import HOLD
from policies.routing.instance_queue import admit, batch_left_s, clear_at_s, expected_s, finish, start
from policies.routing.queueing_model import (
    ARRIVED,
    BATCH_ADDED_S,
    BATCH_SERVING,
    BOUNCED,
    CAPACITY,
    CENTRAL_HEAD,
    CENTRAL_LENGTH,
    FINISH_S,
    HEAD,
    LENGTH,
    MEAN_S,
    NOW_S,
    OWN_SERVICE_S,
    PHASE,
    POSITION,
    QUEUE_FULL,
    RANK,
    REFRESHES,
    REWARD,
    RING,
    SERVING,
    STARTED_S,
    UNAVAILABLE,
    Settings,
    State,
    System,
)
from policies.routing.randomness import ROUTE_STREAM, draw_uniform

RULE_NUMBERS = {name: k for k, name in enumerate(rules.RULES)}
"""Number by which compiled code knows a rule (an integer keeps one cached compilation for all rules)."""
LEARNED_REQUEST = len(RULE_NUMBERS)
"""Number of the learned rule, which needs weights (`per_request.py`)."""

_uniform = jit(rules.uniform)
_light_only = jit(rules.light_only)
_heavy_only = jit(rules.heavy_only)
_single_queue = jit(rules.single_queue)
_single_queue_random = jit(rules.single_queue_random)
_deadline = jit(rules.deadline)
_cannot_finish = jit(rules.cannot_finish)
_largest_batch = jit(rules.largest_batch)
_arrive = jit(estimation.arrive)
_depart = jit(estimation.depart)
_arrive_batched = jit(estimation.arrive_batched)
_depart_batched = jit(estimation.depart_batched)
_learn_service = jit(estimation.learn_service)
_learn_margin = jit(estimation.learn_margin)
_learn_tail = jit(estimation.learn_tail)
_learn_spent = jit(estimation.learn_spent)
_learned_request = jit(per_request.learned_request)
_note_arrival = jit(per_request.note_arrival)
_learn_spread = jit(per_request.learn_spread)


@jit
def _choose(
    y: System, rule: int, now_s: float, budget_s: float, draw: float, length: Any, clear_s: Any, service_s: Any,
    margin: Any,
) -> int:  # fmt: skip
    capacity, rank = y.capacity, y.rank
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
    if rule == 7:
        return _learned_request(
            now_s, budget_s, draw, length, capacity, clear_s, service_s, rank, margin, y.accuracy, y.weights
        )
    return _heavy_only(now_s, budget_s, draw, length, capacity, clear_s, service_s, rank, margin)


@jit
def _limit(p: Settings, kind: Any, limits: Any, i: int, single_s: float, length: int, margin: float) -> int:
    """The largest batch of instance i, which holds `length`, when one takes single_s."""
    r = int(kind[i, RANK])
    if not p.choose_limits:
        return int(limits[1, r])
    share = single_s / kind[i, MEAN_S]
    return _largest_batch(
        single_s, share * kind[i, MEAN_S + 1], share * kind[i, MEAN_S + 2], length, p.requirement_s, margin
    )


@jit
def _full_s(kind: Any, i: int, single_s: float, maximum: int) -> float:
    """Expected time of a full batch where one request takes single_s."""
    return float(single_s * kind[i, MEAN_S + ((maximum - 1) >> 1)] / kind[i, MEAN_S])


@jit
def _sent(p: Settings, kind: Any, s: State, e: int, g: int, i: int, now_s: float) -> None:
    """Gateway g has sent a request to instance i."""
    if not p.batching:
        _arrive(now_s, i, s.view_length[e, g], s.view_clear_s[e, g], s.view_service_s[e, g])
        return
    single_s = s.view_service_s[e, g, i]
    maximum = _limit(p, kind, s.limits[e], i, single_s, s.view_length[e, g, i] + 1, s.trust[e, g, 0])
    full_s = _full_s(kind, i, single_s, maximum)
    added_s, serving = s.view_batch[e, g, BATCH_ADDED_S], s.view_batch[e, g, BATCH_SERVING]
    _arrive_batched(now_s, i, maximum, full_s, s.view_length[e, g], s.view_clear_s[e, g], added_s, serving)


@jit
def _told(p: Settings, kind: Any, q: Any, f: Any, s: State, e: int, g: int, i: int, now_s: float) -> None:
    """Gateway g learns what batching instance i holds at now_s."""
    single_s = s.view_service_s[e, g, i]
    maximum = _limit(p, kind, s.limits[e], i, single_s, q[i, LENGTH], s.trust[e, g, 0])
    left_s = batch_left_s(kind, q, f, i, now_s)
    added_s, serving = s.view_batch[e, g, BATCH_ADDED_S], s.view_batch[e, g, BATCH_SERVING]
    _depart_batched(
        now_s, i, q[i, LENGTH], q[i, SERVING], left_s, maximum, single_s, _full_s(kind, i, single_s, maximum),
        s.view_length[e, g], s.view_clear_s[e, g], added_s, serving,
    )  # fmt: skip


@jit
def _believe(
    y: System, p: Settings, q: Any, f: Any, s: State, e: int, i: int, k: int, served: int, now_s: float
) -> None:
    """Gateways take in what the last `finish` and `start` of instance i made known; k: where its ring was before."""
    places = (q.shape[1] - RING) >> 1
    answered = 0
    while answered < served or k != q[i, HEAD]:
        g = q[i, RING + k] >> 8
        sojourn_s = now_s - f[i, RING + k] if answered < served else np.inf
        if p.learn_trust:
            _learn_margin(f[i, RING + places + k], sojourn_s, p.requirement_s, s.trust[e, g])
            _learn_spent(sojourn_s, p.requirement_s, s.trust[e, g])
        if p.batching:
            _told(p, y.kind, q, f, s, e, g, i, now_s)
        else:
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
                    if p.batching:
                        _told(p, kind, q, f, s, e, g, i, refresh_s)
                    else:
                        s.view_length[e, g, i] = q[i, LENGTH]
                        s.view_clear_s[e, g, i] = clear_at_s(kind, q, f, i, refresh_s)
                continue
        if now_s > until_s:
            return
        served, head, began_s = q[first, SERVING], q[first, HEAD], f[first, STARTED_S]
        if p.learn_rate > 0.0:
            single_s = (now_s - began_s) * kind[first, MEAN_S] / kind[first, MEAN_S + ((served - 1) >> 1)]
            f[first, OWN_SERVICE_S] += p.learn_rate * (single_s - f[first, OWN_SERVICE_S])
            g = q[first, RING + head] >> 8
            if rule == LEARNED_REQUEST:
                _learn_spread(single_s, s.view_service_s[e, g, first], s.trust[e, g], p.learn_rate)
            if p.learn_trust:
                _learn_tail(single_s, s.view_service_s[e, g, first], s.trust[e, g])
            _learn_service(first, single_s, s.view_service_s[e, g], p.learn_rate)
        finish(p, kind, q, f, x, count, log, first)
        start(p, kind, grid_s, random, q, f, x, limits, count, first, now_s)
        _believe(y, p, q, f, s, e, first, head, served, now_s)
        if z[CENTRAL_LENGTH] > 0 and q[first, SERVING] == 0:
            j = z[CENTRAL_HEAD]
            budget_s = s.central_s[e, j] + p.requirement_s - now_s
            draw = draw_uniform(random, ROUTE_STREAM)
            length, clear_s, service_s = s.view_length[e, 0], s.view_clear_s[e, 0], s.view_service_s[e, 0]
            i = _choose(y, rule, now_s, budget_s, draw, length, clear_s, service_s, s.trust[e, 0])
            if i >= 0:
                z[CENTRAL_HEAD] = j + 1 if j + 1 < s.central_s.shape[1] else 0
                z[CENTRAL_LENGTH] -= 1
                _sent(p, kind, s, e, 0, i, now_s)
                tag, ident = s.central[e, j, 0], s.central[e, j, 1]
                admit(
                    p, kind, grid_s, random, q, f, x, limits, count, i, now_s, s.central_s[e, j], tag, ident, budget_s
                )


@jit
def _bounces(p: Settings, kind: Any, q: Any, f: Any, limits: Any, i: int, now_s: float, allowed_s: float) -> bool:
    """Whether the worker of instance i sends a request back: full, or busy beyond what the gateway plans with."""
    if q[i, LENGTH] >= kind[i, CAPACITY]:
        return True
    if q[i, LENGTH] == 0:
        return False
    if not p.batching:
        return _cannot_finish(now_s, now_s + allowed_s, clear_at_s(kind, q, f, i, now_s), f[i, OWN_SERVICE_S])
    waiting = q[i, LENGTH] - q[i, SERVING]
    maximum = limits[1, int(kind[i, RANK])]
    full_s = expected_s(kind, f, i, maximum)
    return bool(batch_left_s(kind, q, f, i, now_s) + (waiting // maximum + 1) * full_s > allowed_s)


@jit
def run_rule_in(y: System, s: State, e: int, rule: int, until_s: float) -> None:
    """Environment e to until_s under a per-request rule, as one or several gateways would run it."""
    p, kind, grid_s = y.set, y.kind, y.grid_s
    random, x, z, q, f = s.random[e], s.clock[e], s.marks[e], s.queue[e], s.times[e]
    limits, count = s.limits[e], s.tally[e]
    gateways = s.view_length.shape[1]
    while next_arrival(y, p, random, x, z, until_s, False):
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
        if p.batching:
            service_s = s.view_batch[e, g, BATCH_ADDED_S]
        if rule == LEARNED_REQUEST:
            _note_arrival(now_s, trust)
        i = _choose(y, rule, now_s, p.requirement_s, draw, length, clear_s, service_s, trust)
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
        allowed_s = trust[0] * p.requirement_s
        # As in the live gateway, what is sent although it would be late has nowhere better to go: it is not bounced.
        surprising = max(clear_s[i] - now_s, 0.0) + service_s[i] <= allowed_s
        if p.bounce and surprising and _bounces(p, kind, q, f, limits, i, now_s, allowed_s):
            # The worker refuses with its status; the gateway tries one other instance, once.
            count[h, BOUNCED] += 1
            refused, held = i, q[i, LENGTH]
            if p.batching:
                _told(p, kind, q, f, s, e, g, i, now_s)
            else:
                clear_s[i] = clear_at_s(kind, q, f, i, now_s)
            length[i] = y.capacity[i]
            i = _choose(y, rule, now_s, p.requirement_s, draw, length, clear_s, service_s, trust)
            length[refused] = held
        foreseen_s = max(clear_s[i] - now_s, 0.0) + service_s[i]
        _sent(p, kind, s, e, g, i, now_s)
        if p.choose_limits:
            # The frame carries the gateway's margin: the worker's limits follow it.
            single_s = f[i, OWN_SERVICE_S]
            limits[1, int(kind[i, RANK])] = _limit(p, kind, limits, i, single_s, q[i, LENGTH] + 1, trust[0])
        if not admit(p, kind, grid_s, random, q, f, x, limits, count, i, now_s, now_s, tag, ident, foreseen_s):
            if p.learn_trust:
                _learn_margin(foreseen_s, np.inf, p.requirement_s, trust)
                _learn_spent(np.inf, p.requirement_s, trust)
            if p.batching:
                _told(p, kind, q, f, s, e, g, i, now_s)
            else:
                length[i] = q[i, LENGTH]
                clear_s[i] = clear_at_s(kind, q, f, i, now_s)
    _advance_in_order(y, s, e, until_s, rule)
