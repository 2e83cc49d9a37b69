"""Where a window's requests go: asked of the scheduler, and decided here by `sequential` where it does not answer."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
import numpy as np

from gateway import edge_request
from gateway.edge_request import Choice, Decided, Net
from gateway.edge_view import EdgeView
from policies.placement.live import Loads, OnTheWay, loads_of, place_window, without_variant
from policies.placement.rules import Sequential
from protocol.edge_records import Decide, Decision, EdgeReply, EdgeRequest, Placement
from protocol.frames import Kind
from protocol.link import LinkClosed
from protocol.outcomes import Attempt

log = logging.getLogger("gateway.edge_decide")

DECIDE_PATIENCE_S: Final = 0.25
"""A scheduler that takes longer is passed over for this window."""
BY_SCHEDULER: Final = "scheduler"
BY_GATEWAY: Final = "gateway"

_decode = msgspec.msgpack.Decoder(Decision).decode
_rng = np.random.default_rng(0)  # `sequential` draws nothing


class Decider:
    """Decides windows. State: what it knows to be on its way, whoever decided it, and the windows' number."""

    def __init__(self, view: EdgeView) -> None:
        self._view = view
        self._moving: tuple[Net, OnTheWay] | None = None
        self._windows = 0

    async def decide(self, net: Net, requests: Sequence[EdgeRequest], closed: Mapping[int, str]) -> Decided:
        """One window, requests in arrival order; `closed` nodes must not be chosen, and why. Always decides."""
        began_s = time.monotonic()
        decision = await self._ask(net, requests, closed)
        if decision is not None:
            placements: Sequence[Placement] = decision.placements
            policy, by = decision.policy, BY_SCHEDULER
        else:
            loads = self._loads(net, closed)
            placements = await asyncio.to_thread(self._place, net, requests, loads)
            policy, by = net.alone.name, BY_GATEWAY
        now_s = time.monotonic()
        self._of(net).add(requests, placements, now_s)
        return Decided(placements, policy, by, now_s - began_s)

    def decide_second(
        self, net: Net, request: EdgeRequest, closed: Mapping[int, str], without: int | None
    ) -> Placement:
        """One request again, at once and by `sequential`; `without` a variant of its service if one is given."""
        network = net.network
        service = net.service_of[request.service]
        if without is not None:
            network = without_variant(network, service, without)
            if not network.valid[service].any():
                return Placement(reason="its service has no other variant")
        loads = self._loads(net, closed)
        placement = place_window(network, Sequential(network), [request], loads, net.edge.per_service, _rng)[0]
        self._of(net).add([request], [placement], time.monotonic())
        return placement

    def _loads(self, net: Net, closed: Mapping[int, str]) -> Loads:
        now_s = time.monotonic()
        loads = loads_of(net.network, self._view.statuses(net, now_s), net.edge.queue_capacity, closed)
        return self._of(net).onto(loads, now_s)

    @staticmethod
    def _place(net: Net, requests: Sequence[EdgeRequest], loads: Loads) -> list[Placement]:
        return place_window(net.network, net.alone, requests, loads, net.edge.per_service, _rng)

    async def _ask(self, net: Net, requests: Sequence[EdgeRequest], closed: Mapping[int, str]) -> Decision | None:
        peer = self._view.scheduler()
        if peer is None:
            return None
        self._windows += 1
        request_id = 0
        try:
            async with asyncio.timeout(DECIDE_PATIENCE_S):
                request_id, future = peer.request(Kind.DECIDE, Decide(self._windows, tuple(requests), tuple(closed)))
                decision = _decode((await future).meta)
        except (LinkClosed, TimeoutError, msgspec.MsgspecError) as error:
            log.warning("the scheduler did not decide window %d: %s", self._windows, error or "no answer in time")
            peer.cancel(request_id)
            return None
        if len(decision.placements) != len(requests):
            return None  # it could not: it is starting, or serves another deployment
        if not all(map(self._exists, [net] * len(requests), requests, decision.placements)):
            log.warning("the scheduler decided window %d for another network", self._windows)
            return None
        return decision

    @staticmethod
    def _exists(net: Net, request: EdgeRequest, placement: Placement) -> bool:
        """Whether the network has what was chosen: around a change of deployment the scheduler may know another."""
        if placement.node < 0:
            return bool(placement.reason)
        valid = net.network.valid[net.service_of[request.service]]
        configurations, variants = valid.shape
        i, j, k = placement.configuration, placement.variant, placement.node
        return 0 <= i < configurations and 0 <= j < variants and k < net.network.nodes and bool(valid[i, j])

    def _of(self, net: Net) -> OnTheWay:
        if self._moving is None or self._moving[0] is not net:
            self._moving = net, OnTheWay(net.network)
        return self._moving[1]


def could_not_load(request: edge_request.EdgeRequest, choice: Choice, reply: EdgeReply) -> bool:
    """Whether the decided node refused a variant for which it has room: then the variant is at fault, not the node."""
    network, placement, status = request.net.network, choice.placement, reply.status
    service = request.net.service_of[request.service]
    table = network.tables[service]
    name = table.variants[placement.variant]
    if status.node != network.graph.names[placement.node] or status.draining or reply.attempt != Attempt.UNAVAILABLE:
        return False
    if name in status.deployed or name in status.loading:
        return False
    sizes_mb = {
        one: float(mb) for other in network.tables for one, mb in zip(other.variants, other.memory_mb, strict=True)
    }
    free_mb = float(network.graph.memory_mb[placement.node]) - status.memory_used_mb
    free_mb += sum(sizes_mb.get(one, 0.0) for one in status.idle)
    return free_mb >= sizes_mb[name] + reply.adapted_mb
