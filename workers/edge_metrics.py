"""Prometheus metrics of an edge node, read at each scrape; nothing where the worker is no node."""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from protocol.outcomes import Attempt
from workers.edge_node import EdgeNode
from workers.metrics import add_histogram


class NodeCollector(Collector):
    """All series of one node. Labels are bounded: its neighbours, its deployment's variants, the attempts' names."""

    def __init__(self, worker: str, node: EdgeNode) -> None:
        self._worker = worker
        self._node = node

    def collect(self) -> Iterable[Metric]:
        """One reading of everything."""
        if not self._node.name:
            return []
        reading = self._node.statistics()
        status, variants = reading.status, reading.variants
        labels, values = ["worker", "node"], [self._worker, status.node]
        ended = CounterMetricFamily(
            "tidegate_node_requests",
            "Requests executed or refused here, by how they ended.",
            labels=[*labels, "outcome"],
        )
        for attempt, count in zip(Attempt, status.counts, strict=True):
            if attempt not in (Attempt.LOST, Attempt.BOUNCED):  # words of other parts
                ended.add_metric([*values, attempt.name], count)
        link = CounterMetricFamily(
            "tidegate_node_link_seconds", "Time that emulated links were busy.", labels=[*labels, "to"]
        )
        for to, busy_s in (("uplink", reading.uplink_s), *sorted(reading.links_s.items())):
            link.add_metric([*values, to], busy_s)
        deployed = GaugeMetricFamily(
            "tidegate_node_variant_loaded", "1 while a variant is in memory.", labels=[*labels, "variant"]
        )
        for name in status.deployed:
            deployed.add_metric([*values, name], 1.0)
        loads = CounterMetricFamily("tidegate_node_loads", "Loads of variants.", labels=[*labels, "result"])
        loads.add_metric([*values, "ok"], variants.loads)
        loads.add_metric([*values, "failed"], variants.failed_loads)
        load_time = HistogramMetricFamily("tidegate_node_load_seconds", "What loads took.", labels=labels)
        add_histogram(load_time, values, variants.load_time)
        simple: tuple[tuple[type[CounterMetricFamily] | type[GaugeMetricFamily], str, str, float], ...] = (
            (CounterMetricFamily, "entered", "Requests that came, from clients or neighbours.", reading.entered),
            (CounterMetricFamily, "handed_on", "Requests passed on to a neighbour.", reading.handed_on),
            (CounterMetricFamily, "evictions", "Variants that left to make room.", variants.evictions),
            (GaugeMetricFamily, "passing", "Requests in preparation or on their way.", reading.passing),
            (
                GaugeMetricFamily,
                "queue_length",
                "Requests decided for this node, in execution included.",
                status.length,
            ),
            (GaugeMetricFamily, "waiting_tflop", "Tera-operations still to be done.", status.waiting_tflop),
            (GaugeMetricFamily, "memory_bytes", "The budget (10^6 bytes per MB).", 1e6 * variants.memory_mb),
            (GaugeMetricFamily, "memory_used_bytes", "Variants and requests' data.", 1e6 * variants.memory_used_mb),
        )
        families: list[Metric] = [ended, link, deployed, loads, load_time]
        for kind, name, text, value in simple:
            family = kind(f"tidegate_node_{name}", text, labels=labels)
            family.add_metric(values, value)
            families.append(family)
        return families
