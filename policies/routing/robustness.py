"""How the `deadline` rule holds when what it assumes does not: random service times, drift, stale views."""

from dataclasses import dataclass, replace

from policies.routing.contract import InstanceKind
from policies.routing.estimation import SERVICE_RATE
from policies.routing.presets import paper_service
from policies.routing.queueing_model import (
    ARRIVED,
    IN_TIME,
    ArrivalModel,
    ServiceModel,
    build,
    markovian,
    paper_arrivals,
)
from policies.routing.scores import Scores, scores_of
from policies.routing.simulator import run_rule

PROMISE = 0.02
FIXED_MARGINS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class OtherService:
    """Service times in ms, heaviest first, how many instances of each, and the requirement in ms."""

    times_ms: tuple[float, ...]
    counts: tuple[int, ...]
    requirement_ms: float
    accuracies: tuple[float, ...] = (0.8278, 0.7769)

    def model(self, law: str, cv: float) -> ServiceModel:
        """The service as simulated."""
        kinds = [
            InstanceKind(f"variant-{rank}", rank, time_ms / 1e3, accuracy)
            for rank, (time_ms, count, accuracy) in enumerate(
                zip(self.times_ms, self.counts, self.accuracies, strict=True)
            )
            for _ in range(count)
        ]
        return ServiceModel(tuple(kinds), requirement_s=self.requirement_ms / 1e3, law=law, cv=cv)

    def capacity(self) -> float:
        """Requests per second that all instances serve together."""
        return sum(1e3 * count / time_ms for time_ms, count in zip(self.times_ms, self.counts, strict=True))


OTHER_SERVICES = (
    OtherService((43.0, 11.5), (2, 2), 300.0),
    OtherService((43.0, 11.5), (2, 2), 150.0),
    OtherService((38.0, 8.0), (1, 1), 250.0),
    OtherService((60.0, 20.0), (1, 3), 300.0),
    OtherService((20.0, 5.0), (4, 4), 100.0),
    OtherService((200.0, 50.0), (2, 2), 1000.0),
    OtherService((80.0, 30.0), (2, 2), 300.0),
    OtherService((80.0, 30.0), (2, 2), 300.0, (0.9, 0.7)),
    OtherService((100.0, 30.0), (2, 2), 300.0),
    OtherService((150.0, 30.0), (2, 2), 300.0),
    OtherService((120.0, 50.0, 20.0), (2, 2, 2), 400.0, (0.8278, 0.805, 0.7769)),
)
"""From services as roomy as the paper's to some whose heavy instance hardly fits its requirement."""


@dataclass(frozen=True, slots=True)
class Row:
    """One setting: 50:50 scores of the learned margin, and of the best fixed one (None: not searched)."""

    law: str
    cv: float
    gateways: int
    bounce: bool
    learned: Scores
    best_margin: float | None = None
    best: Scores | None = None


def score(
    service: ServiceModel,
    *,
    slots: int,
    seed: int,
    margin: float | None = None,
    gateways: int = 1,
    bounce: bool = False,
    batching: bool = False,
    arrivals: ArrivalModel | None = None,
) -> Scores:
    """50:50 scores of `deadline`; margin None: learned online, else fixed. arrivals: the paper's unless given.

    Several gateways see each other's load when their views are refreshed, every 50 ms in turn. batching: with batch
    limits by `rules.largest_batch`.
    """
    environments = 8
    learning = {"learn_trust": True, "learn_rate": SERVICE_RATE} if margin is None else {"margin": margin}
    system, state = build(
        service, arrivals or paper_arrivals(), environments, seed, gateways=gateways, refresh_s=0.05, bounce=bounce,
        batching=batching, choose_limits=batching, **learning,  # type: ignore[arg-type]
    )  # fmt: skip
    run_rule(system, state, "deadline", slots / environments)
    return scores_of(state.tally.sum(axis=0), ("bursty", "normal"))["overall_50_50"]


def variable_service(law: str, cv: float, *, slots: int, seed: int) -> Row:
    """The learned margin against the best of the fixed ones, one gateway."""
    service = replace(paper_service(), law=law, cv=cv)
    fixed = {m: score(service, slots=slots, seed=seed, margin=m) for m in FIXED_MARGINS}
    best = max(fixed, key=lambda m: fixed[m].goodput_ratio)
    return Row(law, cv, 1, False, score(service, slots=slots, seed=seed), best, fixed[best])


def other_service(
    other: OtherService, load: float, law: str, cv: float, *, requests: int, seed: int
) -> tuple[Scores, float, Scores]:
    """The learned margin, the best fixed one and its scores, on a workload like the paper's.

    Bursts ask for `load` times what all instances serve together, calm for an eighteenth of that. The best fixed
    margin is the one of most goodput among those that keep the promise; if none does, the one of fewest violations.
    """
    service, rate = other.model(law, cv), load * other.capacity()
    arrivals, slots = paper_arrivals(rate / 180.0), int(requests / (rate / 9.0))

    def scored(margin: float | None) -> Scores:
        return score(service, slots=slots, seed=seed, margin=margin, arrivals=arrivals)

    fixed = {margin: scored(margin) for margin in FIXED_MARGINS}
    kept = [margin for margin in fixed if fixed[margin].violation_ratio <= PROMISE]
    best = (
        max(kept, key=lambda m: fixed[m].goodput_ratio) if kept else min(fixed, key=lambda m: fixed[m].violation_ratio)
    )
    return scored(None), best, fixed[best]


def several_gateways(law: str, cv: float, gateways: int, bounce: bool, *, slots: int, seed: int) -> Row:
    """Gateways with views up to 50 ms old, with or without the workers' bounce."""
    service = replace(paper_service(), law=law, cv=cv)
    return Row(law, cv, gateways, bounce, score(service, slots=slots, seed=seed, gateways=gateways, bounce=bounce))


def batches(rate_scale: float, cv: float, *, slots: int, seed: int) -> tuple[Scores, Scores]:
    """`deadline` without and with batches on the same arrivals, gamma service times, margin learned.

    A batch of b takes 0.4 + 0.6 b times one request (modelled; `ServiceModel.batch_factor`).
    """
    service = replace(paper_service(), law="gamma", cv=cv)
    plain, batched = (
        score(service, slots=slots, seed=seed, batching=batching, arrivals=paper_arrivals(rate_scale))
        for batching in (False, True)
    )
    return plain, batched


def recovery(cv: float, *, seed: int, environments: int = 64) -> list[tuple[float, float]]:
    """(seconds since the heavy instances became 1.5 times as slow, violation ratio of the arrivals of that 5 s).

    Under 180 arrivals per second throughout, so that the change meets full queues.
    """
    service = replace(
        paper_service(), law="gamma", cv=cv, slow_at_s=200.0, slow_factor=(1.5, 1.5, 1.0, 1.0), reward_accuracy=None
    )
    arrivals = markovian([[-180.0]], [[180.0]], ("bursty",))
    system, state = build(service, arrivals, environments, seed, learn_trust=True, learn_rate=SERVICE_RATE)
    run_rule(system, state, "deadline", 200.0)
    found = []
    before = state.tally.sum(axis=(0, 1))
    for k in range(1, 9):
        run_rule(system, state, "deadline", 200.0 + 5.0 * k)
        now = state.tally.sum(axis=(0, 1))
        span = now - before
        before = now
        found.append((5.0 * k, float(max(0.0, 1.0 - span[IN_TIME] / span[ARRIVED]))))
    return found
