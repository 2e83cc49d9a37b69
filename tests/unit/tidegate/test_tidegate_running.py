"""An operator's side of a gateway: addresses, services by name, routers that come into force or do not."""

import asyncio
from collections.abc import Callable
from typing import Any, Self, cast

import aiohttp
import pytest

from loadgen.payloads import Payload
from protocol.records import Deployment, InstanceSpec, ServiceSpec, WorkerSpec
from tidegate import running
from tidegate.running import GatewayError, PhaseHint, RouterUnusable, RunningGateway, in_words, whole_url


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://127.0.0.1:8700/", "http://127.0.0.1:8700"),
        ("127.0.0.1:8700", "http://127.0.0.1:8700"),
        ("edge-1:8700", "http://edge-1:8700"),
        ("https://edge.example/tide", "https://edge.example/tide"),
        ("[::1]:8700", "http://[::1]:8700"),
    ],
)
def test_an_address_may_leave_out_http(given: str, url: str) -> None:
    assert whole_url(given) == url


@pytest.mark.parametrize("given", ["", "http://", "ftp://x:1", "edge:port", "edge:99999", "edge:0"])
def test_what_is_no_address_is_said_so(given: str) -> None:
    with pytest.raises(GatewayError, match="no address of a gateway: write it as http://"):
        whole_url(given)


def test_what_went_wrong_is_told_in_words() -> None:
    assert in_words(TimeoutError()) == "it takes too long"
    assert in_words(ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 9)")) == "Connection refused"
    assert in_words(OSError(-2, "Name or service not known")) == "Name or service not known"
    assert in_words(ValueError("odd")) == "odd"


