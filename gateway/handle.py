"""The life of one request: admit, dispatch, judge, answer, count. Start reading the gateway here.

Every request ends in exactly one `Outcome`, counted once, whatever happens: a bad body, a dead worker, a client that
leaves, a bug. What each outcome means: `protocol/outcomes.py`. Images take this way in `exchange.py`, without a task;
`serve` is the same life for calls that come over ASGI.
"""

import logging
import secrets
import time
from random import Random
from typing import Final, Protocol

import msgspec

from gateway.admission import Receive, Uploads
from gateway.arrivals import Arrivals
from gateway.config import GatewayConfig
from gateway.dispatch import Dispatcher, DispatchStatistics
from gateway.edge import EdgeDispatcher
from gateway.edge_answer import Account
from gateway.edge_exposition import edge_values
from gateway.edge_metrics import EdgeMetrics
from gateway.edge_request import EdgeAnswered, EdgeRequest, Ending
from gateway.edge_state import EdgeState, edge_state
from gateway.edge_view import EdgeView
from gateway.exposition import Exposition
from gateway.fleet import Fleet
from gateway.inferences import Inferences
from gateway.metrics import UNKNOWN, GatewayMetrics
from gateway.presence import Presence
from gateway.request import Answered, AnswerTimeout, ClientGone, End, Refused, Request
from gateway.responses import Send
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
    edge: EdgeState | None = None


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


class Gateway:
    """Holds the parts together: what is known (`fleet`), how requests travel (`dispatcher`), what is counted."""

    def __init__(self, config: GatewayConfig, board: Board, seed: int | None = None) -> None:
        self.config = config
        self.edge_view = EdgeView(board)
        self.edge_services = self.edge_view.services
        self.fleet = Fleet(board, on_change=lambda: self.dispatcher.release(), on_deployment=self.edge_view.configure)
        self.dispatcher = Dispatcher(self.fleet, Random(seed).random, config.answer_timeout_s)
        self.edge = EdgeDispatcher(self.edge_view, config.answer_timeout_s)
        self.metrics = GatewayMetrics()
        self.edge_metrics = EdgeMetrics()
        self.exposition = Exposition(
            self.fleet.id,
            self.metrics,
            self.fleet.services.values,
            self.dispatcher.statistics,
            config.metrics_folder,
            lambda: edge_values(self.edge_view, self.edge, self.edge_metrics, time.monotonic()),
        )
        self.arrivals = Arrivals(secrets.token_hex(4), time.monotonic())
        self.inferences = Inferences()
        self.uploads = Uploads(int(config.uploads_mb * 2**20))
        self.draining = False
        self._arrived = 0

    # the steps of a life

    def arrived(self, service: str) -> float:
        """A request has come: the time. One that is pinned to a variant is noted as the variant's: no router's work.

        `service` is empty for one that does not exist.
        """
        now_s = time.monotonic()
        self._arrived += 1
        if service:
            self.arrivals.add(now_s, service)
        return now_s

    def check_started(self) -> None:
        """Raises `Refused` (UNAVAILABLE) before the first deployment has been seen."""
        if not self.fleet.services and not self.edge_view.services:
            raise Refused(Outcome.UNAVAILABLE, "the gateway is starting: it has not seen a deployment yet")

    @staticmethod
    def judge(
        end: Ending, id: str, request: Request | EdgeRequest | None, on_late: str, now_s: float
    ) -> tuple[Outcome, Refused | None]:
        """The outcome, and what the client is told if that is an error; None for an answer or nobody to tell."""
        if not isinstance(end, Exception):
            assert request is not None, "only an admitted request is answered"
            if now_s <= request.deadline_s:
                return Outcome.OK, None
            late = Refused(Outcome.LATE, "the answer came after the deadline", 504) if on_late == "error" else None
            return Outcome.LATE, late
        if isinstance(end, Refused):
            return end.outcome, end
        if isinstance(end, ClientGone):
            return Outcome.CANCELLED, None
        if isinstance(end, AnswerTimeout):
            return Outcome.FAILED, Refused(Outcome.FAILED, "the worker did not answer")
        log.error("request %s failed", id, exc_info=end)
        return Outcome.FAILED, Refused(
            Outcome.FAILED, "internal error: the gateway's log has the details under this id"
        )

    def count(self, router: ServiceRouter | None, variant: str, outcome: Outcome, end: Ending, total_s: float) -> None:
        """The one place where requests are counted. `variant`: the pinned one, if any."""
        name = router.name if router is not None else UNKNOWN
        if isinstance(end, Answered):
            self.metrics.count(name, outcome, total_s, end.target.record.variant)
            self.inferences.add(name, end.target.record.variant, total_s, end.reply)
        else:
            self.metrics.count(name, outcome, None, None)
            self.inferences.add_failure(name, variant)

    def count_edge(
        self,
        service: str,
        request: EdgeRequest | None,
        outcome: Outcome,
        end: Ending,
        account: Account | None,
        total_s: float,
    ) -> None:
        """As `count`, for a request to an edge service; `request` if it was admitted, `account` if it was answered."""
        if isinstance(end, EdgeAnswered):
            choice = end.choice.placement
            net = end.request.net
            variant = net.network.tables[net.service_of[service]].variants[choice.variant]
            self.metrics.count(service, outcome, total_s, variant)
        else:
            self.metrics.count(service, outcome, None, None)
        if request is not None:
            self.edge_metrics.count(request, outcome, end, account)

    @staticmethod
    def retry_after_s(router: ServiceRouter | None) -> float:
        """When a refused client may come again: when the first instance is predicted to be clear."""
        return min(router.clear_s, default=0.0) - time.monotonic() if router is not None else 1.0

    async def serve(self, call: Call, presence: Presence, receive: Receive, send: Send) -> None:
        """The life of one request that came over ASGI."""
        router = call.router
        arrived_s = now_s = self.arrived(call.variant or (router.name if router is not None else ""))
        end: End = ClientGone()
        outcome, refused = Outcome.CANCELLED, None
        request: Request | None = None
        try:
            try:
                self.check_started()
                request = await call.admit(receive, arrived_s)
                assert router is not None, "an admitted request has a service"
                if presence.gone:  # while its body was read in a thread: there is nothing yet that could be abandoned
                    raise ClientGone
                presence.watch(lambda: request.abandon(ClientGone()))
                end = await self.dispatcher.dispatch(router, request)
            except Exception as error:
                end = error
            now_s = time.monotonic()
            outcome, refused = self.judge(end, call.id, request, router.spec.on_late if router else "", now_s)
        finally:
            presence.forget()
            self.count(router, call.variant, outcome, end, now_s - arrived_s)
        if refused is not None:
            await call.refuse(send, refused, self.retry_after_s(router), close=request is None)
        elif isinstance(end, Answered):
            await call.answer(send, outcome, end, now_s - arrived_s)

    def statistics(self) -> GatewayStatistics:
        """A frozen picture of this process, for `/state`, metrics and tests."""
        now_s = time.monotonic()
        return GatewayStatistics(
            arrived=self._arrived,
            in_flight=self._arrived - self.metrics.ended,
            outcomes=self.metrics.outcomes(),
            services={name: router.statistics(now_s) for name, router in self.fleet.services.items()},
            dispatch=self.dispatcher.statistics(),
            edge=edge_state(self.edge_view, self.edge, self.edge_metrics, now_s),
        )
