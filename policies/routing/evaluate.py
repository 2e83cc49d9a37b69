"""Score any router on any workload in the simulator (Tan 5.1.6: long runs of 0.6 million slots; learned ones without
noise), and Table 2 of Tan beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from policies.routing.contract import FloatArray, InstanceKind, RoutingError
from policies.routing.environment import SlotEnvironments
from policies.routing.learned import LearnedPolicy, load_policy
from policies.routing.presets import paper_service
from policies.routing.queueing_model import COUNTERS, LENGTH, NOW_S, PHASE, TRACE, ArrivalModel, ServiceModel, build
from policies.routing.rules import RULES
from policies.routing.scores import Scores, scores_of
from policies.routing.set_environment import SetEnvironments
from policies.routing.set_network import NAME as LEARNED_SET
from policies.routing.set_network import SetPolicy, load_set_policy
from policies.routing.simulator import run_rule, run_tables
from policies.routing.tables import Infaas, Stationary, TableRule, Threshold

LEARNED = ("learned-po", "learned-fo", "learned-po-batch", "learned-fo-batch", LEARNED_SET)
ROUTERS = (
    "light-only",
    "heavy-only",
    "heavy-expire",
    "learned-po",
    "learned-fo",
    "learned-po-batch",
    "learned-fo-batch",
    "single-queue",
    "single-queue-random",
    "stationary",
    "infaas",
    "uniform",
    "threshold",
    LEARNED_SET,
    "deadline",
)
"""Every router by name, in the order of Table 2, then ours."""

PAPER_TABLE_2 = {
    ("paper", "light-only"): (77.69, 0.0, 77.69, 0.0, None, 77.69, 0.0, None),
    ("paper", "heavy-only"): (41.43, 49.95, 0.089, 99.89, None, 82.78, 0.007, None),
    ("paper", "heavy-expire"): (69.05, 16.61, 55.31, 33.19, None, 82.78, 0.0, None),
    ("paper", "learned-po"): (79.24, 1.447, 75.85, 2.891, 12.78, 82.62, 0.003, 96.25),
    ("paper", "learned-fo"): (80.14, 0.366, 77.64, 0.732, 10.66, 82.62, 0.0, 97.25),
    ("paper", "learned-po-batch"): (79.49, 0.884, 76.56, 1.594, 3.664, 82.43, 0.174, 93.14),
    ("paper", "learned-fo-batch"): (80.18, 0.079, 77.82, 0.161, 5.099, 82.54, 0.0, 93.69),
    ("paper", "single-queue"): (79.59, 0.0, 78.86, 0.0, 22.85, 80.37, 0.0, 52.65),
    ("paper", "single-queue-random"): (79.59, 0.0, 78.86, 0.0, 22.85, 80.37, 0.0, 52.65),
    ("paper", "stationary"): (80.39, 0.499, 78.01, 0.998, 19.99, 82.78, 0.0, 99.99),
    ("paper", "infaas"): (78.22, 1.695, 76.12, 3.389, 24.22, 80.35, 0.0, 52.18),
    ("periodic", "light-only"): (77.69, 0.0, 77.69, 0.0, None, 77.69, 0.0, None),
    ("periodic", "heavy-only"): (41.45, 49.93, 0.125, 99.85, None, 82.77, 0.011, None),
    ("periodic", "heavy-expire"): (69.05, 16.59, 55.32, 33.17, None, 82.77, 0.0, None),
    ("periodic", "learned-po"): (79.23, 1.553, 75.75, 3.103, 12.11, 82.72, 0.003, 98.78),
    ("periodic", "learned-fo"): (80.27, 0.329, 77.76, 0.651, 11.63, 82.77, 0.008, 99.93),
}
"""Tan's Table 2, percent: overall goodput and violations; bursty goodput, violations, heavy share; normal, the same."""


@dataclass(frozen=True, slots=True)
class Result:
    """Scores of one router on one workload: `overall`, `overall_50_50` and one entry per phase."""

    router: str
    scores: dict[str, Scores]

    def as_dict(self) -> dict[str, dict[str, float]]:
        """The JSON form."""
        return {phase: s.as_dict() for phase, s in self.scores.items()}


