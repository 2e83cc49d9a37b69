"""Requests to edge services, from admission to their end: windows, decisions, attempts at nodes, second choices.

    start ──► window ──► decided ──► its local node ──► … ──► reply
                │            │            └─ full, gone, no room: decided once more, here, without that node
                │            └─ refused by the policy: EXPIRED (no time) or UNAVAILABLE (no room)
                └─ closes window_ms after its first request, or when one service has per_service of them

As in `dispatch.py`, a request ends exactly once, is attempted at most twice, and can be abandoned wherever it waits.

All mutable state: the open window, the requests under way, the nodes that failed a moment ago, what was learned of the
time beyond predictions, and the counts.
"""

import asyncio
import logging
import time
from collections import Counter
from typing import Final

import msgspec

from gateway.edge_decide import Decider, could_not_load
from gateway.edge_overhead import Overhead
from gateway.edge_request import Choice, EdgeAnswered, EdgeEnd, EdgeRequest, Net, OnEdgeEnd
from gateway.edge_sizes import Sizes
from gateway.edge_view import EdgeView
from gateway.request import AnswerTimeout, Refused
from protocol import edge_records
from protocol.edge_records import EdgeInfer, EdgeReply
from protocol.frames import Frame, Kind
from protocol.link import LinkClosed
from protocol.outcomes import Attempt, Outcome

log = logging.getLogger("gateway.edge")

SHUN_S: Final = 0.5
"""So long a node that was full or gone is not chosen: what is known of it may be as old."""
TRY_AGAIN: Final = frozenset({Attempt.QUEUE_FULL, Attempt.UNAVAILABLE, Attempt.LOST})
"""Ends of a first attempt after which nothing was computed, or nothing can come any more."""

_decode_reply = msgspec.msgpack.Decoder(EdgeReply).decode


class EdgeCounts(msgspec.Struct, frozen=True):
    """Counts since start: windows by who decided, requests by policy, attempts by node and end, second choices.

    `deciding_s`: from windows' ends to their decisions, in all. `waiting`: requests in the open window, and
    `under_way`: all that have not ended.
    """

    windows: dict[str, int]
    decided: dict[str, int]
    attempts: dict[str, dict[str, int]]
    second_choices: int
    deciding_s: float
    waiting: int
    under_way: int


class _Waiting:
    """A request in the open window, or in one that is being decided."""

    __slots__ = ("_edge", "request")

    def __init__(self, edge: "EdgeDispatcher", request: EdgeRequest) -> None:
        self._edge = edge
        self.request = request

    def abandon(self, why: Exception) -> None:
        """See `Stage`."""
        self._edge.left(self.request, why)


class _Sent:
    """One attempt under way."""

    __slots__ = ("_edge", "choice", "request", "request_id", "sent_s")

    def __init__(self, edge: "EdgeDispatcher", request: EdgeRequest, choice: Choice, sent_s: float) -> None:
        self._edge = edge
        self.request = request
        self.choice = choice
        self.sent_s = sent_s
        self.request_id = 0

    def replied(self, reply: Frame | LinkClosed) -> None:
        """The link's news."""
        self._edge.replied(self, reply)

    def abandon(self, why: Exception) -> None:
        """See `Stage`."""
        self._edge.abandoned(self, why)


