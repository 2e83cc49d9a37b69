"""Huang's comparison of placement policies, from what a running system answered: pure functions and their results.

The reward is Eq. 21 over all requests: standard accuracy (Eq. 19) less delay (Eq. 6) less cost (Eq. 11) of what was
answered in time, and the penalty of Eq. 20 for everything else. Delays are the emulated ones, which the paper speaks
of; where a deployment emulates no computing, the real computation and the wait for it stand in.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np

from gateway.edge_answer import EdgeAnswer, RealDelay
from loadgen.score import LATE_RUN_RATIO, LATE_SENDER_MS
from policies.placement.edge_network import EdgeNetwork
from policies.placement.window import Request, window_slots
from protocol.edge_records import Emulation
from tidegate.edge_compare_scores import MeasuredScore, measured_detection, measured_tracking
from tidegate.edge_compare_send import Sent
from tidegate.edge_compare_workload import EdgeWorkload

IN_TIME: Final = "OK"
REAL_PARTS: Final = RealDelay.__struct_fields__
_NO_DEADLINE_S: Final = 1e9


class Spread(msgspec.Struct, frozen=True):
    """Of real times over the answers, in seconds."""

    mean: float
    p50: float
    p99: float


class Difference(msgspec.Struct, frozen=True):
    """The largest differences between answers (late ones, too) and the environment on what was observed."""

    delay_s: float
    cost_usd: float
    accuracy: float


class ServiceFigures(msgspec.Struct, frozen=True):
    """One service under one policy; means are over its answers, accuracy is None where nothing was answered.

    `measured`: of what was really answered against the scenes' truth (mAP over images, MOTA over clips).
    """

    requests: int
    answered: int
    failure_ratio: float
    expected_accuracy: float | None
    measured: MeasuredScore | None
    delay_s: float | None
    cost_usd: float | None


class PolicyFigures(msgspec.Struct, frozen=True):
    """One policy on the workload. `failures`: requests that were not answered in time, by outcome and reason.

    Sums like the paper's: `reward`, `predicted_reward` (by what the environment foresaw when it decided). Means over
    the answers in time: `accuracy`, `delay_s`, `cost_usd`, and what was foreseen of the last two. `beside_s`: real
    times, none of which is in `delay_s`; `loads`: of variants, by all nodes; `link_queue_s`: emulated waits for
    uplinks and links, which the paper lacks.
    """

    policy: str
    planned: int
    requests: int
    answered: int
    failure_ratio: float
    reward: float
    predicted_reward: float
    accuracy: float | None
    delay_s: float | None
    predicted_delay_s: float | None
    cost_usd: float | None
    predicted_cost_usd: float | None
    link_queue_s: float | None
    services: dict[str, ServiceFigures]
    difference: Difference
    beside_s: dict[str, Spread]
    loads: int
    second_choices: int
    decided_by: dict[str, int]
    nodes: dict[str, int]
    variants: dict[str, int]
    failures: dict[str, int]
    late_sent_ratio: float
    most_lag_s: float
    interrupted: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """One request that was answered in time."""

    number: int
    told: EdgeAnswer
    body: bytes
    standard_accuracy: float
    delay_s: float


def policy_figures(
    policy: str, sent: Sequence[Sent], workload: EdgeWorkload, network: EdgeNetwork, emulate: Emulation, loads: int
) -> PolicyFigures:
    """All figures of one policy's run, in which nodes loaded variants `loads` times.

    Raises ImportError where the scores' packages are missing.
    """
    answers = [_answer(one, network, emulate) for one in sent if one.outcome == IN_TIME]
    told = [one.told for one in answers]
    lost = len(sent) - len(answers)
    gained = sum(one.standard_accuracy for one in answers) + lost * network.prices.penalty
    delays, costs = [one.delay_s for one in answers], [one.cost_usd.total for one in told]
    predicted_delays = [one.decision.predicted_delay_s for one in told]
    predicted_costs = [one.decision.predicted_cost_usd for one in told]
    lags_s = [one.lag_s for one in sent]
    return PolicyFigures(
        policy=policy,
        planned=len(workload.arrivals),
        requests=len(sent),
        answered=len(answers),
        failure_ratio=lost / len(sent) if sent else 0.0,
        reward=gained - sum(delays) - sum(costs),
        predicted_reward=gained - sum(predicted_delays) - sum(predicted_costs),
        accuracy=_mean([one.expected_accuracy for one in told]),
        delay_s=_mean(delays),
        predicted_delay_s=_mean(predicted_delays),
        cost_usd=_mean(costs),
        predicted_cost_usd=_mean(predicted_costs),
        link_queue_s=_mean([one.delay_s.uplink_queue + one.delay_s.link_queue for one in told]),
        services={name: _service(name, sent, answers, workload) for name in workload.kinds},
        difference=largest_difference(
            [msgspec.json.decode(one.answer, type=EdgeAnswer) for one in sent if one.answer], network, emulate
        ),
        beside_s={part: _spread([getattr(one.delay_s.real, part) for one in told]) for part in REAL_PARTS}
        if told
        else {},
        loads=loads,
        second_choices=sum(one.decision.second_choice for one in told),
        decided_by=dict(Counter(f"{one.decision.policy} in the {one.decision.decided_by}" for one in told)),
        nodes=dict(Counter(one.decision.node for one in told)),
        variants=dict(Counter(one.decision.variant for one in told)),
        failures=dict(Counter(_why(one) for one in sent if one.outcome != IN_TIME)),
        late_sent_ratio=float(np.mean([lag_s * 1e3 > LATE_SENDER_MS for lag_s in lags_s])) if lags_s else 0.0,
        most_lag_s=max(lags_s, default=0.0),
        interrupted=len(sent) < len(workload.arrivals),
    )


def not_comparable(figures: Sequence[PolicyFigures]) -> str:
    """Why these runs cannot be held against each other; empty if they can."""
    behind = [f"{one.policy} {one.late_sent_ratio:.1%}" for one in figures if one.late_sent_ratio > LATE_RUN_RATIO]
    if behind:
        return (
            f"not comparable: this machine could not keep the load up; requests left more than {LATE_SENDER_MS:g} ms"
            f" late ({', '.join(behind)}). End other programs, or send windows less often (--every-s)"
        )
    cut = [one.policy for one in figures if one.interrupted]
    if cut:
        return f"not comparable: {', '.join(cut)} was interrupted, and the others have had more requests"
    others = [f"{one.policy} {share:.0%}" for one in figures if (share := _by_another(one)) > LATE_RUN_RATIO]
    if others:
        return (
            "not comparable: windows that the scheduler did not decide in time were decided by sequential in the"
            f" gateway ({', '.join(others)} of the answers)"
        )
    return ""


def largest_difference(answers: Sequence[EdgeAnswer], network: EdgeNetwork, emulate: Emulation) -> Difference:
    """How far the nodes' emulated delays, and the costs and accuracies told, are from `EdgeNetwork`.

    On what was observed: the decision, the bytes that were sent on, the work ahead and whether the variant was loaded.
    """
    delay_s = cost_usd = accuracy = 0.0
    for told in answers:
        said, shown = environment_says(told, network), told.delay_s
        pairs = [
            (emulate.uplink, shown.access, said.access_s),
            (emulate.links, shown.transmission, said.transmission_s),
        ]
        pairs.append((emulate.compute == "table", shown.queue + shown.compute, said.compute_s))
        delay_s = max(delay_s, *(abs(one - other) for emulated, one, other in pairs if emulated), 0.0)
        costs = zip(
            (told.cost_usd.routing, told.cost_usd.memory, told.cost_usd.compute),
            (said.routing_usd, said.memory_usd, said.compute_usd),
            strict=True,
        )
        cost_usd = max(cost_usd, *(abs(one - other) for one, other in costs))
        accuracy = max(accuracy, abs(told.expected_accuracy - said.accuracy))
    return Difference(delay_s, cost_usd, accuracy)


class Said(msgspec.Struct, frozen=True):
    """One request in the environment's figures (Huang, Eqs. 1, 3 to 5 and 8 to 10)."""

    accuracy: float
    access_s: float
    transmission_s: float
    compute_s: float
    routing_usd: float
    memory_usd: float
    compute_usd: float


