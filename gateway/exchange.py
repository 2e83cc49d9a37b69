"""POST /v1/{service}: the image is the body, the answer is JSON. One request's life on its connection, without a task.

    head ──► begin (its turn has come) ──► body complete ──► dispatcher ──► answer written

ASGI would take a task, a cycle object and half a dozen coroutines for each request: more time than everything that
this gateway itself does (docs/decisions/0003). `connection.py` keeps the order of requests on a connection and calls
`begin`, `take`, `complete` and `leave`; everything else runs straight through in callbacks.
"""

import asyncio
import logging
import time
from typing import Final, Protocol
from urllib.parse import unquote

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from gateway.admission import check_head, image_of, request_id, too_large, too_slow
from gateway.edge_request import EdgeRequest, Ending
from gateway.handle import PREFIX, Gateway
from gateway.request import Answered, ClientGone, Refused, Request
from gateway.responses import answer_body, refusal
from protocol.outcomes import Outcome

log = logging.getLogger("gateway.exchange")

_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\n"
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_BROKEN: Final = b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_SMALL_BYTES: Final = 512
"""Pieces of a body below this are put together at once: kept apart, chunks of one byte would each take fifty."""


class Line(Protocol):
    """The connection, as an exchange needs it."""

    def send(self, data: bytes) -> None:
        """Writes bytes that do not end the exchange."""

    def finish(self, exchange: "Exchange", answer: bytes) -> None:
        """Writes the answer; the next request's turn comes, or the end, as the exchange's `keep_alive` says."""


class _Nobody:
    """uvicorn's connection wakes the task of its request; here is none."""

    def set(self) -> None:
        """Nobody waits."""