class EdgeDispatcher:
    """Brings requests to nodes. One that hangs there is given up `answer_timeout_s` after its deadline."""

    def __init__(self, view: EdgeView, answer_timeout_s: float) -> None:
        self._view = view
        self._decider = Decider(view)
        self._answer_timeout_s = answer_timeout_s
        self._window: list[EdgeRequest] = []
        self._window_net: Net | None = None
        self._closing: asyncio.TimerHandle | None = None
        self._deciding: set[asyncio.Task[None]] = set()
        self._under_way: set[EdgeRequest] = set()
        self._overhead = Overhead()
        self._sizes = Sizes()
        self._shunned: dict[str, float] = {}  # until when, by node
        self._windows: Counter[str] = Counter()
        self._decided: Counter[str] = Counter()
        self._attempts: Counter[tuple[str, Attempt]] = Counter()
        self._second_choices = 0
        self._deciding_s = 0.0

    # a request's way

    def start(self, request: EdgeRequest, ended: OnEdgeEnd) -> None:
        """Takes over a request. `ended` is called exactly once."""
        loop = asyncio.get_running_loop()
        request.ended = ended
        self._under_way.add(request)
        patience_s = request.deadline_s + self._answer_timeout_s - time.monotonic()
        timer = loop.call_later(patience_s, request.abandon, AnswerTimeout())
        request.give_up = timer.cancel
        request.stage = _Waiting(self, request)
        if self._window and self._window_net is not request.net:  # the deployment has changed under it
            self._close()
        if not self._window:
            self._window_net = request.net
            self._closing = loop.call_later(request.net.edge.window_ms / 1e3, self._close)
        self._window.append(request)
        if sum(one.service == request.service for one in self._window) >= request.net.edge.per_service:
            self._close()

    def left(self, request: EdgeRequest, why: Exception) -> None:
        """Nobody waits any more for a request that is not decided yet."""
        if request in self._window:
            self._window.remove(request)
            if not self._window and self._closing is not None:
                self._closing.cancel()
        self._over(request, why)

    def _over(self, request: EdgeRequest, end: EdgeEnd) -> None:
        """The request has ended; the second end of one that has is not told."""
        ended, request.ended, request.stage = request.ended, None, None
        if ended is None:
            return
        self._under_way.discard(request)
        if request.give_up is not None:
            request.give_up()
        request.body = ()
        try:
            ended(end)
        except Exception:  # the link that called has others to tell
            log.exception("request %s: its end could not be told", request.id)

    # windows

    def _close(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
        window, self._window = self._window, []
        if window:
            assert self._window_net is not None, "a window has its first request's network"
            task = asyncio.create_task(self._decide(self._window_net, window), name="decide a window")
            self._deciding.add(task)
            task.add_done_callback(self._deciding.discard)

    async def _decide(self, net: Net, window: list[EdgeRequest]) -> None:
        try:
            await self._decide_and_send(net, window)
        except Exception as error:
            log.exception("a window could not be decided")
            for request in window:
                self._over(request, error)

    async def _decide_and_send(self, net: Net, window: list[EdgeRequest]) -> None:
        now_s = time.monotonic()
        asked: list[edge_records.EdgeRequest] = []
        entries: list[int] = []
        waiting: list[EdgeRequest] = []
        for request in window:
            request.window_s = now_s - request.arrived_s
            left_s = request.deadline_s - now_s
            entry = self._view.entry(net, request.local)
            if left_s <= 0.0:
                self._over(request, Refused(Outcome.EXPIRED, "its time was over when its window closed"))
            elif entry is None:
                self._over(request, Refused(Outcome.UNAVAILABLE, "no edge node is up"))
            else:
                left_s -= self._overhead.allowance_s(now_s, left_s)
                asked.append(edge_records.EdgeRequest(request.service, entry, left_s, self._data_mb(request)))
                entries.append(entry)
                waiting.append(request)
        if not asked:
            return
        decided = await self._decider.decide(net, asked, self._closed(net, entries, now_s))
        self._windows[decided.by] += 1
        self._decided[decided.policy] += len(asked)
        self._deciding_s += decided.took_s
        for request, entry, placement in zip(waiting, entries, decided.placements, strict=True):
            if request.ended is None:
                continue  # its client left meanwhile
            request.decide_s = decided.took_s
            if placement.node < 0:
                outcome = Outcome.EXPIRED if placement.late else Outcome.UNAVAILABLE
                self._over(request, Refused(outcome, f"{decided.policy} refused it: {placement.reason}"))
            else:
                self._send(request, Choice(placement, entry, decided.policy, decided.by, second=False))

    def _closed(self, net: Net, entries: list[int], now_s: float) -> dict[int, str]:
        """Nodes that failed a moment ago, and those that a dead node cuts off from every one of the entries."""
        self._shunned = {node: until_s for node, until_s in self._shunned.items() if until_s > now_s}
        closed = {net.node_of[one]: "failed a moment ago" for one in self._shunned if one in net.node_of}
        live = set(self._view.live(net))
        for node in range(net.network.nodes):
            if not any(live.issuperset(net.network.paths.route(entry, node)) for entry in entries):
                closed.setdefault(node, "cannot be reached")
        return closed

    # one attempt

    def _send(self, request: EdgeRequest, choice: Choice) -> None:
        net, placement = request.net, choice.placement
        request.choice = choice
        now_s = time.monotonic()
        request.stage = sent = _Sent(self, request, choice, now_s)
        asked = EdgeInfer(
            service=request.service,
            configuration=placement.configuration,
            variant=placement.variant,
            node=placement.node,
            budget_s=request.deadline_s - now_s,
            content_type=request.content_type,
        )
        peer = self._view.links.peer(net.network.graph.names[choice.entry])
        try:
            if peer is None:
                raise LinkClosed("its link is down")
            sent.request_id = peer.ask(Kind.EDGE_INFER, asked, request.body, sent.replied)
        except LinkClosed as closed:
            self.replied(sent, closed)

    def replied(self, sent: _Sent, answer: Frame | LinkClosed) -> None:
        """An attempt has ended: the answer, a second choice, or the request's end."""
        try:
            self._take(sent, answer)
        except Exception as error:  # the link that called has others to tell
            log.exception("request %s: its reply could not be taken", sent.request.id)
            self._over(sent.request, error)

    def _take(self, sent: _Sent, answer: Frame | LinkClosed) -> None:
        request, choice = sent.request, sent.choice
        net = request.net
        request.stage = None
        entry = net.network.graph.names[choice.entry]
        now_s = time.monotonic()
        if isinstance(answer, LinkClosed):
            self._attempts[entry, Attempt.LOST] += 1
            self._shunned[entry] = now_s + SHUN_S
            lost = Refused(Outcome.UNAVAILABLE, f"edge node {entry} died, and no other could take the request in time")
            self._again_or(request, choice, choice.entry, None, lost)
            return
        try:
            reply = _decode_reply(answer.meta)
            attempt = Attempt(reply.attempt)
        except (msgspec.MsgspecError, ValueError) as error:
            log.exception("request %s: a reply of node %s that cannot be read", request.id, entry)
            self._attempts[entry, Attempt.FAILED] += 1
            self._over(request, error)
            return
        self._view.links.heard(reply.status.node, reply.status, now_s)
        self._attempts[reply.status.node, attempt] += 1
        if attempt is Attempt.OK or attempt is Attempt.LATE:
            placed = choice.placement
            predicted_s = placed.access_s + placed.transmission_s + placed.compute_s
            self._overhead.learn(now_s, now_s - sent.sent_s - predicted_s)
            factor = float(net.network.size_factor[net.service_of[request.service], placed.configuration])
            self._sizes.learn(request.service, request.content_type, request.data_mb, reply.adapted_mb, factor)
            self._over(request, EdgeAnswered(request, choice, reply, answer.payload))
            return
        refused = Refused(Outcome.UNAVAILABLE, reply.reason or attempt.name)
        if attempt not in (Attempt.BOUNCED, Attempt.LOST):
            refused = Refused(Outcome(attempt), reply.reason or attempt.name, reply.http_status)
        if attempt in TRY_AGAIN:
            if attempt is not Attempt.UNAVAILABLE:  # that is about this request; the node's status says the rest
                self._shunned[net.network.graph.names[choice.placement.node]] = now_s + SHUN_S
            without = choice.placement.variant if could_not_load(request, choice, reply) else None
            self._again_or(request, choice, choice.placement.node, without, refused)
        else:
            self._over(request, refused)

    def abandoned(self, sent: _Sent, why: Exception) -> None:
        """Nobody waits for this attempt any more: the nodes may free its places."""
        entry = sent.request.net.network.graph.names[sent.choice.entry]
        peer = self._view.links.peer(entry)
        if peer is not None:
            peer.cancel(sent.request_id)
        self._attempts[entry, Attempt.CANCELLED] += 1
        self._over(sent.request, why)

    # second choices

    def _again_or(
        self, request: EdgeRequest, choice: Choice, avoid: int, without: int | None, refused: Refused
    ) -> None:
        """Once more, without the node `avoid` and the variant `without`; else the request's end as it is."""
        second = None if choice.second else self._second_choice(request, avoid, without)
        if second is None:
            self._over(request, refused)
            return
        self._second_choices += 1
        self._send(request, second)

    def _second_choice(self, request: EdgeRequest, avoid: int, without: int | None) -> Choice | None:
        net, now_s = request.net, time.monotonic()
        left_s = request.deadline_s - now_s
        entry = self._view.entry(net, request.local)
        if left_s <= 0.0 or entry is None:
            return None
        closed = {**self._closed(net, [entry], now_s), avoid: "failed this request"}
        left_s -= self._overhead.allowance_s(now_s, left_s)
        asked = edge_records.EdgeRequest(request.service, entry, left_s, self._data_mb(request))
        placement = self._decider.decide_second(net, asked, closed, without)
        if placement.node < 0:
            return None
        return Choice(placement, entry, net.alone.name, "gateway", second=True)

    def _data_mb(self, request: EdgeRequest) -> float:
        return self._sizes.data_mb(request.service, request.content_type, request.data_mb)

    def counts(self) -> EdgeCounts:
        """Counts since start."""
        attempts: dict[str, dict[str, int]] = {}
        for (node, attempt), number in self._attempts.items():
            attempts.setdefault(node, {})[attempt.name] = number
        return EdgeCounts(
            windows=dict(self._windows),
            decided=dict(self._decided),
            attempts=attempts,
            second_choices=self._second_choices,
            deciding_s=self._deciding_s,
            waiting=len(self._window),
            under_way=len(self._under_way),
        )
