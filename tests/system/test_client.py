"""The Python client against a real gateway, and against servers that misbehave in one way each.

Each test of the client's behaviour runs for both clients: what holds for one holds for the other.
"""

import asyncio
import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.running_system import RunningSystem, any_port, deployment
from tidegate.client import (
    Answer,
    AsyncClient,
    Client,
    ConnectionFailed,
    DeadlineMissed,
    InvalidRequest,
    Overloaded,
    ServerFailed,
    TidegateError,
    content_type_of,
    pause_before_retry,
    read_answer,
)

Infer = Callable[..., Answer]

EMULATED = """
name = "client"
[services.slow]
variants = ["slow50"]
requirement_ms = 5000
[services.null]
variants = ["null"]
requirement_ms = 5000
[[workers]]
name = "a"
instances = [{ variant = "slow50", capacity = 2 }]
[[workers]]
name = "b"
instances = [{ variant = "null" }]
"""

GOOD = {
    "predictions": [{"label": "cat", "class_id": 1, "score": 0.75}, {"label": "dog", "class_id": 0, "score": 0.25}],
    "service": "pets",
    "variant": "small",
    "instance": "a/small",
    "id": "7",
    "outcome": "OK",
    "timings_ms": {"total": 3.0},
}
FULL = {"error": "no place in the queue", "code": "QUEUE_FULL", "id": "7"}


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    with RunningSystem(deployment(tmp_path_factory.mktemp("client") / "client.toml", EMULATED)) as running:
        yield running


def synchronous(url: str, *given: Any, retries: int = 2, **named: Any) -> Answer:
    with Client(url, retries=retries) as client:
        return client.infer(*given, **named)


def asynchronous(url: str, *given: Any, retries: int = 2, **named: Any) -> Answer:
    async def scenario() -> Answer:
        async with AsyncClient(url, retries=retries) as client:
            return await client.infer(*given, **named)

    return asyncio.run(scenario())


@pytest.fixture(params=[synchronous, asynchronous])
def infer(request: pytest.FixtureRequest) -> Infer:
    chosen: Infer = request.param
    return chosen


class Misbehaving:
    """A server that plays a script: one (status, headers, body) per request, the last one for ever.

    Status 0 closes the connection without an answer; a number instead of a tuple sleeps so many seconds.
    """

    def __init__(self, *script: Any) -> None:
        self.requests: list[dict[str, str]] = []
        steps = itertools.chain(script, itertools.repeat(script[-1]))
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server.requests.append({name.lower(): value for name, value in self.headers.items()})
                self.rfile.read(int(self.headers["content-length"]))
                step = next(steps)
                if isinstance(step, float):
                    time.sleep(step)
                    step = (200, {}, GOOD)
                status, headers, body = step
                if status == 0:
                    self.close_connection = True
                    return
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                with contextlib.suppress(ConnectionError):  # the client may have stopped waiting
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(data))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> "Misbehaving":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def test_an_answer_from_a_real_gateway(system: RunningSystem, infer: Infer) -> None:
    answer = infer(system.url, "null", b"tidegate-label:1\n", deadline_s=5.0, id="mine")
    assert (answer.label, answer.score, answer.variant, answer.instance) == ("1", 1.0, "null", "b/null")
    assert (answer.id, answer.late, answer.service) == ("mine", False, "null")
    assert answer.timings_ms["total"] > 0.0


def test_what_a_real_gateway_refuses(system: RunningSystem, infer: Infer) -> None:
    for service, body, words, status in (
        ("nothing", b"x", "no service of this name", 404),
        ("null", b"", "the body is empty", 400),
        ("null", b"tidegate-label:9\n", "below 2", 400),
    ):
        with pytest.raises(InvalidRequest, match=words) as refused:
            infer(system.url, service, body)
        assert (refused.value.status, refused.value.code) == (status, "INVALID")


def test_a_deadline_that_the_gateway_cannot_meet(system: RunningSystem, infer: Infer) -> None:
    with pytest.raises(DeadlineMissed) as missed:
        infer(system.url, "slow", b"x", deadline_s=0.01)
    assert missed.value.code == "EXPIRED"


def test_a_full_queue_is_retried_within_the_deadline(system: RunningSystem) -> None:
    """Two places, eight callers, 50 ms each: all are answered by retrying; without retries some are refused."""

    def ask(retries: int) -> str:
        with Client(system.url, retries=retries) as client:
            try:
                return client.infer("slow", b"x", deadline_s=30.0).service
            except Overloaded as refused:
                return refused.code

    with ThreadPoolExecutor(8) as pool:
        assert "QUEUE_FULL" in set(pool.map(ask, [0] * 8))
        assert set(pool.map(ask, [20] * 8)) == {"slow"}


def test_threads_share_a_client_and_keep_their_connections(system: RunningSystem) -> None:
    with Client(system.url) as client, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: client.infer("null", b"tidegate-label:%d\n" % (number % 2)), range(40)))
        assert [answer.label for answer in answers] == ["0", "1"] * 20
        assert len(client._open) <= 4


def test_refusals_are_retried(infer: Infer) -> None:
    with Misbehaving((429, {"Retry-After": "0"}, FULL), (503, {"Retry-After": "0"}, FULL), (200, {}, GOOD)) as server:
        assert infer(server.url, "pets", b"x").label == "cat"
        assert len(server.requests) == 3


