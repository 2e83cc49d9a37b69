"""Framed connections over unix sockets or TCP: many requests in flight on one connection, in both directions.

`Connection` is one end of a socket (an asyncio protocol). `serve` accepts them; `connect` opens one. The owner passes
callbacks; nothing here knows what a frame means. An address is ``unix:/path`` or ``tcp:host:port``.

All mutable state of a connection: its reader, its transport, and who waits for which reply. Who asks is told exactly
once: the reply frame, or `LinkClosed`.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import msgspec

from protocol.frames import MAX_PAYLOAD_BYTES, Frame, FrameError, FrameReader, Kind, encode_head
from protocol.records import Goodbye

_encode = msgspec.msgpack.Encoder().encode
_WRITE_TOGETHER_BYTES = 16_384
"""Below this a head and its payload are joined into one write: a copy is cheaper than a second system call."""


class LinkClosed(ConnectionError):
    """The connection ended while a reply was awaited, or before a frame could be sent."""


Payload = bytes | Sequence[bytes | bytearray]
"""A frame's payload; one that came in pieces need not be joined (20 MB would take the loop milliseconds)."""

OnReply = Callable[[Frame | LinkClosed], None]
"""Called once with the reply, or with why none will come. Runs in the event loop and must not block or raise."""


class Connection(asyncio.Protocol):
    """One end of a framed connection.

    `on_frame(connection, frame)` is called for every frame that is not the reply to a `request`; `on_close(connection,
    reason)` exactly once, after everybody who waits has been told. Both run in the event loop and must not block.
    """

    __slots__ = (
        "_next_id",
        "_on_close",
        "_on_frame",
        "_reader",
        "_transport",
        "_waiting",
        "close_reason",
        "closed",
    )

    def __init__(
        self,
        on_frame: Callable[["Connection", Frame], None],
        on_close: Callable[["Connection", str], None] | None = None,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
    ) -> None:
        self._on_frame = on_frame
        self._on_close = on_close
        self._reader = FrameReader(max_payload_bytes)
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, OnReply] = {}
        self._next_id = 0
        self.closed = False
        self.close_reason = ""

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the interface but not the base class.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=8 << 20)

    def data_received(self, data: bytes) -> None:
        try:
            frames = self._reader.feed(data)
        except FrameError as error:
            self.close(str(error))
            return
        waiting = self._waiting
        for frame in frames:
            on_reply = waiting.pop(frame.request_id, None) if frame.kind in _ANSWERS else None
            if on_reply is not None:
                on_reply(frame)
            elif frame.kind == Kind.GOODBYE:
                with contextlib.suppress(msgspec.MsgspecError):
                    self.close_reason = msgspec.msgpack.decode(frame.meta, type=Goodbye).reason
            else:
                self._on_frame(self, frame)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if not self.close_reason:
            cut_off = f" in the middle of a frame ({self._reader.pending_bytes} bytes)"
            self.close_reason = (str(error) if error else "the peer closed the connection") + (
                cut_off if self._reader.pending_bytes else ""
            )
        waiting, self._waiting = self._waiting, {}
        for on_reply in waiting.values():
            on_reply(LinkClosed(self.close_reason))
        if self._on_close is not None:
            self._on_close(self, self.close_reason)

    # the owner's side

    def send(self, kind: Kind, request_id: int, meta: msgspec.Struct | None = None, payload: Payload = b"") -> None:
        """Writes one frame. Raises `LinkClosed` if the connection has ended."""
        if self.closed or self._transport is None:
            raise LinkClosed(self.close_reason or "not connected")
        if not isinstance(payload, bytes):
            size = sum(map(len, payload))
            head = encode_head(kind, request_id, _encode(meta) if meta is not None else b"", size)
            self._transport.writelines((head, *payload))
            return
        head = encode_head(kind, request_id, _encode(meta) if meta is not None else b"", len(payload))
        if len(payload) <= _WRITE_TOGETHER_BYTES:
            self._transport.write(head + payload)
        else:
            self._transport.writelines((head, payload))

    def ask(self, kind: Kind, meta: msgspec.Struct | None, payload: Payload, on_reply: OnReply) -> int:
        """Sends a frame that will be answered: its request id. Raises `LinkClosed` if the connection has ended.

        On the request path: a callback costs a tenth of a future and the turn of the loop that wakes who awaits it.
        """
        self._next_id = request_id = self._next_id + 1
        self.send(kind, request_id, meta, payload)
        self._waiting[request_id] = on_reply
        return request_id

    def request(
        self, kind: Kind, meta: msgspec.Struct | None = None, payload: bytes = b""
    ) -> tuple[int, "asyncio.Future[Frame]"]:
        """Like `ask`, for those who wait in a coroutine: the request id, and the future of the reply.

        Who stops waiting should `forget` the request, and tell the peer with a CANCEL frame where that matters.
        """
        future: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()

        def on_reply(reply: Frame | LinkClosed) -> None:
            if future.done():
                return
            if isinstance(reply, LinkClosed):
                future.set_exception(reply)
                future.exception()  # a waiter that has gone leaves no "exception was never retrieved"
            else:
                future.set_result(reply)

        return self.ask(kind, meta, payload, on_reply), future

    def forget(self, request_id: int) -> None:
        """A reply that still comes for this request is dropped."""
        self._waiting.pop(request_id, None)

    @property
    def in_flight(self) -> int:
        """Requests that await a reply on this connection."""
        return len(self._waiting)

    @property
    def unsent_bytes(self) -> int:
        """Bytes accepted by `send` that the socket has not taken yet."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def close(self, reason: str) -> None:
        """Says goodbye with a reason and closes. Idempotent."""
        if self.closed or self._transport is None or self._transport.is_closing():
            return
        self.close_reason = self.close_reason or reason
        meta = _encode(Goodbye(reason))
        self._transport.write(encode_head(Kind.GOODBYE, 0, meta, 0))
        self._transport.close()

    def abort(self, reason: str) -> None:
        """Ends the connection at once: no goodbye, no wait for the other side to take what is still to be sent."""
        if not self.closed and self._transport is not None:
            self.close_reason = self.close_reason or reason
            self._transport.abort()


_ANSWERS = frozenset({Kind.REPLY, Kind.STATUS, Kind.DECISION, Kind.NODE_STATUS})


async def serve(address: str, make_connection: Callable[[], Connection]) -> asyncio.Server:
    """Listens on `address` (a stale unix socket file is replaced). The caller closes the server."""
    loop = asyncio.get_running_loop()
    scheme, host, port = _split(address)
    if scheme == "unix":
        with contextlib.suppress(FileNotFoundError):
            os.unlink(host)
        return await loop.create_unix_server(make_connection, host)
    return await loop.create_server(make_connection, host, port, reuse_address=True)


async def connect(address: str, make_connection: Callable[[], Connection]) -> Connection:
    """Opens a connection to `address`. Raises `OSError` if nobody listens there."""
    loop = asyncio.get_running_loop()
    scheme, host, port = _split(address)
    pair: tuple[Any, Connection]
    if scheme == "unix":
        pair = await loop.create_unix_connection(make_connection, host)
    else:
        pair = await loop.create_connection(make_connection, host, port)
    return pair[1]


LONGEST_SOCKET_PATH: Final = 107  # bytes that fit into sockaddr_un


def address_fault(address: str) -> str:
    """Empty if a server could listen on `address` and others name it so, else what would be right."""
    scheme, _, rest = address.partition(":")
    host, _, port = rest.rpartition(":")
    if scheme == "unix" and rest.startswith("/"):
        short = len(rest.encode()) <= LONGEST_SOCKET_PATH
        return "" if short else f"a socket's path has at most {LONGEST_SOCKET_PATH} bytes: choose a shorter one"
    sound = scheme == "tcp" and host != "" and port.isdigit() and int(port) <= 65535
    return "" if sound else "must be unix:/absolute/path or tcp:host:port"


def is_every_interface(address: str) -> bool:
    """Whether a server listens there on all interfaces: then nobody can connect to it by this name."""
    return address.startswith(("tcp:0.0.0.0:", "tcp:[::]:", "tcp::::"))


def _split(address: str) -> tuple[str, str, int]:
    scheme, _, rest = address.partition(":")
    if scheme == "unix" and rest:
        return scheme, rest, 0
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and host and port.isdigit():
        return scheme, host, int(port)
    raise ValueError(f"address {address!r}: expected unix:/path or tcp:host:port")
