"""The text of `/metrics`: what this process has counted and how it sees the instances, read when it is asked.

Several gateway processes on one port answer for all of them: each writes its view to a file in a folder that they
share, every second, and whoever is asked merges them. What was counted adds up, by processes that have ended, too; what
is *seen* comes from processes that live: the longest queue, the most cautious margin, and ready only where every
process can route. So what the others have counted is up to a second old, and grows from scrape to scrape.
"""

import asyncio
import contextlib
import logging
import operator
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from gateway.dispatch import DispatchStatistics
from gateway.edge_exposition import READY, EdgeValues, edge_families
from gateway.metrics import BUCKETS_S, GatewayMetrics, Values
from gateway.router import ServiceRouter
from protocol.outcomes import OUTCOMES

log = logging.getLogger("gateway.exposition")

SHARE_EVERY_S: Final = 1.0
LIVES_S: Final = 3.0
"""A view that is older belongs to a process that has ended."""
_SUFFIX: Final = ".view"
_BOUNDS: Final = (*map(str, BUCKETS_S[:-1]), "+Inf")


class View(msgspec.Struct, array_like=True, frozen=True):
    """One process's view: `requests` by (service, outcome), `buckets` by (service, upper bound), `seconds` by service,
    `answers` by (service, variant), `attempts` by (instance, end); `length` and `ready` by (service, instance),
    `margin` by service; `edge` as `edge_exposition.py` has it.
    """

    requests: Values
    buckets: Values
    seconds: Values
    answers: Values
    attempts: Values
    length: Values
    ready: Values
    margin: Values
    edge: EdgeValues = {}


class Exposition:
    """Makes the text. `async with` shares the view with the other processes, where there is a `folder` for it.

    `id` is this process's among them.
    """

    def __init__(
        self,
        id: str,
        metrics: GatewayMetrics,
        services: Callable[[], Iterable[ServiceRouter]],
        dispatch: Callable[[], DispatchStatistics],
        folder: Path | None,
        edge: Callable[[], EdgeValues] = dict,
    ) -> None:
        self._metrics = metrics
        self._services = services
        self._dispatch = dispatch
        self._edge = edge
        self._file = folder / f"{id}{_SUFFIX}" if folder is not None else None
        self._sharing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._file is not None:
            self._sharing = asyncio.create_task(self._share_for_ever(self._file), name="share metrics")
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
            log.warning("the /metrics of the other processes lack what this one counts: %s", error)

    def view(self) -> View:
        """Of this process, now."""
        now_s = time.monotonic()
        view = View({}, {}, {}, {}, {}, {}, {}, {}, self._edge())
        for service, counts in self._metrics.services.items():
            view.requests.update({(service, one.name): counts.outcomes[one] for one in OUTCOMES})
            view.buckets.update(zip(((service, bound) for bound in _BOUNDS), counts.buckets, strict=True))
            view.seconds[service,] = counts.seconds
            view.answers.update({(service, variant): number for variant, number in counts.answers.items()})
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
        """One family after the other, as prometheus-client wants them."""
        own, others = self.view(), list(self._others())
        views = [own, *(view for view, _ in others)]
        living = [own, *(view for view, lives in others if lives)]

        def total(part: str) -> Values:
            return merged(operator.add, (getattr(view, part) for view in views))

        about = "Requests by outcome."
        requests = CounterMetricFamily("tidegate_requests", about, labels=["service", "outcome"])
        yield _filled(requests, total("requests"))
        about = "From the request's arrival to its answer, for answered requests."
        latency = HistogramMetricFamily("tidegate_request_seconds", about, labels=["service"])
        buckets = total("buckets")
        for (service,), seconds in total("seconds").items():
            below = accumulate(buckets[service, bound] for bound in _BOUNDS)
            latency.add_metric([service], list(zip(_BOUNDS, below, strict=True)), seconds)
        yield latency
        answers = CounterMetricFamily("tidegate_answers", "Answers by variant.", labels=["service", "variant"])
        yield _filled(answers, total("answers"))
        about = "Attempts at an instance by their end."
        attempts = CounterMetricFamily("tidegate_attempts", about, labels=["instance", "end"])
        yield _filled(attempts, total("attempts"))
        where = ["service", "instance"]
        length = GaugeMetricFamily("tidegate_instance_length", "Requests in the instance.", labels=where)
        yield _filled(length, merged(max, (view.length for view in living)))
        ready = GaugeMetricFamily("tidegate_instance_ready", "1 if routable.", labels=where)
        yield _filled(ready, merged(min, (view.ready for view in living)))
        about = "Share of the budget that deadline plans with."
        margin = GaugeMetricFamily("tidegate_deadline_margin", about, labels=["service"])
        yield _filled(margin, merged(min, (view.margin for view in living)))
        if any(view.edge for view in views):
            yield from edge_families(
                lambda key: merged(operator.add, (view.edge.get(key, {}) for view in views)),
                [view.edge.get(READY.key, {}) for view in living],
            )

    def text(self) -> bytes:
        """The answer to a scrape."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)


def merged(choose: Callable[[float, float], float], parts: Iterable[Values]) -> Values:
    """One value for each key of any part: `choose` says which of two."""
    whole: Values = {}
    for part in parts:
        for key, value in part.items():
            whole[key] = choose(whole[key], value) if key in whole else value
    return whole


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Values) -> Metric:
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family
