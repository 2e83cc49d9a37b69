"""A client for Tidegate in one file: `Client` for threads, `AsyncClient` for asyncio; both give `Answer`s.

    with Client("http://127.0.0.1:8700") as client:
        answer = client.infer("digits", image_bytes, deadline_s=0.25)
        print(answer.label, answer.score, answer.variant)

The deadline is a promise to the caller: it covers connecting, sending, waiting and every retry, and what is left of
it goes along as `X-Deadline-Ms`, so that the server gives up when the client does. Retried is only what cannot have
been computed: a connection that could not be made, and the refusals 429 and 503. A connection that breaks after the
request was sent is not retried: the server may have computed it, and a second try would add load to an overload.

`Client` needs only the standard library, `AsyncClient` aiohttp.
"""

import contextlib
import http.client
import json
import random
import select
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import SplitResult, quote, urlsplit

if TYPE_CHECKING:
    import aiohttp

DEFAULT_RETRIES = 2
FIRST_PAUSE_S = 0.05
LONGEST_IDLE_S = 30.0
"""A kept connection older than this is not used again: the server closes idle ones (after 75 s)."""
GRACE_S = 0.25
"""How much longer than the deadline to wait for the answer that says it was missed."""


@dataclass(frozen=True)
class Prediction:
    """One class that the model considers; `score` is its probability."""

    label: str
    class_id: int
    score: float


@dataclass(frozen=True)
class Answer:
    """What the service says about an image. `late`: it came, but after its deadline."""

    predictions: tuple[Prediction, ...]
    service: str
    variant: str
    instance: str
    id: str
    late: bool
    timings_ms: dict[str, float]
    raw: dict[str, Any] = field(repr=False)

    @property
    def label(self) -> str:
        """Of the likeliest class."""
        return self.predictions[0].label

    @property
    def score(self) -> float:
        """Of the likeliest class."""
        return self.predictions[0].score


