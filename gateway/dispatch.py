"""Sends one request to an instance and waits for its reply; once more, to another instance, where that is allowed.

    route ──► HOLD? wait for an idle instance ──► attempt ──► reply
                                                     └─ bounced, lost, worker draining: one second attempt elsewhere

A request is attempted at most twice. While it waits, it can be told that its client has gone (`Request.abandon`):
then the worker is told to free the place. All mutable state: the held requests per service, and the counts.
"""

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Final

import msgspec

from gateway.fleet import Fleet
from gateway.router import HOLD, REJECT, ServiceRouter, Target
from policies.routing.rules import cannot_finish
from protocol.frames import Frame, Kind
from protocol.link import LinkClosed
from protocol.outcomes import Attempt, Outcome
from protocol.records import BOUNCE, EXPIRE, Infer, Reply

_decode_reply = msgspec.msgpack.Decoder(Reply).decode

TRY_ELSEWHERE: Final = frozenset({Attempt.BOUNCED, Attempt.LOST, Attempt.UNAVAILABLE})
"""Ends of a first attempt after which nothing was computed, or nothing can come any more."""


class ClientGone(Exception):
    """The client left while its request was on the way."""


class AnswerTimeout(Exception):
    """The worker holds the request far beyond its budget: it hangs."""


class Refused(Exception):
    """The request ends here with an outcome other than an answer."""

    def __init__(self, outcome: Outcome, reason: str, http_status: int = 0) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason
        self.http_status = http_status


class Request:
    """One admitted request. `arrived_s` and `deadline_s` are local monotonic times.

    `flags` (TENSORS, PREDICTIONS) say what the worker should answer; `variant` pins the request to its instances.
    """

    __slots__ = (
        "arrived_s",
        "body",
        "content_type",
        "deadline_s",
        "ended_early",
        "flags",
        "id",
        "top_k",
        "variant",
        "waiting",
    )

    def __init__(
        self,
        id: str,
        arrived_s: float,
        deadline_s: float,
        body: bytes,
        content_type: str,
        top_k: int,
        flags: int = 0,
        variant: str = "",
    ) -> None:
        self.id = id
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s
        self.body = body
        self.content_type = content_type
        self.top_k = top_k
        self.flags = flags
        self.variant = variant
        self.waiting: asyncio.Future[Frame] | asyncio.Future[Target] | None = None
        self.ended_early: Exception | None = None

    def abandon(self, why: Exception) -> None:
        """Nobody waits for this request any more (`ClientGone`) or it must not wait longer (`AnswerTimeout`)."""
        self.ended_early = why
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_exception(why)


class Answered:
    """A reply with an answer, and who gave it. `attempts` is 1 or 2."""

    __slots__ = ("attempts", "payload", "rank", "reply", "target")

    def __init__(self, target: Target, rank: int, reply: Reply, payload: bytes, attempts: int) -> None:
        self.target = target
        self.rank = rank
        self.reply = reply
        self.payload = payload
        self.attempts = attempts


class DispatchStatistics(msgspec.Struct, frozen=True):
    """Attempts by instance and how they ended, and the requests held now, by service."""

    attempts: dict[str, dict[str, int]]
    held: dict[str, int]


