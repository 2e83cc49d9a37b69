"""Waiting times of the M/D/1 queue, and the fixed shares that Tan's stationary approximation (SA) finds with them."""

from decimal import Decimal, localcontext

import numpy as np

from policies.routing.contract import InstanceKind, RoutingError


def md1_waits_beyond(rate: float, service_s: float, wait_s: float) -> float:
    """P(W > wait_s) in the M/D/1 queue (Erlang 1909, the formula that Tan's [69] makes stable for many servers).

    rate: arrivals per second; service_s: the service time of every request. An unstable queue gives 1. The sum
    alternates in sign with terms that grow like exp(wait_s / service_s), hence decimal arithmetic of 80 digits.
    """
    load = rate * service_s
    if load >= 1.0:
        return 1.0
    if wait_s < 0.0:
        return 1.0
    if load <= 0.0:
        return 0.0
    with localcontext() as context:
        context.prec = 80
        x = Decimal(wait_s) / Decimal(service_s)
        rho = Decimal(load)
        total = Decimal(0)
        factorial = Decimal(1)
        for k in range(int(x) + 1):
            if k:
                factorial *= k
            d = rho * (Decimal(k) - x)
            total += (d**k if k else Decimal(1)) / factorial * (-d).exp()
        return float(1 - (1 - rho) * total)


def violation_ratio(kinds: tuple[InstanceKind, ...], rate: float, requirement_s: float, heavy: float) -> float:
    """Share of requests late in the long run, by M/D/1, when `heavy` of them share the heaviest instances equally
    and the rest the lightest ones."""
    lightest = max(k.rank for k in kinds)
    total = 0.0
    for rank, share in ((0, heavy), (lightest, 1.0 - heavy)) if lightest else ((0, 1.0),):
        group = [k for k in kinds if k.rank == rank]
        if share > 0.0:
            service_s = group[0].service_s
            total += share * md1_waits_beyond(rate * share / len(group), service_s, requirement_s - service_s)
    return total


def best_heavy_share(
    kinds: tuple[InstanceKind, ...], rate: float, requirement_s: float, promise: float, step: float = 1e-4
) -> float:
    """The largest heavy share, on a grid of `step` below 1, whose violation ratio is at most the promise.

    If no share keeps it, the share on a coarse grid with the fewest violations.
    """
    if rate <= 0.0 or not np.isfinite(rate):
        raise RoutingError(f"rate = {rate}: must be above 0 and finite")
    grid = np.arange(0.0, 1.0, 0.01)
    late = np.array([violation_ratio(kinds, rate, requirement_s, float(heavy)) for heavy in grid])
    if late.min() > promise:
        return float(grid[late.argmin()])
    best = float(grid[late <= promise][-1])
    low, high = best, min(best + 0.01, 1.0 - step)
    while high - low > step / 2.0:
        middle = (low + high) / 2.0
        if violation_ratio(kinds, rate, requirement_s, middle) <= promise:
            low = middle
        else:
            high = middle
    return round(low / step) * step
