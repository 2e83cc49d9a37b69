"""What this worker tells the board, every second and at once on change: its instances, its node; and their removal."""

import asyncio
import logging
from collections.abc import Callable

from protocol.board import BOARD_ERRORS, Board
from protocol.edge_records import NodeRecord
from protocol.records import InstanceRecord

RENEW_S = 1.0
FIRST_PAUSE_S = 0.05

log = logging.getLogger(__name__)


class Registration:
    """Keeps the board's records equal to `records()`, and to `node()` where this worker is a node.

    State: the ids and the node posted, the wake-up event, whether the board is away.
    """

    def __init__(
        self,
        board: Board,
        records: Callable[[], list[InstanceRecord]],
        node: Callable[[], NodeRecord | None] = lambda: None,
    ) -> None:
        self._board = board
        self._records = records
        self._node = node
        self._posted_node = ""
        self._changed = asyncio.Event()
        self._posted: set[str] = set()
        self._away = False

    def changed(self) -> None:
        """Post at once, and tell every follower to read."""
        self._changed.set()

    async def run(self) -> None:
        """Post for ever. A board that is away is tried again and again, and told everything when it is back."""
        news_owed = True
        wait_s = RENEW_S
        while True:
            self._changed.clear()
            try:
                await self._post(changed=news_owed)
                news_owed = False
                wait_s = RENEW_S
                self._say(away=False)
            except BOARD_ERRORS as error:
                # The first call after a return may meet a broken connection of the pool: try again soon.
                news_owed, wait_s = True, min(RENEW_S, 2.0 * wait_s if self._away else FIRST_PAUSE_S)
                self._say(away=True, reason=str(error))
            try:
                # Not wait_for: on Python 3.11 it loses a cancellation that comes together with the event.
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
                news_owed = True
            except TimeoutError:
                pass

    async def withdraw(self) -> None:
        """Take every record back (an orderly end). If the board is away they expire by themselves."""
        try:
            await self._board.remove_instances(sorted(self._posted))
            if self._posted_node:
                await self._board.remove_node(self._posted_node)
        except BOARD_ERRORS as error:
            log.warning("records not removed; they expire by themselves", extra={"reason": str(error)})

    async def _post(self, *, changed: bool) -> None:
        records = self._records()
        ids = {record.id for record in records}
        if gone := sorted(self._posted - ids):
            await self._board.remove_instances(gone)
            self._posted -= set(gone)
        self._posted |= ids
        if records:
            await self._board.post_instances(records, changed=changed)
        node = self._node()
        if self._posted_node and (node is None or node.node != self._posted_node):
            await self._board.remove_node(self._posted_node)
            self._posted_node = ""
        if node is not None:
            self._posted_node = node.node
            await self._board.post_node(node, changed=changed)

    def _say(self, *, away: bool, reason: str = "") -> None:
        """Log a change only: a board that is away for an hour is one line."""
        if away and not self._away:
            log.warning("the board is away; serving goes on", extra={"reason": reason})
        elif self._away and not away:
            log.info("the board is back")
        self._away = away
