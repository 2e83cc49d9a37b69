"""Preparation of inputs (decode, resize) in a small pool off the event loop, starting at arrival."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from models.preprocess import Prepared
from models.runtime import Runtime
from policies.routing.queueing import EntryState
from workers.instance import Request

T = TypeVar("T")


class Preparer:
    """A pool of `threads` threads, started by the first request. Holds at most what the queues have places for."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="prepare")

    def submit(self, request: Request, runtime: Runtime, done: Callable[[Prepared | Exception], None]) -> None:
        """Prepare the request's payload; `done` gets the result, or what was raised, in the event loop.

        A request that has left before its turn is not decoded, and `done` is not called.
        """
        loop = asyncio.get_running_loop()

        def work() -> None:
            if request.state is not EntryState.PREPARING:
                return
            outcome: Prepared | Exception
            try:
                outcome = runtime.prepare(request.payload, request.asked.content_type)
            except Exception as error:
                outcome = error
            loop.call_soon_threadsafe(done, outcome)

        self._pool.submit(work)

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` in the pool; who stops waiting before its turn takes it out of the line."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    def close(self) -> None:
        """Drop what has not begun and end the threads."""
        self._pool.shutdown(cancel_futures=True)
