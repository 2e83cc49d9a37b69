"""The edge network as this gateway sees it, for `/state`: who decides, how nodes are, what became of requests."""

import msgspec

from gateway.edge import EdgeCounts, EdgeDispatcher
from gateway.edge_metrics import EdgeMeans, EdgeMetrics
from gateway.edge_view import EdgeView


class EdgeNodeView(msgspec.Struct, frozen=True):
    """One node. `ready`: it can be chosen; else `reason`. `said_s`: the age of its last word, 0 if there is none."""

    node: str
    ready: bool
    reason: str
    worker: str = ""
    said_s: float = 0.0
    length: int = 0
    waiting_tflop: float = 0.0
    memory_mb: float = 0.0
    memory_used_mb: float = 0.0
    deployed: tuple[str, ...] = ()
    loading: tuple[str, ...] = ()
    loads: int = 0
    evictions: int = 0
    draining: bool = False


class EdgeState(msgspec.Struct, frozen=True):
    """`policy` is the deployment's, `placing_by` the one that decides now, for the `reason` if they differ.

    `services`: means by service and node, of this process.
    """

    policy: str
    placing_by: str
    reason: str
    window_ms: float
    per_service: int
    nodes: list[EdgeNodeView]
    requests: EdgeCounts
    services: dict[str, dict[str, EdgeMeans]]


def edge_state(view: EdgeView, dispatcher: EdgeDispatcher, metrics: EdgeMetrics, now_s: float) -> EdgeState | None:
    """None where the deployment has no edge network, or none that can be read."""
    net = view.net
    if net is None:
        return None
    placing_by, reason = view.placing()
    return EdgeState(
        policy=net.edge.policy,
        placing_by=placing_by,
        reason=reason,
        window_ms=net.edge.window_ms,
        per_service=net.edge.per_service,
        nodes=[_node(view, name, index, now_s) for name, index in net.node_of.items()],
        requests=dispatcher.counts(),
        services=metrics.means(),
    )


def _node(view: EdgeView, name: str, index: int, now_s: float) -> EdgeNodeView:
    assert view.net is not None, "a node is shown of a network"
    reason = view.not_ready(name, now_s)
    capacity_mb = float(view.net.network.graph.memory_mb[index])
    record, heard = view.links.records.get(name), view.links.heard_of.get(name)
    worker = record.worker if record is not None else ""
    if heard is None:
        return EdgeNodeView(name, not reason, reason, worker, memory_mb=capacity_mb)
    status = heard.status
    return EdgeNodeView(
        node=name,
        ready=not reason,
        reason=reason,
        worker=worker,
        said_s=round(now_s - heard.at_s, 3),
        length=status.length,
        waiting_tflop=status.waiting_tflop,
        memory_mb=capacity_mb,
        memory_used_mb=status.memory_used_mb,
        deployed=status.deployed,
        loading=status.loading,
        loads=status.loads,
        evictions=status.evictions,
        draining=status.draining,
    )
