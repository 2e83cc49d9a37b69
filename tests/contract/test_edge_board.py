"""What edge nodes and the placement controller promise each other on the board, over both kinds of board."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from protocol import edge_board
from protocol.board import Board
from protocol.edge_records import (
    ControllerRecord,
    EdgeLinkSpec,
    EdgeNodeSpec,
    EdgeRequest,
    EdgeServiceSpec,
    EdgeSpec,
    NodeRecord,
    Placement,
    WindowRecord,
)
from protocol.records import Deployment, WorkerSpec


def run(board_url: str, scenario: Callable[[Board], Awaitable[None]]) -> None:
    """Run a scenario against the board."""

    async def inside() -> None:
        async with Board(board_url) as board:
            await scenario(board)

    asyncio.run(inside())


def record(node: str, **settings: object) -> NodeRecord:
    """A registration."""
    made = NodeRecord(node=node, worker="w", address="unix:/x", epoch="e", deployed=("v",), memory_mb=512.0)
    return msgspec.structs.replace(made, **settings)


async def come(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait until what the condition gives is true, at most 5 s."""
    async with asyncio.timeout(5.0):
        while not await condition():  # noqa: ASYNC110 - what is awaited happens in another process
            await asyncio.sleep(0.005)


def test_nodes_come_and_go(board_url: str) -> None:
    """Sorted by name; what is taken back is gone; an unreadable record is left out; instances are another matter."""

    async def scenario(board: Board) -> None:
        assert await board.nodes() == []
        await board.post_node(record("b"), changed=True)
        await board.post_node(record("a", draining=True, reason="preload: x"), changed=False)
        assert await board.nodes() == [record("a", draining=True, reason="preload: x"), record("b")]
        await board._redis.set("node:broken", b"[]")
        await board.remove_node("a")
        await board.remove_node("never there")
        assert await board.nodes() == [record("b")]
        assert await board.instances() == []

    run(board_url, scenario)


def test_nodes_and_controllers_expire(board_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is killed stops renewing, and its record goes by itself."""
    monkeypatch.setattr(edge_board, "NODE_EXPIRES_S", 0.2)

    async def scenario(board: Board) -> None:
        assert await board.controller() is None
        controller = ControllerRecord(address="unix:/c", epoch="1", policy="beam")
        await board.post_controller(controller)
        await board.post_node(record("a"), changed=False)
        assert await board.controller() == controller
        assert len(await board.nodes()) == 1

        async def gone() -> bool:
            return not await board.nodes() and await board.controller() is None

        await come(gone)

    run(board_url, scenario)


def test_only_changes_are_news(board_url: str) -> None:
    """A follower reads once at the start, then hears of changes and removals, not of renewals."""

    async def scenario(board: Board) -> None:
        heard: list[bytes] = []
        ready = asyncio.Event()

        async def read_all() -> None:
            ready.set()

        async def on_news(channel: str, data: bytes) -> None:
            heard.append(data)

        following = asyncio.create_task(board.follow(read_all, on_news))
        await ready.wait()
        await board.post_node(record("a"), changed=False)
        await board.post_node(record("a"), changed=True)
        await board.remove_node("a")

        async def told() -> bool:
            return len(heard) >= 2

        await come(told)
        assert heard == [b"nodes", b"nodes"]
        following.cancel()
        with pytest.raises(asyncio.CancelledError):
            await following

    run(board_url, scenario)


def test_a_deployments_edge_comes_back_as_it_was_posted(board_url: str) -> None:
    edge = EdgeSpec(
        services={"detection": EdgeServiceSpec(table="detection", requirement_ms=500)},
        nodes=(EdgeNodeSpec(name="a", latitude=-37.8, longitude=144.9, tflops=1.26, memory_mb=512, uplink_mbps=48),),
        links=(EdgeLinkSpec(between=("a", "b"), bandwidth_mbps=100),),
        per_service=2,
    )
    workers = (WorkerSpec(name="w", node="a", preload=("v",)),)

    async def scenario(board: Board) -> None:
        posted = await board.put_deployment(Deployment(name="d", services={}, workers=workers, edge=edge))
        assert await board.deployment() == posted
        assert posted.edge == edge
        assert posted.workers == workers

    run(board_url, scenario)


def test_decided_windows_are_kept_newest_first_and_bounded(board_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a decision rested on can be read again as it was written; old ones go."""
    monkeypatch.setattr(edge_board, "WINDOWS_KEPT", 5)

    async def scenario(board: Board) -> None:
        written = [
            WindowRecord(
                policy=f"p{number}",
                decide_ms=1.5,
                requests=(EdgeRequest("detection", 3, 1.0, 0.5),),
                placements=(Placement(1, 2, 3, accuracy=0.5), Placement(reason="late", late=True)),
                waiting_tflop=(0.0, 0.25),
                memory_used_mb=(10.0, 0.0),
                closed={"b": "is draining"},
            )
            for number in range(400)
        ]
        for record in written:
            await board.add_window(record)
        assert await board.windows(2) == [written[399], written[398]]
        assert len(await board.windows(1000)) < 400

    run(board_url, scenario)
