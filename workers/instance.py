"""An instance: one loaded variant, one bounded queue, and what it knows about itself.

A request's way through it (`host.py` moves it along):

    INFER ─► admit ─► prepare (pool) ─► wait its turn ─► serve in a batch (the device) ─► REPLY with status
               └─ refused at once: UNAVAILABLE, BOUNCED, QUEUE_FULL, EXPIRED

`Instance` holds state and answers questions; it starts nothing. The clock is an argument.
"""

import asyncio
from collections.abc import Callable

import msgspec

from models.preprocess import Prepared
from models.runtime import EmulatedRuntime, Runtime
from policies.routing.batch_forecast import BatchTimes, choosable
from policies.routing.queueing import BoundedQueue, Entry, QueueStatistics
from policies.routing.rules import largest_batch
from policies.routing.service_time import ServiceTimes
from protocol.outcomes import Attempt
from protocol.records import (
    BOUNCE,
    EXPIRE,
    Infer,
    InputRecord,
    InstanceRecord,
    InstanceSpec,
    InstanceState,
    Reply,
    Status,
)
from workers.histogram import Histogram, HistogramStatistics


class Request(Entry):
    """One INFER in this worker. `respond(request, reply, payload)` is called exactly once, when it ends."""

    __slots__ = ("asked", "payload", "prepared", "request_id", "respond")

    def __init__(
        self,
        asked: Infer,
        payload: bytes,
        now_s: float,
        request_id: int,
        respond: Callable[["Request", Reply, bytes], None],
    ) -> None:
        flags = asked.flags
        super().__init__(
            now_s,
            now_s + asked.budget_s,
            bounce=bool(flags & BOUNCE),
            margin=asked.margin,
            expire=bool(flags & EXPIRE),
        )
        self.asked = asked
        self.payload = payload
        self.request_id = request_id
        self.respond = respond
        self.prepared: Prepared | None = None


class Site(msgspec.Struct, frozen=True):
    """Where an instance lives: what all instances of one start of a worker have in common on the board."""

    worker: str
    address: str
    epoch: str


class InstanceStatistics(msgspec.Struct, frozen=True):
    """An instance at one moment, for metrics."""

    id: str
    variant: str
    state: InstanceState
    queue: QueueStatistics
    queue_time: HistogramStatistics
    service_time: HistogramStatistics
    service_s: float
    loads: int
    failed_loads: int


class Instance:
    """One variant and one queue. All mutable state is public to the worker: see the attributes' comments."""

    def __init__(self, id: str, spec: InstanceSpec, service: str, device: str = "cpu", threads: int = 1) -> None:
        self.id = id
        self.spec = spec
        self.service = service
        self.device = device
        self.threads = threads
        self.state = InstanceState.LOADING
        self.reason = ""  # why it FAILED
        self.runtime: Runtime | None = None  # set while loaded
        self.queue = BoundedQueue(spec.capacity, *spec.batch)
        self.has_chosen = False  # the batch limits are those that `deadline` asked for
        self.times = ServiceTimes()
        self.queue_time = Histogram()
        self.service_time = Histogram()
        self.started_s = 0.0  # start of the batch in service
        self.ends_s = 0.0  # its end, predicted (exact when emulated)
        self.last_failure = ""  # what the last batch raised, so that a failing model logs it once
        self.loads = 0
        self.failed_loads = 0
        self.unwanted = asyncio.Event()  # the deployment no longer asks for it
        self.emptied = asyncio.Event()  # draining, and the last request has ended

    @property
    def emulated(self) -> bool:
        """Whether its service times are timers and not computation."""
        return isinstance(self.runtime, EmulatedRuntime)

    def admit(self, request: Request, backlog_s: float) -> Attempt | None:
        """Decide on arrival; None when admitted. `backlog_s`: what the device holds already."""
        queue, times = self.queue, self.times
        batches = request.bounce and self.spec.batch[1] > 1
        if batches and (batch_s := choosable(self.spec.batch, times.batch_s())):
            own_s = self._choose_batch(request, batch_s)
            return queue.arrive(request, request.arrived_s + backlog_s, own_s, times.least_s)
        if self.has_chosen:
            self.has_chosen = False
            queue.set_batch_limits(*self.spec.batch)
        if queue.maximum == 1:
            own_s = times.mean_s(1)
        else:
            limits = queue.minimum, queue.maximum
            own_s = max(0.0, times.drain_s(queue.not_started + 1, *limits) - times.drain_s(queue.not_started, *limits))
        return queue.arrive(request, request.arrived_s + backlog_s, own_s, times.least_s)

    def _choose_batch(self, request: Request, batch_s: BatchTimes) -> float:
        """Sets the largest batch as the request's gateway forecasts it; what the request adds if that is full."""
        queue, times = self.queue, self.times
        largest = largest_batch(*batch_s, queue.length + 1, request.asked.budget_s, request.asked.margin)
        queue.set_batch_limits(1, largest)
        self.has_chosen = True
        waiting = queue.not_started
        return (waiting // largest + 1) * times.mean_s(largest) - times.drain_s(waiting, 1, largest)

    def backlog_s(self, now_s: float) -> float:
        """Predicted device time that this instance's requests still need; a service over its time counts as ending."""
        queue = self.queue
        rest_s = max(0.0, self.ends_s - now_s) if queue.in_service else 0.0
        return rest_s + self.times.drain_s(queue.not_started, queue.minimum, queue.maximum)

    def status(self, now_s: float, backlog_s: float) -> Status:
        """What goes over the wire (Tan 3.1.3). `backlog_s`: of the whole device, all instances together."""
        queue = self.queue
        batch = queue.in_service
        return Status(
            instance=self.id,
            length=queue.length,
            elapsed_s=max(0.0, now_s - self.started_s) if batch else 0.0,
            ages_s=queue.ages_s(now_s),
            batch=batch,
            backlog_s=backlog_s,
            service_s=self.times.mean_s(1),
            arrived=queue.arrived,
            counts=queue.counts,
        )

    def record(self, site: Site) -> InstanceRecord:
        """What goes onto the board."""
        variant = self.runtime.variant if self.runtime else None
        accuracy = variant.accuracy if variant else None
        return InstanceRecord(
            id=self.id,
            worker=site.worker,
            address=site.address,
            service=self.service or (variant.service if variant else ""),
            variant=self.spec.variant,
            capacity=self.spec.capacity,
            state=self.state,
            epoch=site.epoch,
            accuracy=accuracy.value if accuracy else None,
            accuracy_source=accuracy.source if accuracy else "none",
            service_s=self.times.mean_s(1),
            reason=self.reason,
            input=InputRecord(variant.input.name, variant.input.shape, variant.input.dtype) if variant else None,
            classes=variant.classes if variant else 0,
            batch=self.spec.batch,
            batch_s=self.times.batch_s() if self.times.mean_s(1) > 0.0 else None,
        )

    def statistics(self) -> InstanceStatistics:
        """The instance at this moment."""
        return InstanceStatistics(
            id=self.id,
            variant=self.spec.variant,
            state=self.state,
            queue=self.queue.statistics(),
            queue_time=self.queue_time.statistics(),
            service_time=self.service_time.statistics(),
            service_s=self.times.mean_s(1),
            loads=self.loads,
            failed_loads=self.failed_loads,
        )
