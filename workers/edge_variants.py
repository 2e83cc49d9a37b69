"""The variants in a node's memory: loaded when a request needs them, or at once and for good where preloaded.

`edge_memory.py` decides what fits and what leaves; here it is done, one load at a time, off the event loop. A load
counts as a use of the variant, so nothing leaves that is still on its way. What had to leave is closed before the load
begins that it made room for.
"""

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping, Sequence

import msgspec

from models.edge_runtime import EdgeRuntime
from workers.device import Clock, Device
from workers.edge_memory import Memory, NoRoom, Use
from workers.histogram import Histogram, HistogramStatistics

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0

log = logging.getLogger(__name__)


OpenVariant = Callable[[str, str, int], EdgeRuntime]
"""open(variant's name, device, threads): loads; blocks, and raises whatever a broken file makes its reader raise."""


class LoadFailed(Exception):
    """A variant could not be loaded; the message says which and why."""


class VariantStatistics(msgspec.Struct, frozen=True):
    """Loads and memory at one moment."""

    deployed: tuple[str, ...]
    loading: tuple[str, ...]
    idle: tuple[str, ...]
    memory_mb: float
    memory_used_mb: float
    loads: int
    failed_loads: int
    evictions: int
    load_time: HistogramStatistics


class InUse:
    """One request's hold on a variant. `new`: the variant had to be loaded for it. Release it once."""

    __slots__ = ("_release", "_task", "new")

    def __init__(self, new: bool, task: "asyncio.Task[EdgeRuntime]", release: Callable[[], None]) -> None:
        self.new = new
        self._task = task
        self._release = release

    async def runtime(self) -> EdgeRuntime:
        """The loaded variant, once it is there. Raises `LoadFailed`. The load goes on if the waiter leaves."""
        return await asyncio.shield(self._task)

    def release(self) -> None:
        """The variant may leave as far as this request is concerned."""
        self._release()


