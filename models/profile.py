"""Measure profiles: the instances run at once, each in its own process, as they will when serving.

All instances are kept busy during the whole window of a batch size, so the figures hold for the worst case, in
which every neighbour computes too. Service time is `execute` only: decoding happens off the executor.
"""

import multiprocessing
import platform
import queue
import time
from collections.abc import Callable, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from models.catalog import Variant, VariantError
from models.preprocess import Prepared
from models.profiles import Profile, ServiceTimes, modelled_profile, service_times
from models.runtime import open_runtime

if TYPE_CHECKING:
    Results = multiprocessing.Queue[tuple[int, int, list[float] | str]]

_START_TIMEOUT_S = 300.0  # a TensorRT engine may be built on the way


def measure(
    variants: Sequence[Variant],
    *,
    device: str = "cpu",
    batch_sizes: Sequence[int] = (1, 3, 5),
    window_s: float = 3.0,
    threads: int = 1,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Profile]:
    """Profiles of `variants` running at once, one process each (name one twice for two instances).

    Instances of the same variant share one profile with all their samples. Emulated variants are not run: their
    profile comes from their law. `on_progress(done, total)` counts measured windows. Raises `VariantError`.
    """
    sizes = sorted(set(batch_sizes))
    if not sizes or sizes[0] < 1:
        raise VariantError("profile", "batch", list(batch_sizes), "give batch sizes of 1 or more")
    real = [variant for variant in variants if variant.runtime != "emulated"]
    samples = _run(real, device, sizes, window_s, threads, on_progress) if real else {}
    profiles = []
    for name, variant in {variant.name: variant for variant in variants}.items():
        if variant.runtime == "emulated":
            profiles.append(modelled_profile(variant, sizes))
            continue
        beside = [other.name for other in real]
        beside.remove(name)
        times: list[ServiceTimes] = [service_times(size, samples[name, size]) for size in sizes]
        profiles.append(
            Profile(
                variant=name,
                device=device,
                source="measured",
                co_located=tuple(sorted(beside)),
                machine=machine_name(),
                accuracy=variant.accuracy,
                times=tuple(times),
            )
        )
    return profiles


def machine_name() -> str:
    """Processor and core count, for people who compare profiles."""
    processor = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: the plain name will do
    return f"{processor}, {multiprocessing.cpu_count()} cores"


def _run(
    variants: list[Variant],
    device: str,
    sizes: list[int],
    window_s: float,
    threads: int,
    on_progress: Callable[[int, int], None],
) -> dict[tuple[str, int], list[float]]:
    """Service times in seconds by (variant, batch size), from one process per entry of `variants`."""
    context = multiprocessing.get_context("spawn")  # a forked onnxruntime hangs
    results: Results = context.Queue()
    barrier = context.Barrier(len(variants))
    processes = [
        context.Process(
            target=_measure_one,
            args=(index, variant, device, sizes, window_s, threads, barrier, results),
            daemon=True,
        )
        for index, variant in enumerate(variants)
    ]
    samples: dict[tuple[str, int], list[float]] = {}
    total = len(variants) * len(sizes)
    try:
        for process in processes:
            process.start()
        for done in range(1, total + 1):
            index, size, outcome = _next_result(results, processes)
            if isinstance(outcome, str):
                raise VariantError(variants[index].name, "profile", variants[index].name, outcome)
            samples.setdefault((variants[index].name, size), []).extend(outcome)
            on_progress(done, total)
    finally:
        for process in processes:
            if process.pid is not None:  # it was started
                process.terminate()
                process.join()
    return samples


def _next_result(
    results: "Results", processes: Sequence[multiprocessing.process.BaseProcess]
) -> tuple[int, int, list[float] | str]:
    """The next message; an error instead of waiting for ever when a process has died without one."""
    while True:
        try:
            return results.get(timeout=0.5)
        except queue.Empty:
            for index, process in enumerate(processes):
                if process.exitcode not in (None, 0):
                    return index, 0, f"its process ended with exit code {process.exitcode}: too little memory?"


def _measure_one(
    index: int,
    variant: Variant,
    device: str,
    sizes: list[int],
    window_s: float,
    threads: int,
    barrier: Barrier,
    results: "Results",
) -> None:
    """In a process of its own: load, warm up, then measure each batch size in step with the others."""
    try:
        runtime = open_runtime(variant, device=device, threads=threads, seed=index)
        rng = np.random.default_rng(index)
        noise = rng.standard_normal(variant.input.shape).astype(variant.input.dtype)
        for size in sizes:
            batch = [Prepared(tensor=noise)] * size
            for _ in range(3):
                runtime.execute(batch)
            barrier.wait(_START_TIMEOUT_S)
            times: list[float] = []
            end = time.perf_counter() + window_s
            while not times or time.perf_counter() < end:
                started = time.perf_counter()
                runtime.execute(batch)
                times.append(time.perf_counter() - started)
            results.put((index, size, times))
        runtime.close()
    except Exception as error:  # whatever it is, the parent must hear it; it ends the others, too
        results.put((index, 0, str(error)))
