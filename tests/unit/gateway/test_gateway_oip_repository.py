"""Loading over the Open Inference Protocol: told when every instance is there, or why one is not."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec
import pytest

from gateway.fleet import Fleet
from gateway.oip_models import Model, find_model
from gateway.oip_repository import set_loaded
from gateway.request import Refused
from protocol.board import Board
from protocol.outcomes import Outcome
from protocol.records import Deployment, InstanceRecord, InstanceSpec, InstanceState, WorkerSpec
from tests.unit.gateway.test_gateway_oip import DEPLOYMENT, Surface, record

HERE = {"unix:/nowhere"}
PLACED = msgspec.structs.replace(
    DEPLOYMENT,
    workers=(
        WorkerSpec(name="a", instances=(InstanceSpec(variant="big"),)),
        WorkerSpec(name="b", instances=(InstanceSpec(variant="small"),)),
    ),
)
LOADING = InstanceState.LOADING


class ScriptedBoard:
    """Keeps the deployment that was made."""

    def __init__(self) -> None:
        self.posted = PLACED

    async def change_deployment(
        self, change: Callable[[Deployment], Deployment], empty: Deployment | None
    ) -> Deployment | None:
        """As `Board.change_deployment`."""
        changed = change(self.posted)
        if changed != self.posted:
            self.posted = msgspec.structs.replace(changed, version=self.posted.version + 1)
        return self.posted


def loading(body: Callable[[Surface, Callable[..., Awaitable[None]]], Awaitable[None]]) -> ScriptedBoard:
    """Runs a scenario in which `pets` (big on a, small on b) is loaded or unloaded."""
    surface, board = Surface(), ScriptedBoard()
    surface.gateway.fleet.board, surface.gateway.fleet.deployment = cast(Board, board), PLACED
    model = find_model(surface.gateway.fleet.services, "pets")
    assert isinstance(model, Model)

    async def call(loaded: bool, patience_s: float = 5.0) -> None:
        fleet: Fleet = surface.gateway.fleet
        await set_loaded(fleet, model, loaded, patience_s)

    asyncio.run(cast(Any, body)(surface, call))
    return board


async def turns() -> None:
    """Long enough for a few looks at the fleet."""
    await asyncio.sleep(0.06)


def records(big: InstanceState, small: InstanceState, reason: str = "") -> list[InstanceRecord]:
    return [record("a/big", "big", big), msgspec.structs.replace(record("b/small", "small", small), reason=reason)]


def test_loading_is_over_when_every_instance_is_ready() -> None:
    async def body(surface: Surface, call: Callable[..., Awaitable[None]]) -> None:
        surface.router.set_instances(records(InstanceState.READY, LOADING), HERE)
        task = asyncio.ensure_future(call(True))
        await turns()
        assert not task.done(), "one of two is not enough"
        surface.router.set_instances(records(InstanceState.READY, InstanceState.READY), HERE)
        await task

    loading(body)


def test_unloading_is_over_when_every_instance_has_gone() -> None:
    async def body(surface: Surface, call: Callable[..., Awaitable[None]]) -> None:
        task = asyncio.ensure_future(call(False))
        await turns()
        surface.router.set_instances(records(InstanceState.READY, InstanceState.READY)[:1], HERE)
        await turns()
        assert not task.done()
        surface.router.set_instances([], HERE)
        await task

    posted = loading(body).posted
    assert posted.version == PLACED.version + 1
    assert [one.loaded for worker in posted.workers for one in worker.instances] == [False, False]


@pytest.mark.parametrize(
    ("small", "reason", "outcome", "says"),
    [
        (InstanceState.FAILED, "no such file", Outcome.FAILED, "failed to load 'pets': b/small: no such file"),
        (LOADING, "", Outcome.UNAVAILABLE, "still loading 'pets' after 0.05 s"),
    ],
)
def test_what_does_not_come_is_told(small: InstanceState, reason: str, outcome: Outcome, says: str) -> None:
    async def body(surface: Surface, call: Callable[..., Awaitable[None]]) -> None:
        surface.router.set_instances(records(InstanceState.READY, small, reason), HERE)
        with pytest.raises(Refused, match=says) as caught:
            await call(True, 0.05)
        assert caught.value.outcome is outcome

    loading(body)
