"""What a hostile client can do with bytes on one connection, and what must not come of it for the others."""

import asyncio
import gc
import re
import tracemalloc
from collections.abc import Callable

import msgspec
import pytest

from gateway.exchange import Exchange
from protocol.outcomes import Attempt
from tests.fakes.scripted_client import Client, soon, tally
from tests.fakes.scripted_worker import ScriptedFleet
from tests.unit.gateway.test_gateway_handle import CHUNKED, gateway_over, limited, run

ANSWER = b'{"predictions":[]}'


def image(body: bytes = b"body", path: str = "/v1/imagenet", **headers: str) -> bytes:
    """The bytes of one request; names of headers with `_` for `-`."""
    return Client(body, {name.replace("_", "-"): value for name, value in headers.items()}, path).request


HEALTH = Client(b"", path="/healthz", method="GET").request


def statuses(client: Client) -> list[int]:
    """Of all answers so far."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", client.socket.written)]


@pytest.mark.parametrize(
    "ahead",
    [image(path="/v1/nothing", content_length="9"), image(content_length="9"), image() * 2 + image(content_length="9")],
)
def test_after_the_last_answer_nothing_is_served_or_written(ahead: bytes) -> None:
    """What was sent ahead of a `Connection: close` used to write after the end: into the worker's link, which broke."""

    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway = gateway_over(fleet)
        client = Client().connect(gateway)
        client.send(image(connection="close") + ahead)
        fleet["a"].reply(Attempt.OK, payload=ANSWER)
        assert statuses(client) == [200]
        assert client.socket.ended
        client.leave()
        assert len(fleet["a"].asked) == 1
        assert tally(gateway) == {"OK": 1}

    run(body)


def test_what_follows_a_refusal_in_the_same_bytes_is_not_served() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway = gateway_over(fleet)
        client = Client().connect(gateway)
        client.send(image(path="/v1/nothing") + image() * 3)
        assert statuses(client) == [404]
        assert fleet["a"].asked == {}
        assert tally(gateway) == {"INVALID": 1}

    run(body)


@pytest.mark.parametrize(
    "first", [image(path="/v1/nothing", content_length="9"), b"GET / HTTP/1.1\r\na: " + b"x" * 17_000]
)
def test_a_client_is_refused_once(first: bytes) -> None:
    """Bytes that cannot be read, behind what was refused already."""

    async def body() -> None:
        client = Client().connect(gateway_over(ScriptedFleet("uniform", a="light")))
        client.send(first + b"\r\n\r\n\0\0garbage\r\n\r\n" * 3)
        client.send(b"\0")
        assert len(statuses(client)) == 1
        assert client.socket.ended

    run(body)


def test_a_body_that_was_sent_ahead_is_held_to_the_limit_in_its_turn() -> None:
    """It came in chunks that announce no length, before anybody knew which limit is its."""

    async def body() -> None:
        fleet, gateway = limited()  # 10 bytes
        client = Client().connect(gateway)
        client.send(image() + Client(b"b\r\n12345678901\r\n0\r\n\r\n", CHUNKED).request)
        fleet["a"].reply(Attempt.OK, payload=ANSWER)
        await soon(lambda: len(statuses(client)) == 2)
        assert statuses(client) == [200, 413]
        assert len(fleet["a"].asked) == 1
        assert tally(gateway) == {"OK": 1, "INVALID": 1}

    run(body)


@pytest.mark.parametrize(("path_bytes", "status"), [(6_000, 404), (7_000, 431)])
def test_a_heads_bytes_are_those_of_its_path_and_its_headers_together(path_bytes: int, status: int) -> None:
    """Either is below the limit of 16 KiB; nothing that is sent in small pieces gets around it."""

    async def body() -> None:
        client = Client().connect(gateway_over(ScriptedFleet("uniform", a="light")))
        sent = image(path="/v1/" + "x" * path_bytes, x_filler="y" * 10_000)
        for start in range(0, len(sent), 1000):
            client.send(sent[start : start + 1000])
        assert statuses(client) == [status]

    run(body)


