"""The life of one request without a network: scripted worker below, ASGI messages above; one outcome, counted once."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec
import pytest

from gateway.app import INFER_OPERATION
from gateway.config import ConfigError, GatewayConfig
from gateway.handle import Gateway
from gateway.presence import Presence, announce
from protocol.board import Board
from protocol.outcomes import Attempt, Outcome
from tests.fakes.scripted_worker import ScriptedFleet

Message = MutableMapping[str, Any]
NOBODY = "redis://127.0.0.1:1/0"


class Client:
    """One HTTP exchange as ASGI sees it."""

    def __init__(self, *parts: bytes, headers: dict[str, str] | None = None, path: str = "/v1/imagenet") -> None:
        self.scope: Message = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in (headers or {}).items()],
        }
        self.presence = Presence()
        announce(self.scope, self.presence)
        self.sent: list[Message] = []
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        for number, part in enumerate(parts or (b"body",)):
            self.part(part, more=number + 1 < len(parts))

    def part(self, body: bytes, *, more: bool) -> None:
        """More of the request arrives."""
        self._messages.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leave(self) -> None:
        """The connection is gone."""
        self.presence.leave()
        self._messages.put_nowait({"type": "http.disconnect"})

    async def receive(self) -> Message:
        """ASGI."""
        return await self._messages.get()

    async def send(self, message: Message) -> None:
        """ASGI."""
        self.sent.append(message)

    @property
    def status(self) -> int:
        """Of the one response."""
        start, body = self.sent
        assert (start["type"], body["type"]) == ("http.response.start", "http.response.body")
        assert int(self.headers["content-length"]) == len(body["body"])
        return int(start["status"])

    @property
    def headers(self) -> dict[str, str]:
        """Of the response."""
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def json(self) -> dict[str, Any]:
        """The response's body."""
        decoded: dict[str, Any] = msgspec.json.decode(self.sent[1]["body"])
        return decoded


def gateway_over(fleet: ScriptedFleet, **settings: Any) -> Gateway:
    """A gateway that knows the scripted fleet and no board."""
    gateway = Gateway(GatewayConfig(board_url=NOBODY, **settings), Board(NOBODY), seed=1)
    gateway.fleet.services.update(fleet.services)
    gateway.fleet.peers.update(fleet.peers)  # type: ignore[arg-type]
    return gateway


def tally(gateway: Gateway) -> dict[str, int]:
    """Outcomes so far; the law holds at every look."""
    statistics = gateway.statistics()
    counted = {name: number for one in statistics.outcomes.values() for name, number in one.items()}
    assert statistics.arrived == sum(counted.values()) + statistics.in_flight
    return counted


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20.0):
            await body()

    asyncio.run(bounded())