def environment_says(told: EdgeAnswer, network: EdgeNetwork) -> Said:
    """`EdgeNetwork` on one answered request: its decision and what was observed."""
    s, i, j, entry, k = _places(told, network)
    data_mb = told.observed.adapted_mb / float(network.size_factor[s, i])
    waiting, used = np.zeros(network.nodes), np.zeros(network.nodes)
    waiting[k] = told.observed.waiting_tflop
    deployed = np.zeros((network.nodes, network.variant_columns), dtype=bool)
    deployed[k, int(network.first_variant[s]) + j] = not told.observed.new_instance
    slots = window_slots(network, [Request(told.service, entry, _NO_DEADLINE_S, data_mb)], waiting, used, deployed)
    outcome = network.evaluate(slots, np.array([[[i, j, k]]]))
    return Said(*(float(getattr(outcome, name)[0, 0]) for name in Said.__struct_fields__))


def _places(told: EdgeAnswer, network: EdgeNetwork) -> tuple[int, int, int, int, int]:
    """Indices of service, configuration, variant, entry and node."""
    decision, names = told.decision, network.graph.names
    s = [table.name for table in network.tables].index(told.service)
    table = network.tables[s]
    i, j = table.configurations.index(decision.configuration.name), table.variants.index(decision.variant)
    return s, i, j, names.index(decision.entry), names.index(decision.node)


