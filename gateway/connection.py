"""uvicorn's HTTP connection with the guards that it lacks: on a request's head (bytes and time), and on pipelines.

A client that breaks a guard, or that does not speak HTTP, gets a JSON error and the connection is closed; answers to
its earlier requests go out first. When a client leaves, the request that is being served hears of it even if the
client had already sent the next one. Images (POST /v1/{service}) are served without ASGI, as an `Exchange`, in turn
with the others. Everything else is uvicorn's.
"""

import asyncio
from typing import Any, ClassVar, Final, cast

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gateway.admission import Receive, Scope
from gateway.exchange import Exchange
from gateway.handle import PREFIX, Gateway
from gateway.joined import JoinedSend
from gateway.presence import Presence, announce, presence_of
from gateway.responses import Send

_INFER: Final = PREFIX.encode()
LINGER_S: Final = 1.0
"""How long a client that is still sending may take to read why it is cut off."""


class GuardedConnection(HttpToolsProtocol):
    """An HTTP/1.1 connection whose request heads are bounded in bytes and time. The settings are class-wide."""

    gateway: ClassVar[Gateway]
    max_header_bytes: ClassVar[int] = 16_384
    header_timeout_s: ClassVar[float] = 10.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._heads = 0  # begun so far
        self._head_bytes = 0  # of the one that is open
        self._head_timer: asyncio.TimerHandle | None = None  # set while one is open, and until the first begins
        self._running: RequestResponseCycle | Exchange | None = None
        self._unread: Exchange | None = None  # its answer waits for a client that reads slowly
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self.header_timeout_s, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        # uvicorn tells the latest request only; the one that is being served may be an earlier one.
        running = self._running
        if isinstance(running, Exchange):
            running.leave()
        elif running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
            presence_of(cast(Scope, running.scope)).leave()
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        heads = self._heads
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stop:
            self._decline_upgrade(data[stop.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("")
        # Only a head that was open before these bytes, and still is, is known to consist of all of them; in others
        # they may be the body before it. So an endless head is noticed one chunk later, and a body never is one.
        if self._head_timer is not None and heads == self._heads:
            self._head_bytes += len(data)
            if self._head_bytes > self.max_header_bytes:
                self._refuse(431, f"the request's head is larger than {self.max_header_bytes} bytes")

    # the parser's calls

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._heads += 1
        self._head_bytes = 0
        if self._head_timer is None and not self._refused:
            self._head_timer = self.loop.call_later(self.header_timeout_s, self._too_slow)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # the parser stops here: `_decline_upgrade` goes on
        self._stop_timer()
        if self._refused:
            return
        if sum(len(name) + len(value) + 4 for name, value in self.headers) + len(self.url) > self.max_header_bytes:
            self._refuse(431, f"the request's head is larger than {self.max_header_bytes} bytes")
            return
        path = httptools.parse_url(self.url).path or b""
        if path.startswith(_INFER):
            self._open_exchange(path)
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._refused:
            return
        latest: RequestResponseCycle | Exchange = self.cycle
        if isinstance(latest, Exchange):
            latest.take(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._refused or self.parser.should_upgrade():
            return
        latest: RequestResponseCycle | Exchange = self.cycle
        if isinstance(latest, Exchange):
            latest.complete()
        else:
            super().on_message_complete()

    def _decline_upgrade(self, rest: bytes) -> None:
        """Serves a request that offers another protocol (h2c, WebSocket) as if it had not; `rest` follows its head.

        A server may ignore such an offer, and some HTTP clients make it with every first request. The parser would
        take what follows for the other protocol, so a fresh one gets the head without the offer.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(405, "this is no proxy")
            return
        kept = (b"%b: %b\r\n" % one for one in self.headers if one[0] not in (b"upgrade", b"connection"))
        version = self.parser.get_http_version().encode()
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.data_received(b"%b %b HTTP/%b\r\n%b\r\n%b" % (method, self.url, version, b"".join(kept), rest))

    # exchanges

    def _open_exchange(self, path: bytes) -> None:
        exchange = Exchange(
            self.gateway,
            self,
            self.parser.get_method().decode("ascii"),
            path.decode("latin-1"),
            self.headers,
            keep_alive=self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive(),
            continues=self.expect_100_continue,
        )
        latest, self.cycle = self.cycle, cast(RequestResponseCycle, exchange)
        if latest is None or latest.response_complete:
            self._running = exchange
            exchange.begin()
        else:
            self.flow.pause_reading()
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

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "these bytes are not an HTTP/1.1 request")

    def _start_asgi_task(self, cycle: RequestResponseCycle | Exchange, app: Any) -> None:
        self._running = cycle
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
        self._refuse(408, f"the request's head did not arrive within {self.header_timeout_s:g} s")

    def _refuse(self, status: int, reason: str) -> None:
        """Takes nothing more from this client, and says why unless that would overtake an earlier answer."""
        self._refused = True
        self._stop_timer()
        if self.transport.is_closing():
            return
        latest = self.cycle
        if latest is not None and not latest.response_complete and (self.pipeline or not latest.more_body):
            latest.keep_alive = False  # its answer will be the last
            return
        body = msgspec.json.encode({"error": reason, "code": "INVALID"})
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self._close_gently()

    def _close_gently(self) -> None:
        """Closes after what was written. A client that is still sending is given a moment to read it.

        Closing on unread bytes resets the connection, and the reset may overtake the answer that says why.
        """
        if self.transport.is_closing():
            return
        if not self._refused and (self.cycle is None or not self.cycle.more_body):
            self.transport.close()
            return
        self._refused = True
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