class Exchange:
    """One request and its answer.

    `keep_alive`, `more_body`, `response_complete` and `message_event` are what uvicorn's connection looks at in the
    request that it serves; `response_complete` is the connection's to set.
    """

    __slots__ = (
        "_arrived_s",
        "_begun",
        "_body_timer",
        "_budget_s",
        "_content_type",
        "_continues",
        "_ended",
        "_gateway",
        "_headers",
        "_held",
        "_id",
        "_limit",
        "_line",
        "_method",
        "_parts",
        "_path",
        "_request",
        "_router",
        "_size",
        "_spoilt",
        "disconnected",
        "keep_alive",
        "more_body",
        "response_complete",
    )
    message_event = _Nobody()
    breathes = False
    """Whether others are served between the pieces of its body, at the price of a millisecond for each."""

    def __init__(
        self,
        gateway: Gateway,
        line: Line,
        method: str,
        path: str,
        headers: list[tuple[bytes, bytes]],
        *,
        keep_alive: bool,
        continues: bool,
    ) -> None:
        self._gateway = gateway
        self._line = line
        self._method = method
        self._path = unquote(path) if "%" in path else path
        self._headers = dict(headers)
        self._router = gateway.fleet.services.get(self._path[len(PREFIX) :])
        self._id = ""
        self._continues = continues
        self._parts: list[bytes | bytearray] = []
        self._size = 0
        self._held = 0  # of it, what counts among the gateway's uploads
        self._limit = 0
        self._begun = False
        self._ended = False
        self._arrived_s = 0.0
        self._budget_s = 0.0
        self._content_type = ""
        self._request: Request | EdgeRequest | None = None
        self._spoilt: Refused | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self.keep_alive = keep_alive
        self.more_body = True
        self.response_complete = False
        self.disconnected = False

    # the connection's calls

    def begin(self) -> None:
        """Every earlier request of the connection has been answered: this one's life starts."""
        self._begun = True
        self._id = request_id(self._headers)
        try:
            self._admit()
            if self._size > self._limit:
                raise too_large(self._limit)
        except Exception as error:
            self._end(error)
            return
        if not self.more_body:
            self._dispatch()
            return
        if self._continues:
            self._line.send(_CONTINUE)
        timeout_s = self._gateway.config.body_timeout_s
        self._body_timer = asyncio.get_running_loop().call_later(timeout_s, self._end, too_slow())

    def take(self, part: bytes) -> None:
        """A piece of the body. After the end (a refusal) it is dropped."""
        if self._ended:
            return
        self._size += len(part)
        parts = self._parts
        if len(part) >= _SMALL_BYTES:
            parts.append(part)
        elif parts and type(parts[-1]) is bytearray:
            parts[-1] += part
        else:
            parts.append(bytearray(part))
        if self._begun:
            uploads = self._gateway.uploads
            uploads.held += self._size - self._held
            self._held = self._size
            if self._size > self._limit:
                self._end(too_large(self._limit))
            elif uploads.held > uploads.limit:
                self._end(uploads.full())

    def complete(self) -> None:
        """The body has been read to its end."""
        self.more_body = False
        if self._begun and not self._ended:
            self._dispatch()

    def spoil(self, why: Refused) -> None:
        """The rest of the body will never come: `why` is this request's end, in its turn."""
        self._spoilt = why
        if self._begun:
            self._end(why)

    def leave(self) -> None:
        """The client has gone."""
        self.disconnected = True
        if self._request is not None:
            self._request.abandon(ClientGone())
        elif self._begun:
            self._end(ClientGone())

    # the rest of its life

    def _admit(self) -> None:
        """The head is judged. Raises `Refused`; `spoil` may have come before."""
        gateway, router = self._gateway, self._router
        self._arrived_s = gateway.arrived(router.name if router is not None else "")
        if self._spoilt is not None:
            raise self._spoilt
        if router is None:
            gateway.check_started()
        elif router.wants_phase:
            gateway.fleet.report_phase(router.name, self._headers.get(b"x-tidegate-phase", b""))
        router, self._content_type, self._budget_s = check_head(router, self._path, self._method, self._headers)
        self._limit = router.spec.max_body_bytes

    def _dispatch(self) -> None:
        router = self._router
        assert router is not None, "a request whose head was refused has ended"
        self._arrived_whole()
        parts, self._parts = self._parts, []
        body = b"".join(parts)
        try:
            image, content_type = image_of(body, self._content_type, self._headers)
        except Exception as error:
            self._end(error)
            return
        deadline_s = self._arrived_s + self._budget_s
        self._request = request = Request(self._id, self._arrived_s, deadline_s, image, content_type, router.spec.top_k)
        self._gateway.dispatcher.start(router, request, self._end)

    def _end(self, end: Ending) -> None:
        """The one end of this request: judged, counted, and told to the client if it is still there."""
        if self._ended:
            return
        self._ended = True
        if self._held or self._body_timer is not None:
            self._arrived_whole()
        now_s = time.monotonic()
        total_s = now_s - self._arrived_s
        on_late = self._router.spec.on_late if self._router is not None else ""
        request, self._request = self._request, None
        outcome, refused = self._gateway.judge(end, self._id, request, on_late, now_s)
        self._parts = []
        try:
            if self.disconnected:
                return
            try:
                answer = self._answer(end, outcome, refused, admitted=request is not None, total_s=total_s)
            except Exception:
                log.exception("the answer to request %s cannot be written", self._id)
                self.keep_alive = False
                answer = _BROKEN
            self._line.finish(self, answer)
        finally:  # after the answer has left: nobody waits for the books
            if self._router is not None:
                self._gateway.count(self._router, "", outcome, end, total_s)
            else:
                self._count(request, end, outcome, total_s)

    def _answer(
        self, end: Ending, outcome: Outcome, refused: Refused | None, *, admitted: bool, total_s: float
    ) -> bytes:
        """The bytes that tell the client of the end."""
        if refused is not None:
            self.keep_alive = self.keep_alive and admitted
            status, headers, body = refusal(self._id, refused, self._retry_after_s())
            lines = [STATUS_LINE[status], *(b"%b: %b\r\n" % header for header in headers)]
            head = b"".join(lines)
            if self._method == "HEAD":
                body = b""
        else:
            if self._router is not None and isinstance(end, Answered):
                body = answer_body(self._id, self._router.name, outcome, end, total_s)
            else:
                body = self._answer_body(end, outcome, total_s)
            head = _HEAD % (len(body), self._id.encode())
            if outcome is Outcome.LATE:
                head += b"x-tidegate-late: 1\r\n"
        if not self.keep_alive:
            head += b"connection: close\r\n"
        return b"%b\r\n%b" % (head, body)

    # what other kinds of requests do otherwise

    def _answer_body(self, end: Ending, outcome: Outcome, total_s: float) -> bytes:
        """The answer's JSON, where no router of classification answered."""
        raise TypeError(f"without a refusal and with somebody to tell there is an answer, not {end!r}")

    def _count(self, request: Request | EdgeRequest | None, end: Ending, outcome: Outcome, total_s: float) -> None:
        """The books of a request without a router of classification: here, of one to an unknown service."""
        self._gateway.count(None, "", outcome, end, total_s)

    def _retry_after_s(self) -> float:
        return self._gateway.retry_after_s(self._router)

    def _arrived_whole(self) -> None:
        """The body is no upload any more: it has come to its end, or nobody wants the rest."""
        self._gateway.uploads.held -= self._held
        self._held = 0
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
