"""An edge node's books: where each request is that came, and how each one ended. Pure, but for one event.

    entered = passing + handed_on + arrived            arrived = sum(counts) + length

`passing`: being prepared, on a link, or in another node's hands while its answer is awaited. `length`: decided for this
node and not ended. `handed_on`: ended elsewhere; counted there. `counts`: executed or refused here, by `Attempt`.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Final

from protocol.outcomes import Attempt
from workers.edge_journey import Refused

MOST_BYTES: Final = 256 << 20
"""Of bodies and adapted data in a node's hands. Beyond it they are refused: QUEUE_FULL."""


class Books:
    """All figures are public to read."""

    def __init__(self) -> None:
        self.entered = 0
        self.passing = 0
        self.handed_on = 0
        self.length = 0
        self.counts = [0] * len(Attempt)
        self.bytes = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def held(self) -> int:
        """Requests in this node's hands."""
        return self.passing + self.length

    @property
    def arrived(self) -> int:
        """Requests that are this node's to count. Kept apart from `counts`, so that the two can be held together."""
        return self.entered - self.handed_on - self.passing

    def enter(self) -> None:
        """A request came."""
        self.entered += 1
        self.passing += 1
        self._empty.clear()

    def end(self, attempt: Attempt, *, elsewhere: bool) -> None:
        """It has ended."""
        self.passing -= 1
        if elsewhere:
            self.handed_on += 1
        else:
            self.counts[attempt] += 1
        if not self.held:
            self._empty.set()

    @contextlib.contextmanager
    def placed(self) -> Iterator[None]:
        """While it is in this node's queue."""
        self.passing -= 1
        self.length += 1
        try:
            yield
        finally:
            self.length -= 1
            self.passing += 1

    @contextlib.contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """While bytes are in this node's hands. Raises `Refused` if they are too many."""
        if self.bytes + size > MOST_BYTES:
            raise Refused(Attempt.QUEUE_FULL, f"this node holds {self.bytes >> 20} MiB of data already")
        self.bytes += size
        try:
            yield
        finally:
            self.bytes -= size

    async def emptied(self) -> None:
        """Returns once no request is in this node's hands."""
        await self._empty.wait()