class EdgeVariants:
    """What is in memory. State: the ledger, one task per variant (its load), what is outdated, when to try again."""

    def __init__(self, clock: Clock, device: Device, open_variant: OpenVariant, on_change: Callable[[], None]) -> None:
        """`on_change`: called whenever a variant has come or gone."""
        self.memory = Memory(0.0)
        self.loads = 0
        self.failed_loads = 0
        self.evictions = 0
        self._clock = clock
        self._device = device
        self._open_variant = open_variant
        self._on_change = on_change
        self._target = ("cpu", 1)
        self._tasks: dict[str, asyncio.Task[EdgeRuntime]] = {}
        self._closing: list[asyncio.Task[EdgeRuntime]] = []
        self._loading = asyncio.Lock()
        self._load_time = Histogram()
        self._preload: dict[str, float] = {}
        self._outdated: set[str] = set()
        self._again_s: dict[str, tuple[float, float]] = {}
        self._reasons: dict[str, str] = {}

    # requests

    def take(self, name: str, memory_mb: float, data_mb: float) -> InUse:
        """A request needs a variant, and memory for its data. Raises `NoRoom`."""
        use = self.memory.take(name, memory_mb, data_mb)
        task = self._load(use, memory_mb) if use.new else self._tasks[name]
        return InUse(use.new, task, functools.partial(self._release, use))

    def _release(self, use: Use) -> None:
        self.memory.release(use)
        if self._outdated or self.memory.used_mb > self.memory.budget_mb:
            self._shrink()

    # the deployment

    def follow(
        self, budget_mb: float, known: frozenset[str], preload: Mapping[str, float], device: str, threads: int
    ) -> None:
        """From now on: this budget, these variants, these of them (and their megabytes) always there.

        What is no longer known, loaded for another device or beyond the budget leaves as soon as nobody uses it.
        """
        if (device, threads) != self._target:
            self._outdated = set(self._tasks)
            self._target = (device, threads)
        self._outdated |= set(self._tasks) - known
        self.memory.budget_mb = budget_mb
        self._preload = dict(preload)
        self._reasons = {name: reason for name, reason in self._reasons.items() if name in preload}
        self._again_s.clear()
        self._shrink()
        self.preload()

    def preload(self) -> None:
        """Loads what should be there and is not. To be called now and then: failures are tried again, ever later."""
        for name, memory_mb in self._preload.items():
            due_s, pause_s = self._again_s.get(name, (0.0, FIRST_PAUSE_S))
            if name in self.memory or self._clock.now_s() < due_s:
                continue
            self._again_s[name] = self._clock.now_s() + pause_s, min(LONGEST_PAUSE_S, 2.0 * pause_s)
            try:
                use = self.memory.take(name, memory_mb)
            except NoRoom as error:
                self._reasons[name] = f"preload: {error}"
                self._on_change()
                continue
            self._load(use, memory_mb)
            self.memory.release(use)

    @property
    def reason(self) -> str:
        """Why something that should be there is not; empty if all is well."""
        return next((self._reasons[name] for name in self._preload if name in self._reasons), "")

    def _shrink(self) -> None:
        self.memory.pinned = frozenset(self._preload) - self._outdated
        leaving = self.memory.shrink(self._outdated)
        self._outdated &= set(self.memory.names)
        self.memory.pinned = frozenset(self._preload)
        if leaving:
            self._leave(leaving)
            asyncio.create_task(self._close_those_that_left(), name="close variants")  # noqa: RUF006 - ends by itself

    # loading

    def _load(self, use: Use, memory_mb: float) -> "asyncio.Task[EdgeRuntime]":
        self._leave(use.leaving)
        loading = self.memory.take(use.name, memory_mb)
        task = asyncio.create_task(self._loaded(use.name, loading), name=f"load {use.name}")
        # Whoever waits hears of a failure; if nobody does, it is no unheard exception.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._tasks[use.name] = task
        self._on_change()
        return task

    async def _loaded(self, name: str, loading: Use) -> EdgeRuntime:
        try:
            async with self._loading:
                await self._close_all()
                begun_s = self._clock.now_s()
                runtime = await asyncio.to_thread(self._open_variant, name, *self._target)
                await self._device.call(runtime.warm_up)
                load_s = self._clock.now_s() - begun_s
        except Exception as error:  # a broken file raises whatever its reader likes
            self.failed_loads += 1
            reason = f"variant {name} cannot be loaded: {str(error) or repr(error)}"
            log.warning(reason)
            self._reasons[name] = reason
            self.memory.forget(name)
            del self._tasks[name]
            raise LoadFailed(reason) from error
        else:
            self.loads += 1
            self._load_time.observe(load_s)
            self._reasons.pop(name, None)
            self._again_s.pop(name, None)
            log.info("variant loaded", extra={"variant": name, "load_s": round(load_s, 4)})
            return runtime
        finally:
            self._release(loading)
            self._on_change()

    def _leave(self, names: Sequence[str]) -> None:
        for name in names:
            self.evictions += 1
            log.info("variant evicted", extra={"variant": name})
            self._closing.append(self._tasks.pop(name))
        if names:
            self._on_change()

    async def _close_those_that_left(self) -> None:
        async with self._loading:
            await self._close_all()

    async def _close_all(self) -> None:
        """Closes what has left; only ever done by who holds the lock of loading."""
        while self._closing:
            runtime = await self._closing.pop()
            await asyncio.to_thread(runtime.close)

    async def close(self) -> None:
        """Everything leaves; the memory is given back."""
        self._preload = {}
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._closing += self._tasks.values()
        self._tasks = {}
        await self._close_those_that_left()

    def statistics(self) -> VariantStatistics:
        """Loads and memory at this moment."""
        loaded = {name: task.done() for name, task in list(self._tasks.items())}
        return VariantStatistics(
            deployed=tuple(sorted(name for name, done in loaded.items() if done)),
            loading=tuple(sorted(name for name, done in loaded.items() if not done)),
            idle=self.memory.idle,
            memory_mb=self.memory.budget_mb,
            memory_used_mb=self.memory.used_mb,
            loads=self.loads,
            failed_loads=self.failed_loads,
            evictions=self.evictions,
            load_time=self._load_time.statistics(),
        )
