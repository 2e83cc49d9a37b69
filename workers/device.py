"""The one executor of a worker: a thread for real runtimes, timers for emulated ones, one service at a time.

Emulated services live on an ideal clock: a service that starts at `start_s` ends at start_s + duration, and the next
one may start at that very time, however late the timer fires. So lateness of the event loop delays answers by a
millisecond but never adds up, and after a stall the timers catch up.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from models.preprocess import Prepared
from models.runtime import Answer, EmulatedRuntime, Runtime

T = TypeVar("T")

Done = Callable[[list[Answer] | Exception, float, float], None]
"""done(answers or what the model raised, start_s, end_s), called in the event loop."""


class Timer(Protocol):
    """What `Clock.call_at` gives back."""

    def cancel(self) -> None:
        """The callback will not be called."""


class Clock(Protocol):
    """Monotonic time in seconds, and callbacks at a time. Tests pass a fake one."""

    def now_s(self) -> float:
        """The time."""

    def call_at(self, when_s: float, callback: Callable[[], None]) -> Timer:
        """Call back at `when_s` or, if that is past, soon."""


class LoopClock:
    """The running event loop's clock. Waits are rounded up to whole milliseconds, so that nothing fires early."""

    def now_s(self) -> float:
        """`time.monotonic()`: uvloop's own clock has a resolution of a millisecond."""
        return time.monotonic()

    def call_at(self, when_s: float, callback: Callable[[], None]) -> Timer:
        """Call back at `when_s` or up to about a millisecond later."""
        loop = asyncio.get_running_loop()
        wait_s = when_s - time.monotonic()
        return loop.call_later(math.ceil(wait_s * 1e3) * 1e-3, callback) if wait_s > 0.0 else loop.call_soon(callback)


class Device:
    """Runs one batch at a time. The thread is made when the first real runtime needs it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._thread: ThreadPoolExecutor | None = None

    def run(self, runtime: Runtime, batch: Sequence[Prepared], start_s: float, expected_s: float, done: Done) -> float:
        """Serve a batch from `start_s` on; `done` is called once, never before this returns.

        Gives back the time at which it will end: exact for an emulated runtime, a guess by `expected_s` for others.
        """
        if isinstance(runtime, EmulatedRuntime):
            emulated, end_s = runtime, start_s + runtime.duration_s(len(batch))
            self._clock.call_at(end_s, lambda: done(_answers(emulated, batch), start_s, end_s))
            return end_s
        loop = asyncio.get_running_loop()

        def serve() -> None:
            started_s = self._clock.now_s()
            answers = _answers(runtime, batch)
            loop.call_soon_threadsafe(done, answers, started_s, self._clock.now_s())

        self._executor().submit(serve)
        return start_s + expected_s

    def submit(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function` on the device's thread when its turn comes; until then the future can be cancelled."""
        return self._executor().submit(function)

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the device's thread, between services (warming up)."""
        return await asyncio.get_running_loop().run_in_executor(self._executor(), function)

    def close(self) -> None:
        """Wait for the service that runs and end the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None

    def _executor(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        return self._thread


def _answers(runtime: Runtime, batch: Sequence[Prepared]) -> list[Answer] | Exception:
    """What the runtime answers, or what it raised: a model's failure must not end the worker."""
    try:
        answers = runtime.execute(batch)
    except Exception as error:
        return error
    if len(answers) != len(batch):
        return ValueError(f"{runtime.variant.name} gave {len(answers)} answers to a batch of {len(batch)}")
    return answers
