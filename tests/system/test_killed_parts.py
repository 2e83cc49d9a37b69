"""kill -9 of each part at 100 requests/s: every request is answered once, and the part rejoins by itself."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from tests.fakes.running_system import (
    Load,
    RunningSystem,
    assert_client_agrees,
    assert_conserved,
    client,
    deployment,
    until,
)

RATE = 100.0
RESTORED_WITHIN_S = 2.0
FOUR_LIGHT = """
name = "killed"
[services.imagenet]
variants = ["efficientnet_b0_t4"]
requirement_ms = 2000
router = "uniform"
""" + "".join(f'[[workers]]\nname = "{name}"\ninstances = [{{ variant = "efficientnet_b0_t4" }}]\n' for name in "abcd")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, embedded: bool) -> Iterator[RunningSystem]:
    file = deployment(tmp_path_factory.mktemp("killed") / "killed.toml", FOUR_LIGHT)
    with RunningSystem(file, embedded=embedded) as running:
        yield running


def _kill(system: RunningSystem, name: str) -> float:
    """As by kill -9; when it was."""
    os.kill(system.pid(name), signal.SIGKILL)
    return time.monotonic()


async def _back(system: RunningSystem, name: str, killed_pid: int) -> None:
    async def again() -> bool:
        return system.child(name).statistics().pid not in (None, killed_pid)

    await until(again, 15.0, f"{name} was not restarted: {system.events}")


def test_a_killed_worker(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            before = await assert_conserved(system, session)
            pid = system.pid("worker-b")
            async with Load(session, f"{system.url}/v1/imagenet", RATE) as load:
                await asyncio.sleep(1.0)
                killed_s = _kill(system, "worker-b")
                await asyncio.sleep(RESTORED_WITHIN_S)
                await _back(system, "worker-b", pid)

                async def serving() -> bool:
                    return any(sent.body.get("instance", "")[:2] == "b/" for sent in load.sent if sent.at_s > killed_s)

                await until(serving, 20.0, "the killed worker did not rejoin")
                await asyncio.sleep(0.5)
            after = await assert_conserved(system, session, restarted=("b",))
            assert_client_agrees(load, before, after, "imagenet")
            late = [one for one in load.sent if one.status != 200 and one.at_s > killed_s + RESTORED_WITHIN_S]
            assert late == [], "not restored in time"
            ends = after["dispatch"]["attempts"]["b/efficientnet_b0_t4"]
            assert load.retried() <= ends.get("LOST", 0)
            assert ends.get("UNAVAILABLE", 0) == 0, "the restarted worker was asked before it was ready"
            # What it held when it died, and what was on its way before the gateway heard of it: milliseconds' worth.
            assert ends.get("LOST", 0) <= 15
            assert set(load.statuses()) <= {200, 503}
            assert load.statuses()[503] == 0, "three other instances could have answered"

    asyncio.run(run())


def test_a_killed_scheduler_disturbs_nobody(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            before = await assert_conserved(system, session)
            pid = system.pid("scheduler")
            async with Load(session, f"{system.url}/v1/imagenet", RATE) as load:
                await asyncio.sleep(0.5)
                _kill(system, "scheduler")
                await asyncio.sleep(1.0)
                await _back(system, "scheduler", pid)
            after = await assert_conserved(system, session)
            assert_client_agrees(load, before, after, "imagenet")
            assert set(load.statuses()) == {200}
            assert load.retried() == 0

    asyncio.run(run())


def test_a_killed_board_disturbs_nobody_and_is_filled_again(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            before = await assert_conserved(system, session)
            pid = system.pid("board")
            async with Load(session, f"{system.url}/v1/imagenet", RATE) as load:
                await asyncio.sleep(0.5)
                _kill(system, "board")
                await _back(system, "board", pid)
                version = (await _deployment(session, system))["version"]

                async def accepted() -> bool:
                    url = f"{system.url}/admin/services/imagenet/router"
                    async with session.put(url, json={"router": "light-only"}) as response:
                        assert response.status in (200, 503), await response.text()
                        return response.status == 200

                # The empty board is told everything again as soon as it listens: a change reaches all who follow it.
                await until(accepted, 15.0, "the board does not take changes")

                async def changed() -> bool:
                    services = (await system.state(session))["services"]
                    return bool(services["imagenet"]["router"] == "light-only")

                await until(changed, 10.0, "the board did not come back to the gateway")
                assert (await _deployment(session, system))["version"] > version
                await asyncio.sleep(1.0)
            after = await assert_conserved(system, session)
            assert_client_agrees(load, before, after, "imagenet")
            assert set(load.statuses()) == {200}
            assert load.retried() == 0
            await _change_router(session, system, "uniform")

    asyncio.run(run())


def test_a_worker_that_dies_while_the_board_is_away_rejoins_once_it_is_back(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            before = await assert_conserved(system, session)
            pid = system.pid("worker-c")
            async with Load(session, f"{system.url}/v1/imagenet", RATE) as load:
                _kill(system, "board")
                killed_s = _kill(system, "worker-c")
                await _back(system, "worker-c", pid)

                async def serving() -> bool:
                    return any(sent.body.get("instance", "")[:2] == "c/" for sent in load.sent if sent.at_s > killed_s)

                await until(serving, 20.0, "the killed worker did not rejoin")
            after = await assert_conserved(system, session, restarted=("c",))
            assert_client_agrees(load, before, after, "imagenet")
            assert set(load.statuses()) == {200}

    asyncio.run(run())


async def _deployment(session: aiohttp.ClientSession, system: RunningSystem) -> dict[str, Any]:
    async with session.get(f"{system.url}/admin/deployment") as response:
        answer: dict[str, Any] = await response.json()
        return answer


async def _change_router(session: aiohttp.ClientSession, system: RunningSystem, router: str) -> None:
    url = f"{system.url}/admin/services/imagenet/router"
    async with session.put(url, json={"router": router}) as response:
        assert response.status == 200, await response.text()
