"""What one node knows of the network that it belongs to: its place, its neighbours, what a request means. Pure.

Made anew from the deployment whenever that changes; requests under way keep the view that they came with.
"""

from dataclasses import dataclass
from typing import cast

from models.adapt import Configuration
from policies.placement.deployed import network_of
from policies.placement.edge_network import MEGABITS_PER_MEGABYTE, EdgeNetwork
from policies.placement.tables import TableError
from protocol.edge_records import Emulation
from protocol.records import Deployment


class Unknown(ValueError):
    """A service, configuration, variant or node that this node's deployment does not have; the message says which."""


@dataclass(frozen=True)
class Task:
    """One request's decision in this node's terms. `variant`: the catalog's name; `work_tflop`: A_j I_i of Eq. 5."""

    service: str
    configuration: Configuration
    variant: str
    memory_mb: float
    work_tflop: float


@dataclass(frozen=True)
class Neighbour:
    """A node at the other end of a link."""

    name: str
    bandwidth_mbps: float


@dataclass(frozen=True)
class NodeView:
    """One node's part of a deployment's `[edge]`."""

    name: str
    index: int
    network: EdgeNetwork
    configurations: tuple[tuple[Configuration, ...], ...]
    """Per service, in the tables' order."""
    neighbours: dict[int, Neighbour]
    queue_capacity: int
    emulate: Emulation
    preload: dict[str, float]
    """Variants that are loaded at once and kept, and their megabytes."""
    device: str
    threads: int

    @property
    def tflops(self) -> float:
        """A_k."""
        return float(self.network.graph.tflops[self.index])

    @property
    def memory_mb(self) -> float:
        """B_k."""
        return float(self.network.graph.memory_mb[self.index])

    @property
    def uplink_mbps(self) -> float:
        """Of the wireless access to this node."""
        return float(self.network.graph.uplink_mbps[self.index])

    @property
    def variants(self) -> frozenset[str]:
        """Every variant that may be asked for."""
        return frozenset(name for table in self.network.tables for name in table.variants)

    def task(self, service: str, configuration: int, variant: int, node: int) -> Task:
        """What was decided, by this view's tables. Raises `Unknown`."""
        tables = self.network.tables
        names = [table.name for table in tables]
        if service not in names:
            raise Unknown(f"service {service[:64]!r}: node {self.name} knows {', '.join(names)}")
        s = names.index(service)
        table = tables[s]
        for what, index, count in (
            ("configuration", configuration, len(table.configurations)),
            ("variant", variant, len(table.variants)),
            ("node", node, self.network.nodes),
        ):
            if not 0 <= index < count:
                raise Unknown(f"{what} {index} of {service}: node {self.name} knows 0 to {count - 1}")
        return Task(
            service,
            self.configurations[s][configuration],
            table.variants[variant],
            float(table.memory_mb[variant]),
            float(self.network.work_tflop[s, configuration, variant]),
        )

    def next_towards(self, node: int) -> int:
        """The neighbour that leads to `node` on the shortest path (Eq. 4)."""
        return int(self.network.paths.next_node[self.index, node])


def megabits(data_mb: float) -> float:
    """What a link has to carry for so many megabytes."""
    return MEGABITS_PER_MEGABYTE * data_mb


def view_of(deployment: Deployment, worker: str) -> NodeView | None:
    """The worker's node, or None if it is none. Raises GraphError, TableError or ValueError: what is wrong, and where.

    Files of tables and graphs are read.
    """
    spec = next((one for one in deployment.workers if one.name == worker), None)
    if deployment.edge is None or spec is None or not spec.node:
        return None
    network = network_of(deployment.edge)
    graph = network.graph
    if spec.node not in graph.names:
        raise ValueError(f"workers {worker!r}: node = {spec.node!r}: the graph has {', '.join(graph.names)}")
    memory_mb = {
        name: float(mb) for table in network.tables for name, mb in zip(table.variants, table.memory_mb, strict=True)
    }
    if strange := [name for name in spec.preload if name not in memory_mb]:
        raise ValueError(f"workers {worker!r}: preload {strange[0]!r}: the tables have {', '.join(sorted(memory_mb))}")
    index = graph.names.index(spec.node)
    return NodeView(
        name=spec.node,
        index=index,
        network=network,
        configurations=tuple(
            tuple(
                _configuration(settings, f"{table.name}: configuration {name!r}")
                for name, settings in zip(table.configurations, table.settings, strict=True)
            )
            for table in network.tables
        ),
        neighbours=_neighbours(network, index),
        queue_capacity=deployment.edge.queue_capacity,
        emulate=deployment.edge.emulate,
        preload={name: memory_mb[name] for name in spec.preload},
        device=spec.device,
        threads=spec.threads,
    )


def _configuration(settings: object, where: str) -> Configuration:
    """A table's settings as what can be applied to bytes. Raises TableError."""
    given = dict(cast(dict[str, float], settings))
    if strange := sorted(given.keys() - set(Configuration.__struct_fields__)):
        known = ", ".join(Configuration.__struct_fields__)
        raise TableError(f"{where} has the setting {strange[0]!r}: a node can apply {known}")
    if "jpeg_quality" in given:
        given["jpeg_quality"] = round(given["jpeg_quality"])
    try:
        return Configuration(**given)  # type: ignore[arg-type]
    except ValueError as error:
        raise TableError(f"{where}: {error}") from error


def _neighbours(network: EdgeNetwork, index: int) -> dict[int, Neighbour]:
    """Every node that a link joins to this one; of parallel links the widest counts, as in the shortest paths."""
    graph = network.graph
    found: dict[int, Neighbour] = {}
    for (a, b), width in zip(graph.links, graph.bandwidth_mbps, strict=True):
        if index in (a, b):
            other = int(b if a == index else a)
            known = found[other].bandwidth_mbps if other in found else 0.0
            found[other] = Neighbour(graph.names[other], max(known, float(width)))
    return found
