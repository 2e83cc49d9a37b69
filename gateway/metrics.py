"""Prometheus metrics of a gateway. Labels are bounded: services, variants and instances of the deployment, outcomes.

Request counts and latencies are plain prometheus-client metrics, so that several gateway processes on one port add up
through its multiprocess mode (`PROMETHEUS_MULTIPROC_DIR`). What instances look like comes from `.statistics()`.
"""

import os
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector

from gateway.dispatch import DispatchStatistics
from gateway.router import ServiceRouter
from protocol.outcomes import OUTCOMES, Outcome

_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3)
BUCKETS_S = (*_BUCKETS_S, 0.4, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)
UNKNOWN = "unknown"


class GatewayMetrics:
    """Counts every request once, by service and outcome. `tally` is the same count for `/state` and tests."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        requests = Counter(
            "tidegate_requests_total", "Requests by outcome.", ["service", "outcome"], registry=self.registry
        )
        seconds = Histogram(
            "tidegate_request_seconds",
            "From the request's arrival to its answer, for answered requests.",
            ["service"],
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        answers = Counter(
            "tidegate_answers_total", "Answers by variant.", ["service", "variant"], registry=self.registry
        )
        self._requests, self._seconds, self._answers = requests, seconds, answers
        self._outcomes: dict[str, list[Counter]] = {}
        self._histograms: dict[str, Histogram] = {}
        self._variants: dict[tuple[str, str], Counter] = {}
        self.tally: Tally[tuple[str, Outcome]] = Tally()
        self.in_flight = 0

    def count(self, service: str, outcome: Outcome, seconds: float | None, variant: str | None) -> None:
        """One request has ended. `service` is one of the deployment's or `UNKNOWN`."""
        self.tally[service, outcome] += 1
        children = self._outcomes.get(service)
        if children is None:
            children = self._outcomes[service] = [self._requests.labels(service, one.name) for one in OUTCOMES]
            self._histograms[service] = self._seconds.labels(service)
        children[outcome].inc()
        if seconds is not None:
            self._histograms[service].observe(seconds)
        if variant is not None:
            counter = self._variants.get((service, variant))
            if counter is None:
                counter = self._variants[service, variant] = self._answers.labels(service, variant)
            counter.inc()

    def exposition(self) -> bytes:
        """The text for `/metrics`; with several processes, the sum over all of them."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)


class FleetCollector:
    """This process's view of the instances, read at scrape time."""

    def __init__(
        self, services: Callable[[], Iterable[ServiceRouter]], dispatch: Callable[[], DispatchStatistics]
    ) -> None:
        self._services = services
        self._dispatch = dispatch

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus-client for every scrape."""
        now_s = time.monotonic()
        length = GaugeMetricFamily(
            "tidegate_instance_length", "Requests in the instance.", labels=["service", "instance"]
        )
        ready = GaugeMetricFamily("tidegate_instance_ready", "1 if routable.", labels=["service", "instance"])
        margin = GaugeMetricFamily(
            "tidegate_deadline_margin", "Share of the budget that deadline plans with.", labels=["service"]
        )
        for router in self._services():
            statistics = router.statistics(now_s)
            margin.add_metric([router.name], statistics.margin)
            for view in statistics.instances:
                length.add_metric([router.name, view.id], view.length)
                ready.add_metric([router.name, view.id], float(view.ready))
        attempts = CounterMetricFamily(
            "tidegate_attempts", "Attempts at an instance by their end.", labels=["instance", "end"]
        )
        for one, ends in self._dispatch().attempts.items():
            for end, number in ends.items():
                attempts.add_metric([one, end], number)
        yield from (length, ready, margin, attempts)
