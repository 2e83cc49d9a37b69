"""A deployment's [edge] becomes the network that everybody accounts by."""

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from policies.placement.actors import LearnedPolicy
from policies.placement.contract import ArtifactError
from policies.placement.deployed import experiment, graph_of, network_of
from policies.placement.evaluate import build_policy
from policies.placement.graph import GraphError, eua16
from policies.placement.tables import TableError
from policies.placement.workload import Load
from protocol.edge_records import EdgeLinkSpec, EdgeNodeSpec, EdgeServiceSpec, EdgeSpec

DEPLOYMENTS = Path(__file__).parents[3] / "deploy"
NODES = tuple(
    EdgeNodeSpec(name=name, latitude=-37.8, longitude=144.9, tflops=tflops, memory_mb=512, uplink_mbps=48)
    for name, tflops in (("b", 1.0), ("a", 0.5))
)
LINKS = tuple(EdgeLinkSpec(between=("b", end), bandwidth_mbps=100) for end in ("a", "c"))
SERVICES = {"pictures": EdgeServiceSpec(table="detection"), "tracking": EdgeServiceSpec(table="tracking")}


def test_a_graph_by_hand_keeps_the_order_of_its_nodes() -> None:
    edge = EdgeSpec(services=SERVICES, nodes=NODES, links=(EdgeLinkSpec(between=("a", "b"), bandwidth_mbps=100),))
    network = network_of(edge)
    assert network.graph.names == ("b", "a")
    assert network.graph.tflops.tolist() == [1.0, 0.5]
    assert network.paths.s_per_megabit[0, 1] == pytest.approx(0.01)
    assert [table.name for table in network.tables] == ["pictures", "tracking"]


def test_a_named_graph_is_the_same_as_elsewhere() -> None:
    graph = graph_of(EdgeSpec(services=SERVICES, graph="eua16:3"))
    assert np.array_equal(graph.tflops, eua16(3).tflops)


def test_what_cannot_be_found_is_named() -> None:
    with pytest.raises(TableError, match=r"edge.services.pictures.table = 'nothing'.*detection, "):
        network_of(EdgeSpec(services={"pictures": EdgeServiceSpec(table="nothing")}, graph="eua16"))
    with pytest.raises(GraphError, match="two parts"):
        network_of(EdgeSpec(services=SERVICES, nodes=NODES))


def test_policies_are_trained_for_a_named_graph_or_for_a_deployment() -> None:
    network, load = experiment("eua16", 5)
    assert (network.nodes, [table.name for table in network.tables]) == (16, ["detection", "tracking"])
    assert load == Load(per_service=5)
    network, load = experiment(str(DEPLOYMENTS / "edge4.toml"), 2)
    assert network.graph.names == ("harbour", "market", "station", "gardens")
    assert load.per_service == 2
    assert 0 < load.system_tflop[1] < network.graph.tflops.max(), "less than a second of work"
    assert load.memory_used_mb[1] < network.graph.memory_mb.min()


def test_a_deployment_without_an_edge_trains_nothing(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"digits.toml has no \[edge\]"):
        experiment(str(DEPLOYMENTS / "digits.toml"), 4)
    with pytest.raises(GraphError, match="cannot be read"):
        experiment(str(tmp_path / "none.toml"), 4)


def test_a_learned_policy_is_found_for_the_network_that_it_was_trained_for() -> None:
    for graph, trained_for in (("eua16", 16), (str(DEPLOYMENTS / "edge4.toml"), 4)):
        policy = build_policy("hisper-sequential", *experiment(graph, 4))
        assert isinstance(policy, LearnedPolicy)
        assert policy.artifact.actions[2] == trained_for
    three = EdgeSpec(services=SERVICES, nodes=(*NODES, replace(NODES[0], name="c")), links=LINKS)
    with pytest.raises(ArtifactError, match=r"hisper-sequential: trained on layout"):
        build_policy("hisper-sequential", network_of(three), Load())
