"""`tidegate routing shadow` and `rollback` before a scripted gateway: what they ask, what they print, when they end."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from protocol.records import Deployment, RouterChoice, ServiceSpec, ShadowRecord, WouldBe
from tidegate import routing_live
from tidegate.main import app
from tidegate.running import GatewayError, NotThere, RunningGateway

SHADOW = "/admin/services/s/shadow"
LIGHT = ShadowRecord(
    choice=RouterChoice(router="light-only"),
    active_router="deadline",
    slots=4,
    shadow=WouldBe(requests=1234, goodput_ratio=0.7769, violation_ratio=0.01),
    observed=WouldBe(requests=1230, goodput_ratio=0.8),
)
Told = ShadowRecord | GatewayError | None


class Gateway:
    """Answers with one of `told` after the other, the last for ever; None: nothing yet."""

    def __init__(self, *told: Told) -> None:
        self.asked: list[tuple[str, str, bytes | None]] = []
        self._told = list(told) or [None]

    async def call(self, method: str, path: str, body: bytes | None = None) -> Any:
        self.asked.append((method, path, body))
        if path == "/state":
            of = {"router": "learned-po", "routing_by": "learned-po", "reason": "", "table_version": len(self.asked)}
            return {"services": {"s": of}}
        if path == "/admin/deployment":
            spec = ServiceSpec(variants=("v",), requirement_ms=300.0, router="learned-po", policy_file="/runs/mine")
            return msgspec.to_builtins(Deployment(name="d", services={"s": spec}, workers=()))
        if (method, path) != ("GET", SHADOW):
            return {}
        told = self._told.pop(0) if len(self._told) > 1 else self._told[0]
        if told is None:
            raise NotThere("no router looks on")
        if isinstance(told, GatewayError):
            raise told
        return msgspec.to_builtins(told)


Says = Callable[..., tuple[int, str]]


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Says:
    """Runs a command before a gateway: exit code and all that it said, on one line. No time passes by itself."""
    now_s = 0.0

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now_s

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    def run(gateway: Gateway, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(routing_live, "time", Clock)
        monkeypatch.setattr(asyncio, "sleep", sleep)
        monkeypatch.setattr(RunningGateway, "_call", lambda self, *given: gateway.call(*given))
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["routing", *arguments])
        return result.exit_code, " ".join(result.output.split())

    return run


def test_a_former_shadows_last_news_is_not_taken_for_the_new_ones(says: Says) -> None:
    new = msgspec.structs.replace(LIGHT, choice=RouterChoice(router="uniform"), slots=7)
    code, said = says(Gateway(LIGHT, LIGHT, new), "shadow", "uniform", "--seconds", "9")
    assert code == 0
    assert "uniform would have had" in said
    code, said = says(Gateway(LIGHT), "shadow", "uniform")
    assert code == 1
    assert "nothing was heard of uniform yet: is the scheduler running?" in said


def test_of_no_requests_there_are_no_shares(says: Says) -> None:
    code, said = says(Gateway(LIGHT), "shadow")
    assert code == 0
    assert "1,234 │ 77.69% │ 1.00%" in said
    assert "no request has ended" not in said
    idle = msgspec.structs.replace(LIGHT, shadow=WouldBe(), observed=WouldBe())
    code, said = says(Gateway(idle), "shadow", "--seconds", "0")
    assert (code, "0.00%" in said) == (0, False)
    assert "no request has ended since it looks on" in said


def test_a_router_that_cannot_decide_is_not_watched_to_the_end(says: Says) -> None:
    gateway = Gateway(None, msgspec.structs.replace(LIGHT, reason="needs the phase"))
    code, said = says(gateway, "shadow", "light-only", "--seconds", "600")
    assert code == 1
    assert "light-only cannot decide: needs the phase" in said
    assert len(gateway.asked) < 8


def test_a_board_that_is_away_is_not_a_shadow_that_is_not_there(says: Says) -> None:
    code, said = says(Gateway(GatewayError("the board (Redis) cannot be reached")), "shadow")
    assert (code, said) == (1, "tidegate routing: the board (Redis) cannot be reached")
    code, said = says(Gateway(), "shadow")
    assert (code, "no router looks on at s: name one" in said) == (1, True)


def test_none_ends_it(says: Says) -> None:
    gateway = Gateway(LIGHT)
    assert says(gateway, "shadow", "none") == (0, "no router looks on any more")
    put = [body for method, path, body in gateway.asked if (method, path) == ("PUT", SHADOW)]
    assert [msgspec.json.decode(body, type=RouterChoice).router for body in put if body is not None] == [""]


def test_a_rollback_names_the_policy_that_is_back(says: Says) -> None:
    code, said = says(Gateway(), "rollback")
    assert (code, said) == (0, "s is routed by learned-po of /runs/mine again")


def test_a_negative_time_is_refused(says: Says) -> None:
    code, said = says(Gateway(), "shadow", "--seconds", "-1")
    assert code == 2
    assert "--seconds" in said
