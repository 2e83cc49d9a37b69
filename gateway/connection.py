"""uvicorn's HTTP connection with the guards that it lacks: on a request's head (bytes and time), and on pipelines.

A client that breaks a guard, or that does not speak HTTP, gets a JSON error and the connection is closed; answers to
its earlier requests go out first. Nothing grows with what a client sends ahead: reading stops while requests wait for
their turns, and each turn begins in the event loop. When a client leaves, the request that is being served hears of it
even if the client had already sent the next one. Images (POST /v1/{service}) are served without ASGI, as an
`Exchange`, in turn with the others. Everything else is uvicorn's.
"""

import asyncio
from collections.abc import Sized
from typing import Any, ClassVar, Final, cast
from urllib.parse import unquote

import httptools
import msgspec
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gateway.admission import Receive, Scope
from gateway.edge_exchange import EdgeExchange
from gateway.exchange import Exchange
from gateway.handle import PREFIX, Gateway
from gateway.joined import JoinedSend
from gateway.presence import Presence, announce, presence_of
from gateway.request import Refused
from gateway.responses import Send
from protocol.outcomes import Outcome

_INFER: Final = PREFIX.encode()
LINGER_S: Final = 1.0
"""How long a client that is still sending may take to read why it is cut off."""
BREATHE_BYTES: Final = 131_072
"""A piece of a body so large comes from a full buffer: there is more."""
BREATHE_S: Final = 0.001
"""With buffers of 256 KB, uploads are taken at 256 MB/s at most."""
READ_AHEAD_BYTES: Final = 65_536
"""Of requests that wait for their turn. A client that sends more ahead and leaves is noticed at the next turn."""


class _Turns(FlowControl):
    """Reads a little ahead of the request that is served, so that a client's leaving is seen, and then no further.

    While requests that were sent ahead wait, nobody may resume; only `data_received` pauses because of them.
    """

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting
        self.ahead_bytes = 0
        self.queueing = False  # uvicorn queues a request just now, and would pause at once

    def pause_reading(self) -> None:
        """uvicorn's calls, for a large body and for a request that has to wait."""
        if not self.queueing:
            super().pause_reading()

    def resume_reading(self) -> None:
        """uvicorn's calls, one for each `receive` and each answer."""
        if not self._waiting:
            self.ahead_bytes = 0
            super().resume_reading()

    def breathe(self, loop: asyncio.AbstractEventLoop) -> None:
        """Reads no further for a moment, in which others are served.

        libuv would read up to 32 full buffers (8 MB) of one connection in one turn of the loop: 8 ms.
        """
        if not self.read_paused:
            super().pause_reading()
            loop.call_later(BREATHE_S, self._breathed)

    def _breathed(self) -> None:
        if not self._transport.is_closing():
            self.resume_reading()

    def read_ahead(self, size: int) -> None:
        """`size` bytes have come while requests wait for their turns."""
        self.ahead_bytes += size
        if self.ahead_bytes > READ_AHEAD_BYTES:
            super().pause_reading()


