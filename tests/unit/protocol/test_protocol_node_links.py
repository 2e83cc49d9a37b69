"""Links to the nodes that the board knows: who answers counts, who hangs is waited for once, who is gone is gone."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from protocol import node_links
from protocol.board import Board
from protocol.edge_records import NodeStatus
from protocol.frames import Frame, Kind
from protocol.link import LinkClosed
from protocol.node_links import SILENT_S, Heard, NodeLinks, SilenceWatch
from tests.fakes.scripted_nodes import EdgeBoard, ScriptedNode, until


class World:
    """A board with two nodes."""

    def __init__(self, folder: Path) -> None:
        self.board = EdgeBoard()
        self.a, self.b = ScriptedNode("a", folder), ScriptedNode("b", folder)
        self.changes = 0
        self.links = NodeLinks(cast(Board, self.board), self._count)

    def _count(self) -> None:
        self.changes += 1

    async def __aenter__(self) -> "World":
        for node in (self.a, self.b):
            await node.start()
            self.board.node_records.append(node.record)
        await self.links.__aenter__()
        await until(lambda: all(self.links.peer(one) for one in "ab"))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.links.__aexit__(None, None, None)
        for node in (self.a, self.b):
            await node.stop()

    def known(self, oldest_s: float = 5.0) -> dict[str, NodeStatus]:
        """What the nodes said last."""
        return self.links.known(time.monotonic(), oldest_s)


def test_everybody_is_asked_at_once_and_known_by_name(tmp_path: Path) -> None:
    async def body() -> None:
        async with World(tmp_path) as world:
            assert world.known() == {}
            world.b.status = NodeStatus("b", length=3)
            await world.links.ask(5.0)
            assert {name: status.length for name, status in world.known().items()} == {"a": 0, "b": 3}
            assert world.known(oldest_s=-1.0) == {}
            world.links.heard("a", NodeStatus("a", length=7), time.monotonic())
            assert world.known()["a"].length == 7

    asyncio.run(body())


def test_a_node_that_hangs_is_waited_for_once(tmp_path: Path) -> None:
    async def body() -> None:
        async with World(tmp_path) as world:
            world.a.silent = True
            began_s = time.monotonic()
            await world.links.ask(0.05)
            assert time.monotonic() - began_s >= 0.05
            assert set(world.known()) == {"b"}
            world.links.heard_of.clear()
            await world.links.ask(60.0)  # would outlast the test's own limit if it waited for a
            assert set(world.known()) == {"b"}

    asyncio.run(body())


def test_a_node_that_dies_is_not_known_before_the_board_knows(tmp_path: Path) -> None:
    async def body() -> None:
        async with World(tmp_path) as world:
            await world.links.ask(5.0)
            changes = world.changes
            await world.a.stop()
            await until(lambda: world.links.peer("a") is None)
            assert world.changes > changes
            assert set(world.known()) == {"b"}
            assert "a" in world.links.records
            await world.a.start()
            world.board.node_records = [world.a.record, world.b.record]
            await world.board.tell()
            await until(lambda: world.links.peer("a") is not None)
            assert set(world.known()) == {"b"}, "what it said before it died is no longer true"
            await world.links.ask(5.0)
            assert set(world.known()) == {"a", "b"}

    asyncio.run(body())


def test_a_board_that_forgets_is_not_believed_at_once_but_an_orderly_end_is(tmp_path: Path) -> None:
    async def body() -> None:
        async with World(tmp_path) as world:
            world.board.node_records = []
            await world.board.tell()
            assert set(world.links.records) == {"a", "b"}
            draining = msgspec.structs.replace(world.a.record, draining=True)
            world.board.node_records = [draining]
            await world.board.tell()
            world.board.node_records = []
            await world.board.tell()
            assert set(world.links.records) == {"b"}
            assert world.links.peer("b") is not None

    asyncio.run(body())


def test_a_node_that_moved_is_found_at_its_new_address(tmp_path: Path) -> None:
    async def body() -> None:
        async with World(tmp_path) as world:
            (tmp_path / "new").mkdir()
            moved = await ScriptedNode("a", tmp_path / "new").start()
            moved.status = NodeStatus("a", length=9)
            world.board.node_records = [moved.record, world.b.record]
            await world.board.tell()
            await until(lambda: world.links.peer("a") is not None)
            await world.links.ask(5.0)
            assert world.known()["a"].length == 9
            await moved.stop()

    asyncio.run(body())


def test_a_node_keeps_links_only_to_those_it_wants(tmp_path: Path) -> None:
    async def body() -> None:
        async with World(tmp_path) as world:
            links = NodeLinks(cast(Board, world.board), wants=lambda node: node == "b")
            async with links:
                await until(lambda: links.peer("b") is not None)
                assert set(links.records) == {"b"}
                assert links.peer("a") is None

    asyncio.run(body())


def test_what_waits_for_a_node_that_is_off_the_board_and_silent_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs takes connections: nobody would look after its link once its registration is gone."""
    monkeypatch.setattr(node_links, "READ_AGAIN_S", 0.01)
    monkeypatch.setattr(node_links, "FORGET_AFTER_S", 0.1)

    async def body() -> None:
        async with World(tmp_path) as here:
            here.a.silent = here.b.silent = True
            here.links.heard("b", NodeStatus("b"), time.monotonic() + 60.0)  # busy, but it goes on answering
            lost: list[Frame | LinkClosed] = []
            kept: list[Frame | LinkClosed] = []
            for name, ends in (("a", lost), ("b", kept)):
                peer = here.links.peer(name)
                assert peer is not None
                peer.ask(Kind.NODE_STATUS_REQUEST, None, b"", ends.append)
            here.board.node_records.clear()
            await until(lambda: bool(lost) and not here.links.records)
            assert isinstance(lost[0], LinkClosed)
            assert not kept

    asyncio.run(body())


