"""The part of `/metrics` that edge services fill: by service and node, what the paper compares policies by.

Everything is a sum since start, so that a mean over any span is a quotient of two rates.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from gateway.edge import EdgeDispatcher
from gateway.edge_metrics import COSTS, DELAYS, EdgeMetrics
from gateway.edge_view import EdgeView
from gateway.metrics import Values

EdgeValues = dict[str, Values]
"""By family's key."""


class _Family(NamedTuple):
    key: str
    name: str
    about: str
    labels: tuple[str, ...]


_WHERE: Final = ("service", "node")
COUNTERS: Final = (
    _Family("answers", "tidegate_edge_answers", "Answered requests by service and decided node.", _WHERE),
    _Family("failures", "tidegate_edge_failures", "Violations without an answer; node none: never placed.", _WHERE),
    _Family("accuracy", "tidegate_edge_expected_accuracy", "Expected accuracy, summed over the answers.", _WHERE),
    _Family("delay", "tidegate_edge_delay_seconds", "Emulated delay, summed over the answers.", (*_WHERE, "part")),
    _Family("cost", "tidegate_edge_cost_usd", "Cost in US dollars, summed over the answers.", (*_WHERE, "part")),
    _Family("windows", "tidegate_edge_windows", "Windows by who decided them.", ("decided_by",)),
    _Family("decided", "tidegate_edge_decided", "Requests that were decided, by policy.", ("policy",)),
    _Family("second", "tidegate_edge_second_choices", "Requests that were sent to a second node.", ()),
    _Family("deciding", "tidegate_edge_deciding_seconds", "From windows' ends to their decisions, summed.", ()),
    _Family("attempts", "tidegate_edge_attempts", "Attempts at nodes by their end.", ("node", "end")),
)
READY: Final = _Family("ready", "tidegate_edge_node_ready", "1 if the node can be chosen.", ("node",))


def edge_values(view: EdgeView, dispatcher: EdgeDispatcher, metrics: EdgeMetrics, now_s: float) -> EdgeValues:
    """Of this process, now; empty where there is no edge network."""
    if view.net is None:
        return {}
    counts = dispatcher.counts()
    values: EdgeValues = {family.key: {} for family in (*COUNTERS, READY)}
    for where, one in metrics.counts.items():
        values["answers"][where] = one.answers
        values["failures"][where] = one.failures
        values["accuracy"][where] = one.accuracy
        values["delay"].update({(*where, part): sum_s for part, sum_s in zip(DELAYS, one.delay_s, strict=True)})
        values["cost"].update({(*where, part): usd for part, usd in zip(COSTS, one.cost_usd, strict=True)})
    values["windows"].update({(by,): number for by, number in counts.windows.items()})
    values["decided"].update({(policy,): number for policy, number in counts.decided.items()})
    values["second"][()] = counts.second_choices
    values["deciding"][()] = counts.deciding_s
    for node, ends in counts.attempts.items():
        values["attempts"].update({(node, end): number for end, number in ends.items()})
    values["ready"].update({(node,): float(not view.not_ready(node, now_s)) for node in view.net.node_of})
    return values


def edge_families(total: Callable[[str], Values], ready: Iterable[Values]) -> Iterator[Metric]:
    """The families, with the sums over processes by key; a node is ready if every living process can choose it."""
    for family in COUNTERS:
        counter = CounterMetricFamily(family.name, family.about, labels=family.labels)
        for labels, value in total(family.key).items():
            counter.add_metric(list(labels), value)
        yield counter
    gauge = GaugeMetricFamily(READY.name, READY.about, labels=READY.labels)
    seen: Values = {}
    for values in ready:
        for labels, value in values.items():
            seen[labels] = min(value, seen.get(labels, 1.0))
    for labels, value in seen.items():
        gauge.add_metric(list(labels), value)
    yield gauge