def test_who_is_cut_off_while_it_sends_has_a_moment_to_read_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing on unread bytes would reset the connection, and the reset may overtake the answer."""
    monkeypatch.setattr("gateway.connection.LINGER_S", 0.01)

    async def body() -> None:
        _, gateway = limited()
        client = Client(b"b\r\n12345678901\r\n", CHUNKED).ask(gateway)
        assert statuses(client) == [413]
        assert client.socket.ended
        assert not client.socket.closed
        client.send(b"5\r\n12345\r\n")
        await soon(lambda: client.socket.closed)

    run(body)


def test_a_connection_that_breaks_leaves_no_timer_behind() -> None:
    """Which would keep it in memory for the 75 s that an idle one may live."""

    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        client = Client().ask(gateway_over(fleet))
        fleet["a"].reply(Attempt.OK, payload=ANSWER)
        assert client.connection.timeout_keep_alive_task is not None
        client.connection.connection_lost(ConnectionResetError())
        assert client.connection.timeout_keep_alive_task is None

    run(body)


@pytest.mark.parametrize("first", [HEALTH, image()])
def test_thousands_sent_ahead_and_refused_at_once_do_not_nest(first: bytes) -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway = gateway_over(fleet)
        client = Client().connect(gateway)
        client.send(first + image() * 3000)
        fleet["a"].die()
        await soon(lambda: gateway.metrics.ended == 3000 + (first != HEALTH))
        assert len(statuses(client)) == 3001
        assert set(statuses(client)[1:]) == {503}
        assert gateway.dispatcher._under_way == set()

    run(body)


def test_no_more_is_read_while_requests_wait_for_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ASGI request reads on by calling `receive`; who is behind it would be kept in memory without any limit."""

    monkeypatch.setattr("gateway.connection.READ_AHEAD_BYTES", 0)

    async def body() -> None:
        fleet = ScriptedFleet("uniform", capacity=9, a="light")
        gateway = gateway_over(fleet)
        client = Client().connect(gateway)
        infer = Client(b"\x89PNG", {"content-type": "image/png"}, "/v2/models/imagenet/infer").request
        client.send(infer + image() * 2 + image(content_length="999"))
        await soon(lambda: fleet["a"].asked)
        for answered in range(3):
            assert not client.socket.reading
            await soon(lambda: fleet["a"].in_flight)
            fleet["a"].reply(Attempt.OK, payload=ANSWER)
            await soon(lambda: len(statuses(client)) == answered + 1)  # noqa: B023
        await soon(lambda: client.socket.reading)  # the last one's body is still to come
        client.send(b"x" * 995)
        fleet["a"].reply(Attempt.OK, payload=ANSWER)
        assert statuses(client) == [200] * 4

    run(body)


def test_a_body_that_breaks_off_is_invalid_in_its_turn() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway = gateway_over(fleet)
        client = Client().connect(gateway)
        client.send(image() + Client(b"4\r\n1234\r\nno number\r\n", CHUNKED).request)
        assert statuses(client) == []
        fleet["a"].reply(Attempt.OK, payload=ANSWER)
        await soon(lambda: statuses(client) == [200, 400])
        assert tally(gateway) == {"OK": 1, "INVALID": 1}
        assert gateway.uploads.held == 0
        alone = Client(b"4\r\n1234\r\nno number\r\n", CHUNKED).ask(gateway)
        assert (alone.status, alone.headers["connection"]) == (400, "close")
        assert tally(gateway) == {"OK": 1, "INVALID": 2}

    run(body)


def test_an_operators_request_whose_body_breaks_off_is_answered_once() -> None:
    async def body() -> None:
        errors: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        client = Client(b"no number\r\n", CHUNKED, "/healthz").ask(gateway_over(ScriptedFleet("uniform")))
        tasks = list(client.connection.tasks)
        await asyncio.wait(tasks)
        assert statuses(client) == [400]
        assert errors == []
        assert [task.exception() for task in tasks] == [None]

    run(body)


@pytest.mark.parametrize("path", ["/v1/imagenet", "/healthz"])
@pytest.mark.parametrize("endless", [b"a: b\r\n" * 1000, b"x" * 6000, b""])
def test_trailers_and_chunk_extensions_end(path: str, endless: bytes) -> None:
    """They are no body: no limit of a service and no time limit of a body ends those of a request that is answered."""

    async def body() -> None:
        client = Client(b"1\r\nx\r\n" + (b"0\r\n" if endless else b"1;"), CHUNKED, path)
        client.ask(gateway_over(ScriptedFleet("uniform", a="light")))
        assert not client.socket.ended
        for _ in range(4):
            client.send(endless or b"e" * 6000)
        assert client.socket.ended
        assert statuses(client) == [431]

    run(body)


def test_thousands_of_offers_of_another_protocol_do_not_nest() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", capacity=5000, a="light")
        gateway = gateway_over(fleet)
        client = Client().connect(gateway)
        client.send(image(b"x", connection="Upgrade", upgrade="h2c", x_deadline_ms="60000") * 2000)
        for _ in range(2000):
            await soon(lambda: fleet["a"].in_flight)
            fleet["a"].reply(Attempt.OK, payload=ANSWER)
        assert tally(gateway) == {"OK": 2000}

    run(body)


def test_only_a_request_keeps_an_idle_connection_open() -> None:
    """Blank lines, and the rest of a body whose answer is written, begin no request: the wait for one goes on."""

    async def body() -> None:
        client = Client(b"", path="/healthz", method="GET").ask(gateway_over(ScriptedFleet("uniform", a="light")))
        await client.answered()
        waiting = client.connection.timeout_keep_alive_task
        assert waiting is not None
        client.send(b"\r\n")
        assert client.connection.timeout_keep_alive_task is waiting
        assert not waiting.cancelled()
        client.send(b"GET /hea")
        assert client.connection.timeout_keep_alive_task is None
        client.leave()

    run(body)


