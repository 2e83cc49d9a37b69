"""Ending the tasks that an object has started."""

import asyncio
import contextlib
from collections.abc import Iterable


async def end_tasks(tasks: Iterable["asyncio.Task[None]"]) -> None:
    """Cancels all of them, then waits until each has ended. What one raises in ending is raised here."""
    ending = list(tasks)
    for task in ending:
        task.cancel()
    for task in ending:
        with contextlib.suppress(asyncio.CancelledError):
            await task
