"""The life of one request: admit, dispatch, judge, answer, count. Start reading the gateway here.

Every request ends in exactly one `Outcome`, counted once, in `finally`, whatever happens: a bad body, a dead worker,
a client that leaves, a bug. See DESIGN section 4 for what each outcome means.
"""

import asyncio
import logging
import time
from random import Random
from typing import Any, Final

import msgspec

from gateway.admission import Receive, Scope, admit, request_id
from gateway.config import GatewayConfig
from gateway.dispatch import Answered, AnswerTimeout, ClientGone, Dispatcher, DispatchStatistics, Refused, Request
from gateway.fleet import Fleet
from gateway.metrics import UNKNOWN, FleetCollector, GatewayMetrics
from gateway.responses import Send, send_answer, send_refusal
from gateway.router import RouterStatistics
from protocol.board import Board
from protocol.outcomes import Outcome

log = logging.getLogger("gateway.handle")

WATCH_AFTER_S: Final = 0.005
"""A client's leaving is looked for once its request has waited this long: most answers are faster and need no task."""
PREFIX: Final = "/v1/"


class GatewayStatistics(msgspec.Struct, frozen=True):
    """Everything countable at one moment. arrived = sum of outcomes + in flight, for each gateway process."""

    arrived: int
    in_flight: int
    outcomes: dict[str, dict[str, int]]
    services: dict[str, RouterStatistics]
    dispatch: DispatchStatistics


class Gateway:
    """Holds the parts together: what is known (`fleet`), how requests travel (`dispatcher`), what is counted."""

    def __init__(self, config: GatewayConfig, board: Board, seed: int | None = None) -> None:
        self.config = config
        self.fleet = Fleet(board, on_change=lambda: self.dispatcher.release())
        self.dispatcher = Dispatcher(self.fleet, Random(seed).random)
        self.metrics = GatewayMetrics()
        self.metrics.registry.register(FleetCollector(self.fleet.services.values, self.dispatcher.statistics))
        self.draining = False
        self._arrived = 0

    async def infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One POST to /v1/{service}, from its first byte to its answer."""
        arrived_s = time.monotonic()
        self._arrived += 1
        headers: dict[bytes, bytes] = dict(scope["headers"])
        name = scope["path"][len(PREFIX) :]
        router = self.fleet.services.get(name)
        id = request_id(headers)
        outcome = Outcome.CANCELLED
        request: Request | None = None
        refused: Refused | None = None
        answered: Answered | None = None
        now_s = arrived_s
        try:
            if router is None and not self.fleet.services:
                raise Refused(Outcome.UNAVAILABLE, "the gateway is starting: it has not seen a deployment yet")
            request = await admit(router, scope, headers, receive, id, arrived_s, self.config.body_timeout_s)
            assert router is not None
            watch = _Watch(receive, request, self.config.answer_timeout_s)
            try:
                answered = await self.dispatcher.dispatch(router, request)
            finally:
                watch.stop()
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
            log.exception("request %s to %s failed", id, name)
            outcome = Outcome.FAILED
            refused = Refused(outcome, "internal error: the gateway's log has the details under this id")
        finally:
            known = name if router is not None else UNKNOWN
            if answered is not None:
                self.metrics.count(known, outcome, now_s - arrived_s, answered.target.record.variant)
            else:
                self.metrics.count(known, outcome, None, None)
        if refused is not None:
            wait_s = min(router.clear_s, default=0.0) - time.monotonic() if router is not None else 1.0
            await send_refusal(send, id, refused, wait_s, close=request is None)
        elif answered is not None:
            await send_answer(send, id, name, outcome, answered, now_s - arrived_s)

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


class _Watch:
    """Notices that the client has left, or that the worker hangs, while a request waits for its reply."""

    __slots__ = ("_loop", "_receive", "_request", "_task", "_timeout_s", "_timer")

    def __init__(self, receive: Receive, request: Request, timeout_s: float) -> None:
        self._receive = receive
        self._request = request
        self._timeout_s = timeout_s
        self._task: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(WATCH_AFTER_S, self._begin)

    def _begin(self) -> None:
        self._task = self._loop.create_task(self._until_gone())
        left_s = max(0.0, self._request.deadline_s - time.monotonic())
        self._timer = self._loop.call_later(left_s + self._timeout_s, self._request.abandon, AnswerTimeout())

    async def _until_gone(self) -> None:
        message: Any = await self._receive()
        if message["type"] == "http.disconnect":
            self._request.abandon(ClientGone())

    def stop(self) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
