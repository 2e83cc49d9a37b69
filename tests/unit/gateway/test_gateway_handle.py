"""The life of one request without a network: scripted worker below, a connection's bytes above; counted once."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.config import ConfigError, GatewayConfig
from gateway.document import INFER_OPERATION
from gateway.handle import Gateway
from loadgen.answers import Outcome as SeenOutcome
from loadgen.answers import outcome_of
from protocol.board import Board
from protocol.outcomes import Attempt, Outcome
from tests.fakes.scripted_client import Client, soon, tally
from tests.fakes.scripted_worker import ScriptedFleet

NOBODY = "redis://127.0.0.1:1/0"


def gateway_over(fleet: ScriptedFleet, **settings: Any) -> Gateway:
    """A gateway that knows the scripted fleet and no board."""
    gateway = Gateway(GatewayConfig(board_url=NOBODY, **settings), Board(NOBODY), seed=1)
    gateway.fleet.services.update(fleet.services)
    gateway.fleet.peers.update(fleet.peers)  # type: ignore[arg-type]
    return gateway


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20.0):
            await body()

    asyncio.run(bounded())


def agrees_with_the_document(client: Client) -> None:
    """What was sent is what the OpenAPI document says: its status, its headers, the keys of its body."""
    described = INFER_OPERATION["responses"][str(client.status)]
    names = {name.lower() for name in described["headers"]}
    assert set(client.headers) - {"content-type", "content-length", "connection"} <= names
    schema = described["content"]["application/json"]["schema"]
    assert client.json.keys() <= schema["properties"].keys()
    assert set(schema.get("required", ())) <= client.json.keys()


@pytest.mark.parametrize(
    ("attempt", "status", "outcome"),
    [
        (Attempt.OK, 200, "OK"),
        (Attempt.QUEUE_FULL, 429, "QUEUE_FULL"),
        (Attempt.EXPIRED, 504, "EXPIRED"),
        (Attempt.INVALID, 415, "INVALID"),
        (Attempt.UNAVAILABLE, 503, "UNAVAILABLE"),
        (Attempt.BOUNCED, 504, "EXPIRED"),
        (Attempt.LOST, 503, "UNAVAILABLE"),
        (Attempt.FAILED, 500, "FAILED"),
    ],
)
def test_each_end_of_an_attempt_is_one_outcome_with_its_status(attempt: Attempt, status: int, outcome: str) -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway = gateway_over(fleet)
        client = Client().ask(gateway)
        if attempt is Attempt.LOST:
            fleet["a"].die()
        else:
            http_status = 415 if attempt is Attempt.INVALID else 0
            fleet["a"].reply(attempt, payload=b'{"predictions":[]}', reason="so", http_status=http_status)
        assert client.status == status
        assert client.json["outcome" if status == 200 else "code"] == outcome
        assert tally(gateway) == {outcome: 1}
        assert ("retry-after" in client.headers) == (status in (429, 503))
        agrees_with_the_document(client)

    run(body)


@pytest.mark.parametrize(("on_late", "status"), [("serve", 200), ("error", 504)])
def test_lateness_is_said_in_the_way_that_the_service_chose(on_late: str, status: int) -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        fleet.router.configure(msgspec.structs.replace(fleet.router.spec, on_late=on_late))
        gateway = gateway_over(fleet)
        client = Client(headers={"x-deadline-ms": "0.001"}).ask(gateway)
        fleet["a"].reply(Attempt.LATE, payload=b'{"predictions":[]}')
        assert client.status == status
        assert client.json["outcome" if status == 200 else "code"] == "LATE"
        assert client.headers.get("x-tidegate-late") == "1"
        assert outcome_of(client.status, "x-tidegate-late" in client.headers) is SeenOutcome.LATE, "the sender's view"
        assert tally(gateway) == {"LATE": 1}
        agrees_with_the_document(client)

    run(body)


def test_who_is_refused_may_come_again_when_the_first_instance_is_predicted_to_be_clear() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="heavy", b="light")
        gateway = gateway_over(fleet)
        for target in fleet.router.targets:
            fleet.router.close(target)
        fleet.router.clear_s[:] = [time.monotonic() + 50.0, time.monotonic() + 20.999]
        client = Client().ask(gateway)
        assert client.status == 503
        assert client.headers["retry-after"] == "21"

    run(body)


def test_a_client_that_leaves_while_it_waits_is_cancelled_and_hears_nothing() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway = gateway_over(fleet)
        client = Client().ask(gateway)
        client.leave()
        assert client.socket.written == b""
        assert fleet["a"].cancelled == [1]
        assert tally(gateway) == {"CANCELLED": 1}

    run(body)


def test_a_worker_that_hangs_is_given_up() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway = gateway_over(fleet, answer_timeout_s=0.01)
        client = Client(headers={"x-deadline-ms": "1"}).ask(gateway)
        await client.answered()
        assert (client.status, client.json["code"]) == (500, "FAILED")
        assert fleet["a"].cancelled == [1]
        assert tally(gateway) == {"FAILED": 1}

    run(body)


def test_a_bug_is_a_failure_and_the_place_is_given_back() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway = gateway_over(fleet)
        client = Client().ask(gateway)
        fleet["a"].reply(99)  # type: ignore[arg-type]
        assert (client.status, client.json["code"]) == (500, "FAILED")
        assert "99" not in client.json["error"], "what went wrong inside is the log's business"
        assert fleet.router.targets[0].in_flight == 0
        assert tally(gateway) == {"FAILED": 1}

    run(body)


# admission


@pytest.mark.parametrize(
    ("client", "status"),
    [
        (Client(path="/v1/nothing"), 404),
        (Client(b""), 400),
        (Client(headers={"content-type": "text/html"}), 415),
        (Client(headers={"content-length": "99999999999"}), 413),
        (Client(headers={"x-deadline-ms": "-1"}), 400),
        (Client(b"12345678901"), 413),
    ],
)
def test_what_admission_refuses_reaches_no_worker(client: Client, status: int) -> None:
    async def body() -> None:
        fleet, gateway = limited()
        client.ask(gateway)
        assert (client.status, client.json["code"]) == (status, "INVALID")
        assert client.headers["connection"] == "close", "the rest of the body is not waited for"
        assert fleet["a"].asked == {}
        assert tally(gateway) == {"INVALID": 1}
        agrees_with_the_document(client)

    run(body)


def limited(**settings: Any) -> tuple[ScriptedFleet, Gateway]:
    """A fleet whose service takes bodies of 10 bytes, and a gateway over it."""
    fleet = ScriptedFleet("uniform", a="light")
    fleet.router.configure(msgspec.structs.replace(fleet.router.spec, max_body_bytes=10))
    return fleet, gateway_over(fleet, **settings)


CHUNKED = {"transfer-encoding": "chunked", "content-length": ""}


@pytest.mark.parametrize("cut", range(1, 160, 7))
def test_a_body_in_pieces_is_put_together_up_to_its_limit(cut: int) -> None:
    async def body() -> None:
        fleet, gateway = limited()
        client = Client(b"3\r\n123\r\n4\r\n4567\r\n3\r\n890\r\n0\r\n\r\n", CHUNKED).connect(gateway)
        for start in range(0, len(client.request), cut):
            assert fleet["a"].asked == {}
            client.send(client.request[start : start + cut])
        fleet["a"].reply(Attempt.OK, payload=b'{"predictions":[]}')
        assert client.status == 200
        assert tally(gateway) == {"OK": 1}

    run(body)


def test_a_chunked_body_beyond_the_limit_is_cut_off() -> None:
    async def body() -> None:
        fleet, gateway = limited()
        client = Client(b"6\r\n123456\r\n6\r\n", CHUNKED).ask(gateway)
        assert client.socket.written == b""
        client.send(b"123456")
        assert (client.status, client.headers["connection"]) == (413, "close")
        client.send(b"\r\n0\r\n\r\n")
        assert client.status == 413, "nothing more is said"
        assert fleet["a"].asked == {}
        assert tally(gateway) == {"INVALID": 1}

    run(body)


def test_the_time_that_a_body_takes_is_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The promise counts from the head: the worker gets what is left of it."""
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    fleet, gateway = limited()
    client = Client(b"1234", {"x-deadline-ms": "200"})

    async def body() -> None:
        nonlocal now_s
        client.connect(gateway)
        client.send(client.request[:-1])
        now_s += 0.15
        client.send(client.request[-1:])
        assert fleet["a"].asked[1].budget_s == pytest.approx(0.05)
        now_s += 0.06
        fleet["a"].reply(Attempt.OK, payload=b'{"predictions":[]}')
        assert client.json["outcome"] == "LATE"
        assert client.json["timings_ms"]["total"] == 210.0
        client.leave()

    asyncio.run(body())


