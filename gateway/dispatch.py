"""Sends one request to an instance and waits for its reply; once more, to another instance, where that is allowed.

    route ──► HOLD? wait for an idle instance ──► attempt ──► reply
                                                     └─ bounced, lost, worker draining: one second attempt elsewhere

A request is attempted at most twice. While it waits, it can be told that its client has gone (`Request.abandon`):
then the worker is told to free the place. Everything here is a callback: the reply's arrival runs straight through to
the answer, without a task that has to be woken (`dispatch` is there for those who await).

All mutable state: the held requests per service, the requests under way with the time at which each is given up, and
the counts.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Final

import msgspec

from gateway.fleet import Fleet
from gateway.request import Answered, AnswerTimeout, ClientGone, End, OnEnd, Refused, Request
from gateway.router import HOLD, REJECT, ServiceRouter, Target
from policies.routing.rules import cannot_finish
from protocol.frames import Frame, Kind
from protocol.link import LinkClosed
from protocol.outcomes import Attempt, Outcome
from protocol.records import BOUNCE, EXPIRE, Infer, Reply

log = logging.getLogger("gateway.dispatch")

_decode_reply = msgspec.msgpack.Decoder(Reply).decode

TRY_ELSEWHERE: Final = frozenset({Attempt.BOUNCED, Attempt.LOST, Attempt.UNAVAILABLE})
"""Ends of a first attempt after which nothing was computed, or nothing can come any more."""
FORECAST_ENDS: Final = frozenset({Attempt.OK, Attempt.LATE, Attempt.QUEUE_FULL, Attempt.EXPIRED})
"""Ends that say whether the forecast was right. A bounce has spared the request what it got wrong: as in the
simulator, it teaches the view of the instance, not the margin."""


class DispatchStatistics(msgspec.Struct, frozen=True):
    """Attempts by instance and how they ended, and the requests held now, by service."""

    attempts: dict[str, dict[str, int]]
    held: dict[str, int]


class Held:
    """A request in the gateway's own queue, until an instance is idle."""

    __slots__ = ("_line", "_over", "request")

    def __init__(self, request: Request, line: "deque[Held]", over: Callable[[Request, "End"], None]) -> None:
        self.request = request
        self._line = line
        self._over = over

    def abandon(self, why: Exception) -> None:
        """See `Stage`."""
        self._line.remove(self)
        self._over(self.request, why)


class Sent:
    """One attempt under way: `target` has the request, with `budget_s` left at `sent_s`."""

    __slots__ = (
        "_dispatcher",
        "budget_s",
        "first",
        "predicted_s",
        "request",
        "request_id",
        "router",
        "sent_s",
        "target",
    )

    def __init__(
        self,
        dispatcher: "Dispatcher",
        router: ServiceRouter,
        request: Request,
        target: Target,
        predicted_s: float,
        sent_s: float,
        first: bool,
    ) -> None:
        self._dispatcher = dispatcher
        self.router = router
        self.request = request
        self.target = target
        self.predicted_s = predicted_s
        self.sent_s = sent_s
        self.budget_s = request.deadline_s - sent_s
        self.first = first
        self.request_id = 0

    def replied(self, reply: Frame | LinkClosed) -> None:
        """The link's news: the reply, or that none will come."""
        self._dispatcher.replied(self, reply)

    def abandon(self, why: Exception) -> None:
        """See `Stage`."""
        self._dispatcher.abandoned(self, why)