def _answer(sent: Sent, network: EdgeNetwork, emulate: Emulation) -> Answer:
    told = msgspec.json.decode(sent.answer, type=EdgeAnswer)
    s, i, j, _, _ = _places(told, network)
    delay_s = told.delay_s.total
    if emulate.compute != "table":
        delay_s += told.delay_s.real.wait + told.delay_s.real.compute
    return Answer(sent.number, told, sent.answer, float(network.standard_accuracy[s, i, j]), delay_s)


def _service(name: str, sent: Sequence[Sent], answers: Sequence[Answer], workload: EdgeWorkload) -> ServiceFigures:
    asked = [one for one in sent if workload.arrivals[one.number].service == name]
    mine = [one for one in answers if one.told.service == name]
    measured = None
    if mine:
        measure = measured_detection if workload.kinds[name] == "detection" else measured_tracking
        measured = measure([(workload.item(one.number), one.body) for one in mine])
    return ServiceFigures(
        requests=len(asked),
        answered=len(mine),
        failure_ratio=1.0 - len(mine) / len(asked) if asked else 0.0,
        expected_accuracy=_mean([one.told.expected_accuracy for one in mine]),
        measured=measured,
        delay_s=_mean([one.delay_s for one in mine]),
        cost_usd=_mean([one.told.cost_usd.total for one in mine]),
    )


def _why(sent: Sent) -> str:
    return f"{sent.outcome}: {sent.reason}" if sent.reason else sent.outcome


def _by_another(figures: PolicyFigures) -> float:
    """The share of answers that a first choice of the gateway's led to."""
    if not figures.answered or figures.policy == "sequential":
        return 0.0
    by_gateway = sum(count for by, count in figures.decided_by.items() if by.endswith("in the gateway"))
    return max(0, by_gateway - figures.second_choices) / figures.answered


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _spread(values: Sequence[float]) -> Spread:
    return Spread(float(np.mean(values)), *(float(one) for one in np.percentile(values, (50, 99))))
