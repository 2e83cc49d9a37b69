"""The host: instances that share one device in arrival order, and the way of a request through them.

Whenever the device is free, the instance whose batching rule permits and whose head of line is the oldest goes next
(Huang's Eq. 5: one executor; for Tan there is one instance per worker). Everything here runs in the event loop;
decoding runs in a small pool, execution on the device.

All mutable state: the instances, the one service under way, the time at which the device became free, one timer for
expiries.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

import msgspec

from models.preprocess import InvalidInput, Prepared
from models.runtime import Answer
from policies.routing.queueing import Entry, EntryState
from protocol.outcomes import Attempt
from protocol.records import InstanceState, Reply, Status
from workers.answers import encode_answer
from workers.device import Clock, Device, Timer
from workers.instance import Instance, InstanceStatistics, Request
from workers.preparing import Preparer

log = logging.getLogger(__name__)

_REASONS = {
    Attempt.UNAVAILABLE: "the instance is not ready",
    Attempt.BOUNCED: "the queue ahead makes it late",
    Attempt.QUEUE_FULL: "no place in the queue",
    Attempt.EXPIRED: "it cannot finish in time",
    Attempt.CANCELLED: "the client has gone",
}

_TIMER_SLACK_S = 0.001
"""The expiry timer aims this far behind the moment, so that it does find something when it fires."""


class HostStatistics(msgspec.Struct, frozen=True):
    """The host at one moment. `unknown`: requests for instances that are not here (answered UNAVAILABLE)."""

    instances: tuple[InstanceStatistics, ...]
    unknown: int
    backlog_s: float


class Host:
    """Instances by id, and the device that they share."""

    def __init__(self, clock: Clock, device: Device, preparer: Preparer) -> None:
        self.instances: dict[str, Instance] = {}
        self.clock = clock
        self.device = device
        self.loading = asyncio.Lock()
        self.draining = False  # the whole worker, for its status
        self.beside_s: Callable[[float], float] = lambda now_s: 0.0  # what else the device has to do: edge requests
        self._preparer = preparer
        self._serving: Instance | None = None
        self._free_s = 0.0
        self._expiry: Timer | None = None
        self._expiry_s = float("inf")
        self._unknown = 0

    # a request's way

    def arrive(self, request: Request) -> None:
        """A request came: refuse it now, or give it a place and start to prepare its input."""
        instance = self.instances.get(request.asked.instance)
        if instance is None:
            self._unknown += 1
            status = Status(request.asked.instance)
            request.respond(request, Reply(Attempt.UNAVAILABLE, status, "this worker has no such instance"), b"")
            return
        refused = instance.admit(request, self.backlog_s(request.arrived_s))
        if refused is not None:
            self._end(instance, request, refused)
            return
        assert instance.runtime is not None, "an open queue belongs to a loaded instance"
        if instance.emulated:
            # Reading a label costs less than the way to another thread.
            try:
                prepared: Prepared | InvalidInput = instance.runtime.prepare(
                    request.payload, request.asked.content_type
                )
            except InvalidInput as error:
                prepared = error
            self.prepared(instance, request, prepared)
        else:
            self._preparer.submit(
                request, instance.runtime, lambda prepared: self.prepared(instance, request, prepared)
            )

    def prepared(self, instance: Instance, request: Request, prepared: Prepared | Exception) -> None:
        """The request's input is there, or why not; it may have left in the meantime."""
        request.payload = b""
        if isinstance(prepared, Exception):
            if request.state is EntryState.PREPARING:
                invalid = isinstance(prepared, InvalidInput)
                attempt = Attempt.INVALID if invalid else Attempt.FAILED
                instance.queue.leave(request, attempt)
                status_code = prepared.status if isinstance(prepared, InvalidInput) else 0
                self._end(instance, request, attempt, str(prepared) or repr(prepared), status_code)
                self._dispatch()
            return
        request.prepared = prepared
        # An emulated arrival is ready when it arrives: its ideal clock must not see the time spent here.
        if instance.queue.ready(request, request.arrived_s if instance.emulated else self.clock.now_s()):
            self._dispatch()

    def cancel(self, request: Request) -> None:
        """The client has gone: its place is free at once, unless it is in service."""
        instance = self.instances.get(request.asked.instance)
        if instance is not None and instance.queue.cancel(request):
            self._end(instance, request, Attempt.CANCELLED)
            self._dispatch()

    def limits_changed(self) -> None:
        """Batch limits or capacities were changed: a batch that was waiting may start now."""
        self._dispatch()

    # the device

    def _dispatch(self) -> None:
        """Start the next batch if the device is free: the oldest head of line whose batching rule permits."""
        if self._serving is None:
            now_s = self.clock.now_s()
            self._expire(now_s)
            chosen: Instance | None = None
            first = (float("inf"), float("inf"))
            for instance in self.instances.values():
                start_s = instance.queue.start_s(self._free_s)
                if start_s is not None and (start_s, instance.queue.head_arrived_s) < first:
                    chosen, first = instance, (start_s, instance.queue.head_arrived_s)
            if chosen is not None:
                # Only an emulated service can have started in the past.
                self._start(chosen, first[0] if chosen.emulated else now_s)
        self._watch_expiries()

    def _start(self, instance: Instance, start_s: float) -> None:
        assert instance.runtime is not None
        batch = instance.queue.start(start_s)
        requests = [request for request in batch if isinstance(request, Request)]
        inputs = [request.prepared for request in requests if request.prepared is not None]
        instance.started_s = start_s
        expected_s = instance.times.mean_s(len(batch))
        self._serving = instance
        instance.ends_s = self.device.run(
            instance.runtime,
            inputs,
            start_s,
            expected_s,
            lambda result, begun_s, end_s: self._finished(instance, requests, result, begun_s, end_s),
        )

    def _finished(
        self,
        instance: Instance,
        requests: list[Request],
        result: list[Answer] | Exception,
        start_s: float,
        end_s: float,
    ) -> None:
        """A batch has ended: free the device for the next one first, then answer."""
        self._serving, self._free_s = None, end_s
        payloads = self._encode(instance, requests, result)
        failure = str(payloads) or repr(payloads) if isinstance(payloads, Exception) else ""
        if not failure:
            instance.times.observe(len(requests), end_s - start_s)
        elif failure != instance.last_failure:
            log.error("a batch failed", extra={"instance": instance.id, "failure": failure})
        instance.last_failure = failure
        ended = instance.queue.finish(self.clock.now_s(), failed=bool(failure))
        if any(one.queue.not_started for one in self.instances.values()):
            self._dispatch()
        now_s = self.clock.now_s()
        status = instance.status(now_s, self.backlog_s(now_s))
        for place, (entry, attempt) in enumerate(ended):
            request = requests[place]
            assert request is entry
            queue_s = max(0.0, start_s - request.ready_s)
            answered = attempt is Attempt.OK or attempt is Attempt.LATE
            payload, shape = payloads[place] if answered and not isinstance(payloads, Exception) else (b"", ())
            reply = Reply(
                attempt,
                status,
                reason=failure if attempt is Attempt.FAILED else _REASONS.get(attempt, ""),
                prepare_s=request.ready_s - request.arrived_s,
                queue_s=queue_s,
                service_s=end_s - start_s,
                batch=len(requests),
                shape=shape,
            )
            request.respond(request, reply, payload)
            instance.queue_time.observe(queue_s)
        instance.service_time.observe(end_s - start_s)
        self._settle(instance)

    def _encode(
        self, instance: Instance, requests: list[Request], result: list[Answer] | Exception
    ) -> list[tuple[bytes, tuple[int, ...]]] | Exception:
        if isinstance(result, Exception) or instance.runtime is None:
            return result if isinstance(result, Exception) else RuntimeError("the instance was unloaded")
        try:
            variant = instance.runtime.variant
            return [
                (b"", ()) if request.cancelled else encode_answer(answer, variant, request.asked)
                for request, answer in zip(requests, result, strict=True)
            ]
        except (IndexError, ValueError) as error:  # answers that do not fit the variant's labels
            return error

    # expiry

    def _expire(self, now_s: float) -> None:
        for instance in self.instances.values():
            if instance.queue.not_started:
                self._end_all(instance, instance.queue.expire(now_s, instance.times.least_s), Attempt.EXPIRED)

    def _watch_expiries(self) -> None:
        """Keep one timer at the next moment at which a request becomes hopeless while it waits."""
        next_s = float("inf")
        for instance in self.instances.values():
            expiry_s = instance.queue.next_expiry_s(instance.times.least_s)
            if expiry_s is not None and expiry_s < next_s:
                next_s = expiry_s
        # A timer that is early only looks again; most requests are served and never need one moved.
        if next_s < self._expiry_s:
            if self._expiry is not None:
                self._expiry.cancel()
            self._expiry_s = next_s
            self._expiry = self.clock.call_at(next_s + _TIMER_SLACK_S, self._on_expiry)

    def _on_expiry(self) -> None:
        self._expiry, self._expiry_s = None, float("inf")
        self._expire(self.clock.now_s())
        self._dispatch()

    # endings

    def drain(self, instance: Instance) -> None:
        """The instance admits nothing more; a batch that waited for company starts now."""
        instance.queue.drain()
        self._dispatch()

    def end_all(self, instance: Instance, attempt: Attempt) -> None:
        """End everything that the instance holds (it could not be drained in time)."""
        self._end_all(instance, instance.queue.end_all(attempt), attempt)

    def _end_all(self, instance: Instance, entries: Sequence[Entry], attempt: Attempt) -> None:
        for entry in entries:
            assert isinstance(entry, Request)
            self._end(instance, entry, attempt)

    def _end(
        self, instance: Instance, request: Request, attempt: Attempt, reason: str = "", http_status: int = 0
    ) -> None:
        """Answer a request that is not served: its entry has already left the queue."""
        now_s = self.clock.now_s()
        request.payload = b""  # the pool may not come to it for long, and a body can be large
        reply = Reply(
            attempt,
            instance.status(now_s, self.backlog_s(now_s)),
            reason or _REASONS.get(attempt, ""),
            http_status,
            queue_s=now_s - request.arrived_s,
        )
        request.respond(request, reply, b"")
        self._settle(instance)

    def _settle(self, instance: Instance) -> None:
        if instance.state is InstanceState.DRAINING and instance.queue.length == 0:
            instance.emptied.set()

    # reading

    @property
    def busy(self) -> bool:
        """Whether the device serves or anything waits for it."""
        return self._serving is not None or any(one.queue.length for one in self.instances.values())

    def backlog_s(self, now_s: float) -> float:
        """Predicted time until everything that the device now holds is done."""
        return self.own_backlog_s(now_s) + self.beside_s(now_s)

    def own_backlog_s(self, now_s: float) -> float:
        """The instances' part of it."""
        total_s = 0.0
        for instance in self.instances.values():
            total_s += instance.backlog_s(now_s)
        return total_s

    def status(self) -> tuple[Status, ...]:
        """Every instance at this moment, sorted by id."""
        now_s = self.clock.now_s()
        backlog_s = self.backlog_s(now_s)
        return tuple(self.instances[id].status(now_s, backlog_s) for id in sorted(self.instances))

    def statistics(self) -> HostStatistics:
        """The host at this moment. May be called from another thread."""
        instances = [instance.statistics() for instance in list(self.instances.values())]
        return HostStatistics(tuple(instances), self._unknown, self.backlog_s(self.clock.now_s()))
