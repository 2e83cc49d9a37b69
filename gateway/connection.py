"""uvicorn's HTTP connection with two guards that it lacks: on the size of a request's head, and on its slowness.

Everything else is uvicorn's. A client that breaks a guard gets a JSON error and the connection is closed.
"""

import asyncio
from typing import Any, ClassVar

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol


class GuardedConnection(HttpToolsProtocol):
    """An HTTP/1.1 connection whose request heads are bounded in bytes and time. The limits are class-wide settings."""

    max_header_bytes: ClassVar[int] = 16_384
    header_timeout_s: ClassVar[float] = 10.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self.header_timeout_s, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.header_timeout_s, self._too_slow)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        if sum(len(name) + len(value) + 4 for name, value in self.headers) + len(self.url) > self.max_header_bytes:
            self._refuse(431, f"the request's head is larger than {self.max_header_bytes} bytes")
        else:
            super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        # Bytes that arrive while a head is open count against its limit. A chunk that completes the head may bring
        # some of the body along, so the limit is judged only while the head stays open.
        super().data_received(data)
        if self._head_timer is not None and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > self.max_header_bytes:
                self._refuse(431, f"the request's head is larger than {self.max_header_bytes} bytes")

    def _too_slow(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._refuse(408, f"the request's head did not arrive within {self.header_timeout_s:g} s")

    def _refuse(self, status: int, reason: str) -> None:
        body = msgspec.json.encode({"error": reason, "code": "INVALID"})
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
