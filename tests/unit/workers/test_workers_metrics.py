"""What Prometheus reads from a worker."""

import urllib.request
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from workers.config import ConfigError
from workers.metrics import WorkerCollector, serve_metrics

Bench = Any  # of this folder's conftest.py


def test_metrics_read_the_statistics(bench: Bench) -> None:
    """Over HTTP, parsed by prometheus-client's own parser: they add up to what was done."""
    bench.add("a", 0.03, capacity=2)
    for _ in range(5):
        bench.send("a")
    bench.clock.advance_to(1.0)
    with serve_metrics("127.0.0.1", 0, WorkerCollector("w", bench.host)) as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        with pytest.raises(ConfigError, match="metrics_port"), serve_metrics("127.0.0.1", port):
            pass
    samples = {
        (sample.name, sample.labels.get("outcome") or sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["tidegate_worker_requests_total", "OK"] == 2
    assert samples["tidegate_worker_requests_total", "QUEUE_FULL"] == 3
    assert samples["tidegate_worker_arrived_total", None] == 5
    assert samples["tidegate_worker_service_seconds_bucket", "0.02"] == 0
    assert samples["tidegate_worker_service_seconds_bucket", "0.04"] == 2
    assert samples["tidegate_worker_service_seconds_count", None] == 2
    assert samples["tidegate_worker_queue_seconds_sum", None] == pytest.approx(0.03)
    assert samples["tidegate_worker_instance_ready", None] == 1
