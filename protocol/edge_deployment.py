"""The `[edge]` part of a deployment, checked: names, ranges, and that nodes and workers belong together.

What the named graph and tables contain is for `policies.placement.deployed` to say, which may open them.
"""

import math
import re

from protocol.edge_records import EdgeSpec
from protocol.records import Deployment

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
MOST_NODES = 256
MOST_PER_SERVICE = 64


def check_edge(deployment: Deployment) -> str:
    """Empty if the part is absent or sound, else the key, its value and what would be right."""
    edge = deployment.edge
    nodes = [worker.node for worker in deployment.workers if worker.node]
    if edge is None:
        if nodes:
            return f"workers: node = {nodes[0]!r}, but the deployment has no [edge]: add it, or leave node out"
        return ""
    if fault := _check_settings(edge):
        return fault
    for name, spec in edge.services.items():
        where = f"edge.services.{name}"
        if not _NAME.fullmatch(name):
            return f"{where}: a name is made of a-z, 0-9, '_', '.' and '-', 64 at most"
        if name in deployment.services:
            return f"{where}: [services.{name}] has this name, too: give each its own"
        if not 0 < spec.requirement_ms <= 600_000:
            return f"{where}.requirement_ms = {spec.requirement_ms}: must be above 0 and at most 600000 milliseconds"
        if not 1 <= spec.max_body_bytes <= 64 << 20:
            return f"{where}.max_body_bytes = {spec.max_body_bytes}: must be from 1 to {64 << 20}"
        if not spec.table:
            return f"{where}.table is empty: name a placement table, as 'scenes-detection' or a path"
    if not nodes:
        return "workers: none is a node of [edge]: give them node = NAME"
    twice = next((node for node in nodes if nodes.count(node) > 1), None)
    if twice is not None:
        return f"workers: node = {twice!r} twice: one worker runs one node"
    known = {one.name for one in edge.nodes}
    strange = next((node for node in nodes if known and node not in known), None)
    if strange is not None:
        return f"workers: node = {strange!r}: [[edge.nodes]] has {', '.join(sorted(known))}"
    return ""


def _check_settings(edge: EdgeSpec) -> str:
    if not edge.services:
        return "edge.services is empty: name at least one, as [edge.services.detection]"
    if bool(edge.graph) == bool(edge.nodes):
        return (
            f"edge.graph = {edge.graph!r}: give either a graph's name, as 'eua16', or [[edge.nodes]] and [[edge.links]]"
        )
    if len(edge.nodes) > MOST_NODES:
        return f"edge.nodes: {len(edge.nodes)} nodes: at most {MOST_NODES}"
    names = [one.name for one in edge.nodes]
    for node in edge.nodes:
        where = f"edge.nodes {node.name!r}"
        if names.count(node.name) > 1:
            return f"{where}: two have this name; give each its own"
        for key in ("tflops", "memory_mb", "uplink_mbps"):
            value = getattr(node, key)
            if not 0 < value < math.inf:
                return f"{where}.{key} = {value}: must be a finite figure above 0"
        if not (-90 <= node.latitude <= 90 and -180 <= node.longitude <= 180):
            return f"{where}: {node.latitude}, {node.longitude} is no position in degrees"
    for link in edge.links:
        strange = next((end for end in link.between if end not in names), None)
        if strange is not None or link.between[0] == link.between[1]:
            return f"edge.links between {list(link.between)}: name two different nodes of [[edge.nodes]]"
        if not 0 < link.bandwidth_mbps < math.inf or not 0 <= link.usd_per_megabit < math.inf:
            return f"edge.links between {list(link.between)}: bandwidth_mbps above 0, usd_per_megabit not below 0"
    if not 1 <= edge.window_ms <= 10_000:
        return f"edge.window_ms = {edge.window_ms}: must be from 1 to 10000 milliseconds"
    if not 1 <= edge.per_service <= MOST_PER_SERVICE:
        return f"edge.per_service = {edge.per_service}: must be from 1 to {MOST_PER_SERVICE}"
    if not 1 <= edge.queue_capacity <= 10_000:
        return f"edge.queue_capacity = {edge.queue_capacity}: must be from 1 to 10000"
    if edge.emulate.compute not in ("table", "real"):
        return f"edge.emulate.compute = {edge.emulate.compute!r}: must be 'table' or 'real'"
    return ""