class Dispatcher:
    """Brings requests to instances. `draw()` gives uniform numbers in [0, 1).

    A request whose worker hangs is given up `answer_timeout_s` after its deadline.
    """

    def __init__(self, fleet: Fleet, draw: Callable[[], float], answer_timeout_s: float = 30.0) -> None:
        self._fleet = fleet
        self._draw = draw
        self._answer_timeout_s = answer_timeout_s
        self._held: dict[str, deque[Held]] = {}
        self._attempts: Counter[tuple[str, Attempt]] = Counter()
        self._under_way: set[Request] = set()
        self._look: asyncio.TimerHandle | None = None
        self._look_s = float("inf")

    # a request's way

    def start(self, router: ServiceRouter, request: Request, ended: OnEnd) -> None:
        """Takes over a request. `ended` is called exactly once, perhaps before this returns."""
        now_s = time.monotonic()
        request.ended = ended
        request.give_up_s = request.deadline_s + self._answer_timeout_s
        self._under_way.add(request)
        if request.give_up_s < self._look_s:
            self._look_at(request.give_up_s, now_s)
        try:
            if self._held and self._held.get(router.name) and not request.variant:
                choice: Target | int = HOLD
            else:
                choice = router.route(now_s, request.deadline_s - now_s, self._draw(), variant=request.variant)
            if isinstance(choice, Target):
                self._send(router, request, choice, now_s, first=True)
            elif choice == HOLD:
                self._hold(router, request)
            else:
                reason = f"no instance of {request.variant or router.name} is ready"
                self._over(request, Refused(Outcome.UNAVAILABLE, reason))
        except Exception as error:
            log.exception("request %s could not be sent", request.id)
            request.abandon(error)
            self._over(request, error)

    async def dispatch(self, router: ServiceRouter, request: Request) -> Answered:
        """The answer. Raises `Refused`, `ClientGone` or `AnswerTimeout`; the request is over in every case."""
        future: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()

        def ended(end: End) -> None:
            if future.done():
                return
            if isinstance(end, Answered):
                future.set_result(end)
            else:
                future.set_exception(end)

        self.start(router, request, ended)
        try:
            return await future
        finally:
            request.abandon(ClientGone())

    def _over(self, request: Request, end: End) -> None:
        """The request has ended; the second end of one that has is not told."""
        ended, request.ended, request.stage = request.ended, None, None
        if ended is not None:
            self._under_way.discard(request)
            try:
                ended(end)
            except Exception:  # the link or the queue that called has others to tell
                log.exception("request %s: its end could not be told", request.id)

    # the single queue

    def _hold(self, router: ServiceRouter, request: Request) -> None:
        line = self._held.setdefault(router.name, deque())
        if len(line) + sum(target.in_flight for target in router.targets) >= sum(router.capacity):
            self._over(request, Refused(Outcome.QUEUE_FULL, f"the queue of {router.name} is full"))
            return
        held = Held(request, line, self._over)
        request.stage = held
        line.append(held)

    def release(self) -> None:
        """Places held requests, oldest first, as long as the rules say where; called when an instance may be idle."""
        for name, line in list(self._held.items()):  # who is told of an end may send what opens another line
            if line:
                self._release(name, line)

    def _release(self, name: str, line: deque[Held]) -> None:
        router = self._fleet.services.get(name)
        while line:
            request = line[0].request
            now_s = time.monotonic()
            if router is None:
                choice: Target | int = REJECT
            elif router.expires and cannot_finish(now_s, request.deadline_s, now_s, min(router.service_s, default=0.0)):
                line.popleft()
                self._over(request, Refused(Outcome.EXPIRED, "no instance was idle in time"))
                continue
            else:
                choice = router.route(now_s, request.deadline_s - now_s, self._draw())
            if choice == HOLD:
                return
            line.popleft()
            if router is not None and isinstance(choice, Target):
                self._send(router, request, choice, now_s, first=True)
            else:
                self._over(request, Refused(Outcome.UNAVAILABLE, f"no instance of {name} is ready"))

    # one attempt

    def _send(self, router: ServiceRouter, request: Request, target: Target, now_s: float, *, first: bool) -> None:
        predicted_s = router.sent(target, now_s)
        sent = Sent(self, router, request, target, predicted_s, now_s, first)
        request.stage = sent
        margin = router.margin[0]
        flags = request.flags
        if router.expires:
            flags |= EXPIRE
        # What was sent here although it would be late has nowhere better to go: only a surprise is worth a bounce.
        if first and router.bounces and router.routable > 1 and not request.variant:
            flags |= BOUNCE if predicted_s <= margin * sent.budget_s else 0
        asked = Infer(target.id, sent.budget_s, request.content_type, flags, request.top_k, margin)
        peer = self._fleet.peers.get(target.record.address)
        try:
            if peer is None:
                raise LinkClosed(f"no link to {target.record.address}")
            sent.request_id = peer.ask(Kind.INFER, asked, request.body, sent.replied)
        except LinkClosed as closed:
            self.replied(sent, closed)
        except Exception as error:
            log.exception("request %s could not be sent to %s", request.id, target.id)
            request.abandon(error)

    def replied(self, sent: Sent, answer: Frame | LinkClosed) -> None:
        """An attempt has ended: the answer, a second attempt, or the request's end."""
        request, router, target = sent.request, sent.router, sent.target
        request.stage = None
        end: End | None = None
        attempt, reply, payload = Attempt.LOST, None, b""
        try:
            if isinstance(answer, Frame):
                reply, payload = _decode_reply(answer.meta), answer.payload
                attempt = Attempt(reply.attempt)
        except Exception as error:
            log.exception("request %s: a reply that cannot be read", request.id)
            attempt, reply, end = Attempt.FAILED, None, error
        if attempt is Attempt.UNAVAILABLE or attempt is Attempt.LOST:
            # What the board says of it is out of date (a worker that restarted while the board was away).
            router.close(target)
        if isinstance(answer, LinkClosed):  # its neighbours in the same process have gone with it
            for one in router.targets:
                if one.record.address == target.record.address and router.capacity[one.index]:
                    router.close(one)
        if reply is not None and (attempt is Attempt.OK or attempt is Attempt.LATE):
            rank = router.rank[target.index] if target.index >= 0 else -1
            try:  # the client first, then the books
                self._over(request, Answered(target, rank, reply, payload, 1 if sent.first else 2))
            finally:
                self._account(sent, attempt, reply)
            return
        self._account(sent, attempt, reply)
        if end is None and sent.first and attempt in TRY_ELSEWHERE:
            second = self._elsewhere(router, request, target)
            if second is not None:
                self._send(router, request, second, time.monotonic(), first=False)
                return
        self._over(request, end or _refusal(attempt, reply))

    def abandoned(self, sent: Sent, why: Exception) -> None:
        """Nobody waits for this attempt any more: the worker may free its place."""
        peer = self._fleet.peers.get(sent.target.record.address)
        if peer is not None:
            peer.cancel(sent.request_id)
        self._account(sent, Attempt.CANCELLED, None)
        self._over(sent.request, why)

    def _elsewhere(self, router: ServiceRouter, request: Request, avoid: Target) -> Target | None:
        now_s = time.monotonic()
        budget_s = request.deadline_s - now_s
        if budget_s <= 0.0:
            return None
        choice = router.route(now_s, budget_s, self._draw(), avoid=avoid, variant=request.variant)
        return choice if isinstance(choice, Target) else None

    def _account(self, sent: Sent, attempt: Attempt, reply: Reply | None) -> None:
        """Counts the attempt, tells the router how it ended, and places whoever waited for that."""
        router, target = sent.router, sent.target
        self._attempts[target.id, attempt] += 1
        if reply is None:
            router.lost(target)
        else:
            now_s = time.monotonic()
            status = reply.status
            service_s = reply.service_s if reply.batch else 0.0
            router.answered(
                target, now_s, status.length, status.backlog_s, service_s, reply.batch, status.batch, status.elapsed_s
            )
            if router.bounces and attempt in FORECAST_ENDS:
                served = attempt is Attempt.OK or attempt is Attempt.LATE
                router.learn(sent.predicted_s, now_s - sent.sent_s if served else float("inf"), sent.budget_s)
        if self._held:
            self.release()

    # workers that hang

    def _look_at(self, when_s: float, now_s: float) -> None:
        """One timer for all: it is moved only when a request is to be given up before every other."""
        if self._look is not None:
            self._look.cancel()
        self._look_s = when_s
        self._look = asyncio.get_running_loop().call_later(max(0.0, when_s - now_s) + 0.001, self._give_up)

    def _give_up(self) -> None:
        self._look, self._look_s = None, float("inf")
        now_s = time.monotonic()
        for request in [one for one in self._under_way if one.give_up_s <= now_s]:
            request.abandon(AnswerTimeout())
        if self._under_way:
            self._look_at(min(one.give_up_s for one in self._under_way), now_s)

    def statistics(self) -> DispatchStatistics:
        """Counts since start. The attempts at an instance, whatever their end, are what its worker saw arrive."""
        attempts: dict[str, dict[str, int]] = {}
        for (one, attempt), number in self._attempts.items():
            attempts.setdefault(one, {})[attempt.name] = number
        return DispatchStatistics(attempts=attempts, held={name: len(line) for name, line in self._held.items()})


def _refusal(attempt: Attempt, reply: Reply | None) -> Refused:
    if attempt is Attempt.LOST:
        return Refused(Outcome.UNAVAILABLE, "the worker died and no other instance could take the request in time")
    if attempt is Attempt.BOUNCED:
        return Refused(Outcome.EXPIRED, "no instance can finish this request in time")
    return Refused(Outcome(attempt), reply.reason if reply else attempt.name, reply.http_status if reply else 0)
