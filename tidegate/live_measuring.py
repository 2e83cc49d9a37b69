"""What a running gateway's system is like: service times of its instances, all of them busy, and its arrivals.

Service times are taken from the answers to requests that are pinned to a variant, twice as many at a time as it has
instances: so every instance has its neighbours computing beside it, as in a burst. For some seconds this is real load
on the system. Arrivals are those that the gateways remember, and those that come while it is asked to record.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import numpy as np

from loadgen.payloads import PayloadSet
from loadgen.traces import Trace
from models.catalog import load_catalog
from models.profiles import Profile, service_times
from policies.routing.contract import RoutingError
from policies.routing.workload import Arrivals
from tidegate.record_command import Recorder, find_gateways

IN_FLIGHT_PER_INSTANCE: Final = 2
LEAST_SAMPLES: Final = 5
_LONG_MS: Final = "60000"
_AGES_S: Final = 1e7
"""Longer ago than any arrival that a gateway remembers."""
_CLOCK_SLACK_S: Final = 0.01


class MeasuredInstances(msgspec.Struct, frozen=True):
    """The ready instances of a service in the order of their ids: (profile, rank, capacity) of each."""

    ids: tuple[str, ...]
    instances: tuple[tuple[Profile, int, int], ...]


async def measure_instances(
    url: str,
    state: dict[str, Any],
    seconds: float,
    payloads: PayloadSet,
    catalog: Sequence[Path] = (),
    report: Callable[[int], None] = lambda samples: None,
) -> MeasuredInstances:
    """Profiles of the ready instances in `state` (of one service, as `/state` has it). `report(samples so far)`.

    Raises `RoutingError` if none is ready, one gives too few samples, or a variant's accuracy is not known.
    """
    ready = sorted((view for view in state["instances"] if view["ready"]), key=lambda view: str(view["id"]))
    if not ready:
        raise RoutingError("no instance is ready: nothing can be measured")
    known = load_catalog(catalog)
    for view in ready:
        if view["variant"] not in known or known[view["variant"]].accuracy.value is None:
            raise RoutingError(
                f"the accuracy of {view['variant']} is not known: give the folder that describes it with --catalog"
            )
    counts: dict[str, int] = {}
    for view in ready:
        counts[view["variant"]] = counts.get(view["variant"], 0) + 1
    samples = await _busy(url, counts, seconds, payloads, report)
    profiles: dict[str, Profile] = {}
    for variant, count in counts.items():
        found = {size: times for (name, size), times in samples.items() if name == variant}
        if sum(map(len, found.values())) < LEAST_SAMPLES:
            raise RoutingError(
                f"{variant} answered {sum(map(len, found.values()))} times in {seconds:g} s, at least {LEAST_SAMPLES}"
                " are needed: measure longer with --measure-s"
            )
        beside = dict(counts) | {variant: count - 1}
        profiles[variant] = Profile(
            variant=variant,
            device="as deployed",
            source="measured",
            co_located=tuple(name for name in sorted(beside) for _ in range(beside[name])),
            accuracy=known[variant].accuracy,
            times=tuple(service_times(size, found[size]) for size in sorted(found)),
        )
    return MeasuredInstances(
        tuple(str(view["id"]) for view in ready),
        tuple((profiles[view["variant"]], int(view["rank"]), int(view["capacity"])) for view in ready),
    )


async def _busy(
    url: str, counts: dict[str, int], seconds: float, payloads: PayloadSet, report: Callable[[int], None]
) -> dict[tuple[str, int], list[float]]:
    """Service times in seconds by variant and batch size, with every instance kept busy for so long."""
    samples: dict[tuple[str, int], list[float]] = {}
    ends_s = time.monotonic() + seconds
    failures: list[str] = []

    async def client(session: aiohttp.ClientSession, variant: str, first: int) -> None:
        number = first
        while time.monotonic() < ends_s:
            payload = payloads.payloads[number % len(payloads.payloads)]
            number += 1
            kind = payload.content_type if payload.content_type.startswith("image/") else "image/jpeg"
            headers = {"Content-Type": kind, "X-Deadline-Ms": _LONG_MS}
            async with session.post(f"{url}/v2/models/{variant}/infer", data=payload.body, headers=headers) as response:
                answer = await response.json(content_type=None)
            if response.status != 200:
                failures.append(str(answer.get("error", response.status)))
                await asyncio.sleep(0.05)
                continue
            told = answer["parameters"]
            samples.setdefault((variant, int(told["batch"])), []).append(float(told["service_ms"]) / 1e3)
            report(sum(map(len, samples.values())))

    timeout = aiohttp.ClientTimeout(total=60.0)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        clients = [
            client(session, variant, number)
            for variant, count in counts.items()
            for number in range(IN_FLIGHT_PER_INSTANCE * count)
        ]
        try:
            await asyncio.gather(*clients)
        except (aiohttp.ClientError, TimeoutError, KeyError, ValueError) as error:
            raise RoutingError(f"{url} cannot be measured: {error!r}") from error
    if failures and not samples:
        raise RoutingError(f"no request was answered while measuring: {failures[-1]}")
    return samples


async def recorded_arrivals(
    url: str, service: str, seconds: float, report: Callable[[int, float], None] = lambda count, passed_s: None
) -> Trace:
    """The service's arrivals that the gateways still remember, and those of the next `seconds`.

    `report(arrivals so far, seconds passed)`. Times start at the first of them. Raises `RecordError`.
    """
    async with contextlib.AsyncExitStack() as stack:
        links = await find_gateways(url, stack)
        started_s = time.monotonic()
        recorder = Recorder(started_s - _AGES_S, service)
        recorder.next |= {link.gateway: 0 for link in links}  # from the first that they remember
        while True:
            for link in links:
                await link.poll(recorder)
            passed_s = time.monotonic() - started_s
            report(len(recorder.times_s), passed_s)
            if passed_s >= seconds:
                break
            await asyncio.sleep(min(0.5, seconds - passed_s))
        times_s = np.sort(np.asarray(recorder.times_s, dtype=np.float64))
        first_s = float(times_s[0]) if len(times_s) else _AGES_S
        arrivals = Arrivals(times_s - first_s, None, _AGES_S + passed_s - first_s + _CLOCK_SLACK_S)
        return Trace("recorded arrivals", arrivals)
