"""Loading one instance: what fits into the device's memory, and when a load that failed is tried again."""

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from models.catalog import VariantError, load_catalog
from models.runtime import EmulatedRuntime
from protocol.records import InstanceSpec, InstanceState
from tests.fakes.edge_world import run_world
from workers.instance import Instance
from workers.life import Loading, _check_memory, _load_until_loaded

Bench = Any  # of this folder's conftest.py


def test_a_load_that_fails_is_tried_again_ever_later(bench: Bench, tmp_path: Path) -> None:
    """After 1 s, doubled up to 30 s; and no more once nobody wants it."""
    failed_s: list[float] = []

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        instance = Instance("w/nothing", InstanceSpec(variant="nothing"), "things")

        def enter(state: InstanceState, reason: str = "") -> None:
            if state is InstanceState.FAILED:
                failed_s.append(loop.time())

        loading = asyncio.create_task(_load_until_loaded(instance, bench.host, Loading((tmp_path,)), enter))
        await asyncio.sleep(100.0)
        instance.unwanted.set()
        assert await loading is False
        assert instance.failed_loads == len(failed_s)

    run_world(scenario())
    pauses_s = [later_s - earlier_s for earlier_s, later_s in pairwise(failed_s)]
    assert pauses_s == pytest.approx([1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0])


def test_memory_may_be_filled_to_the_last_megabyte(bench: Bench) -> None:
    """What is loaded counts, what is about to be loaded too; one megabyte more is refused with the figures."""
    variant = msgspec.structs.replace(load_catalog()["efficientnet_b0_t4"], memory_mb=100.0)
    bench.add("a", 1.0, runtime=EmulatedRuntime(variant))
    _check_memory(variant, bench.host, Loading())
    _check_memory(variant, bench.host, Loading(memory_mb=200.0))
    with pytest.raises(VariantError, match=r"100.0 MB beside the 100.0 MB in use"):
        _check_memory(variant, bench.host, Loading(memory_mb=199.0))
