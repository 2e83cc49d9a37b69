"""The life of one instance as one coroutine: load, warm up, ready, drain, unload; a failed load is tried again.

Loading and warming happen off the event loop, so that the worker's other instances serve on meanwhile.
"""

import asyncio
import functools
import logging
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from models.catalog import Variant, VariantError, load_catalog
from models.preprocess import Prepared
from models.runtime import EmulatedRuntime, Runtime, batch_factor, blank_tensor, open_runtime
from policies.routing.contract import BATCH_SIZES
from policies.routing.service_time import IDLE_RATE
from protocol.outcomes import Attempt
from protocol.records import InstanceState
from workers.device import Clock
from workers.host import Host
from workers.instance import Instance

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
NOTICE_S = 0.1
"""Draining is announced this long before the queue closes: requests that are already on their way are still served."""
MEASURE_AGAIN_S = 5.0
_SHARE_OF_TIME = 0.01
_MEASURED_RUNS = 5

log = logging.getLogger(__name__)


class Loading(msgspec.Struct, frozen=True):
    """What loading needs besides the instance: catalog folders, the worker's seed, the device's memory if limited.

    `measure_again_s`: how long an instance is idle before it measures itself.
    """

    catalog: tuple[Path, ...] = ()
    seed: int = 0
    memory_mb: float | None = None
    measure_again_s: float = MEASURE_AGAIN_S


async def live(instance: Instance, host: Host, loading: Loading, on_change: Callable[[], None], drain_s: float) -> None:
    """Run one instance from loading until it has been unloaded; ends once `instance.unwanted` is set.

    `on_change` is called at every change of state. After `drain_s` of draining what is left ends UNAVAILABLE.
    """

    def enter(state: InstanceState, reason: str = "") -> None:
        instance.state, instance.reason = state, reason
        level = logging.WARNING if state is InstanceState.FAILED else logging.INFO
        log.log(level, "instance %s", state.value, extra={"instance": instance.id, "reason": reason})
        on_change()

    if await _load_until_loaded(instance, host, loading, enter):
        instance.queue.open()
        enter(InstanceState.READY)
        await _until_unwanted(instance, host, loading.measure_again_s)
        enter(InstanceState.DRAINING)
        await asyncio.sleep(min(NOTICE_S, drain_s))
        await _drain(instance, host, drain_s)
    if instance.runtime is not None:
        runtime, instance.runtime = instance.runtime, None
        await host.device.call(runtime.close)


async def _load_until_loaded(instance: Instance, host: Host, loading: Loading, enter: Callable[..., None]) -> bool:
    """Load and warm up, with growing pauses between tries. False if it became unwanted first.

    What the last try failed of stays to be seen while the next one goes on.
    """
    pause_s = FIRST_PAUSE_S
    failed_of = ""
    while not instance.unwanted.is_set():
        try:
            # One load at a time: the next one has to see what memory this one takes.
            async with host.loading:
                if instance.unwanted.is_set():  # while it waited for its turn
                    break
                enter(InstanceState.LOADING, failed_of)
                runtime = await asyncio.to_thread(_open, instance, host, loading)
                enter(InstanceState.WARMING, failed_of)
                await _warm_up(instance, runtime, host)
                instance.runtime = runtime
        except Exception as error:  # a broken file raises whatever its reader likes
            instance.failed_loads += 1
            failed_of = str(error) or repr(error)
            enter(InstanceState.FAILED, failed_of)
            try:
                async with asyncio.timeout(pause_s):
                    await instance.unwanted.wait()
            except TimeoutError:
                pause_s = min(LONGEST_PAUSE_S, pause_s * 2)
        else:
            instance.loads += 1
            return not instance.unwanted.is_set()
    return False