def service_for(router: str, service: ServiceModel) -> ServiceModel:
    """The service as this router uses it: the one-model routers have all instances of one model (papers/README.md)."""
    kinds = service.kinds
    if router == "light-only":
        return _all_of(service, max(range(len(kinds)), key=lambda i: kinds[i].rank))
    if router in ("heavy-only", "heavy-expire"):
        one = _all_of(service, min(range(len(kinds)), key=lambda i: kinds[i].rank))
        return replace(one, expire=router == "heavy-expire")
    return service


def _all_of(service: ServiceModel, i: int) -> ServiceModel:
    n = len(service.kinds)
    gain = service.reward_accuracy
    return replace(
        service,
        kinds=(service.kinds[i],) * n,
        reward_accuracy=None if gain is None else (gain[i],) * n,
        quantiles_s=None if service.quantiles_s is None else np.repeat(service.quantiles_s[i : i + 1], n, axis=0),
        slow_factor=None if service.slow_factor is None else (service.slow_factor[i],) * n,
    )


def phase_rates(arrivals: ArrivalModel) -> tuple[float, ...]:
    """Arrivals per second in each phase."""
    if arrivals.d1 is not None:
        return tuple(arrivals.d1.sum(axis=1).tolist())
    if arrivals.rate is not None:
        return tuple(arrivals.rate.tolist())
    assert arrivals.time_s is not None
    assert arrivals.phase is not None
    spans = np.diff(arrivals.time_s, prepend=0.0)
    return tuple(
        float((arrivals.phase == h).sum() / max(spans[arrivals.phase == h].sum(), 1e-9)) for h in range(arrivals.phases)
    )


def table_rule(router: str, service: ServiceModel, arrivals: ArrivalModel, promise: float) -> TableRule:
    """The per-slot rule of this name for a service."""
    if router == "threshold":
        return Threshold(service.kinds)
    if router == "infaas":
        return Infaas(service.kinds)
    return Stationary.solve(service.kinds, phase_rates(arrivals), service.requirement_s, promise)


