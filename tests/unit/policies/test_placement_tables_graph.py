"""Service tables and graphs: what ships, what is refused, and paths against exhaustive search."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.placement.graph import (
    EUA16,
    EdgeGraph,
    GraphError,
    eua16,
    haversine_km,
    named_graph,
    pick_connected,
    read_eua,
    shortest_paths,
)
from policies.placement.tables import TableError, parse_table, read_table, shipped_tables

DETECTION, TRACKING = shipped_tables()


def raw_table() -> dict[str, Any]:
    """A small valid table."""
    return {
        "name": "s",
        "configuration": [{"name": "a", "size_factor": 1.0, "size_factor_source": "measured", "inferences": 2}],
        "variant": [{"name": "v", "memory_mb": 1.0, "tflop": 0.1, "accuracy": [0.5], "accuracy_source": ["published"]}],
        "requests": {"data_mb": [1, 2], "deadlines_s": [1.0]},
    }


def test_the_shipped_tables_are_the_papers() -> None:
    assert dict(zip(DETECTION.variants, DETECTION.tflop, strict=True))["r50_c4"] == 0.8193
    assert TRACKING.memory_mb.tolist() == [378.02, 157.93, 216.95]
    assert len(DETECTION.configurations) == len(TRACKING.configurations) == 16
    assert DETECTION.accuracy.max() == pytest.approx(0.42, abs=0.002)
    assert DETECTION.accuracy.min() == pytest.approx(0.097, abs=0.002)
    assert TRACKING.accuracy.min() / TRACKING.accuracy.max() == pytest.approx(0.6 / 0.85, abs=0.01)
    assert TRACKING.inferences.tolist() == [30, 15, 10, 5] * 4


def test_only_the_highest_configuration_has_published_accuracy_and_full_size() -> None:
    for table in (DETECTION, TRACKING):
        assert set(table.accuracy_source[0]) == {"published"}
        assert {s for row in table.accuracy_source[1:] for s in row} == {"modelled"}
        assert set(table.size_factor_source) == {"measured"}
        assert table.size_factor[0] == 1.0
        assert (table.size_factor[1:] < 0.65).all()
        assert table.standard_accuracy.max() == 1.0
        assert table.standard_accuracy.min() == 0.0


def test_a_lower_configuration_is_never_larger_or_more_accurate() -> None:
    for table in (DETECTION, TRACKING):
        grid = table.size_factor.reshape(4, 4)
        assert (np.diff(grid, axis=0) < 0).all()
        assert (np.diff(grid, axis=1) < 0).all()
        accuracy = table.accuracy.reshape(4, 4, -1)
        assert (np.diff(accuracy, axis=0) < 0).all()
        assert (np.diff(accuracy, axis=1) < 0).all()


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("name",), "", "name"),
        (("configuration",), [], r"\[\[configuration\]\]"),
        (("variant",), [], r"\[\[variant\]\]"),
        (("configuration", 0, "size_factor"), 1.5, "at most 1"),
        (("configuration", 0, "size_factor"), float("nan"), "size_factor"),
        (("configuration", 0, "inferences"), 0, "inferences"),
        (("variant", 0, "memory_mb"), -1, "memory_mb"),
        (("variant", 0, "tflop"), float("inf"), "tflop"),
        (("variant", 0, "accuracy"), [0.5, 0.6], "1 numbers"),
        (("variant", 0, "accuracy_source"), ["guessed"], "published, measured, modelled"),
        (("requests", "data_mb"), [3, 2], "smaller figure"),
        (("requests", "deadlines_s"), [], "deadlines_s"),
    ],
)
def test_a_wrong_table_is_refused_by_key(path: tuple[Any, ...], value: Any, says: str) -> None:
    raw = raw_table()
    place: Any = raw
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(TableError, match=says):
        parse_table(raw, "test")


def test_json_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(raw_table()))
    assert read_table(tmp_path / "t.json").variants == ("v",)
    assert read_table(tmp_path / "t.json").standard_accuracy.tolist() == [[1.0]]
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(TableError, match="name"):
        read_table(tmp_path / "empty.toml")
    with pytest.raises(TableError, match="cannot be read"):
        read_table(tmp_path / "missing.toml")


def test_eua16_is_the_papers_setting() -> None:
    graph = eua16()
    assert graph.nodes == 16
    assert len(graph.links) == 29
    degree = np.bincount(graph.links.ravel())
    assert (degree.min(), degree.max()) == (2, 6)
    for a, b in itertools.combinations(range(16), 2):
        near = float(haversine_km(graph.positions[a], graph.positions[b])) < 0.5
        assert near == ([a, b] in graph.links.tolist())
    assert eua16(1).bandwidth_mbps.tolist() != graph.bandwidth_mbps.tolist()
    assert eua16().bandwidth_mbps.tolist() == graph.bandwidth_mbps.tolist()


def small_graph(seed: int) -> EdgeGraph:
    rng = np.random.default_rng(seed)
    links = np.array([[0, 1], [1, 2], [2, 3], [3, 4], [4, 0], [1, 3], [0, 2]])
    return EdgeGraph(
        names=tuple("abcde"),
        positions=np.zeros((5, 2)),
        tflops=np.ones(5),
        memory_mb=np.ones(5),
        uplink_mbps=np.ones(5),
        links=links,
        bandwidth_mbps=rng.choice([50.0, 100.0, 200.0, 400.0], 7),
        routing_usd_per_mb=rng.choice([0.001, 0.002], 7),
    )


@pytest.mark.parametrize("seed", range(8))
def test_paths_are_the_shortest_of_all_simple_paths(seed: int) -> None:
    graph = small_graph(seed)
    paths = shortest_paths(graph)
    cost = {}
    for (a, b), w, p in zip(graph.links.tolist(), graph.bandwidth_mbps, graph.routing_usd_per_mb, strict=True):
        cost[a, b] = cost[b, a] = (1.0 / w, p)
    for start, end in itertools.permutations(range(5), 2):
        rest = [n for n in range(5) if n not in (start, end)]
        found = []
        for count in range(4):
            for middle in itertools.permutations(rest, count):
                route = [start, *middle, end]
                steps = list(itertools.pairwise(route))
                if all(step in cost for step in steps):
                    found.append((sum(cost[s][0] for s in steps), sum(cost[s][1] for s in steps)))
        shortest = min(found, key=lambda x: (round(x[0], 10), x[1]))
        assert paths.s_per_megabit[start, end] == pytest.approx(shortest[0], abs=1e-12)
        assert paths.usd_per_megabit[start, end] == pytest.approx(shortest[1], abs=1e-12)
        route = paths.route(start, end)
        assert len(route) == paths.hops[start, end] + 1
        assert sum(cost[s][0] for s in itertools.pairwise(route)) == pytest.approx(shortest[0], abs=1e-12)


def test_a_graph_in_two_parts_is_refused() -> None:
    graph = eua16()
    with pytest.raises(GraphError, match=r"two parts.*add a link"):
        replace(graph, links=graph.links[:3], bandwidth_mbps=graph.bandwidth_mbps[:3])


@pytest.mark.parametrize("key", ["tflops", "memory_mb", "uplink_mbps", "bandwidth_mbps"])
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_capacities_have_to_be_finite_and_positive(key: str, value: float) -> None:
    figures = getattr(eua16(), key).copy()
    figures[0] = value
    with pytest.raises(GraphError, match=key):
        replace(eua16(), **{key: figures})


def test_nearest_access_point() -> None:
    graph = eua16()
    for k, (_, latitude, longitude) in enumerate(EUA16):
        assert graph.nearest_node(latitude + 1e-5, longitude - 1e-5) == k
    with pytest.raises(GraphError, match="finite"):
        graph.nearest_node(float("nan"), 0.0)


def test_graphs_by_name_and_from_any_eua_file(tmp_path: Path) -> None:
    file = tmp_path / "sites.csv"
    rng = np.random.default_rng(0)
    sites = np.array([-37.815, 144.96]) + rng.uniform(-0.006, 0.006, (80, 2))
    rows = "".join(f"{i},{a},{b}\n" for i, (a, b) in enumerate(sites))
    file.write_text("SITE_ID,LATITUDE,LONGITUDE\n" + rows)
    assert read_eua(file)[1].shape == (80, 2)
    for name in ("eua16:3", "geometric:1", f"{file}:2"):
        assert named_graph(name).nodes == 16
    redrawn, original = named_graph("eua16-bandwidths:3"), named_graph("eua16")
    assert (redrawn.bandwidth_mbps != original.bandwidth_mbps).any()
    for kept in ("links", "tflops", "memory_mb", "uplink_mbps", "positions"):
        np.testing.assert_array_equal(getattr(redrawn, kept), getattr(original, kept))
    with pytest.raises(GraphError, match="not an EUA site file"):
        read_eua(Path(__file__))
    for name in ("mars", "eua16:x"):
        with pytest.raises(GraphError, match="graph"):
            named_graph(name)
    with pytest.raises(GraphError, match="connected sites"):
        pick_connected(np.array([[0.0, 0.0], [1.0, 1.0]]), 2, 0)
