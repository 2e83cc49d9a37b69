"""Loading, sharing, evicting and keeping variants, in virtual time."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.fakes.edge_models import BrightRuntime, open_bright
from tests.fakes.edge_world import PlayedDevice, WorldClock, run_world
from workers.edge_memory import NoRoom
from workers.edge_variants import EdgeVariants, LoadFailed

KNOWN = frozenset({"small", "large", "broken"})


class Store:
    """Variants with 500 MB, each load 1 s; `opened` by name, in order."""

    def __init__(self) -> None:
        self.clock = WorldClock()
        self.opened: list[BrightRuntime] = []
        self.targets: list[tuple[str, str, int]] = []
        self.changes = 0

        def open_variant(name: str, device: str, threads: int) -> BrightRuntime:
            self.targets.append((name, device, threads))
            runtime = open_bright(name, device, threads)
            self.opened.append(runtime)
            return runtime

        open_variant.takes_s = 1.0  # type: ignore[attr-defined]
        self.variants = EdgeVariants(self.clock, PlayedDevice(self.clock), open_variant, self._count)
        self.follow()

    def _count(self) -> None:
        self.changes += 1

    def follow(
        self,
        budget_mb: float = 500.0,
        known: frozenset[str] = KNOWN,
        preload: dict[str, float] | None = None,
        threads: int = 1,
    ) -> None:
        """A deployment."""
        self.variants.follow(budget_mb, known, preload or {}, "cpu", threads)

    @property
    def deployed(self) -> tuple[str, ...]:
        """What is loaded."""
        return self.variants.statistics().deployed


def played(scenario: Callable[[Store], Coroutine[Any, Any, None]]) -> None:
    """Runs it with a store."""

    async def body() -> None:
        await scenario(Store())

    run_world(body())


def test_a_variant_is_loaded_once_however_many_wait_for_it() -> None:
    async def scenario(store: Store) -> None:
        uses = [store.variants.take("small", 100.0, 5.0) for _ in range(3)]
        assert [use.new for use in uses] == [True, False, False]
        assert store.variants.statistics().loading == ("small",)
        runtimes = await asyncio.gather(*(use.runtime() for use in uses))
        assert len({id(runtime) for runtime in runtimes}) == 1
        assert store.clock.now_s() == pytest.approx(1.0)
        books = store.variants.statistics()
        assert (books.loads, books.deployed, books.memory_used_mb) == (1, ("small",), 115.0)
        assert sum(books.load_time.counts) == 1
        assert books.idle == ()
        for use in uses:
            use.release()
        assert store.variants.statistics().idle == ("small",)
        assert store.changes >= 2

    played(scenario)


def test_one_load_at_a_time_and_what_leaves_is_closed_first() -> None:
    async def scenario(store: Store) -> None:
        small, large = store.variants.take("small", 100.0, 0.0), store.variants.take("large", 300.0, 0.0)
        await asyncio.gather(small.runtime(), large.runtime())
        assert store.clock.now_s() == pytest.approx(2.0)
        with pytest.raises(NoRoom):
            store.variants.take("broken", 150.0, 0.0)
        small.release()
        other = store.variants.take("other", 150.0, 0.0)
        assert store.variants.statistics().evictions == 1
        await other.runtime()
        assert [runtime.closed for runtime in store.opened] == [True, False, False]
        assert store.deployed == ("large", "other")

    played(scenario)


def test_a_failed_load_is_told_to_all_who_wait_and_tried_again_for_the_next() -> None:
    async def scenario(store: Store) -> None:
        uses = [store.variants.take("broken", 50.0, 1.0) for _ in range(2)]
        for use in uses:
            with pytest.raises(LoadFailed, match=r"variant broken cannot be loaded: broken.onnx is cut off"):
                await use.runtime()
        again = store.variants.take("broken", 50.0, 1.0)
        assert again.new
        for use in uses:
            use.release()
        assert store.variants.statistics().memory_used_mb == 51.0, "the third still holds its own"
        with pytest.raises(LoadFailed):
            await again.runtime()
        again.release()
        books = store.variants.statistics()
        assert (books.failed_loads, books.memory_used_mb, books.deployed, books.loading) == (2, 0.0, (), ())

    played(scenario)


def test_a_load_goes_on_when_its_waiter_has_left() -> None:
    async def scenario(store: Store) -> None:
        use = store.variants.take("small", 100.0, 0.0)
        waiter = asyncio.create_task(use.runtime())
        await asyncio.sleep(0.5)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        use.release()
        with pytest.raises(NoRoom):
            store.variants.take("large", 450.0, 0.0)
        await asyncio.sleep(1.0)
        assert store.deployed == ("small",)
        assert store.variants.statistics().idle == ("small",)

    played(scenario)


def test_what_is_preloaded_comes_at_once_and_never_leaves() -> None:
    async def scenario(store: Store) -> None:
        store.follow(preload={"small": 100.0, "large": 300.0})
        await asyncio.sleep(2.5)
        assert store.deployed == ("large", "small")
        assert store.variants.reason == ""
        with pytest.raises(NoRoom):
            store.variants.take("other", 150.0, 0.0)
        store.follow(preload={"large": 300.0})
        use = store.variants.take("other", 150.0, 0.0)
        await use.runtime()
        assert store.deployed == ("large", "other")

    played(scenario)


def test_a_preload_that_fails_says_so_and_is_tried_again_after_growing_pauses() -> None:
    async def scenario(store: Store) -> None:
        store.follow(preload={"broken": 50.0, "giant": 600.0})
        for _ in range(20):
            await asyncio.sleep(1.0)
            store.variants.preload()
        assert 3 <= store.variants.failed_loads <= 5, "after 1, 2, 4, 8 seconds"
        assert "broken.onnx is cut off" in store.variants.reason
        store.follow(preload={"giant": 600.0})
        assert store.variants.reason == "preload: giant with its data needs 600 MB beside 0 MB in use, of 500 MB"
        store.follow(budget_mb=700.0, preload={"giant": 600.0})
        await asyncio.sleep(2.0)
        assert store.deployed == ("giant",)
        assert store.variants.reason == ""

    played(scenario)


def test_what_the_deployment_no_longer_knows_leaves_when_nobody_uses_it() -> None:
    async def scenario(store: Store) -> None:
        small, large = store.variants.take("small", 100.0, 0.0), store.variants.take("large", 300.0, 0.0)
        await asyncio.gather(small.runtime(), large.runtime())
        large.release()
        store.follow(known=frozenset({"other"}))
        await asyncio.sleep(0.1)
        assert store.deployed == ("small",)
        assert not store.opened[0].closed
        small.release()
        await asyncio.sleep(0.1)
        assert not store.deployed
        assert all(runtime.closed for runtime in store.opened)

    played(scenario)


def test_another_number_of_threads_loads_anew_what_is_kept() -> None:
    async def scenario(store: Store) -> None:
        store.follow(preload={"small": 100.0})
        await asyncio.sleep(1.5)
        store.follow(preload={"small": 100.0}, threads=2)
        await asyncio.sleep(1.5)
        assert store.targets == [("small", "cpu", 1), ("small", "cpu", 2)]
        assert [runtime.closed for runtime in store.opened] == [True, False]
        await store.variants.close()
        assert not store.deployed
        assert all(runtime.closed for runtime in store.opened)

    played(scenario)