def evaluate(
    router: str,
    service: ServiceModel,
    arrivals: ArrivalModel,
    *,
    slots: int,
    seed: int,
    policy: LearnedPolicy | SetPolicy | None = None,
    promise: float = 0.02,
    as_deployed: bool = False,
    environments: int = 60,
    threads: int = 1,
    progress: Callable[[float], None] | None = None,
) -> Result:
    """Scores over `slots` slots of 1 s, split over environments that start empty in a stationary phase.

    Every router of one seed meets the same arrivals. A trace is run once, in one environment, to its end.
    policy: the learned policy to use (default: the pretrained one of this name). as_deployed: the one-model routers
    keep to the service's own instances, as they would live, instead of having all of one model. `deadline` learns its
    margin and service times online, as it does live.
    """
    shaped = service_for(router, service)
    if as_deployed:
        shaped = replace(service, expire=service.expire or router == "heavy-expire")
    e = 1 if arrivals.kind == TRACE else max(1, min(environments, slots // 100))
    duration_s = float(slots) / e
    if arrivals.kind == TRACE and arrivals.time_s is not None:
        duration_s = float(np.ceil(arrivals.time_s[-1])) + 1.0
    if router in RULES:
        learning = {"learn_trust": True, "learn_rate": 0.02} if router == "deadline" else {}
        system, state = build(shaped, arrivals, e, seed, **learning)  # type: ignore[arg-type]
        run_rule(system, state, router, duration_s + 5.0 if arrivals.kind == TRACE else duration_s, threads)
        return Result(router, scores_of(state.tally.sum(axis=0), arrivals.phase_names, duration_s * e))
    if router in LEARNED:
        learned = policy or trained(router, router, shaped.kinds)
        if isinstance(learned, SetPolicy):
            count = _run_set(learned, shaped, arrivals, e, seed, duration_s, threads, progress)
            return Result(router, scores_of(count, arrivals.phase_names, duration_s * e))
        count = _run_learned(learned, shaped, arrivals, e, seed, duration_s, threads, progress)
        return Result(router, scores_of(count, arrivals.phase_names, duration_s * e))
    if router not in ROUTERS:
        raise RoutingError(f"router = {router!r}: must be one of {sorted(ROUTERS)}")
    rule = table_rule(router, shaped, arrivals, promise)
    system, state = build(shaped, arrivals, e, seed)
    if isinstance(rule, Stationary):
        by_phase = rule.tables(np.zeros((arrivals.phases, 1), dtype=np.int64), np.arange(arrivals.phases))
        run_tables(system, state, np.tile(by_phase, (e, 1, 1)), duration_s, threads=threads)
    else:
        steps = int(np.ceil(duration_s / rule.slot_s))
        for t in range(steps):
            tables = rule.tables(state.queue[:, :, LENGTH], state.marks[:, PHASE])
            run_tables(system, state, tables, min((t + 1) * rule.slot_s, duration_s), threads=threads)
            if progress is not None and t % 1000 == 0:
                progress(t / steps)
    return Result(router, scores_of(state.tally.sum(axis=0), arrivals.phase_names, duration_s * e))


def trained(router: str, source: Path | str, kinds: tuple[InstanceKind, ...]) -> LearnedPolicy | SetPolicy:
    """The learned policy of an artifact, or the shipped one of a name, as `router` takes it, for these instances."""
    return load_set_policy(source, kinds) if router == LEARNED_SET else load_policy(source, kinds)


def _run_set(
    policy: SetPolicy,
    service: ServiceModel,
    arrivals: ArrivalModel,
    e: int,
    seed: int,
    duration_s: float,
    threads: int,
    progress: Callable[[float], None] | None,
) -> FloatArray:
    environments = SetEnvironments(service, arrivals, e, seed, threads)
    steps = int(np.ceil(duration_s / policy.slot_s))
    for t in range(steps):
        environments.step(policy.heavy(environments.observe()))
        if progress is not None and t % 1000 == 0:
            progress(t / steps)
    return environments.slots.take_counts()


def _run_learned(
    policy: LearnedPolicy,
    service: ServiceModel,
    arrivals: ArrivalModel,
    e: int,
    seed: int,
    duration_s: float,
    threads: int,
    progress: Callable[[float], None] | None,
) -> FloatArray:
    environments = SlotEnvironments(
        service, arrivals, e, seed, batching=policy.batching, observable=policy.needs_phase, slot_s=policy.slot_s,
        threads=threads, at_changes=policy.needs_phase,
    )  # fmt: skip
    if environments.layout.hash != policy.layout.hash:
        raise RoutingError(
            f"{policy.name}: trained for layout {policy.layout.hash} ({policy.layout}), but this service and workload "
            f"have {environments.layout.hash} ({environments.layout}): train one for them"
        )
    total = np.zeros((arrivals.phases, COUNTERS))
    seen = np.zeros((e, policy.layout.size), dtype=np.float32)
    step = 0
    # Where a change of phase ends a step too, environments part by fractions of a slot: run until all are there.
    while float(environments.state.clock[:, NOW_S].min()) < duration_s - 1e-9:
        tables, low, high = policy.tables(environments.observe(seen))
        environments.step(tables, low, high)
        step += 1
        if progress is not None and step % 1000 == 0:
            progress(min(step * policy.slot_s / duration_s, 1.0))
    total += environments.take_counts()
    return total


def paper_evaluation(
    routers: Sequence[str],
    workload: ArrivalModel,
    *,
    slots: int,
    seed: int,
    service: ServiceModel | None = None,
    artifacts: dict[str, Path] | None = None,
    threads: int = 1,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Result]:
    """Results of these routers by name, on Tan's service or another; `artifacts` replaces pretrained policies."""
    results = {}
    service = service or paper_service()
    for router in routers:
        policy = trained(router, artifacts[router], service.kinds) if artifacts and router in artifacts else None

        def tell(share: float, router: str = router) -> None:
            if progress is not None:
                progress(router, share)

        tell(0.0)
        results[router] = evaluate(
            router, service, workload, slots=slots, seed=seed, policy=policy, threads=threads, progress=tell,
        )  # fmt: skip
    return results


def as_json(results: dict[str, Result], **about: Any) -> dict[str, Any]:
    """The JSON of an evaluation: {"results": {router: {phase: {...}}}, ...}."""
    return {**about, "results": {name: r.as_dict() for name, r in results.items()}}
