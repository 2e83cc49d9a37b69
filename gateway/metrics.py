"""Prometheus metrics of a gateway. Labels are bounded: services, variants and instances of the deployment, outcomes.

Request counts and latencies are plain prometheus-client metrics, so that several gateway processes on one port add up
through its multiprocess mode (`PROMETHEUS_MULTIPROC_DIR`). What instances look like: `fleet_metrics.py`.
"""

from collections import Counter as Tally

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from gateway.fleet_metrics import FleetMetrics, shared_folder
from protocol.outcomes import OUTCOMES, Outcome

_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3)
BUCKETS_S = (*_BUCKETS_S, 0.4, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)
UNKNOWN = "unknown"


class GatewayMetrics:
    """Counts every request once, by service and outcome. `tally` is the same count for `/state` and tests."""

    def __init__(self, fleet: FleetMetrics) -> None:
        self.fleet = fleet
        self.registry = CollectorRegistry()
        self.registry.register(fleet)
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
        if shared_folder() is None:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        together.register(self.fleet)
        return generate_latest(together)
