"""Prometheus metrics of a worker: read from `statistics()` at each scrape, so serving pays nothing for them."""

import contextlib
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from protocol.outcomes import Attempt
from workers.config import ConfigError
from workers.histogram import HistogramStatistics
from workers.host import Host


class WorkerCollector(Collector):
    """All series of one worker. Labels are bounded: its instances, their variants, the attempts' names."""

    def __init__(self, worker: str, host: Host) -> None:
        self._worker = worker
        self._host = host

    def collect(self) -> Iterable[Metric]:
        """One reading of everything."""
        labels = ["worker", "instance", "variant"]
        ended = CounterMetricFamily(
            "tidegate_worker_requests", "Requests that ended, by how they ended.", labels=[*labels, "outcome"]
        )
        arrived = CounterMetricFamily("tidegate_worker_arrived", "Requests that came.", labels=labels)
        length = GaugeMetricFamily("tidegate_worker_queue_length", "Places taken, in service included.", labels=labels)
        capacity = GaugeMetricFamily("tidegate_worker_queue_capacity", "Places.", labels=labels)
        ready = GaugeMetricFamily("tidegate_worker_instance_ready", "1 while requests are admitted.", labels=labels)
        expected = GaugeMetricFamily(
            "tidegate_worker_expected_service_seconds", "Running estimate for one request.", labels=labels
        )
        loads = CounterMetricFamily("tidegate_worker_loads", "Loads of a variant.", labels=[*labels, "result"])
        queue_time = HistogramMetricFamily(
            "tidegate_worker_queue_seconds", "From prepared to the start of service.", labels=labels
        )
        service_time = HistogramMetricFamily("tidegate_worker_service_seconds", "Service, per batch.", labels=labels)
        statistics = self._host.statistics()
        for one in statistics.instances:
            values = [self._worker, one.id, one.variant]
            for attempt, count in zip(Attempt, one.queue.counts, strict=True):
                if attempt is not Attempt.LOST:  # the gateway's word, never a worker's
                    ended.add_metric([*values, attempt.name], count)
            arrived.add_metric(values, one.queue.arrived)
            length.add_metric(values, one.queue.length)
            capacity.add_metric(values, one.queue.capacity)
            ready.add_metric(values, float(one.state == "ready"))
            expected.add_metric(values, one.service_s)
            loads.add_metric([*values, "ok"], one.loads)
            loads.add_metric([*values, "failed"], one.failed_loads)
            add_histogram(queue_time, values, one.queue_time)
            add_histogram(service_time, values, one.service_time)
        unknown = CounterMetricFamily(
            "tidegate_worker_unknown", "Requests for instances that are not here.", labels=["worker"]
        )
        unknown.add_metric([self._worker], statistics.unknown)
        backlog = GaugeMetricFamily("tidegate_worker_backlog_seconds", "Predicted time to clear.", labels=["worker"])
        backlog.add_metric([self._worker], statistics.backlog_s)
        return [ended, arrived, length, capacity, ready, expected, loads, queue_time, service_time, unknown, backlog]


def add_histogram(family: HistogramMetricFamily, labels: list[str], reading: HistogramStatistics) -> None:
    """Adds one series. Prometheus counts cumulatively and calls the open bucket +Inf."""
    total, buckets = 0, []
    for bound, count in zip([*map(str, reading.bounds_s), "+Inf"], reading.counts, strict=True):
        total += count
        buckets.append((bound, total))
    family.add_metric(labels, buckets, reading.total_s)


@contextlib.contextmanager
def serve_metrics(host_name: str, port: int | None, *collectors: Collector) -> Iterator[int | None]:
    """Serve `/metrics` of `collectors` in a thread of its own while the context lasts; nothing without a port.

    Gives the port. Raises `ConfigError` if it is taken.
    """
    if port is None:
        yield None
        return
    registry = CollectorRegistry()
    for collector in (*collectors, ProcessCollector(registry=None), PlatformCollector(registry=None)):
        registry.register(collector)
    GCCollector(registry)
    try:
        server, thread = start_http_server(port, addr=host_name, registry=registry)
    except OSError as error:
        raise ConfigError("metrics_port", port, f"cannot be listened on ({error.strerror}): choose another") from error
    try:
        yield int(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
