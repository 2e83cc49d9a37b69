"""A transport that sends an answer's head together with its body.

uvicorn writes the two apart, and the event loop sends each at once: two system calls and two wake-ups of the client,
which on a small answer cost more than everything else in the gateway (measured with 40 kB requests over loopback: a
third of its time). So a head is held until the body follows, or until the loop's next turn at the latest.
"""

import asyncio
from typing import Any

_HEAD = b"HTTP/1."


class JoinedTransport:
    """Wraps an asyncio transport; everything but `write` and `close` is the wrapped one's."""

    __slots__ = ("_flush_handle", "_head", "_loop", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""
        self._flush_handle: asyncio.Handle | None = None

    def write(self, data: bytes) -> None:
        """Sends `data`, in order; a chunk that begins an answer waits for the next one."""
        if self._head:
            head, self._head = self._head, b""
            assert self._flush_handle is not None, "a held head has its flush planned"
            self._flush_handle.cancel()
            self._transport.write(head + data)
        elif data.startswith(_HEAD):
            self._head = data
            self._flush_handle = self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def close(self) -> None:
        """Sends what is held, then closes."""
        if self._head:
            self.write(b"")
        self._transport.close()

    def _flush(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