async def soon(condition: Callable[[], object]) -> None:
    """Lets the loop turn until the condition holds."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


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
        gateway, client = gateway_over(fleet), Client()
        task = asyncio.create_task(gateway.infer(client.scope, client.receive, client.send))
        await soon(lambda: fleet["a"].in_flight)
        if attempt is Attempt.LOST:
            fleet["a"].die()
        else:
            http_status = 415 if attempt is Attempt.INVALID else 0
            fleet["a"].reply(attempt, payload=b'{"predictions":[]}', reason="so", http_status=http_status)
        await task
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
        gateway, client = gateway_over(fleet), Client(headers={"x-deadline-ms": "0.001"})
        task = asyncio.create_task(gateway.infer(client.scope, client.receive, client.send))
        await soon(lambda: fleet["a"].in_flight)
        fleet["a"].reply(Attempt.LATE, payload=b'{"predictions":[]}')
        await task
        assert client.status == status
        assert client.json["outcome" if status == 200 else "code"] == "LATE"
        assert client.headers.get("x-tidegate-late") == ("1" if status == 200 else None)
        assert tally(gateway) == {"LATE": 1}
        agrees_with_the_document(client)

    run(body)


def test_a_client_that_leaves_while_it_waits_is_cancelled_and_hears_nothing() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway, client = gateway_over(fleet), Client()
        task = asyncio.create_task(gateway.infer(client.scope, client.receive, client.send))
        await soon(lambda: fleet["a"].in_flight)
        client.leave()
        await task
        assert client.sent == []
        assert fleet["a"].cancelled == [1]
        assert tally(gateway) == {"CANCELLED": 1}

    run(body)


def test_a_worker_that_hangs_is_given_up() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway = gateway_over(fleet, answer_timeout_s=0.01)
        client = Client(headers={"x-deadline-ms": "1"})
        await gateway.infer(client.scope, client.receive, client.send)
        assert (client.status, client.json["code"]) == (500, "FAILED")
        assert fleet["a"].cancelled == [1]
        assert tally(gateway) == {"FAILED": 1}

    run(body)


def test_a_cancelled_task_is_still_counted_once() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway, client = gateway_over(fleet), Client()
        task = asyncio.create_task(gateway.infer(client.scope, client.receive, client.send))
        await soon(lambda: fleet["a"].in_flight)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled(), "a cancellation is not swallowed"
        assert tally(gateway) == {"CANCELLED": 1}
        assert fleet["a"].cancelled == [1]

    run(body)


def test_a_bug_is_a_failure_and_the_place_is_given_back() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway, client = gateway_over(fleet), Client()
        task = asyncio.create_task(gateway.infer(client.scope, client.receive, client.send))
        await soon(lambda: fleet["a"].in_flight)
        fleet["a"].reply(99)  # type: ignore[arg-type]
        await task
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
        (Client(headers={"content-length": "many"}), 400),
        (Client(headers={"x-deadline-ms": "-1"}), 400),
        (Client(b"12345", b"67890", b"1"), 413),
        (Client(b"12345678901"), 413),
    ],
)
def test_what_admission_refuses_reaches_no_worker(client: Client, status: int) -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        fleet.router.configure(msgspec.structs.replace(fleet.router.spec, max_body_bytes=10))
        gateway = gateway_over(fleet)
        await gateway.infer(client.scope, client.receive, client.send)
        assert (client.status, client.json["code"]) == (status, "INVALID")
        assert client.headers["connection"] == "close", "the rest of the body is not waited for"
        assert fleet["a"].asked == {}
        assert tally(gateway) == {"INVALID": 1}
        agrees_with_the_document(client)

    run(body)


def test_a_body_in_pieces_is_put_together_up_to_its_limit() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        fleet.router.configure(msgspec.structs.replace(fleet.router.spec, max_body_bytes=10))
        gateway, client = gateway_over(fleet), Client(b"123", b"", b"4567", b"890")
        task = asyncio.create_task(gateway.infer(client.scope, client.receive, client.send))
        await soon(lambda: fleet["a"].in_flight)
        fleet["a"].reply(Attempt.OK, payload=b'{"predictions":[]}')
        await task
        assert client.status == 200

    run(body)


def test_a_body_has_one_time_limit_however_it_drips() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway, client = gateway_over(fleet, body_timeout_s=0.05), Client(b"1", b"")
        client.scope["headers"] = []

        async def drip() -> None:
            while True:
                client.part(b"x", more=True)
                await asyncio.sleep(0)

        client._messages = asyncio.Queue()
        dripping = asyncio.create_task(drip())
        await gateway.infer(client.scope, client.receive, client.send)
        dripping.cancel()
        assert client.status == 408
        assert tally(gateway) == {"INVALID": 1}
        agrees_with_the_document(client)

    run(body)


def test_a_client_that_leaves_in_its_body_is_cancelled() -> None:
    async def body() -> None:
        fleet = ScriptedFleet("uniform", a="light")
        gateway, client = gateway_over(fleet), Client(b"123", b"")
        client._messages = asyncio.Queue()
        client.part(b"123", more=True)
        client.leave()
        await gateway.infer(client.scope, client.receive, client.send)
        assert client.sent == []
        assert tally(gateway) == {"CANCELLED": 1}

    run(body)


def test_before_the_first_deployment_everything_is_unavailable() -> None:
    async def body() -> None:
        gateway = Gateway(GatewayConfig(board_url=NOBODY), Board(NOBODY))
        client = Client()
        await gateway.infer(client.scope, client.receive, client.send)
        assert (client.status, client.json["code"]) == (503, "UNAVAILABLE")
        assert tally(gateway) == {"UNAVAILABLE": 1}

    run(body)


def test_metrics_carry_every_outcome_and_only_known_names() -> None:
    async def body() -> None:
        gateway = gateway_over(ScriptedFleet("uniform"))
        for path in ("/v1/imagenet", *(f"/v1/made-up-{number}" for number in range(50))):
            client = Client(path=path)
            await gateway.infer(client.scope, client.receive, client.send)
        text = gateway.metrics.exposition().decode()
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
        {"answer_timeout_s": 1e9},
    ],
)
def test_a_bad_setting_is_named_with_its_value(settings: dict[str, Any]) -> None:
    [(key, value)] = settings.items()
    with pytest.raises(ConfigError) as caught:
        GatewayConfig(**{"board_url": NOBODY, **settings})
    assert key in str(caught.value)
    assert str(value) in str(caught.value)
