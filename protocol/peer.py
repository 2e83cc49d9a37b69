"""A lasting link to one address: connects, reconnects with back-off, tells its owner when it is up or down.

Gateways and schedulers keep one `Peer` per worker. Requests are never queued here: while the link is down, `request`
raises `LinkClosed` at once and the caller chooses another worker.
"""

import asyncio
import contextlib
from collections.abc import Callable

import msgspec

from protocol.frames import Frame, Kind
from protocol.link import Connection, LinkClosed, OnReply, Payload, connect

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0


class Peer:
    """The link to `address`. `run` keeps it up until cancelled; `on_change(peer)` is called on every up and down."""

    def __init__(self, address: str, on_change: Callable[["Peer"], None]) -> None:
        self.address = address
        self._on_change = on_change
        self._connection: Connection | None = None
        self._lost = asyncio.Event()
        self._hurry = asyncio.Event()
        self.last_error = ""

    @property
    def up(self) -> bool:
        """Whether a request can be sent now."""
        return self._connection is not None and not self._connection.closed

    @property
    def in_flight(self) -> int:
        """Requests that await a reply."""
        return self._connection.in_flight if self._connection is not None else 0

    @property
    def unsent_bytes(self) -> int:
        """Bytes that the socket has not taken yet."""
        return self._connection.unsent_bytes if self._connection is not None else 0

    def hurry(self) -> None:
        """Try to connect now instead of at the end of the current pause (the worker was just seen alive)."""
        self._hurry.set()

    def ask(self, kind: Kind, meta: msgspec.Struct | None, payload: Payload, on_reply: OnReply) -> int:
        """Like `Connection.ask`. Raises `LinkClosed` while the link is down."""
        if self._connection is None:
            raise LinkClosed(self.last_error or f"not connected to {self.address}")
        return self._connection.ask(kind, meta, payload, on_reply)

    def request(
        self, kind: Kind, meta: msgspec.Struct | None = None, payload: bytes = b""
    ) -> tuple[int, "asyncio.Future[Frame]"]:
        """Like `Connection.request`. Raises `LinkClosed` while the link is down."""
        if self._connection is None:
            raise LinkClosed(self.last_error or f"not connected to {self.address}")
        return self._connection.request(kind, meta, payload)

    def cancel(self, request_id: int) -> None:
        """Forgets a request and tells the peer that nobody waits for it any more."""
        connection = self._connection
        if connection is not None and not connection.closed:
            connection.forget(request_id)
            with contextlib.suppress(LinkClosed):
                connection.send(Kind.CANCEL, request_id)

    def cut(self, reason: str) -> None:
        """Ends the connection at once; what awaits a reply on it is lost. `run` connects again."""
        if self._connection is not None:
            self._connection.abort(reason)

    async def run(self) -> None:
        """Connect, wait until lost, pause, again; until cancelled. Closes the connection on the way out."""
        pause_s = FIRST_PAUSE_S
        try:
            while True:
                self._lost.clear()
                self._hurry.clear()
                try:
                    self._connection = await connect(self.address, self._make_connection)
                except OSError as error:
                    self.last_error = f"{self.address}: {error.strerror or error}"
                    # Not wait_for: on Python 3.11 it loses a cancellation that comes together with the event.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(pause_s):
                            await self._hurry.wait()
                    pause_s = min(LONGEST_PAUSE_S, pause_s * 2)
                    continue
                pause_s = FIRST_PAUSE_S
                if not self._connection.closed:
                    self._on_change(self)
                await self._lost.wait()
        finally:
            if self._connection is not None:
                self._connection.close("the other side is done")

    def _make_connection(self) -> Connection:
        return Connection(on_frame=lambda connection, frame: None, on_close=self._on_close)

    def _on_close(self, connection: Connection, reason: str) -> None:
        self.last_error = reason
        self._lost.set()
        self._on_change(self)