def _open(instance: Instance, host: Host, loading: Loading) -> Runtime:
    # The catalog is read again at every try: adding the missing entry is enough to get a failed instance going.
    catalog = load_catalog(loading.catalog)
    variant = catalog.get(instance.spec.variant)
    if variant is None:
        known = f"no such variant in the catalog; it has {', '.join(sorted(catalog))}"
        raise VariantError("deployment", "variant", instance.spec.variant, known)
    _check_memory(variant, host, loading)
    seed = zlib.crc32(f"{loading.seed}/{instance.id}".encode())
    return open_runtime(variant, device=instance.device, threads=instance.threads, seed=seed)


def _check_memory(variant: Variant, host: Host, loading: Loading) -> None:
    if loading.memory_mb is None:
        return
    runtimes = [one.runtime for one in list(host.instances.values()) if one.runtime is not None]
    used_mb = sum(runtime.variant.memory_mb for runtime in runtimes)
    if used_mb + variant.memory_mb > loading.memory_mb:
        remedy = (
            f"needs {variant.memory_mb} MB beside the {used_mb} MB in use: raise the worker's memory_mb or load less"
        )
        raise VariantError("deployment", "memory_mb", loading.memory_mb, remedy)


async def _warm_up(instance: Instance, runtime: Runtime, host: Host) -> None:
    """Run once, then learn what each batch size takes (an emulated variant's law is asked instead)."""
    law = runtime.variant.emulated
    if isinstance(runtime, EmulatedRuntime) and law is not None:
        for size in BATCH_SIZES:
            instance.times.observe(size, law.service_ms / 1e3 * batch_factor(law.fixed_share, size))
        return
    await host.device.call(runtime.warm_up)
    blank = Prepared(tensor=blank_tensor(runtime.variant))
    for size in (size for size in BATCH_SIZES if size <= max(1, instance.queue.maximum)):
        timed = functools.partial(_timed, runtime, [blank] * size, host.clock)
        # The least: other processes start at the same time and only ever add to it. An instance that is thought too
        # slow for its service's requirement is never asked, and so never corrected.
        instance.times.observe(size, min([await host.device.call(timed) for _ in range(_MEASURED_RUNS)]))


async def _until_unwanted(instance: Instance, host: Host, measure_again_s: float) -> None:
    """Waits, and keeps the estimate of the service time honest while nobody asks: at most a hundredth of the time.

    An instance that is thought too slow (it started or was last asked while the machine was busy) gets no requests,
    and so nothing else would ever correct it.
    """
    if instance.emulated:
        await instance.unwanted.wait()
        return
    asked = instance.queue.arrived
    while True:
        try:
            async with asyncio.timeout(max(measure_again_s, instance.times.mean_s(1) / _SHARE_OF_TIME)):
                await instance.unwanted.wait()
            return
        except TimeoutError:
            runtime, before, asked = instance.runtime, asked, instance.queue.arrived
            if runtime is None or asked != before or host.busy:
                continue
            blank = [Prepared(tensor=blank_tensor(runtime.variant))]
            try:
                duration_s = await host.device.call(functools.partial(_timed, runtime, blank, host.clock))
            except Exception:  # requests will find that out, and say so
                log.warning("an idle instance cannot be measured", extra={"instance": instance.id}, exc_info=True)
            else:
                instance.times.observe(1, duration_s, IDLE_RATE)


def _timed(runtime: Runtime, batch: list[Prepared], clock: Clock) -> float:
    begun_s = clock.now_s()
    runtime.execute(batch)
    return clock.now_s() - begun_s


async def _drain(instance: Instance, host: Host, drain_s: float) -> None:
    """Admit no more and wait until the queue is empty, at most `drain_s`; what is left then ends UNAVAILABLE."""
    host.drain(instance)
    if instance.queue.length == 0:
        return
    try:
        async with asyncio.timeout(drain_s):
            await instance.emptied.wait()
    except TimeoutError:
        log.warning("not drained in time", extra={"instance": instance.id, "left": instance.queue.length})
        host.end_all(instance, Attempt.UNAVAILABLE)
