"""What Prometheus reads from an edge node."""

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.edge_models import bright_deployment, picture
from tests.fakes.edge_world import World, run_world
from workers.edge_metrics import NodeCollector
from workers.edge_node import EdgeNode


def read(node: EdgeNode) -> dict[tuple[str, ...], float]:
    """All samples by name and by the labels beside worker and node."""
    registry = CollectorRegistry()
    registry.register(NodeCollector("w", node))
    return {
        (
            sample.name,
            *(value for label, value in sample.labels.items() if label not in ("worker", "node")),
        ): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def test_metrics_are_the_nodes_books(tmp_path: Path) -> None:
    """Two requests a to b and one nonsense: what each node counts, holds, loaded and kept its links busy with."""

    async def scenario() -> None:
        world = World(bright_deployment(tmp_path, tflops=0.02), load_s=0.03)
        ended = await asyncio.gather(*(world.infer("a", "b", picture()) for _ in range(2)))
        await world.infer("a", "b", b"nonsense")
        a, b = read(world.nodes["a"]), read(world.nodes["b"])
        assert a["tidegate_node_entered_total",] == 3
        assert a["tidegate_node_handed_on_total",] == 2
        assert a["tidegate_node_requests_total", "INVALID"] == 1
        assert b["tidegate_node_requests_total", "OK"] == 2
        assert b["tidegate_node_queue_length",] == 0
        assert (b["tidegate_node_loads_total", "ok"], b["tidegate_node_load_seconds_bucket", "0.04"]) == (1, 1)
        assert b["tidegate_node_variant_loaded", "small"] == 1
        assert (b["tidegate_node_memory_bytes",], b["tidegate_node_memory_used_bytes",]) == (400e6, 100e6)
        carried_s = sum(8 * one.reply.adapted_mb / 100 for one in ended)
        assert a["tidegate_node_link_seconds_total", "uplink"] == pytest.approx(carried_s)
        assert a["tidegate_node_link_seconds_total", "b"] == pytest.approx(carried_s)
        assert b["tidegate_node_link_seconds_total", "c"] == 0
        waiting = asyncio.create_task(world.infer("b", "b", picture(), variant="large"))
        await asyncio.sleep(0.5)
        b = read(world.nodes["b"])
        assert b["tidegate_node_queue_length",] == 1
        assert b["tidegate_node_waiting_tflop",] == pytest.approx(0.1 - 0.5 * 0.02, abs=1e-3)
        await waiting
        world.nodes["a"].follow("", None)
        assert read(world.nodes["a"]) == {}

    run_world(scenario())