def test_a_head_that_waits_for_earlier_answers_is_not_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.connection.READ_AHEAD_BYTES", 0)

    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        client = Client().connect(gateway_over(fleet))
        client.connection.header_timeout_s = 0.01  # type: ignore[misc]
        client.send(image() * 2 + image()[:30])
        await asyncio.sleep(0.05)
        for _ in range(2):
            await soon(lambda: fleet["a"].in_flight)
            fleet["a"].reply(Attempt.OK, payload=ANSWER)
        assert statuses(client) == [200, 200]
        client.send(image()[30:])
        await soon(lambda: fleet["a"].in_flight)
        fleet["a"].reply(Attempt.OK, payload=ANSWER)
        assert statuses(client) == [200] * 3

    run(body)


def test_a_body_in_tiny_chunks_takes_little_more_than_itself() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        client = Client(b"", CHUNKED).connect(gateway_over(fleet))
        client.send(client.request)
        pieces = b"2\r\nxy\r\n" * 1000
        tracemalloc.start()
        for _ in range(100):
            client.send(pieces)
        taken, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert taken < 2 * 200_000
        client.send(b"0\r\n\r\n")
        assert list(fleet["a"].payloads.values()) == [b"xy" * 100_000]

    run(body)


def test_a_request_and_its_connection_leave_nothing_for_the_cycle_collector() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway = gateway_over(fleet)

        def serve(ask: bytes, end: Callable[[], None]) -> None:
            client = Client().connect(gateway)
            client.send(ask)
            end()
            client.leave()

        gc.collect()
        before = [one for one in gc.get_objects() if type(one) is Exchange]  # of other tests
        gc.disable()
        try:
            serve(image(), lambda: fleet["a"].reply(Attempt.OK, payload=ANSWER))
            serve(image(), lambda: None)
            serve(image() * 3, lambda: None)
            serve(image(path="/v1/nothing"), lambda: None)
            serve(image(content_length="9"), lambda: None)
            left = [one for one in gc.get_objects() if type(one) is Exchange]
        finally:
            gc.enable()
        assert len(left) == len(before)

    run(body)


def test_an_answer_that_cannot_be_written_is_a_500_and_harms_nobody_else() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway = gateway_over(fleet)
        client = Client().ask(gateway)
        fleet["a"].reply(Attempt.INVALID, reason="so", http_status=999)
        assert statuses(client) == [500]
        assert client.socket.ended
        assert tally(gateway) == {"INVALID": 1}

    run(body)


def test_nobody_is_asked_to_wait_for_a_body_by_a_client_of_http_1_0() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        client = Client(headers={"expect": "100-continue"}).connect(gateway_over(fleet))
        client.send(client.request.replace(b"HTTP/1.1", b"HTTP/1.0", 1)[:-4])
        assert client.socket.written == b""

    run(body)


@pytest.mark.parametrize(
    "smuggled",
    [
        b"POST /v1/imagenet HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/imagenet HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nbody",
        b"POST /v1/imagenet HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\ncontent-length: 4\r\n\r\nbody",
        b"POST /v1/imagenet HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST /v1/imagenet HTTP/1.1\r\nhost: x\r\ntransfer-encoding : chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/imagenet HTTP/1.1\r\nhost: x\r\ncontent-length: +4\r\n\r\nbody",
        b"POST /v1/imagenet HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\na: b\r\n c\r\n\r\nbody",
        b"POST /v1/imagenet HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\na: b\0c\r\n\r\nbody",
        b"POST /v1/imagenet HTTP/1.1\nhost: x\ncontent-length: 4\n\nbody",
        b"POST /v1/imagenet HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n4;\n\r\nbody\r\n0\r\n\r\n",
        b"POST /v1/imag\0net HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nbody",
    ],
)
def test_bytes_that_two_readers_could_take_for_different_requests_are_refused(smuggled: bytes) -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway = gateway_over(fleet)
        client = Client().connect(gateway)
        client.send(smuggled)
        assert statuses(client) == [400]
        assert client.socket.ended
        assert fleet["a"].asked == {}

    run(body)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/imagenet?a=b", 200),
        ("http://elsewhere/v1/imagenet", 200),
        ("/v1/image%6eet", 200),
        ("/v1/", 404),
        ("/v1/a/b", 404),
        ("/v1/imagenet/", 404),
        ("/v1/%00%ff%22", 404),
    ],
)
def test_a_service_is_what_the_path_names(path: str, status: int) -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        client = Client(path=path).ask(gateway_over(fleet))
        if status == 200:
            fleet["a"].reply(Attempt.OK, payload=ANSWER)
        assert client.status == status
        assert msgspec.json.decode(client.socket.written.partition(b"\r\n\r\n")[2])

    run(body)


def test_who_is_answered_has_given_the_place_back_before_the_next_ones_turn() -> None:
    """Told first and booked later, a client that sends ahead would be refused for a place that is its own."""

    async def body() -> None:
        fleet = ScriptedFleet("single-queue", capacity=1, a="heavy")
        client = Client().connect(gateway_over(fleet))
        client.send(image() * 2)
        for _ in range(2):
            await soon(lambda: fleet["a"].in_flight)
            fleet["a"].reply(Attempt.OK, payload=ANSWER)
        assert statuses(client) == [200, 200]

    run(body)
