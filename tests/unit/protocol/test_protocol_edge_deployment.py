"""The [edge] part of a deployment file: read with its defaults; what is wrong is named by key, value and remedy."""

from pathlib import Path

import pytest

from protocol.deployment import DeploymentError, read_deployment

GOOD = """
name = "x"
[edge]
per_service = 2
[edge.services.detection]
table = "tables/mine.toml"
requirement_ms = 500
[[edge.nodes]]
name = "a"
latitude = -37.81
longitude = 144.96
tflops = 1.0
memory_mb = 512
uplink_mbps = 48
[[edge.nodes]]
name = "b"
latitude = -37.82
longitude = 144.97
tflops = 0.5
memory_mb = 512
uplink_mbps = 36
[[edge.links]]
between = ["a", "b"]
bandwidth_mbps = 100
[[workers]]
name = "one"
node = "a"
preload = ["small"]
[[workers]]
name = "two"
node = "b"
"""


def error(folder: Path, text: str) -> str:
    """The error of a file, without its path."""
    (folder / "x.toml").write_text(text)
    with pytest.raises(DeploymentError) as caught:
        read_deployment(folder / "x.toml")
    return str(caught.value).partition(": ")[2]


def test_a_good_file_is_read_with_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(GOOD)
    file = read_deployment(tmp_path / "x.toml")
    edge = file.edge
    assert edge is not None
    assert (edge.policy, edge.window_ms, edge.per_service, edge.queue_capacity) == ("beam", 100.0, 2, 16)
    assert edge.services["detection"].table == str(tmp_path / "tables/mine.toml"), "relative to the file"
    assert (edge.emulate.uplink, edge.emulate.links, edge.emulate.compute) == (True, True, "table")
    assert [(worker.node, worker.preload) for worker in file.workers] == [("a", ("small",)), ("b", ())]
    assert file.desired_state().edge == edge


def test_a_named_graph_and_a_shipped_table_stay_names(tmp_path: Path) -> None:
    nodes = GOOD[GOOD.index("[[edge.nodes]]") : GOOD.index("[[workers]]")]
    text = (
        GOOD.replace(nodes, "").replace("per_service = 2", 'graph = "eua16"').replace("tables/mine.toml", "detection")
    )
    (tmp_path / "x.toml").write_text(
        text.replace('node = "a"', 'node = "51622"').replace('node = "b"', 'node = "11581"')
    )
    edge = read_deployment(tmp_path / "x.toml").edge
    assert edge is not None
    assert (edge.graph, edge.services["detection"].table) == ("eua16", "detection")


@pytest.mark.parametrize(
    ("line", "instead", "named"),
    [
        ("per_service = 2", "per_service = 0", ("edge.per_service = 0", "from 1 to 64")),
        ("per_service = 2", "window_ms = 0.5", ("edge.window_ms = 0.5", "from 1")),
        ("per_service = 2", "queue_capacity = 0", ("edge.queue_capacity = 0", "from 1")),
        ("per_service = 2", 'graph = "eua16"', ("edge.graph = 'eua16'", "either")),
        ("per_service = 2", 'emulate = { compute = "gpu" }', ("edge.emulate.compute = 'gpu'", "'table' or 'real'")),
        ("per_service = 2", "windw_ms = 5", ("edge.windw_ms = 5", "did you mean 'window_ms'")),
        ("requirement_ms = 500", "requirement_ms = 0", ("edge.services.detection.requirement_ms = 0", "above 0")),
        ("requirement_ms = 500", "max_body_bytes = 0", ("edge.services.detection.max_body_bytes = 0", "from 1")),
        ('"tables/mine.toml"', '""', ("edge.services.detection.table", "name a placement table")),
        ("tflops = 0.5", "tflops = inf", ("edge.nodes 'b'.tflops = inf", "finite")),
        ("tflops = 0.5", "tflops = -1", ("edge.nodes 'b'.tflops = -1", "above 0")),
        ("longitude = 144.97", "longitude = 200", ("edge.nodes 'b'", "no position")),
        ('between = ["a", "b"]', 'between = ["a", "c"]', ("['a', 'c']", "two different nodes")),
        ('between = ["a", "b"]', 'between = ["a", "a"]', ("['a', 'a']", "two different nodes")),
        ("bandwidth_mbps = 100", "bandwidth_mbps = 0", ("bandwidth_mbps above 0",)),
        ('node = "b"', 'node = "c"', ("node = 'c'", "a, b")),
        ('node = "b"', 'node = "a"', ("node = 'a' twice",)),
        ("[edge.services.detection]", "[edge.services.Detection]", ("edge.services.Detection", "a-z")),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, line: str, instead: str, named: tuple[str, ...]) -> None:
    assert line in GOOD
    message = error(tmp_path, GOOD.replace(line, instead, 1))
    assert all(part in message for part in named), message


def test_a_node_needs_an_edge_and_an_edge_needs_nodes(tmp_path: Path) -> None:
    without = GOOD[: GOOD.index("[edge]")] + GOOD[GOOD.index("[[workers]]") :]
    served = '[services.s]\nvariants = ["v"]\nrequirement_ms = 1\n' + without.replace('name = "x"', "")
    placed = served.replace('preload = ["small"]', 'instances = [{ variant = "v" }]')
    assert "has no [edge]" in error(tmp_path, f'name = "x"\n{placed}')
    nowhere = GOOD.replace('node = "a"', "").replace('node = "b"', "")
    assert "none is a node" in error(tmp_path, nowhere)


def test_an_edge_service_and_a_routed_service_do_not_share_a_name(tmp_path: Path) -> None:
    routed = '[services.detection]\nvariants = ["v"]\nrequirement_ms = 1\n'
    text = GOOD.replace('preload = ["small"]', 'instances = [{ variant = "v" }]') + routed
    assert "give each its own" in error(tmp_path, text)
