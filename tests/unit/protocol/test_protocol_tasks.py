"""Tasks end together: all are cancelled before the first is waited for, and a failure is not swallowed."""

import asyncio

import pytest

from protocol.link import address_fault, is_every_interface
from protocol.tasks import end_tasks


def test_all_are_cancelled_before_any_is_waited_for() -> None:
    async def run() -> list[str]:
        told: list[str] = []
        second_cancelled = asyncio.Event()

        async def first() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                await second_cancelled.wait()
                told.append("first")

        async def second() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                second_cancelled.set()
                told.append("second")

        tasks = [asyncio.create_task(first()), asyncio.create_task(second())]
        await asyncio.sleep(0)
        await asyncio.wait_for(end_tasks(iter(tasks)), 5.0)
        assert all(task.cancelled() for task in tasks)
        return told

    assert asyncio.run(run()) == ["second", "first"]


def test_what_a_task_raises_in_ending_is_raised() -> None:
    async def run() -> None:
        async def failing() -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                raise OSError("the board is away") from None

        task = asyncio.create_task(failing())
        await asyncio.sleep(0)
        await end_tasks([task])

    with pytest.raises(OSError, match="the board is away"):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("unix:/tmp/a.sock", ""),
        ("tcp:127.0.0.1:0", ""),
        ("tcp:[::1]:65535", ""),
        ("unix:a.sock", "unix:/absolute/path"),
        ("tcp:127.0.0.1:65536", "tcp:host:port"),
        ("tcp::80", "tcp:host:port"),
        ("127.0.0.1:80", "tcp:host:port"),
        ("unix:/" + "x" * 107, "107 bytes"),
    ],
)
def test_an_address_is_judged_before_anybody_listens(address: str, said: str) -> None:
    fault = address_fault(address)
    assert said in fault
    assert bool(fault) == bool(said)


def test_all_interfaces_are_no_place_to_connect_to() -> None:
    assert is_every_interface("tcp:0.0.0.0:80")
    assert is_every_interface("tcp:[::]:80")
    assert not is_every_interface("tcp:10.0.0.1:80")
