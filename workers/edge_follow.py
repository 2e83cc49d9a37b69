"""Keeping an edge node as the board's deployment says: its view, its preloaded variants, its neighbours, its end."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from models.catalog import VariantError
from models.edge_catalog import EdgeVariant, load_edge_catalog
from models.edge_runtime import EdgeRuntime, open_edge_runtime
from policies.placement.graph import GraphError
from policies.placement.tables import TableError
from protocol.board import Board
from protocol.deployment import check_deployment
from protocol.node_links import NodeLinks, SilenceWatch
from protocol.records import Deployment
from workers.device import Clock
from workers.edge_node import EdgeNode
from workers.edge_variants import OpenVariant
from workers.edge_view import NodeView, view_of

TICK_S = 1.0

log = logging.getLogger(__name__)


def opener(catalog: tuple[Path, ...]) -> OpenVariant:
    """Opens variants of the edge catalog (read again each time: adding the missing entry is enough).

    A table may call a variant otherwise than the catalog does: `EdgeVariant.table_name`.
    """

    def open_variant(name: str, device: str, threads: int) -> EdgeRuntime:
        return open_edge_runtime(_entry(name, catalog), device=device, threads=threads)

    return open_variant


def _entry(name: str, catalog: tuple[Path, ...]) -> EdgeVariant:
    entries = load_edge_catalog(catalog)
    found = entries.get(name) or next((one for one in entries.values() if one.table_name == name), None)
    if found is None:
        raise VariantError("edge catalog", "variant", name, f"no such entry; it has {', '.join(sorted(entries))}")
    return found


class NodeFollower:
    """Makes the node what the deployment says. State: the part of the last deployment that matters here."""

    def __init__(self, worker: str, node: EdgeNode) -> None:
        self._worker = worker
        self._node = node
        self._followed: tuple[object, object, object] = (None, None, None)

    def follow(self, deployment: Deployment | None) -> None:
        """Does nothing if what concerns this node is as before. A deployment with a fault in it changes nothing."""
        if deployment is None or check_deployment(deployment):
            return  # the reconciler of the instances says why
        spec = next((one for one in deployment.workers if one.name == self._worker), None)
        name = spec.node if spec is not None else ""
        loads = (spec.preload, spec.device, spec.threads) if spec is not None else None
        former, self._followed = self._followed, (deployment.edge, name, loads)
        if former == self._followed:
            return
        view: NodeView | None = None
        fault = ""
        try:
            view = view_of(deployment, self._worker)
        except (GraphError, TableError, ValueError) as error:
            fault = str(error)
            log.error("this node cannot take part", extra={"node": name, "reason": fault})
            self._followed = (None, None, None)  # a file may be mended without a word here: look again at the next news
        self._node.follow(name, view, fault, same_network=former[:2] == self._followed[:2])


async def stay_linked(board: Board, node: EdgeNode, clock: Clock) -> None:
    """While this worker is a node: links to its neighbours, and preloads that failed tried again. For ever."""
    while True:
        await node.named.wait()
        watch = SilenceWatch()
        async with NodeLinks(board, wants=node.is_neighbour) as links:
            node.peer_of = links.peer
            try:
                while node.name:
                    await asyncio.sleep(TICK_S)
                    node.variants.preload()
                    await links.ask(TICK_S)
                    watch.cut_silent(links, clock.now_s())
            finally:
                node.peer_of = lambda name: None


async def drain(node: EdgeNode, drain_s: float, notice_s: float, cut_off: Callable[[], None]) -> None:
    """Take nothing new and finish what is here, at most `drain_s`; then `cut_off` ends the rest. Frees the variants.

    `notice_s`: draining is announced this long before, so that those on their way are still served.
    """
    node.draining = True
    node.on_change()
    await asyncio.sleep(min(notice_s, drain_s))
    node.refusing = True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(drain_s):
            await node.books.emptied()
    if node.books.held:
        log.warning("not drained in time", extra={"node": node.name, "left": node.books.held})
        node.cut_off = True
        cut_off()
        await node.books.emptied()
    await node.variants.close()
