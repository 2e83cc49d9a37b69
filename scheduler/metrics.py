"""Prometheus metrics of the scheduler: slots decided, missed, and how long a table takes to be public."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class SchedulerMetrics:
    """Labels are the services of the deployment and the ends of a slot."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.slots = Counter(
            "tidegate_slots_total", "Slots by what became of them.", ["service", "end"], registry=self.registry
        )
        self.decide_seconds = Histogram(
            "tidegate_decide_seconds",
            "From the slot's start to the table on the board.",
            ["service"],
            buckets=_BUCKETS_S,
            registry=self.registry,
        )
        self.would_be = Gauge(
            "tidegate_shadow_ratio",
            "Goodput and violations of the shadowed router, of the active one in the same model, and as observed.",
            ["service", "of", "ratio"],
            registry=self.registry,
        )
        self.windows = Counter(
            "tidegate_placement_windows_total", "Placement windows by who decided.", ["policy"], registry=self.registry
        )
        self.window_seconds = Histogram(
            "tidegate_placement_decide_seconds",
            "From a window's arrival to its decision: the nodes' statuses and the policy.",
            buckets=_BUCKETS_S,
            registry=self.registry,
        )
        self.leading = Gauge("tidegate_scheduler_leading", "1 while this one holds the lease.", registry=self.registry)

    def serve(self, port: int) -> None:
        """Serves `/metrics` on `port`; 0 is off."""
        if port:
            start_http_server(port, registry=self.registry)
