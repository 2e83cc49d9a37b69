"""A client of the gateway in memory: HTTP bytes into a real connection, the answer's bytes out, no network between."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
from uvicorn import Config
from uvicorn.server import ServerState

from gateway.app import TidegateApp
from gateway.connection import GuardedConnection
from gateway.handle import Gateway


class Socket:
    """The transport below a connection: keeps what is written. As strict as a real one: nothing after the end."""

    def __init__(self) -> None:
        self.written = b""
        self.ended = False
        self.closed = False
        self.reading = True

    def get_extra_info(self, name: str, default: object = None) -> object:
        """Addresses."""
        return ("127.0.0.1", 1) if name in ("sockname", "peername") else default

    def write(self, data: bytes) -> None:
        """Bytes for the client."""
        if self.ended:
            raise RuntimeError("Cannot call write() after write_eof()")
        self.written += data

    def write_eof(self) -> None:
        """Nothing follows, but what comes is still read: not closing yet."""
        self.ended = True

    def close(self) -> None:
        """Nothing follows, and nothing is read."""
        self.ended = self.closed = True

    def is_closing(self) -> bool:
        """As a transport's."""
        return self.closed

    def pause_reading(self) -> None:
        """As a transport's."""
        self.reading = False

    def resume_reading(self) -> None:
        """As a transport's."""
        self.reading = True


class Client:
    """One client on a connection of its own: bytes in, bytes out."""

    def __init__(
        self,
        body: bytes = b"body",
        headers: dict[str, str] | None = None,
        path: str = "/v1/imagenet",
        method: str = "POST",
    ) -> None:
        given = {"host": "x", "content-length": str(len(body))} | (headers or {})
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value)
        self.request = f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body
        self.socket = Socket()

    def connect(self, gateway: Gateway) -> "Client":
        """Opens the connection."""
        kind = type("Connection", (GuardedConnection,), {"gateway": gateway})
        config = Config(TidegateApp(gateway), lifespan="off", proxy_headers=False, log_config=None)
        config.load()
        self.connection: GuardedConnection = kind(config, ServerState(), {})
        self.connection.connection_made(self.socket)
        return self

    def ask(self, gateway: Gateway) -> "Client":
        """Sends the whole request at once."""
        self.connect(gateway)
        self.send(self.request)
        return self

    def send(self, data: bytes) -> None:
        """Some bytes arrive at the gateway."""
        self.connection.data_received(data)

    def leave(self) -> None:
        """The connection is gone."""
        self.socket.closed = True
        self.connection.connection_lost(None)

    async def answered(self) -> None:
        """Waits for the whole answer."""
        await soon(lambda: b"\r\n\r\n" in self.socket.written)

    @property
    def status(self) -> int:
        """Of the one response, which is whole and is all that was written."""
        head, _, body = self.socket.written.partition(b"\r\n\r\n")
        assert int(self.headers["content-length"]) == len(body)
        version, status, *_ = head.split(b" ")
        assert version == b"HTTP/1.1"
        return int(status)

    @property
    def headers(self) -> dict[str, str]:
        """Of the response."""
        lines = self.socket.written.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
        return dict(line.split(": ", 1) for line in lines)

    @property
    def json(self) -> dict[str, Any]:
        """The response's body."""
        decoded: dict[str, Any] = msgspec.json.decode(self.socket.written.partition(b"\r\n\r\n")[2])
        return decoded


async def soon(condition: Callable[[], object]) -> None:
    """Lets the loop turn until the condition holds."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


def tally(gateway: Gateway) -> dict[str, int]:
    """Outcomes so far; the law holds at every look."""
    statistics = gateway.statistics()
    counted: Counter[str] = Counter()
    for one in statistics.outcomes.values():
        counted.update(one)
    assert statistics.arrived == counted.total() + statistics.in_flight
    return counted
