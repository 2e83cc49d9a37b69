"""What a deployment makes of one node."""

from pathlib import Path

import msgspec
import pytest

from models.adapt import Configuration
from policies.placement.deployed import network_of
from policies.placement.graph import eua16
from policies.placement.tables import TableError
from protocol.edge_records import EdgeLinkSpec, EdgeSpec
from protocol.records import Deployment, WorkerSpec
from tests.fakes.edge_models import bright_deployment
from workers.edge_view import Unknown, view_of


def changed(deployment: Deployment, **edge: object) -> Deployment:
    """The deployment with other settings of its [edge]."""
    assert isinstance(deployment.edge, EdgeSpec)
    return msgspec.structs.replace(deployment, edge=msgspec.structs.replace(deployment.edge, **edge))


def test_a_task_says_what_the_indices_mean(tmp_path: Path) -> None:
    view = view_of(bright_deployment(tmp_path, tflops=1.5, preload=("large",)), "w-b")
    assert view is not None
    assert (view.name, view.index) == ("b", 1)
    assert (view.tflops, view.uplink_mbps) == (1.5, 100.0)
    assert view.preload == {"large": 300.0}
    task = view.task("detection", 1, 1, 2)
    assert (task.variant, task.memory_mb) == ("large", 300.0)
    assert task.work_tflop == pytest.approx(0.05)
    assert task.configuration == Configuration(resolution=0.5, jpeg_quality=80)
    assert view.task("tracking", 0, 0, 0).configuration == Configuration(frame_rate=5)
    assert view.task("tracking", 0, 0, 0).work_tflop == pytest.approx(2 * 0.02)
    with pytest.raises(Unknown, match="variant 5 of detection: node b knows 0 to 4"):
        view.task("detection", 0, 5, 0)


@pytest.mark.parametrize("prefix", ["", "scenes-"])
def test_the_shipped_tables_can_be_applied(tmp_path: Path, prefix: str) -> None:
    """Every setting in them is one that a node can apply; every node has its neighbours and its way to all others."""
    deployment = bright_deployment(tmp_path, graph="eua16:2")
    services = deployment.edge.services if deployment.edge is not None else {}
    shipped = {name: msgspec.structs.replace(spec, table=prefix + name) for name, spec in services.items()}
    graph = eua16(2)
    matrix = graph.bandwidth_matrix()
    for number, name in enumerate(graph.names):
        view = view_of(changed(deployment, services=shipped), f"w-{name}")
        assert view is not None
        counts = [len(table.configurations) for table in view.network.tables]
        assert [len(one) for one in view.configurations] == counts
        assert min(counts) > 1
        widths = {other: one.bandwidth_mbps for other, one in view.neighbours.items()}
        assert widths == {int(other): width for other, width in enumerate(matrix[number]) if width}
        for to in set(range(16)) - {number}:
            assert view.next_towards(to) in view.neighbours


def test_of_parallel_links_the_widest_counts(tmp_path: Path) -> None:
    deployment = bright_deployment(tmp_path, nodes="ab")
    links = tuple(EdgeLinkSpec(between=("b", "a"), bandwidth_mbps=width) for width in (10.0, 50.0, 20.0))
    both = changed(deployment, links=links)
    view = view_of(both, "w-a")
    assert view is not None
    assert both.edge is not None
    assert view.neighbours[1].bandwidth_mbps == pytest.approx(1 / network_of(both.edge).paths.s_per_megabit[0, 1])


def test_a_worker_without_a_node_has_no_view(tmp_path: Path) -> None:
    deployment = bright_deployment(tmp_path, nodes="ab")
    assert view_of(deployment, "somebody") is None
    assert view_of(msgspec.structs.replace(deployment, edge=None), "w-a") is None
    assert view_of(msgspec.structs.replace(deployment, workers=(WorkerSpec(name="w-a"),)), "w-a") is None


def test_what_cannot_be_is_named(tmp_path: Path) -> None:
    deployment = bright_deployment(tmp_path, nodes="ab")
    strange = msgspec.structs.replace(deployment, workers=(WorkerSpec(name="w", node="z"),))
    with pytest.raises(ValueError, match="node = 'z': the graph has a, b"):
        view_of(strange, "w")
    strange = msgspec.structs.replace(deployment, workers=(WorkerSpec(name="w", node="a", preload=("huge",)),))
    with pytest.raises(ValueError, match=r"preload 'huge': the tables have broken, follower, large"):
        view_of(strange, "w")
    table = tmp_path / "bright-detection.toml"
    for bad, reason in (
        (
            "brightness = 3",
            "detection: configuration 'whole' has the setting 'brightness': a node can apply resolution",
        ),
        ("jpeg_quality = 300", "jpeg_quality = 300: 1 to 100"),
    ):
        table.write_text(table.read_text().replace("jpeg_quality = 80", bad))
        with pytest.raises(TableError, match=reason):
            view_of(deployment, "w-a")
        bright_deployment(tmp_path)  # writes the tables again
