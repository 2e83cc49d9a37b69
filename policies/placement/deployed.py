"""The edge network that a deployment's `[edge]` describes: what gateway, scheduler and nodes decide and account by."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from policies.placement.contract import ALL, FloatArray
from policies.placement.edge_network import EdgeNetwork
from policies.placement.graph import EdgeGraph, GraphError, named_graph
from policies.placement.tables import TABLES_DIRECTORY, ServiceTable, TableError, read_table, shipped_tables
from policies.placement.workload import Load
from protocol.deployment import DeploymentError, did_you_mean, read_deployment
from protocol.edge_records import EdgeSpec

BUSY_S = 0.3
"""Work that waits on a node while policies are trained for a deployment: at most so many seconds of it."""


def network_of(edge: EdgeSpec) -> EdgeNetwork:
    """The network, services in the deployment's order. Raises GraphError or TableError, which name what is wrong."""
    return EdgeNetwork(graph_of(edge), [_table(name, spec.table) for name, spec in edge.services.items()])


def policy_fault(edge: EdgeSpec) -> str:
    """Empty if the policy's name is one of those known, or a path; whether it fits shows when it is loaded."""
    if edge.policy in ALL or "/" in edge.policy:
        return ""
    meant = did_you_mean(edge.policy, ALL)
    return f"edge.policy = {edge.policy!r}: must be one of {', '.join(ALL)}, or the path of a trained one{meant}"


def experiment(graph: str, per_service: int) -> tuple[EdgeNetwork, Load]:
    """Where policies are trained and evaluated: a named graph with Huang's tables and load, or a deployment's file.

    A deployment (`graph` ends in .toml) brings its own network and tables; its nodes are drawn with up to `BUSY_S` of
    work and a third of the smallest memory in use. Raises GraphError or TableError.
    """
    if not graph.endswith(".toml"):
        return EdgeNetwork(named_graph(graph), shipped_tables()), Load(per_service=per_service)
    try:
        edge = read_deployment(Path(graph)).edge
    except DeploymentError as error:
        raise GraphError(str(error)) from error
    if edge is None:
        raise GraphError(f"{graph} has no [edge]: there is no network to place requests on")
    network = network_of(edge)
    waiting = 0.0, BUSY_S * float(network.graph.tflops.mean())
    used = 0.0, float(network.graph.memory_mb.min()) / 3
    return network, Load(per_service=per_service, system_tflop=waiting, memory_used_mb=used)


def graph_of(edge: EdgeSpec) -> EdgeGraph:
    """The named graph, or the one that is given by hand. Raises GraphError."""
    if edge.graph:
        return named_graph(edge.graph)
    index = {node.name: number for number, node in enumerate(edge.nodes)}
    ends = [[index[end] for end in link.between] for link in edge.links]
    return EdgeGraph(
        names=tuple(index),
        positions=np.array([[node.latitude, node.longitude] for node in edge.nodes]),
        tflops=_column([node.tflops for node in edge.nodes]),
        memory_mb=_column([node.memory_mb for node in edge.nodes]),
        uplink_mbps=_column([node.uplink_mbps for node in edge.nodes]),
        links=np.array(ends, dtype=np.int64).reshape(-1, 2),
        bandwidth_mbps=_column([link.bandwidth_mbps for link in edge.links]),
        routing_usd_per_mb=_column([link.usd_per_megabit for link in edge.links]),
    )


def _column(figures: list[float]) -> FloatArray:
    return np.array(figures, dtype=np.float64)


def _table(service: str, table: str) -> ServiceTable:
    path = Path(table) if "/" in table else TABLES_DIRECTORY / f"{table}.toml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in TABLES_DIRECTORY.glob("*.toml")))
        raise TableError(f"edge.services.{service}.table = {table!r}: no such table; shipped are {shipped}")
    return replace(read_table(path), name=service)
