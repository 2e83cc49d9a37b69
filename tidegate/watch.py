"""Tells what is not as the deployment wants it, each thing once: instances not ready, routers not in force.

The gateway says so in `/readyz` ("notices"), also while it is ready. `Watch` remembers what was told.
"""

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterable
from typing import Final

import aiohttp
import msgspec

LOOK_EVERY_S: Final = 2.0
FIRST_LOOKS: Final = 4
FIRST_LOOKS_EVERY_S: Final = 0.5


class Watch:
    """Tells `say(text, good)` of notices that two looks in a row have seen, and of the end of those that it told.

    State: what the latest look saw and what was told, by notice without its numbers (an age counts up in one).
    """

    def __init__(self, say: Callable[[str, bool], None]) -> None:
        self._say = say
        self._before: dict[str, str] = {}
        self._told: dict[str, str] = {}

    def look(self, notices: Iterable[str]) -> None:
        """One look. What only one look sees is a change under way, and is not told."""
        now = {re.sub(r"\d+(\.\d+)? s\b", "some s", text): text for text in notices}
        for notice in now.keys() & self._before.keys() - self._told.keys():
            self._told[notice] = now[notice]
            self._say(now[notice], False)
        for notice in self._told.keys() - now.keys() - self._before.keys():
            self._say(f"over: {self._told.pop(notice)}", True)
        self._before = now

    async def run(self, url: str) -> None:
        """Looks at the gateway at `url` until cancelled. One that does not answer is passed over."""
        looks = 0
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=LOOK_EVERY_S)) as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError, msgspec.MsgspecError):
                    async with session.get(f"{url}/readyz") as response:
                        self.look(msgspec.json.decode(await response.read()).get("notices", ()))
                looks += 1
                await asyncio.sleep(FIRST_LOOKS_EVERY_S if looks < FIRST_LOOKS else LOOK_EVERY_S)
