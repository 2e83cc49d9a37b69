"""Metrics of the instances as gateways see them: lengths, readiness, margins, and what became of attempts.

Read at scrape time from `.statistics()`. Several gateway processes on one port answer a scrape for all of them: each
writes its view to a file beside prometheus-client's (`PROMETHEUS_MULTIPROC_DIR`) every second, and whoever is asked
merges them. Attempts add up, those of processes that have ended included; what is *seen* comes from processes that
live: the longest queue, the most cautious margin, and ready only where every process can route.
"""

import asyncio
import contextlib
import logging
import operator
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from gateway.dispatch import DispatchStatistics
from gateway.router import ServiceRouter

log = logging.getLogger("gateway.fleet_metrics")

SHARE_EVERY_S: Final = 1.0
LIVES_S: Final = 3.0
"""A view that is older belongs to a process that has ended."""
_SUFFIX: Final = ".view"

Values = dict[tuple[str, ...], float]
"""By label values."""


class View(msgspec.Struct, array_like=True, frozen=True):
    """One process's view, by (service, instance), (service,), and (instance, end)."""

    length: Values
    ready: Values
    margin: Values
    attempts: Values


class FleetMetrics:
    """prometheus-client's collector of these metrics. `async with` shares the view, where there is a folder for it."""

    def __init__(
        self,
        id: str,
        services: Callable[[], Iterable[ServiceRouter]],
        dispatch: Callable[[], DispatchStatistics],
        folder: Path | None,
    ) -> None:
        self._services = services
        self._dispatch = dispatch
        self._file = folder / f"{id}{_SUFFIX}" if folder is not None else None
        self._sharing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._file is not None:
            self._sharing = asyncio.create_task(self._share_for_ever(self._file), name="share fleet metrics")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sharing is not None and self._file is not None:
            self._sharing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sharing
            self._share(self._file)

    async def _share_for_ever(self, file: Path) -> None:
        while True:
            self._share(file)
            await asyncio.sleep(SHARE_EVERY_S)

    def _share(self, file: Path) -> None:
        fresh = file.with_suffix(".new")
        try:
            fresh.write_bytes(msgspec.msgpack.encode(self.view()))
            fresh.replace(file)
        except OSError as error:
            log.warning("the other processes' /metrics lack this one's view: %s", error)

    def view(self) -> View:
        """Of this process, now."""
        now_s = time.monotonic()
        view = View({}, {}, {}, {})
        for router in self._services():
            statistics = router.statistics(now_s)
            view.margin[router.name,] = statistics.margin
            for instance in statistics.instances:
                view.length[router.name, instance.id] = instance.length
                view.ready[router.name, instance.id] = float(instance.ready)
        for one, ends in self._dispatch().attempts.items():
            for end, number in ends.items():
                view.attempts[one, end] = number
        return view

    def _others(self) -> Iterator[tuple[View, bool]]:
        """The views of the other processes of this port, and whether they live."""
        if self._file is None:
            return
        for file in self._file.parent.glob(f"*{_SUFFIX}"):
            if file != self._file:
                with contextlib.suppress(OSError, msgspec.MsgspecError):
                    lives = time.time() - file.stat().st_mtime < LIVES_S
                    yield msgspec.msgpack.decode(file.read_bytes(), type=View), lives

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus-client for every scrape."""
        own = self.view()
        others = list(self._others())
        living = [own, *(view for view, lives in others if lives)]
        where = ["service", "instance"]
        yield _filled(
            GaugeMetricFamily("tidegate_instance_length", "Requests in the instance.", labels=where),
            merged(max, (view.length for view in living)),
        )
        yield _filled(
            GaugeMetricFamily("tidegate_instance_ready", "1 if routable.", labels=where),
            merged(min, (view.ready for view in living)),
        )
        yield _filled(
            GaugeMetricFamily("tidegate_deadline_margin", "Share of the budget to plan with.", labels=["service"]),
            merged(min, (view.margin for view in living)),
        )
        yield _filled(
            CounterMetricFamily("tidegate_attempts", "Attempts at an instance.", labels=["instance", "end"]),
            merged(operator.add, (view.attempts for view in (own, *(view for view, _ in others)))),
        )


def merged(choose: Callable[[float, float], float], parts: Iterable[Values]) -> Values:
    """One value for each key of any part: `choose` says which of two."""
    whole: Values = {}
    for part in parts:
        for key, value in part.items():
            whole[key] = choose(whole[key], value) if key in whole else value
    return whole


def shared_folder() -> Path | None:
    """Where the gateway processes of one port keep their metrics; None if there is one only."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return Path(folder) if folder else None


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Values) -> Metric:
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family