class TidegateError(Exception):
    """A request without an answer. `code` is the outcome, as QUEUE_FULL; `status` the HTTP status, 0 without one."""

    def __init__(self, message: str, code: str = "", status: int = 0, id: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.id = id


class InvalidRequest(TidegateError):
    """The request cannot be served as it is (4xx): a retry would not help."""


class Overloaded(TidegateError):
    """Refused before compute: no place in a queue, or no instance ready. `retry_after_s` is the server's advice."""

    def __init__(self, message: str, code: str, status: int, id: str, retry_after_s: float) -> None:
        super().__init__(message, code, status, id)
        self.retry_after_s = retry_after_s


class DeadlineMissed(TidegateError):
    """There was no answer in time: the server said so (504), or the client stopped waiting."""


class ServerFailed(TidegateError):
    """The model or the server failed (500), or what answered is not Tidegate."""


class ConnectionFailed(TidegateError):
    """Nobody listens there, or the connection broke. `sent`: the server may have seen the request."""

    def __init__(self, message: str, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


def read_answer(status: int, headers: dict[str, str], body: bytes) -> Answer:
    """The answer in a response, header names in lower case. Raises a `TidegateError` for anything else."""
    try:
        given = json.loads(body)
        if status == 200:
            return Answer(
                tuple(Prediction(one["label"], one["class_id"], one["score"]) for one in given["predictions"]),
                given["service"],
                given["variant"],
                given["instance"],
                given["id"],
                given["outcome"] == "LATE",
                given["timings_ms"],
                given,
            )
        message, code, id = str(given["error"]), str(given.get("code", "")), str(given.get("id", ""))
    except (ValueError, KeyError, TypeError):
        raise ServerFailed(f"HTTP {status}: this is no answer of Tidegate's: {body[:200]!r}", "", status) from None
    if status in (429, 503):
        try:
            retry_after_s = max(0.0, float(headers.get("retry-after", "1")))
        except ValueError:
            retry_after_s = 1.0
        raise Overloaded(message, code, status, id, retry_after_s)
    if status == 504:
        raise DeadlineMissed(message, code, status, id)
    if 400 <= status < 500:
        raise InvalidRequest(message, code, status, id)
    raise ServerFailed(message, code, status, id)


def pause_before_retry(error: TidegateError, attempt: int, retries: int, left_s: float | None, draw: float) -> float:
    """Seconds to wait before attempt number `attempt` + 1 (the first is 1), or -1.0: give up. Pure.

    `left_s`: what is left of the deadline (None: there is none); `draw`: uniform in [0, 1), so that clients that
    were refused together do not come back together.
    """
    if attempt > retries:
        return -1.0
    if isinstance(error, Overloaded):
        pause_s = error.retry_after_s * (1.0 + draw)
    elif isinstance(error, ConnectionFailed) and not error.sent:
        pause_s = FIRST_PAUSE_S * 2 ** (attempt - 1) * (0.5 + draw)
    else:
        return -1.0
    return pause_s if left_s is None or pause_s < left_s else -1.0


def content_type_of(image: bytes) -> str:
    """What the first bytes say."""
    if image.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    return "image/png" if image.startswith(b"\x89PNG\r\n\x1a\n") else "application/octet-stream"


def _request(
    service: str, image: bytes, content_type: str, left_s: float | None, id: str
) -> tuple[str, dict[str, str]]:
    """Path and headers. Raises `DeadlineMissed` when there is no time left."""
    headers = {"Content-Type": content_type or content_type_of(image)}
    if id:
        headers["X-Request-Id"] = id
    if left_s is not None:
        if left_s <= 0.0:
            raise DeadlineMissed("the deadline passed before the request could be sent", "EXPIRED")
        headers["X-Deadline-Ms"] = f"{left_s * 1000:.3f}"
    return f"/v1/{quote(service, safe='')}", headers


def _left_s(ends_s: float | None) -> float | None:
    return None if ends_s is None else ends_s - time.monotonic()


def _quiet(connection: http.client.HTTPConnection) -> bool:
    """Whether nothing has come since the last answer; the server's closing would have."""
    return connection.sock is None or not select.select([connection.sock], [], [], 0.0)[0]


def _checked(url: str) -> tuple[SplitResult, str]:
    """The URL's parts, and its host. Raises `ValueError` if it is none of HTTP, or its port is none."""
    parts = urlsplit(url)
    with contextlib.suppress(ValueError):  # raised by .port
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts, parts.hostname
    raise ValueError(f"url = {url!r}: must be http://HOST:PORT")


class Client:
    """Synchronous; may be shared by threads (each keeps a connection of its own). `timeout_s`: without a deadline."""

    def __init__(self, url: str = "http://127.0.0.1:8700", *, retries: int = DEFAULT_RETRIES, timeout_s: float = 60.0):
        parts, self._host = _checked(url)
        self.url = url.rstrip("/")
        self._make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._port, self._base = parts.port, parts.path.rstrip("/")
        self._retries = retries
        self._timeout_s = timeout_s
        self._kept = threading.local()
        self._open: set[http.client.HTTPConnection] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections of all threads."""
        while self._open:
            self._open.pop().close()

    def infer(
        self, service: str, image: bytes, *, deadline_s: float | None = None, content_type: str = "", id: str = ""
    ) -> Answer:
        """The answer for one encoded image, within `deadline_s` seconds from now. Raises a `TidegateError`."""
        ends_s = None if deadline_s is None else time.monotonic() + deadline_s
        attempt = 1
        while True:
            left_s = _left_s(ends_s)
            path, headers = _request(service, image, content_type, left_s, id)
            try:
                return read_answer(*self._send(path, headers, image, left_s))
            except TidegateError as error:
                pause_s = pause_before_retry(error, attempt, self._retries, _left_s(ends_s), random.random())
                if pause_s < 0.0:
                    raise
            time.sleep(pause_s)
            attempt += 1

    def _send(
        self, path: str, headers: dict[str, str], body: bytes, left_s: float | None
    ) -> tuple[int, dict[str, str], bytes]:
        patience_s = self._timeout_s if left_s is None else left_s + GRACE_S
        ends_s = time.monotonic() + patience_s
        connection, sent = self._connection(patience_s), False
        try:
            if connection.sock is None:
                connection.connect()
            connection.sock.settimeout(max(0.001, ends_s - time.monotonic()))
            sent = True
            connection.request("POST", self._base + path, body, headers)
            response = connection.getresponse()
            answer = response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
            self._kept.used_s = time.monotonic()
            return answer
        except (OSError, http.client.HTTPException) as error:
            self._drop(connection)
            if isinstance(error, TimeoutError):
                raise DeadlineMissed(f"no answer from {self.url} within {patience_s:.3g} s", "EXPIRED") from error
            raise ConnectionFailed(f"{self.url}: {error or type(error).__name__}", sent) from error
        except BaseException:
            self._drop(connection)
            raise

    def _connection(self, patience_s: float) -> http.client.HTTPConnection:
        kept: http.client.HTTPConnection | None = getattr(self._kept, "connection", None)
        if kept is not None and time.monotonic() - self._kept.used_s < LONGEST_IDLE_S and _quiet(kept):
            return kept
        if kept is not None:
            self._drop(kept)
        made = self._make(self._host, self._port, timeout=patience_s)
        self._kept.connection, self._kept.used_s = made, time.monotonic()
        self._open.add(made)
        return made

    def _drop(self, connection: http.client.HTTPConnection) -> None:
        connection.close()
        self._open.discard(connection)
        self._kept.connection = None


class AsyncClient:
    """For asyncio; many requests at once. `async with` owns the connections."""

    def __init__(self, url: str = "http://127.0.0.1:8700", *, retries: int = DEFAULT_RETRIES, timeout_s: float = 60.0):
        _checked(url)
        self.url = url.rstrip("/")
        self._retries = retries
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        import aiohttp

        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=LONGEST_IDLE_S)
        self._session = aiohttp.ClientSession(connector=connector)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def infer(
        self, service: str, image: bytes, *, deadline_s: float | None = None, content_type: str = "", id: str = ""
    ) -> Answer:
        """As `Client.infer`."""
        import asyncio

        ends_s = None if deadline_s is None else time.monotonic() + deadline_s
        attempt = 1
        while True:
            left_s = _left_s(ends_s)
            path, headers = _request(service, image, content_type, left_s, id)
            try:
                return read_answer(*await self._send(path, headers, image, left_s))
            except TidegateError as error:
                pause_s = pause_before_retry(error, attempt, self._retries, _left_s(ends_s), random.random())
                if pause_s < 0.0:
                    raise
            await asyncio.sleep(pause_s)
            attempt += 1

    async def _send(
        self, path: str, headers: dict[str, str], body: bytes, left_s: float | None
    ) -> tuple[int, dict[str, str], bytes]:
        import aiohttp

        if self._session is None:
            raise RuntimeError("use it as: async with AsyncClient(url) as client")
        patience_s = self._timeout_s if left_s is None else left_s + GRACE_S
        try:
            timeout = aiohttp.ClientTimeout(total=patience_s)
            async with self._session.post(self.url + path, data=body, headers=headers, timeout=timeout) as response:
                found = {name.lower(): value for name, value in response.headers.items()}
                return response.status, found, await response.read()
        except TimeoutError as error:
            raise DeadlineMissed(f"no answer from {self.url} within {patience_s:.3g} s", "EXPIRED") from error
        except aiohttp.ClientConnectorError as error:
            raise ConnectionFailed(f"{self.url}: {error}", sent=False) from error
        except aiohttp.ClientError as error:
            raise ConnectionFailed(f"{self.url}: {error or type(error).__name__}", sent=True) from error
