"""The scheduler as a whole, in virtual time: the lease that lets one publish, and one pair of loops per service."""

import asyncio
from typing import Any, Self, cast

import pytest

from protocol.board import Board
from protocol.records import Deployment, ServiceSpec
from scheduler import slot_loop
from scheduler.config import SchedulerConfig
from scheduler.slot_loop import Scheduler
from tests.fakes.virtual_time import run

CONFIG = SchedulerConfig(board_url="redis://nobody")


class LeaseBoard:
    """Answers each request for the lease with the next of these, the last one for ever."""

    def __init__(self, *answers: bool | Exception) -> None:
        self.owners: set[str] = set()
        self._answers = list(answers)

    async def hold_lease(self, owner: str) -> bool:
        """As `Board.hold_lease`."""
        self.owners.add(owner)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_who_cannot_renew_the_lease_leads_no_more() -> None:
    """Asked for every second, so that it is renewed twice before it expires; a board that is away is a lease lost."""
    board = LeaseBoard(False, True, ConnectionError("away"), TimeoutError(), True, False)
    seen: list[tuple[bool, float]] = []

    async def body() -> None:
        scheduler = Scheduler(CONFIG, cast(Board, board), lambda *_: None)
        task = asyncio.create_task(scheduler._hold_lease())
        for second in range(7):
            await asyncio.sleep(second + 0.5 - asyncio.get_running_loop().time())
            gauge = scheduler.metrics.registry.get_sample_value("tidegate_scheduler_leading")
            seen.append((scheduler.leads, gauge or 0.0))
        task.cancel()
        await asyncio.wait([task])

    run(body())
    assert seen == [(leads, float(leads)) for leads in (False, True, False, False, True, False, False)]
    assert len(board.owners) == 1


class ScriptedObserver:
    """Knows the deployment that the test gives it."""

    def __init__(self, *_: object) -> None:
        self.deployment: Deployment | None = None
        self.changed = asyncio.Event()
        observers.append(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def deploy(self, *services: str) -> None:
        """Another deployment is on the board."""
        spec = ServiceSpec(variants=("v",), requirement_ms=300.0)
        self.deployment = Deployment(name="d", services=dict.fromkeys(services, spec), workers=())
        self.changed.set()


observers: list[ScriptedObserver] = []


def test_each_service_has_its_loops_as_long_as_it_is_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that stays is not started over; the loops of one that goes are ended."""
    running: list[str] = []
    begun: list[str] = []

    def loop_of(kind: str) -> Any:
        class Loop:
            def __init__(self, name: object, *_: object, **__: object) -> None:
                self.name = f"{kind} {name}" if kind != "placing" else kind

            async def run(self) -> None:
                begun.append(self.name)
                running.append(self.name)
                try:
                    await asyncio.Event().wait()
                finally:
                    running.remove(self.name)

        return Loop

    for name, kind in (("SlotLoop", "slots"), ("ShadowLoop", "shadow"), ("PlacementLoop", "placing")):
        monkeypatch.setattr(slot_loop, name, loop_of(kind))
    monkeypatch.setattr(slot_loop, "Observer", ScriptedObserver)
    observers.clear()

    async def body() -> None:
        scheduler = Scheduler(CONFIG, cast(Board, LeaseBoard(True)), lambda *_: None)
        task = asyncio.create_task(scheduler.run())
        await asyncio.sleep(0.1)
        assert running == ["placing"]
        observers[0].deploy("a", "b")
        await asyncio.sleep(0.1)
        assert sorted(running) == ["placing", "shadow a", "shadow b", "slots a", "slots b"]
        observers[0].deploy("b", "c")
        await asyncio.sleep(0.1)
        assert sorted(running) == ["placing", "shadow b", "shadow c", "slots b", "slots c"]
        observers[0].deploy("a")
        await asyncio.sleep(0.1)
        assert sorted(running) == ["placing", "shadow a", "slots a"]
        task.cancel()
        await asyncio.wait([task])
        assert running == []

    run(body())
    assert begun.count("slots b") == 1
    assert begun.count("slots a") == 2