def test_a_body_has_one_time_limit_however_it_drips() -> None:
    async def body() -> None:
        _, gateway = limited(body_timeout_s=0.05)
        client = Client(headers={"content-length": "10"}).ask(gateway)

        async def drip() -> None:
            while True:
                await asyncio.sleep(0.02)
                client.send(b"x")

        dripping = asyncio.create_task(drip())
        await client.answered()
        dripping.cancel()
        assert client.status == 408
        assert tally(gateway) == {"INVALID": 1}
        agrees_with_the_document(client)

    run(body)


@pytest.mark.parametrize("path", ["/v1/imagenet", "/v2/models/imagenet/infer"])
def test_all_uploads_together_are_bounded_and_each_way_out_gives_its_bytes_back(path: str) -> None:
    """Three clients hold a third of the memory each; a fourth that wants some is refused, and none of them is."""

    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway = gateway_over(fleet, uploads_mb=3.0)
        third, headers = bytes(1 << 20), {"content-length": str(3 << 20), "content-type": "image/png"}
        clients = [Client(third, headers, path).ask(gateway) for _ in range(3)]
        await soon(lambda: gateway.uploads.held == 3 << 20)
        late = Client(b"x", headers, path).ask(gateway)
        await late.answered()
        assert (late.status, late.json["code"], int(late.headers["retry-after"])) == (503, "UNAVAILABLE", 1)
        assert "uploads" in late.json["error"]
        agrees_with_the_document(late)
        assert tally(gateway) == {"UNAVAILABLE": 1}
        assert [one.socket.written for one in clients] == [b""] * 3
        await soon(lambda: gateway.uploads.held == 3 << 20)
        clients[0].leave()
        await soon(lambda: gateway.uploads.held == 2 << 20)
        whole = Client(third, headers | {"content-length": str(1 << 20)}, path).ask(gateway)
        await soon(lambda: len(fleet["a"].asked) == 1)
        assert gateway.uploads.held == 2 << 20, "what has arrived whole is the queue's to bound"
        whole.leave()
        clients[1].leave()
        clients[2].leave()
        await soon(lambda: gateway.uploads.held == 0)
        await soon(lambda: tally(gateway) == {"UNAVAILABLE": 1, "CANCELLED": 4})

    run(body)