class Dispatcher:
    """Brings requests to instances. `draw()` gives uniform numbers in [0, 1)."""

    def __init__(self, fleet: Fleet, draw: Callable[[], float]) -> None:
        self._fleet = fleet
        self._draw = draw
        self._held: dict[str, deque[tuple[Request, asyncio.Future[Target]]]] = {}
        self._attempts: Counter[tuple[str, Attempt]] = Counter()

    async def dispatch(self, router: ServiceRouter, request: Request) -> Answered:
        """The answer. Raises `Refused`, `ClientGone` or `AnswerTimeout`; the request is over in every case."""
        target, predicted_s = await self._place(router, request)
        attempt, reply, payload = await self._attempt(router, request, target, predicted_s, first=True)
        attempts = 1
        if attempt in TRY_ELSEWHERE:
            second = self._elsewhere(router, request, target)
            if second is not None:
                attempts, target = 2, second
                predicted_s = router.sent(target, time.monotonic())
                attempt, reply, payload = await self._attempt(router, request, target, predicted_s, first=False)
        if reply is not None and attempt in (Attempt.OK, Attempt.LATE):
            rank = router.rank[target.index] if target.index >= 0 else -1
            return Answered(target, rank, reply, payload, attempts)
        raise _refusal(attempt, reply)

    async def _place(self, router: ServiceRouter, request: Request) -> tuple[Target, float]:
        """Chooses the instance, waiting for an idle one if the rule says HOLD; the router knows of it from here on."""
        now_s = time.monotonic()
        if self._held.get(router.name) and not request.variant:
            choice: Target | int = HOLD
        else:
            choice = router.route(now_s, request.deadline_s - now_s, self._draw(), variant=request.variant)
        if isinstance(choice, Target):
            return choice, router.sent(choice, now_s)
        if choice != HOLD:
            raise Refused(Outcome.UNAVAILABLE, f"no instance of {request.variant or router.name} is ready")
        held = self._held.setdefault(router.name, deque())
        if len(held) + sum(target.in_flight for target in router.targets) >= sum(router.capacity):
            raise Refused(Outcome.QUEUE_FULL, f"the queue of {router.name} is full")
        future: asyncio.Future[Target] = asyncio.get_running_loop().create_future()
        request.waiting = future
        entry = (request, future)
        held.append(entry)
        try:
            target = await future
        except BaseException:
            with contextlib.suppress(ValueError):
                held.remove(entry)
            if future.done() and not future.cancelled() and future.exception() is None:
                router.lost(future.result())
            raise
        return target, router.clear_s[target.index] - now_s if target.index >= 0 else 0.0

    def release(self) -> None:
        """Places held requests, oldest first, as long as the rules say where; called when an instance may be idle."""
        for name, held in self._held.items():
            if held:
                self._release(name, held)

    def _release(self, name: str, held: deque[tuple[Request, asyncio.Future[Target]]]) -> None:
        router = self._fleet.services.get(name)
        while held:
            request, future = held[0]
            if future.done():
                held.popleft()
                continue
            now_s = time.monotonic()
            if router is None:
                choice: Target | int = REJECT
            elif router.expires and cannot_finish(now_s, request.deadline_s, now_s, min(router.service_s, default=0.0)):
                held.popleft()
                future.set_exception(Refused(Outcome.EXPIRED, "no instance was idle in time"))
                continue
            else:
                choice = router.route(now_s, request.deadline_s - now_s, self._draw())
            if choice == HOLD:
                return
            held.popleft()
            if router is not None and isinstance(choice, Target):
                router.sent(choice, now_s)
                future.set_result(choice)
            else:
                future.set_exception(Refused(Outcome.UNAVAILABLE, f"no instance of {name} is ready"))

    def _elsewhere(self, router: ServiceRouter, request: Request, avoid: Target) -> Target | None:
        now_s = time.monotonic()
        budget_s = request.deadline_s - now_s
        if budget_s <= 0.0:
            return None
        choice = router.route(now_s, budget_s, self._draw(), avoid=avoid, variant=request.variant)
        return choice if isinstance(choice, Target) else None

    async def _attempt(
        self, router: ServiceRouter, request: Request, target: Target, predicted_s: float, *, first: bool
    ) -> tuple[Attempt, Reply | None, bytes]:
        if request.ended_early is not None:
            router.lost(target)
            raise request.ended_early
        sent_s = time.monotonic()
        budget_s = request.deadline_s - sent_s
        margin = router.margin[0]
        # What was sent here although it would be late has nowhere better to go: only a surprise is worth a bounce.
        may_bounce = first and router.bounces and router.routable > 1 and not request.variant
        flags = (
            (BOUNCE if may_bounce and predicted_s <= margin * budget_s else 0)
            | (EXPIRE if router.expires else 0)
            | request.flags
        )
        attempt, reply, payload = Attempt.CANCELLED, None, b""
        peer = self._fleet.peers.get(target.record.address)
        request_id = 0
        try:
            if peer is None:
                raise LinkClosed(f"no link to {target.record.address}")
            request_id, future = peer.request(
                Kind.INFER, Infer(target.id, budget_s, request.content_type, flags, request.top_k, margin), request.body
            )
            request.waiting = future
            frame = await future
            reply = _decode_reply(frame.meta)
            payload = frame.payload
            attempt = Attempt(reply.attempt)
            if attempt is Attempt.UNAVAILABLE:
                # What the board says of it is out of date (a worker that restarted while the board was away).
                router.close(target)
        except LinkClosed:
            attempt = Attempt.LOST
            router.close(target)
        except BaseException:
            if peer is not None:
                peer.cancel(request_id)
            raise
        finally:
            request.waiting = None
            self._attempts[target.id, attempt] += 1
            self._account(router, target, attempt, reply, predicted_s, sent_s, budget_s)
        return attempt, reply, payload

    def _account(
        self,
        router: ServiceRouter,
        target: Target,
        attempt: Attempt,
        reply: Reply | None,
        predicted_s: float,
        sent_s: float,
        budget_s: float,
    ) -> None:
        """Tells the router how the attempt ended, and places whoever waited for that."""
        now_s = time.monotonic()
        if reply is None:
            router.lost(target)
        else:
            status = reply.status
            one_s = reply.service_s / reply.batch if reply.batch else 0.0
            router.answered(target, now_s, status.length, status.backlog_s, one_s)
            if router.bounces:
                served = attempt in (Attempt.OK, Attempt.LATE)
                router.learn(predicted_s, now_s - sent_s if served else float("inf"), budget_s)
        if self._held:
            self.release()

    def statistics(self) -> DispatchStatistics:
        """Counts since start. The attempts at an instance, whatever their end, are what its worker saw arrive."""
        attempts: dict[str, dict[str, int]] = {}
        for (one, attempt), number in self._attempts.items():
            attempts.setdefault(one, {})[attempt.name] = number
        return DispatchStatistics(
            attempts=attempts,
            held={name: sum(not future.done() for _, future in held) for name, held in self._held.items()},
        )


def _refusal(attempt: Attempt, reply: Reply | None) -> Refused:
    if attempt is Attempt.LOST:
        return Refused(Outcome.UNAVAILABLE, "the worker died and no other instance could take the request in time")
    if attempt is Attempt.BOUNCED:
        return Refused(Outcome.EXPIRED, "no instance can finish this request in time")
    return Refused(Outcome(attempt), reply.reason if reply else attempt.name, reply.http_status if reply else 0)