class GuardedConnection(HttpToolsProtocol):
    """An HTTP/1.1 connection whose request heads are bounded in bytes and time. The settings are class-wide."""

    gateway: ClassVar[Gateway]
    max_header_bytes: ClassVar[int] = 16_384
    header_timeout_s: ClassVar[float] = 10.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._silent = True  # in the bytes at hand: no head begun or complete, no piece of a body, no end of one
        self._silent_bytes = 0  # since the last that was not
        self._head_open = False  # a head has begun and is not complete
        self._head_timer: asyncio.TimerHandle | None = None  # set while bytes of one are awaited
        self._running: RequestResponseCycle | Exchange | None = None
        self._unread: Exchange | None = None  # its answer waits for a client that reads slowly
        self._refused = False  # nothing more is taken from this client
        self._closed = False  # nothing more is written to it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = self._flow = _Turns(transport, self.pipeline)
        self._head_timer = self.loop.call_later(self.header_timeout_s, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = self._refused = True
        self._stop_timer()
        self._unset_keepalive_if_required()
        # uvicorn tells the latest request only; the one that is being served may be an earlier one.
        self._tell_gone(self._running)
        self.pipeline.clear()
        super().connection_lost(exc)
        # An exchange knows its connection: without the way back nothing is left for the cycle collector.
        self.cycle = None  # type: ignore[assignment]
        self._running = self._unread = None

    @staticmethod
    def _tell_gone(running: RequestResponseCycle | Exchange | None) -> None:
        """Nobody waits for the answer of the request that is being served."""
        if isinstance(running, Exchange):
            running.leave()
        elif running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
            presence_of(cast(Scope, running.scope)).leave()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._silent = True
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("")
        if self.pipeline:
            self._flow.read_ahead(len(data))
        if self._head_open and self._head_timer is None and not self._refused:
            self._head_timer = self.loop.call_later(self.header_timeout_s, self._too_slow)
        # Bytes of which nothing came are all of a head, or of what follows a body (trailers, chunk extensions, blank
        # lines). Others may be the body: so an endless head is noticed one chunk later, and a body never is one.
        self._silent_bytes = self._silent_bytes + len(data) if self._silent else 0
        if self._silent_bytes > self.max_header_bytes:
            self._refuse(
                431, f"the request's head, or what follows its body, is larger than {self.max_header_bytes} bytes"
            )

    def _parse(self, data: bytes | memoryview) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as stop:
                data = memoryview(data)[stop.args[0] :]
            if self._refused:
                return
            if self.parser.get_method() == b"CONNECT":
                self._refuse(405, "this is no proxy")
                return
            self._decline_upgrade()

    # the parser's calls

    def on_message_begin(self) -> None:
        # uvicorn makes the scope here; an exchange needs none, so it is made when it is known what the request is.
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._silent = False
        self._head_open = True
        self._unset_keepalive_if_required()

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # the parser stops here: `_decline_upgrade` goes on
        self._silent = self._head_open = False
        self._stop_timer()
        self._unset_keepalive_if_required()
        if self._refused or self.transport.is_closing():
            self._refused = True  # the answer before this one was announced as the last
            return
        if sum(len(name) + len(value) + 4 for name, value in self.headers) + len(self.url) > self.max_header_bytes:
            self._refuse(431, f"the request's head is larger than {self.max_header_bytes} bytes")
            return
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        plain = url.startswith(_INFER) and b"?" not in url and b"#" not in url
        path = url if plain else httptools.parse_url(url).path or b""
        if path.startswith(_INFER):
            self._open_exchange(path)
            return
        super().on_message_begin()
        self.url, self.headers, self.expect_100_continue = url, headers, expects
        self.scope["headers"] = headers
        self._flow.queueing = True
        super().on_headers_complete()
        self._flow.queueing = False

    def on_body(self, body: bytes) -> None:
        self._silent = False
        if self._refused:
            return
        latest: RequestResponseCycle | Exchange = self.cycle
        if isinstance(latest, Exchange):
            latest.take(body)
            if len(body) >= BREATHE_BYTES and latest.breathes:
                self._flow.breathe(self.loop)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._silent = False
        if self._refused or self.parser.should_upgrade():
            return
        latest: RequestResponseCycle | Exchange = self.cycle
        if isinstance(latest, Exchange):
            latest.complete()
        else:
            super().on_message_complete()

    def _decline_upgrade(self) -> None:
        """Serves a request that offers another protocol (h2c, WebSocket) as if it had not.

        A server may ignore such an offer, and some HTTP clients make it with every first request. The parser would
        take what follows for the other protocol, so a fresh one gets the head without the offer.
        """
        kept = (b"%b: %b\r\n" % one for one in self.headers if one[0] not in (b"upgrade", b"connection"))
        version = self.parser.get_http_version().encode()
        head = b"%b %b HTTP/%b\r\n%b\r\n" % (self.parser.get_method(), self.url, version, b"".join(kept))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.parser.feed_data(head)

    # exchanges

    def _open_exchange(self, path: bytes) -> None:
        gateway, make = self.gateway, Exchange
        if gateway.edge_services and unquote(path[len(_INFER) :].decode("latin-1")) in gateway.edge_services:
            make = EdgeExchange
        exchange = make(
            gateway,
            self,
            self.parser.get_method().decode("ascii"),
            path.decode("latin-1"),
            self.headers,
            keep_alive=self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive(),
            continues=self.expect_100_continue and self.parser.get_http_version() != "1.0",
        )
        latest, self.cycle = self.cycle, cast(RequestResponseCycle, exchange)
        if latest is None or latest.response_complete:
            self._running = exchange
            exchange.begin()
        else:
            self.pipeline.appendleft((self.cycle, self.app))

    def send(self, data: bytes) -> None:
        """See `exchange.Line`."""
        self.transport.write(data)

    def finish(self, exchange: Exchange, answer: bytes) -> None:
        """See `exchange.Line`. A client that does not read gets its next turn when it has."""
        self.transport.write(answer)
        if self.flow.write_paused:
            self._unread = exchange
        else:
            self._finished(exchange)

    def resume_writing(self) -> None:
        super().resume_writing()
        unread, self._unread = self._unread, None
        if unread is not None:
            self._finished(unread)

    def _finished(self, exchange: Exchange) -> None:
        exchange.response_complete = True
        if not exchange.keep_alive:
            self._close_gently()
        self.on_response_complete()

    def on_response_complete(self) -> None:
        """The next request's turn, or the wait for one.

        As uvicorn's, but a turn begins in the loop: the books of the request before it are kept by then, and thousands
        that were sent ahead and are refused at once do not nest.
        """
        self.server_state.total_requests += 1
        if self._closed or self.transport.is_closing():
            return
        if self.pipeline:
            self.loop.call_soon(self._next_turn)
            return
        self.flow.resume_reading()
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _next_turn(self) -> None:
        if self.pipeline and not self._closed and not self.transport.is_closing():
            self._start_asgi_task(*self.pipeline.pop())

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "these bytes are not an HTTP/1.1 request")

    def _start_asgi_task(self, cycle: RequestResponseCycle | Exchange, app: Any) -> None:
        self._running = cycle
        self.flow.resume_reading()
        if isinstance(cycle, Exchange):
            cycle.begin()
            return
        announce(cast(Scope, cycle.scope), Presence())

        async def joined(scope: Scope, receive: Receive, send: Send) -> None:
            await app(scope, receive, JoinedSend(cycle, self._close_gently))

        super()._start_asgi_task(cycle, cast(Any, joined))

    # refusals

    def _too_slow(self) -> None:
        self._head_timer = None
        if self.flow.read_paused:  # it may have arrived: requests before it wait for their turns
            self._head_timer = self.loop.call_later(self.header_timeout_s, self._too_slow)
            return
        self._refuse(408, f"the request's head did not arrive within {self.header_timeout_s:g} s")

    def _refuse(self, status: int, reason: str) -> None:
        """Takes nothing more from this client, and says why unless that would overtake an earlier answer."""
        if self._refused:
            return
        self._refused = True
        self._stop_timer()
        if self.transport.is_closing():
            return
        latest: RequestResponseCycle | Exchange | None = self.cycle
        if latest is not None and not latest.response_complete:
            if isinstance(latest, Exchange) and latest.more_body:
                latest.spoil(Refused(Outcome.INVALID, reason, status))  # the error is its answer, in its turn
                return
            if self.pipeline or not latest.more_body:
                latest.keep_alive = False  # its answer will be the last
                return
            self._tell_gone(latest)
        body = msgspec.json.encode({"error": reason, "code": "INVALID"})
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self._close_gently()

    def _close_gently(self) -> None:
        """Closes after what was written. A client that is still sending is given a moment to read it.

        Closing on unread bytes resets the connection, and the reset may overtake the answer that says why.
        """
        if self._closed or self.transport.is_closing():
            return
        sending = self._refused or self.flow.read_paused or (self.cycle is not None and self.cycle.more_body)
        self._closed = self._refused = True
        self.pipeline.clear()
        if not sending:
            self.transport.close()
            return
        self.flow.resume_reading()
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