def test_a_client_that_leaves_in_its_body_is_cancelled() -> None:
    async def body() -> None:
        _, gateway = limited()
        client = Client(headers={"content-length": "10"}).ask(gateway)
        client.leave()
        assert client.socket.written == b""
        assert tally(gateway) == {"CANCELLED": 1}

    run(body)


def test_a_client_that_asks_before_it_sends_is_told_to_go_on_or_why_not() -> None:
    async def body() -> None:
        fleet, gateway = limited()
        client = Client(b"", {"content-length": "10", "expect": "100-continue"}).ask(gateway)
        assert client.socket.written == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.socket.written = b""
        client.send(b"1234567890")
        fleet["a"].reply(Attempt.OK, payload=b'{"predictions":[]}')
        assert client.status == 200
        client = Client(b"", {"content-length": "11", "expect": "100-continue"}).ask(gateway)
        assert client.status == 413

    run(body)


def test_requests_sent_ahead_are_answered_in_turn() -> None:
    """A pipeline of images with an operator's GET between them, which takes the way over ASGI."""

    async def body() -> None:
        fleet = ScriptedFleet("uniform", capacity=5, a="light")
        gateway = gateway_over(fleet)
        client, look = Client(), Client(b"", path="/healthz", method="GET")
        client.connect(gateway)
        client.send(client.request + look.request + client.request + client.request)
        assert len(fleet["a"].asked) == 1
        fleet["a"].reply(Attempt.OK, payload=b'{"predictions":[]}')
        await soon(lambda: len(fleet["a"].asked) == 2)
        fleet["a"].reply(Attempt.QUEUE_FULL)
        await soon(lambda: len(fleet["a"].asked) == 3)
        fleet["a"].reply(Attempt.OK, payload=b'{"predictions":[]}')
        statuses = [int(part[:3]) for part in client.socket.written.split(b"HTTP/1.1 ")[1:]]
        assert statuses == [200, 200, 429, 200]
        assert b'{"status":"alive"}' in client.socket.written
        assert client.socket.reading
        assert tally(gateway) == {"OK": 2, "QUEUE_FULL": 1}

    run(body)


def test_who_leaves_with_requests_sent_ahead_has_only_asked_one() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway = gateway_over(fleet)
        client = Client().connect(gateway)
        client.send(client.request * 3)
        client.leave()
        assert fleet["a"].cancelled == [1]
        assert tally(gateway) == {"CANCELLED": 1}

    run(body)


