"""The life of one request: admit, dispatch, judge, answer, count. Start reading the gateway here.

Every request ends in exactly one `Outcome`, counted once, in `finally`, whatever happens: a bad body, a dead worker,
a client that leaves, a bug. What each outcome means: `protocol/outcomes.py`.
"""

import asyncio
import logging
import secrets
import time
from random import Random
from typing import Final, Protocol

import msgspec

from gateway.admission import Receive, Scope, admit, request_id
from gateway.arrivals import Arrivals
from gateway.config import GatewayConfig
from gateway.dispatch import Answered, AnswerTimeout, ClientGone, Dispatcher, DispatchStatistics, Refused, Request
from gateway.fleet import Fleet
from gateway.inferences import Inferences
from gateway.metrics import UNKNOWN, FleetCollector, GatewayMetrics
from gateway.presence import Presence, presence_of
from gateway.responses import Send, send_answer, send_refusal
from gateway.router import RouterStatistics, ServiceRouter
from protocol.board import Board
from protocol.outcomes import Outcome

log = logging.getLogger("gateway.handle")

PREFIX: Final = "/v1/"


class GatewayStatistics(msgspec.Struct, frozen=True):
    """Everything countable at one moment. arrived = sum of outcomes + in flight, for each gateway process."""

    arrived: int
    in_flight: int
    outcomes: dict[str, dict[str, int]]
    services: dict[str, RouterStatistics]
    dispatch: DispatchStatistics


class Call(Protocol):
    """One request as its HTTP surface sees it; the life between reading and writing is the same for all.

    `variant` is "" unless the client pinned one; `id` may still change while the request is admitted.
    """

    id: str
    router: ServiceRouter | None
    variant: str

    async def admit(self, receive: Receive, arrived_s: float) -> Request:
        """The request, body read. Raises `Refused` (INVALID, with the HTTP status) or `ClientGone`."""

    async def answer(self, send: Send, outcome: Outcome, answered: Answered, total_s: float) -> None:
        """Writes the answer that came after `total_s` seconds, OK or LATE."""

    async def refuse(self, send: Send, refused: Refused, retry_after_s: float, *, close: bool) -> None:
        """Writes the error. `close` ends the connection, for the body may not have been read."""


class ImageCall:
    """POST /v1/{service}: the image is the body, the answer is JSON."""

    variant = ""

    def __init__(self, gateway: "Gateway", scope: Scope) -> None:
        self._scope = scope
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._body_timeout_s = gateway.config.body_timeout_s
        self.router = gateway.fleet.services.get(scope["path"][len(PREFIX) :])
        self.id = request_id(self._headers)
        if self.router is not None and self.router.wants_phase:
            gateway.fleet.report_phase(self.router.name, self._headers.get(b"x-tidegate-phase", b""))

    async def admit(self, receive: Receive, arrived_s: float) -> Request:
        """See `admission.admit`."""
        return await admit(self.router, self._scope, self._headers, receive, self.id, arrived_s, self._body_timeout_s)

    async def answer(self, send: Send, outcome: Outcome, answered: Answered, total_s: float) -> None:
        """See `responses.send_answer`."""
        assert self.router is not None, "only an admitted request is answered"
        await send_answer(send, self.id, self.router.name, outcome, answered, total_s)

    async def refuse(self, send: Send, refused: Refused, retry_after_s: float, *, close: bool) -> None:
        """See `responses.send_refusal`."""
        await send_refusal(send, self.id, refused, retry_after_s, close)


class Gateway:
    """Holds the parts together: what is known (`fleet`), how requests travel (`dispatcher`), what is counted."""

    def __init__(self, config: GatewayConfig, board: Board, seed: int | None = None) -> None:
        self.config = config
        self.fleet = Fleet(board, on_change=lambda: self.dispatcher.release())
        self.dispatcher = Dispatcher(self.fleet, Random(seed).random)
        self.metrics = GatewayMetrics()
        self.metrics.registry.register(FleetCollector(self.fleet.services.values, self.dispatcher.statistics))
        self.arrivals = Arrivals(secrets.token_hex(4), time.monotonic())
        self.inferences = Inferences()
        self.draining = False
        self._arrived = 0

    async def infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One POST to /v1/{service}, from its first byte to its answer."""
        await self.serve(ImageCall(self, scope), presence_of(scope), receive, send)

    async def serve(self, call: Call, presence: Presence, receive: Receive, send: Send) -> None:
        """The life of one request, whatever surface it came through."""
        arrived_s = time.monotonic()
        self._arrived += 1
        router = call.router
        if router is not None:
            self.arrivals.add(arrived_s, router.name)
        outcome = Outcome.CANCELLED
        request: Request | None = None
        refused: Refused | None = None
        answered: Answered | None = None
        now_s = arrived_s
        try:
            if router is None and not self.fleet.services:
                raise Refused(Outcome.UNAVAILABLE, "the gateway is starting: it has not seen a deployment yet")
            request = await call.admit(receive, arrived_s)
            assert router is not None, "an admitted request has a service"
            answered = await self._dispatch(router, request, presence)
            now_s = time.monotonic()
            outcome = Outcome.OK if now_s <= request.deadline_s else Outcome.LATE
            if outcome is Outcome.LATE and router.spec.on_late == "error":
                refused = Refused(Outcome.LATE, "the answer came after the deadline", 504)
        except Refused as error:
            outcome, refused = error.outcome, error
        except ClientGone:
            outcome = Outcome.CANCELLED
        except AnswerTimeout:
            outcome = Outcome.FAILED
            refused = Refused(outcome, "the worker did not answer")
        except Exception:
            log.exception("request %s to %s failed", call.id, router.name if router is not None else UNKNOWN)
            outcome = Outcome.FAILED
            refused = Refused(outcome, "internal error: the gateway's log has the details under this id")
        finally:
            known = router.name if router is not None else UNKNOWN
            total_s = now_s - arrived_s
            if answered is not None:
                self.metrics.count(known, outcome, total_s, answered.target.record.variant)
                self.inferences.add(known, answered.target.record.variant, total_s, answered.reply)
            else:
                self.metrics.count(known, outcome, None, None)
                self.inferences.add_failure(known, call.variant)
        if refused is not None:
            wait_s = min(router.clear_s, default=0.0) - time.monotonic() if router is not None else 1.0
            await call.refuse(send, refused, wait_s, close=request is None)
        elif answered is not None:
            await call.answer(send, outcome, answered, total_s)

    async def _dispatch(self, router: ServiceRouter, request: Request, presence: Presence) -> Answered:
        """The answer, unless the client leaves or the worker hangs first."""
        patience_s = request.deadline_s - request.arrived_s + self.config.answer_timeout_s
        hangs = asyncio.get_running_loop().call_later(patience_s, request.abandon, AnswerTimeout())
        presence.watch(lambda: request.abandon(ClientGone()))
        try:
            return await self.dispatcher.dispatch(router, request)
        finally:
            hangs.cancel()
            presence.forget()

    def statistics(self) -> GatewayStatistics:
        """A frozen picture of this process, for `/state`, metrics and tests."""
        now_s = time.monotonic()
        outcomes: dict[str, dict[str, int]] = {}
        for (service, outcome), number in self.metrics.tally.items():
            outcomes.setdefault(service, {})[outcome.name] = number
        return GatewayStatistics(
            arrived=self._arrived,
            in_flight=self._arrived - self.metrics.tally.total(),
            outcomes=outcomes,
            services={name: router.statistics(now_s) for name, router in self.fleet.services.items()},
            dispatch=self.dispatcher.statistics(),
        )
