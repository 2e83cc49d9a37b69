"""Telling the board, also while it is away."""

import asyncio
from typing import Any

import msgspec
import pytest

from protocol.board import Board
from protocol.edge_records import NodeRecord
from protocol.records import InstanceRecord, InstanceState
from workers.registration import Registration

Bench = Any  # of this folder's conftest.py


class FlakyBoard(Board):
    """A board that is away for the first `away` calls, and remembers what it was told."""

    def __init__(self, away: int) -> None:
        super().__init__("redis://nowhere:1/0")
        self.away = away
        self.posted: list[tuple[list[str], bool]] = []
        self.removed: list[str] = []

    async def post_instances(self, records: list[InstanceRecord], *, changed: bool) -> None:
        """Fails while away."""
        self.away -= 1
        if self.away >= 0:
            raise ConnectionRefusedError("away")
        self.posted.append(([record.id for record in records], changed))

    async def remove_instances(self, ids: list[str]) -> None:
        """Never fails here."""
        self.removed += ids

    async def post_node(self, record: NodeRecord, *, changed: bool) -> None:
        """Never fails here."""
        self.posted.append(([f"node {record.node}"], changed))

    async def remove_node(self, node: str) -> None:
        """Never fails here."""
        self.removed.append(f"node {node}")


def test_registration_outlives_the_board(eventually: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """News that could not be told is told when the board is back; renewals are no news; gone ones are removed."""
    monkeypatch.setattr("workers.registration.RENEW_S", 0.001)
    record = InstanceRecord(
        id="w/a",
        worker="w",
        address="unix:/x",
        service="s",
        variant="a",
        capacity=1,
        state=InstanceState.READY,
        epoch="",
    )
    records = [record, msgspec.structs.replace(record, id="w/b")]

    async def scenario() -> None:
        board = FlakyBoard(away=2)
        registration = Registration(board, lambda: records)
        running = asyncio.create_task(registration.run())
        await eventually(lambda: len(board.posted) >= 2)
        assert board.posted[:2] == [(["w/a", "w/b"], True), (["w/a", "w/b"], False)]
        records.pop()
        registration.changed()
        await eventually(lambda: (["w/a"], True) in board.posted)
        assert board.removed == ["w/b"]
        registration.changed()  # an event and a cancellation together: the cancellation must win
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await registration.withdraw()
        assert board.removed == ["w/b", "w/a"]

    asyncio.run(scenario())


def test_a_node_is_taken_back_when_it_gets_another_name_and_at_the_end(eventually: Any) -> None:
    async def scenario() -> None:
        board = FlakyBoard(away=0)
        record = NodeRecord(node="north", worker="w", address="unix:/x", epoch="")
        registration = Registration(board, list, lambda: record)
        running = asyncio.create_task(registration.run())
        await eventually(lambda: board.posted == [(["node north"], True)])
        record = msgspec.structs.replace(record, node="south")
        registration.changed()
        await eventually(lambda: len(board.posted) == 2)
        assert board.posted[1] == (["node south"], True)
        assert board.removed == ["node north"]
        running.cancel()
        await asyncio.wait([running])
        await registration.withdraw()
        assert board.removed == ["node north", "node south"]

    asyncio.run(scenario())