def test_who_does_not_read_answers_gets_no_further_turn() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway = gateway_over(fleet)
        client = Client().connect(gateway)
        client.connection.pause_writing()
        client.send(client.request * 2)
        fleet["a"].reply(Attempt.OK, payload=b'{"predictions":[]}')
        for _ in range(5):  # a turn begins in the loop
            await asyncio.sleep(0)
        assert len(fleet["a"].asked) == 1
        client.connection.resume_writing()
        await soon(lambda: len(fleet["a"].asked) == 2)

    run(body)


@pytest.mark.parametrize(
    ("version", "header", "closes"),
    [("1.1", "keep-alive", False), ("1.1", "close", True), ("1.0", "", True)],
)
def test_the_connection_lives_as_long_as_the_client_wants(version: str, header: str, closes: bool) -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        client = Client(headers={"connection": header})
        client.request = client.request.replace(b"HTTP/1.1", f"HTTP/{version}".encode(), 1)
        client.ask(gateway_over(fleet))
        fleet["a"].reply(Attempt.OK, payload=b'{"predictions":[]}')
        assert client.socket.closed is closes
        assert client.headers.get("connection") == ("close" if closes else None)

    run(body)


@pytest.mark.parametrize("cut", [1, 7, 60, 10_000])
def test_an_offer_of_another_protocol_is_ignored_and_the_body_is_kept(cut: int) -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway = gateway_over(fleet)
        offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAARAAAAA"}
        client, plain = Client(b"an image", offer).connect(gateway), Client()
        both = client.request + plain.request
        for start in range(0, len(both), cut):
            client.send(both[start : start + cut])
        for _ in range(2):
            await soon(lambda: fleet["a"].in_flight)
            fleet["a"].reply(Attempt.OK, payload=b'{"predictions":[]}')
        assert client.socket.written.count(b"HTTP/1.1 200 OK") == 2
        assert list(fleet["a"].payloads.values()) == [b"an image", b"body"]
        assert not client.socket.closed
        assert tally(gateway) == {"OK": 2}

    run(body)


def test_this_is_no_proxy() -> None:
    async def body() -> None:
        client = Client(b"", path="example.org:443", method="CONNECT").ask(gateway_over(ScriptedFleet("uniform")))
        assert client.status == 405
        assert client.socket.ended

    run(body)


def test_the_answer_to_head_has_no_body() -> None:
    async def body() -> None:
        client = Client(b"", method="HEAD").ask(gateway_over(ScriptedFleet("uniform", a="light")))
        head, _, rest = client.socket.written.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 405 ")
        assert rest == b""

    run(body)


def test_before_the_first_deployment_everything_is_unavailable() -> None:
    async def body() -> None:
        gateway = Gateway(GatewayConfig(board_url=NOBODY), Board(NOBODY))
        client = Client().ask(gateway)
        assert (client.status, client.json["code"]) == (503, "UNAVAILABLE")
        assert tally(gateway) == {"UNAVAILABLE": 1}

    run(body)


def test_metrics_carry_every_outcome_and_only_known_names() -> None:
    async def body() -> None:
        gateway = gateway_over(ScriptedFleet("uniform"))
        for path in ("/v1/imagenet", *(f"/v1/made-up-{number}" for number in range(50))):
            Client(path=path).ask(gateway)
        text = gateway.exposition.text().decode()
        assert 'tidegate_requests_total{outcome="UNAVAILABLE",service="imagenet"} 1.0' in text
        assert 'tidegate_requests_total{outcome="INVALID",service="unknown"} 50.0' in text
        assert "made-up" not in text
        assert all(f'outcome="{outcome.name}"' in text for outcome in Outcome)

    run(body)


@pytest.mark.parametrize(
    "settings",
    [
        {"board_url": ""},
        {"board_url": "http://x"},
        {"port": 0},
        {"port": 65_536},
        {"max_header_bytes": 10},
        {"header_timeout_s": 0.0},
        {"body_timeout_s": float("nan")},
        {"drain_s": -1.0},
        {"uploads_mb": 0.5},
        {"metrics_folder": Path("/nowhere/at all")},
        {"answer_timeout_s": 1e9},
    ],
)
def test_a_bad_setting_is_named_with_its_value(settings: dict[str, Any]) -> None:
    [(key, value)] = settings.items()
    with pytest.raises(ConfigError) as caught:
        GatewayConfig(**{"board_url": NOBODY, **settings})
    assert key in str(caught.value)
    assert str(value) in str(caught.value)
