"""An operator's side of a gateway: addresses, services by name, routers that come into force or do not."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from loadgen.payloads import Payload
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
