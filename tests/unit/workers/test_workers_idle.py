"""An instance that nobody asks measures itself again, and only then."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from models.catalog import Variant
from models.preprocess import Prepared
from models.runtime import Answer
from protocol.records import InstanceSpec, InstanceState
from workers.instance import Instance
from workers.life import Loading, live

Bench = Any  # of this folder's conftest.py
SLOW_S, QUICK_S = 2e-5, 2e-6


class Machine:
    """A runtime whose service time is what the test says; it moves the fake clock instead of waiting."""

    def __init__(self, variant: Variant, clock: Any) -> None:
        self.variant = variant
        self.takes_s = SLOW_S
        self.executed = 0
        self.broken = False
        self._clock = clock

    def prepare(self, payload: bytes, content_type: str) -> Prepared:
        """Nobody asks."""
        raise AssertionError

    def execute(self, batch: Sequence[Prepared]) -> list[Answer]:
        """As slow as it is."""
        self.executed += 1
        if self.broken:
            raise RuntimeError("broken")
        self._clock._now_s += self.takes_s
        return [Answer(np.ones(1, dtype=np.float32))] * len(batch)

    def warm_up(self) -> None:
        """Warm."""

    def close(self) -> None:
        """Closed."""


def run(bench: Bench, monkeypatch: pytest.MonkeyPatch, scenario: Callable[[Instance, Machine], Any]) -> None:
    """One instance of a scripted machine, from loading to unloading, around the scenario."""
    instance = Instance("w/light", InstanceSpec(variant="efficientnet_b0_t4"), "things")
    machines: list[Machine] = []

    def opened(variant: Variant, **_: object) -> Machine:
        machines.append(Machine(variant, bench.clock))
        return machines[0]

    monkeypatch.setattr("workers.life.open_runtime", opened)

    async def inside() -> None:
        bench.host.instances[instance.id] = instance
        life = asyncio.create_task(live(instance, bench.host, Loading(measure_again_s=1e-4), lambda: None, 0.0))
        async with asyncio.timeout(20.0):
            while instance.state is not InstanceState.READY:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert instance.times.mean_s(1) == pytest.approx(SLOW_S)
            await scenario(instance, machines[0])
            instance.unwanted.set()
            await life

    asyncio.run(inside())


async def until(condition: Callable[[], bool]) -> None:
    """Lets the loop turn until the condition holds."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


def test_a_machine_that_got_quicker_is_noticed_without_a_request(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(instance: Instance, machine: Machine) -> None:
        machine.takes_s = QUICK_S
        await until(lambda: instance.times.mean_s(1) < 1.1 * QUICK_S)
        assert instance.queue.arrived == 0

    run(bench, monkeypatch, scenario)


def test_a_busy_device_is_not_disturbed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(instance: Instance, machine: Machine) -> None:
        bench.add("other", 1.0)
        bench.send("other")
        assert bench.host.busy
        executed = machine.executed
        await asyncio.sleep(0.02)
        assert machine.executed <= executed + 1, "at most the one that had begun"
        bench.clock.advance_to(bench.clock.now_s() + 2.0)
        assert not bench.host.busy
        await until(lambda: machine.executed > executed + 1)

    run(bench, monkeypatch, scenario)


def test_one_that_breaks_while_idle_keeps_what_was_known(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(instance: Instance, machine: Machine) -> None:
        before_s = instance.times.mean_s(1)
        machine.broken = True
        tried = machine.executed
        await until(lambda: machine.executed > tried + 2)
        assert instance.times.mean_s(1) == pytest.approx(before_s)
        assert instance.state is InstanceState.READY

    run(bench, monkeypatch, scenario)
