"""An answer's head and body in one write.

uvicorn writes the two apart, and the event loop sends each at once: two system calls and two wake-ups of the client,
which on a small answer cost more than everything else in the gateway (measured with 40 kB requests over loopback: a
third of its time). `JoinedSend` is the ASGI `send` that applications get instead of uvicorn's: it holds the head until
the body is there, and writes a whole answer itself. Whatever is not a whole answer (streams, HEAD, a client that reads
slowly) goes through uvicorn's own `send`, unchanged.
"""

from collections.abc import Callable, MutableMapping
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle


class JoinedSend:
    """The `send` of one request. Held: the message that starts the response, until the next one comes.

    `close` ends the connection after an answer that is the last on it.
    """

    __slots__ = ("_close", "_cycle", "_start")

    def __init__(self, cycle: RequestResponseCycle, close: Callable[[], None]) -> None:
        self._cycle = cycle
        self._close = close
        self._start: MutableMapping[str, Any] | None = None

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        """One ASGI message of the application."""
        start = self._start
        if start is None and message["type"] == "http.response.start":
            self._start = message
            return
        self._start = None
        send: Any = self._cycle.send
        if start is not None:
            answer = self._whole(start, message)
            if answer is not None:
                self._write(answer)
                return
            await send(start)
        await send(message)

    def _whole(self, start: MutableMapping[str, Any], message: MutableMapping[str, Any]) -> bytes | None:
        """The bytes of the answer, if these two messages are all of it and nothing about it is special."""
        cycle = self._cycle
        if message.get("more_body", False) or cycle.response_started or cycle.disconnected or cycle.flow.write_paused:
            return None
        if message["type"] != "http.response.body" or cycle.scope["method"] == "HEAD":
            return None
        body: bytes = message.get("body", b"")
        parts = [STATUS_LINE[start["status"]]]
        announced = -1
        lines = 1
        for name, value in (*cycle.default_headers, *start.get("headers", ())):
            if name == b"connection":
                if value != b"close":
                    return None
                cycle.keep_alive = False
                continue
            if name == b"content-length":
                announced = int(value)
            parts += (name, b": ", value, b"\r\n")
            lines += 1
        head = b"".join(parts)
        # One line each: a header that smuggles in another is for uvicorn to refuse.
        if announced != len(body) or head.count(b"\n") != lines or head.count(b"\r") != lines:
            return None
        return head + (b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n") + body

    def _write(self, answer: bytes) -> None:
        """Writes the answer and does what uvicorn does at the end of one."""
        cycle = self._cycle
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        cycle.transport.write(answer)
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self._close()
        cycle.on_response()
