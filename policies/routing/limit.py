"""What no router can pass: the best goodput on a workload, computed and not guessed.

Three bounds, for instances of one or more variants with deterministic service times:
- `fluid_limit`: rates only; per phase, the heaviest instances serve what their capacity allows, the next ones the
  rest. The only one that knows batches.
- `clairvoyant_limit`: on a trace, knowing all arrivals. Requests all have one requirement, so with equal service
  times on the instances of one variant, taking each request in order of arrival whenever it can still be in time
  serves the largest number (an exchange argument; checked against brute force in the tests). That is an upper bound
  per set of variants; the bound on goodput adds accuracy differences layer by layer.
- `exact_limit`: on a short trace, every assignment is tried (branch and bound): the true optimum.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from policies.routing.contract import FloatArray, InstanceKind, RoutingError

EXACT_LIMIT_REQUESTS = 14


def fluid_limit(kinds: Sequence[InstanceKind], phase_rates: Sequence[float], each_share: float = 1.0) -> list[float]:
    """Largest goodput ratio per phase at these arrival rates, if phases lasted for ever and queues were fluid.

    each_share: time per request in the best batch over that of one alone; 1 without batching.
    """
    if not each_share > 0.0:
        raise RoutingError(f"each_share = {each_share}: must be above 0 (1 without batching)")
    order = sorted(kinds, key=lambda k: -k.accuracy)
    ratios = []
    for rate in phase_rates:
        left, goodput = rate, 0.0
        for kind in order:
            served = min(left, 1.0 / (each_share * kind.service_s))
            goodput += served * kind.accuracy
            left -= served
        ratios.append(goodput / rate)
    return ratios


def servable(time_s: FloatArray, service_s: Sequence[float], requirement_s: float) -> FloatArray:
    """Which requests are served in time, float64[N] of 0 and 1, when each is taken in order if it still can be.

    service_s: service times of the instances; each request goes to the instance on which it finishes first.
    """
    free = [(0.0, s) for s in service_s]
    heapq.heapify(free)
    taken = np.zeros(len(time_s))
    if len(set(service_s)) == 1:
        for j, t in enumerate(time_s.tolist()):
            at, s = free[0]
            finish = max(at, t) + s
            if finish <= t + requirement_s:
                heapq.heapreplace(free, (finish, s))
                taken[j] = 1.0
        return taken
    idle = [0.0] * len(service_s)
    for j, t in enumerate(time_s.tolist()):
        finish, i = min((max(idle[i], t) + service_s[i], i) for i in range(len(idle)))
        if finish <= t + requirement_s:
            idle[i] = finish
            taken[j] = 1.0
    return taken


def clairvoyant_limit(
    time_s: FloatArray, kinds: Sequence[InstanceKind], requirement_s: float
) -> tuple[float, FloatArray]:
    """An upper bound on the goodput ratio of any router on a trace, and float64[N]: what each request adds to it.

    Layer by layer from the most accurate variant: with H the most requests that its instances can serve in time, no
    router has more than H answers of that accuracy; all others have at most the next accuracy.
    """
    if len(time_s) == 0:
        raise RoutingError("time_s is empty: a limit needs at least one arrival")
    levels = sorted({k.accuracy for k in kinds}, reverse=True)
    gain = np.zeros(len(time_s))
    for level, accuracy in enumerate(levels):
        below = levels[level + 1] if level + 1 < len(levels) else 0.0
        group = [k.service_s for k in kinds if k.accuracy >= accuracy]
        if len(set(group)) == 1:
            gain += (accuracy - below) * servable(time_s, group, requirement_s)
        else:
            # Unequal service times: greedy is not known to be largest, so bound by "all of them".
            gain += (accuracy - below) * _at_most(time_s, group, requirement_s)
    return float(gain.mean()), gain


def _at_most(time_s: FloatArray, service_s: Sequence[float], requirement_s: float) -> FloatArray:
    """An upper bound on the requests served in time by unequal instances: each group of equals by itself, summed."""
    total = np.zeros(len(time_s))
    for s in sorted(set(service_s)):
        total += servable(time_s, [x for x in service_s if x == s], requirement_s)
    return np.ones_like(total) if total.sum() >= len(time_s) else total


def exact_limit(time_s: FloatArray, kinds: Sequence[InstanceKind], requirement_s: float) -> float:
    """The best goodput ratio that any clairvoyant router reaches on a trace of at most 14 requests.

    Each instance serves in order of arrival, as the live queues do; a request may be refused.
    """
    times = time_s.tolist()
    n = len(times)
    if not 0 < n <= EXACT_LIMIT_REQUESTS:
        raise RoutingError(f"{n} requests: the exact limit takes 1 to {EXACT_LIMIT_REQUESTS}")
    best_accuracy = max(k.accuracy for k in kinds)
    best = 0.0
    idle = [0.0] * len(kinds)

    def explore(j: int, goodput: float) -> None:
        nonlocal best
        if goodput + (n - j) * best_accuracy <= best:
            return
        if j == n:
            best = goodput
            return
        tried: set[tuple[float, float]] = set()
        for i, kind in sorted(enumerate(kinds), key=lambda ik: -ik[1].accuracy):
            key = (max(idle[i], times[j]), kind.service_s)
            finish = key[0] + kind.service_s
            if key in tried or finish > times[j] + requirement_s:
                continue
            tried.add(key)
            before, idle[i] = idle[i], finish
            explore(j + 1, goodput + kind.accuracy)
            idle[i] = before
        explore(j + 1, goodput)

    explore(0, 0.0)
    return best / n