def test_what_waits_for_a_node_that_ended_in_order_is_not_cut_off(tmp_path: Path) -> None:
    """It takes its registration back while it still finishes what it has."""

    async def body() -> None:
        async with World(tmp_path) as here:
            here.a.silent = True
            ends: list[Frame | LinkClosed] = []
            peer = here.links.peer("a")
            assert peer is not None
            peer.ask(Kind.NODE_STATUS_REQUEST, None, b"", ends.append)
            here.board.node_records = [msgspec.structs.replace(here.a.record, draining=True), here.b.record]
            await here.board.tell()
            here.board.node_records = [here.b.record]
            await here.board.tell()
            await asyncio.sleep(0.01)
            assert set(here.links.records) == {"b"}
            assert peer.up
            assert not ends

    asyncio.run(body())


class Slow:
    """A link that is up, and what waits to be sent over it."""

    def __init__(self) -> None:
        self.unsent_bytes = 0
        self.cuts: list[str] = []

    def cut(self, reason: str) -> None:
        """As `Peer.cut`."""
        self.cuts.append(reason)


def test_a_silent_node_is_cut_off_unless_it_goes_on_taking_what_it_is_sent() -> None:
    slow, links, watch = Slow(), SimpleNamespace(records={"a": None}, heard_of={}), SilenceWatch()
    links.peer = lambda name: slow
    for second in range(20):
        slow.unsent_bytes = 20_000_000 - 1_000_000 * second  # a clip leaves, and the question stands behind it
        watch.cut_silent(cast(NodeLinks, links), float(second))
    assert not slow.cuts
    for second in range(20, 26):
        watch.cut_silent(cast(NodeLinks, links), float(second))
    assert slow.cuts == [f"no word for {SILENT_S:g} s"]
    links.heard_of["a"] = Heard(NodeStatus("a"), 30.0)
    for second in range(26, 35):
        watch.cut_silent(cast(NodeLinks, links), float(second))
    assert len(slow.cuts) == 1
