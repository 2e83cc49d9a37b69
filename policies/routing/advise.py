"""Will a deployment keep its promise, at what load does it break, and what would change that: by simulation."""

from dataclasses import dataclass, replace

from policies.routing.evaluate import evaluate
from policies.routing.queueing_model import TRACE, ArrivalModel, ServiceModel, trace_arrivals
from policies.routing.scores import Scores


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the deployment: what it is, its scores at today's load, and the load at which it breaks."""

    what: str
    now: Scores
    breaks_at: float


@dataclass(frozen=True, slots=True)
class Advice:
    """keeps: whether the promise holds at today's load; changes[0] is the deployment as it is.

    breaks_at counts in multiples of today's arrival rates (holding times unchanged).
    """

    keeps: bool
    promise: float
    changes: tuple[Change, ...]


def at_load(arrivals: ArrivalModel, scale: float) -> ArrivalModel:
    """The same workload with every arrival rate times `scale`; a trace is played faster instead."""
    if arrivals.kind == TRACE and arrivals.time_s is not None:
        return trace_arrivals(arrivals.time_s / scale, arrivals.phase, arrivals.phase_names)
    if arrivals.d0 is not None and arrivals.d1 is not None:
        d1 = arrivals.d1 * scale
        d0 = arrivals.d0.copy()
        for i in range(len(d0)):
            d0[i, i] = -(d0[i].sum() - d0[i, i]) - d1[i].sum()
        return replace(arrivals, d0=d0, d1=d1)
    assert arrivals.rate is not None
    return replace(arrivals, rate=arrivals.rate * scale)


def breaking_load(
    service: ServiceModel,
    arrivals: ArrivalModel,
    promise: float,
    *,
    router: str,
    slots: int,
    seed: int,
    most: float = 64.0,
) -> float:
    """The largest multiple of today's rates, within 2%, at which violations overall stay within the promise."""

    def kept(scale: float) -> bool:
        result = evaluate(router, service, at_load(arrivals, scale), slots=slots, seed=seed, as_deployed=True)
        return result.scores["overall"].violation_ratio <= promise

    low, high = 0.0, 1.0
    while kept(high):
        low, high = high, 2.0 * high
        if high > most:
            return most
    while high - low > 0.02 * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if kept(middle) else (low, middle)
    return low


def advise(
    service: ServiceModel,
    arrivals: ArrivalModel,
    *,
    promise: float = 0.02,
    router: str = "deadline",
    slots: int = 20_000,
    seed: int = 1,
) -> Advice:
    """Today's deployment and four changes to it: an instance more of the heaviest or the lightest variant, one heavy
    instance exchanged for a light one, and a requirement half as long again."""
    kinds, everyone = service.kinds, list(range(len(service.kinds)))
    heavy = min(everyone, key=lambda i: kinds[i].rank)
    light = max(everyone, key=lambda i: kinds[i].rank)
    plans = [
        ("as it is", service),
        (f"one more {kinds[heavy].variant}", service.with_instances([*everyone, heavy])),
    ]
    if kinds[light].rank != kinds[heavy].rank:
        plans.append((f"one more {kinds[light].variant}", service.with_instances([*everyone, light])))
        rest = [i for i in everyone if i != heavy]
        what = f"a {kinds[light].variant} instead of a {kinds[heavy].variant}"
        plans.append((what, service.with_instances([*rest, light])))
    longer_s = 1.5 * service.requirement_s
    plans.append((f"requirement of {1000 * longer_s:.0f} ms", replace(service, requirement_s=longer_s)))
    changes = []
    for what, plan in plans:
        now = evaluate(router, plan, arrivals, slots=slots, seed=seed, as_deployed=True).scores["overall"]
        load = breaking_load(plan, arrivals, promise, router=router, slots=slots, seed=seed)
        changes.append(Change(what, now, load))
    return Advice(changes[0].now.violation_ratio <= promise, promise, tuple(changes))
