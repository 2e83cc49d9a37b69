"""A node's links: the emulated uplink of its users, the emulated links to its neighbours, the real frames over them.

An emulated link is really waited for, and queued for: first come, first served (`edge_fifo.py`). The bytes then go over
a real socket. Store and forward, as Eq. 4 of Huang sums.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

import msgspec

from protocol.edge_records import EdgeReply, EdgeRun
from protocol.frames import Frame, Kind
from protocol.link import LinkClosed
from protocol.outcomes import Attempt
from protocol.peer import Peer
from workers.device import Clock
from workers.edge_fifo import Fifo
from workers.edge_journey import Body, Ended, Journey, Refused, passed_s, sleep_until
from workers.edge_view import NodeView, megabits

PATIENCE_S: Final = 30.0
"""Beyond its deadline: how long an answer is waited for. A computation that began in time may end late."""

log = logging.getLogger(__name__)
_decode_reply = msgspec.msgpack.Decoder(EdgeReply).decode


class EdgeLinks:
    """What one view's requests leave the node by. State: the emulated links' clocks."""

    def __init__(self, clock: Clock, view: NodeView) -> None:
        self._clock = clock
        self._view = view
        self.uplink = Fifo(view.uplink_mbps)
        self.to = {index: Fifo(neighbour.bandwidth_mbps) for index, neighbour in view.neighbours.items()}

    async def access(self, journey: Journey) -> None:
        """The adapted data reach this node from the user (Eq. 3). Raises `Refused` if that cannot be in time."""
        if self._view.emulate.uplink:
            queue_s, transfer_s = await self._carried(journey, self.uplink, "the uplink")
            journey.spend(emulated_uplink_queue_s=queue_s, emulated_access_s=transfer_s)

    async def forward(self, journey: Journey, run: EdgeRun, body: Body, peer_of: Callable[[str], Peer | None]) -> Ended:
        """Hands a request to the next node of its path and gives back its end. Raises `Refused` if nobody is there."""
        if run.hops > self._view.network.nodes:
            raise Refused(Attempt.UNAVAILABLE, f"it went round and round up to node {self._view.name}: nodes disagree")
        index = self._view.next_towards(run.node)
        name = self._view.neighbours[index].name
        if self._view.emulate.links:
            queue_s, transfer_s = await self._carried(journey, self.to[index], f"the link to node {name}")
            journey.spend(emulated_link_queue_s=queue_s, emulated_transmission_s=transfer_s)
        peer = peer_of(name)
        if peer is None:
            raise Refused(Attempt.UNAVAILABLE, f"node {name} is gone: no link to it from node {self._view.name}")
        sent_s = self._clock.now_s()
        left_s = journey.left_s(sent_s)
        onward = msgspec.structs.replace(run, budget_s=left_s, spent=journey.spent, hops=run.hops + 1)
        frame = await _asked(peer, name, onward, body, left_s + PATIENCE_S, journey)
        reply = _decode_reply(frame.meta)
        # What nobody accounts for was spent between the nodes: sockets, event loops, copies.
        elsewhere_s = passed_s(journey.spent, reply.spent, waited_on_links=self._view.emulate.links)
        journey.spent = reply.spent
        journey.spend(forward_s=max(0.0, self._clock.now_s() - sent_s - elsewhere_s))
        return Ended(msgspec.structs.replace(reply, spent=journey.spent), frame.payload)

    async def _carried(self, journey: Journey, link: Fifo, name: str) -> tuple[float, float]:
        """Waits until the link has carried the request's data: the seconds in its queue and on it."""
        amount = megabits(journey.adapted_mb)
        now_s = self._clock.now_s()
        if (ends_s := link.ends_s(amount, now_s)) > journey.deadline_s:
            late_s = ends_s - journey.deadline_s
            raise Refused(Attempt.EXPIRED, f"{name} has carried the data {late_s:.3g} s after the deadline")
        span = link.arrive(amount, now_s)
        try:
            await sleep_until(self._clock, span.ends_s)
        except asyncio.CancelledError:
            link.withdraw(span, self._clock.now_s())
            raise
        return span.queue_s, span.service_s


async def _asked(peer: Peer, name: str, run: EdgeRun, body: Body, limit_s: float, journey: Journey) -> Frame:
    """The neighbour's answer. A cancellation is passed on. Raises `Refused` if it is lost or does not come."""
    try:
        request_id, future = peer.request(Kind.EDGE_RUN, run, body.take())
    except LinkClosed as error:
        raise Refused(Attempt.UNAVAILABLE, f"node {name} is gone: {error}") from error
    journey.passed_on = True
    try:
        async with asyncio.timeout(limit_s):
            return await future
    except LinkClosed as error:
        journey.passed_on = False
        raise Refused(Attempt.UNAVAILABLE, f"node {name} was lost with the request: {error}") from error
    except TimeoutError as error:
        peer.cancel(request_id)
        journey.passed_on = False
        raise Refused(Attempt.UNAVAILABLE, f"node {name} does not answer") from error
    except asyncio.CancelledError:
        peer.cancel(request_id)
        raise
