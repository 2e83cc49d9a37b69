"""How the `deadline` rule holds when what it assumes does not: random service times, drift, stale views."""

from dataclasses import dataclass, replace

from policies.routing.estimation import SERVICE_RATE
from policies.routing.presets import paper_service
from policies.routing.queueing_model import ARRIVED, IN_TIME, ServiceModel, build, markovian, paper_arrivals
from policies.routing.scores import Scores, scores_of
from policies.routing.simulator import run_rule

FIXED_MARGINS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


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
    rate_scale: float = 1.0,
) -> Scores:
    """50:50 scores of `deadline` on the paper's workload; margin None: learned online, else fixed.

    Several gateways see each other's load when their views are refreshed, every 50 ms in turn. batching: with batch
    limits by `rules.largest_batch`; rate_scale: arrivals at this multiple of the workload's rates.
    """
    environments = 8
    learning = {"learn_trust": True, "learn_rate": SERVICE_RATE} if margin is None else {"margin": margin}
    system, state = build(
        service, paper_arrivals(rate_scale), environments, seed, gateways=gateways, refresh_s=0.05, bounce=bounce,
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
        score(service, slots=slots, seed=seed, batching=batching, rate_scale=rate_scale) for batching in (False, True)
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