class Scripted(RunningGateway):
    """A gateway that answers /state from a list, the last one for ever."""

    def __init__(self, *states: tuple[str, str]) -> None:
        super().__init__("http://gateway")
        self.calls: list[tuple[str, str]] = []
        self._states = iter(states)
        self._state = states[0]

    async def _call(self, method: str, path: str, body: bytes | None = None) -> Any:
        self.calls.append((method, path))
        if path != "/state":
            return {}
        self._state = next(self._states, self._state)
        router, reason = self._state
        return {"services": {"digits": {"router": router, "reason": reason, "instances": []}}}

    async def _tell(self, service: str, hint: PhaseHint) -> None:
        self.calls.append((service, hint.phase))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes by itself: 50 ms at every look."""
    now_s = 0.0

    class Clock:
        @staticmethod
        def monotonic() -> float:
            nonlocal now_s
            now_s += 0.05
            return now_s

    async def at_once(seconds: float) -> None:
        pass

    monkeypatch.setattr(running, "time", Clock)
    monkeypatch.setattr(asyncio, "sleep", at_once)


def test_a_router_is_set_once_it_routes() -> None:
    gateway = Scripted(("deadline", ""), ("threshold", "no table yet"), ("threshold", ""))
    asyncio.run(gateway.set_router("digits", "threshold"))
    assert gateway.calls[0] == ("PUT", "/admin/services/digits/router")
    assert len(gateway.calls) == 4, "the old router's state does not count"


def test_a_router_that_does_not_come_into_force_is_unusable_and_says_why() -> None:
    gateway = Scripted(("deadline", ""), ("learned-po", "no table yet"), ("learned-po", "trained for four instances"))
    with pytest.raises(RouterUnusable, match="trained for four instances"):
        asyncio.run(gateway.set_router("digits", "learned-po"))


def test_a_router_that_must_know_the_phase_is_told_it_once_and_only_when_it_is_asked_for() -> None:
    unknown = ("learned-fo", "this policy needs the phase")
    gateway = Scripted(("deadline", ""), unknown, unknown, ("learned-fo", ""))
    asyncio.run(gateway.set_router("digits", "learned-fo", PhaseHint(Payload(b"x", "image/png"), "bursty")))
    assert [call for call in gateway.calls if call[1] != "/state"][1:] == [("digits", "bursty")]
    assert gateway.calls.index(("digits", "bursty")) == 3, "not while the old router is in force"


def test_a_change_that_never_arrives_is_an_error_of_the_gateway() -> None:
    gateway = Scripted(("deadline", ""))
    with pytest.raises(GatewayError, match="did not come into force") as caught:
        asyncio.run(gateway.set_router("digits", "uniform"))
    assert not isinstance(caught.value, RouterUnusable)


def test_a_service_that_is_nearly_right_is_guessed() -> None:
    def look(name: str) -> Callable[[], Any]:
        return lambda: asyncio.run(Scripted(("deadline", "")).service(name))

    assert look("digits")()["router"] == "deadline"
    with pytest.raises(GatewayError, match=r"it has digits; did you mean 'digits'\?"):
        look("digit")()
    with pytest.raises(GatewayError, match=r"it has digits$"):
        look("xyz")()


class Looking(RunningGateway):
    """A gateway that answers each look at /state with the next of these services, the last one for ever."""

    def __init__(self, *services: dict[str, Any]) -> None:
        super().__init__("http://gateway")
        self.looks = 0
        self._services = services

    async def _call(self, method: str, path: str, body: bytes | None = None) -> Any:
        if path != "/state":
            return {}
        self.looks += 1
        return {"services": self._services[min(self.looks, len(self._services)) - 1]}


def digits(*ready: tuple[str, int], router: str = "deadline", length: int = 0) -> dict[str, Any]:
    """The service `digits` with an instance for each id and capacity, and one that is not ready."""
    views = [
        {"id": id, "variant": id.split("/")[1], "capacity": capacity, "ready": True, "length": length}
        for id, capacity in ready
    ]
    loading = {"id": "z/big", "variant": "big", "capacity": 1, "ready": False, "length": 0}
    return {"digits": {"router": router, "reason": "", "instances": [*views, loading]}}


def test_a_deployment_is_there_once_exactly_its_loaded_instances_are_ready_behind_its_routers() -> None:
    worker = WorkerSpec(
        name="w",
        instances=(
            InstanceSpec(variant="big", capacity=2),
            InstanceSpec(variant="small", capacity=3),
            InstanceSpec(variant="unloaded", loaded=False),
        ),
    )
    service = ServiceSpec(variants=("big", "small", "unloaded"), requirement_ms=100.0, router="uniform")
    wanted = Deployment(name="d", services={"digits": service}, workers=(worker,))
    both = ("w/big", 2), ("w/small", 3)
    gateway = Looking(
        digits(("w/big", 2), router="uniform"),
        digits(*both, ("old/small", 3), router="uniform"),
        digits(("w/big", 2), ("w/small", 15), router="uniform"),
        digits(*both, router="deadline"),
        digits(*both, router="uniform"),
    )
    asyncio.run(gateway.deploy(wanted))
    assert gateway.looks == 5
    with pytest.raises(GatewayError, match="deployment d did not become ready within 30 s"):
        asyncio.run(Looking(digits(("w/big", 2), router="uniform")).deploy(wanted))


def test_a_service_is_idle_once_no_instance_holds_a_request() -> None:
    gateway = Looking(digits(("w/big", 2), length=1), digits(("w/big", 2), length=0))
    asyncio.run(gateway.until_idle("digits"))
    assert gateway.looks == 2


class Answer:
    """What aiohttp's session gives for one request."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self._body = body

    def request(self, method: str, url: str, data: bytes | None) -> Self:
        """As `ClientSession.request`."""
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def read(self) -> bytes:
        """The body."""
        return self._body


@pytest.mark.parametrize(
    ("status", "body", "error", "says"),
    [
        (409, b'{"error": "no policy fits"}', RouterUnusable, "^no policy fits$"),
        (400, b'{"error": "no such router"}', RouterUnusable, "^no such router$"),
        (503, b'{"error": "the board is away"}', GatewayError, "^the board is away$"),
        (502, b"<html>", GatewayError, "HTTP 502: is this a Tidegate gateway"),
    ],
)
def test_only_a_refused_router_is_unusable(status: int, body: bytes, error: type[Exception], says: str) -> None:
    """A comparison goes on without a router that is unusable; a gateway in trouble ends it."""
    gateway = RunningGateway("http://gateway")
    gateway._session = cast(aiohttp.ClientSession, Answer(status, body))
    with pytest.raises(GatewayError, match=says) as caught:
        asyncio.run(gateway.ask_for_router("digits", "learned-po"))
    assert type(caught.value) is error