def test_retries_end(infer: Infer) -> None:
    with Misbehaving((429, {"Retry-After": "0"}, FULL)) as server:
        with pytest.raises(Overloaded, match="no place"):
            infer(server.url, "pets", b"x", retries=1)
        assert len(server.requests) == 2


def test_no_retry_that_could_not_be_in_time(infer: Infer) -> None:
    with Misbehaving((503, {"Retry-After": "5"}, FULL)) as server:
        started_s = time.monotonic()
        with pytest.raises(Overloaded):
            infer(server.url, "pets", b"x", deadline_s=1.0)
        assert time.monotonic() - started_s < 0.9
        assert len(server.requests) == 1


@pytest.mark.parametrize("step", [(0, {}, b""), (500, {}, {"error": "the model raised", "code": "FAILED"})])
def test_what_may_have_been_computed_is_not_sent_again(infer: Infer, step: Any) -> None:
    with Misbehaving(step) as server:
        with pytest.raises((ConnectionFailed, ServerFailed)):
            infer(server.url, "pets", b"x")
        assert len(server.requests) == 1


def test_the_deadline_ends_the_wait(infer: Infer) -> None:
    with Misbehaving(3.0) as server:
        started_s = time.monotonic()
        with pytest.raises(DeadlineMissed, match="no answer"):
            infer(server.url, "pets", b"x", deadline_s=0.2)
        assert time.monotonic() - started_s < 2.0


def test_what_is_left_of_the_deadline_goes_along(infer: Infer) -> None:
    with Misbehaving((429, {"Retry-After": "0.05"}, FULL), (200, {}, GOOD)) as server:
        infer(server.url, "pets", b"\xff\xd8\xff", deadline_s=10.0)
        first, second = (float(request["x-deadline-ms"]) for request in server.requests)
        assert 9_000 < second < first - 45 < 10_000
        assert server.requests[0]["content-type"] == "image/jpeg"


def test_nobody_there(infer: Infer) -> None:
    with pytest.raises(ConnectionFailed) as failed:
        infer(f"http://127.0.0.1:{any_port()}", "pets", b"x", deadline_s=5.0)
    assert not failed.value.sent


def test_something_else_there(infer: Infer) -> None:
    with Misbehaving((200, {}, b"<html>hello</html>")) as server, pytest.raises(ServerFailed, match="no answer of Tid"):
        infer(server.url, "pets", b"x")


def test_a_connection_that_the_server_closed_meanwhile_is_replaced() -> None:
    with Misbehaving((200, {"Connection": "close"}, GOOD)) as server, Client(server.url) as client:
        assert [client.infer("pets", b"x").label for _ in range(3)] == ["cat"] * 3


@pytest.mark.parametrize("url", ["127.0.0.1:8700", "ftp://x", "http://", "http://x:99999", "http://x:port"])
def test_a_wrong_url_is_refused_at_once(url: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="must be http://HOST:PORT"):
            kind(url)


def test_when_to_try_again() -> None:
    """The whole decision, by its rules: only refusals before compute and unsent requests, only while there is time."""
    full = Overloaded("full", "QUEUE_FULL", 429, "", 1.0)
    unsent, sent = ConnectionFailed("x", sent=False), ConnectionFailed("x", sent=True)
    assert pause_before_retry(full, 1, 2, None, 0.5) == 1.5
    assert pause_before_retry(full, 2, 2, 2.0, 0.5) == 1.5
    assert pause_before_retry(full, 3, 2, None, 0.5) == -1.0
    assert pause_before_retry(full, 1, 2, 1.4, 0.5) == -1.0
    assert pause_before_retry(unsent, 1, 2, None, 0.5) == 0.05
    assert pause_before_retry(unsent, 2, 2, None, 0.5) == 0.1
    for error in (sent, DeadlineMissed("x"), ServerFailed("x"), InvalidRequest("x")):
        assert pause_before_retry(error, 1, 9, None, 0.0) == -1.0


def test_reading_responses() -> None:
    assert read_answer(200, {}, json.dumps({**GOOD, "outcome": "LATE"}).encode()).late
    for status, kind in ((400, InvalidRequest), (413, InvalidRequest), (429, Overloaded), (503, Overloaded)):
        with pytest.raises(kind, match="no place"):
            read_answer(status, {"retry-after": "nonsense"}, json.dumps(FULL).encode())
    for body in (b"", b"[]", b"{}", b'{"predictions": [{}]}', b"\xff"):
        with pytest.raises(TidegateError):
            read_answer(200, {}, body)


def test_content_types() -> None:
    assert [content_type_of(data) for data in (b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF", b"")] == [
        "image/jpeg",
        "image/png",
        "application/octet-stream",
        "application/octet-stream",
    ]


def test_the_client_is_one_file() -> None:
    """It can be copied out of the project: it imports nothing of ours."""
    text = (Path(__file__).parents[2] / "tidegate" / "client.py").read_text()
    for package in ("protocol", "models", "policies", "workers", "scheduler", "gateway", "loadgen", "tidegate"):
        assert f"from {package}" not in text
        assert f"import {package}" not in text
