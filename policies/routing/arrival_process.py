"""The arrival process in compiled code: Markovian, periodic or a trace, one arrival at a time.

Names: y the `System`, p its `Settings`, x one environment's `clock`, z its `marks`, random its streams.
"""

from typing import Any

from policies.routing.compiled import jit
from policies.routing.queueing_model import (
    MARKOVIAN,
    NOW_S,
    PENDING_S,
    PERIODIC,
    PHASE,
    POSITION,
    SINCE_S,
    TRACE,
    Settings,
    System,
)
from policies.routing.randomness import ARRIVAL_STREAM, draw_exponential, draw_uniform


@jit
def next_arrival(y: System, p: Settings, random: Any, x: Any, z: Any, until_s: float, stop: bool) -> bool:
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
