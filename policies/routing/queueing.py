"""One instance's bounded queue: who gets a place, who starts together, who is dropped. Pure and synchronous.

    arrive ──► PREPARING ──ready──► WAITING ──start──► IN_SERVICE ──finish──► OK | LATE | FAILED | CANCELLED
       │           └───────── cancel, leave, expire ──────┘
       └─ UNAVAILABLE, BOUNCED, QUEUE_FULL, EXPIRED: decided on arrival, no place taken

The queue decides and counts; it sends nothing and reads no clock: every time is an argument on one monotonic clock.
Capacity includes what is in service. First come, first served: an entry whose input is still being prepared holds
back the ones behind it, whichever is decoded first. At every moment arrived = sum(counts) + length.

All mutable state: the line (preparing and waiting, in arrival order), what is in service, the batch limits, whether
it is open, and the counters.
"""

import enum

import msgspec

from policies.routing.rules import batch_size, cannot_finish
from protocol.outcomes import Attempt

_CODES = len(Attempt)


class EntryState(enum.Enum):
    """Where an entry stands. `GONE`: it has ended (or was refused) and holds no place."""

    PREPARING = "preparing"
    WAITING = "waiting"
    IN_SERVICE = "in service"
    GONE = "gone"


class Entry:
    """One request as the queue sees it. `ready_s`: when its input was prepared; the queue sets it and `state`."""

    __slots__ = ("arrived_s", "bounce", "bounce_by_s", "cancelled", "deadline_s", "expire", "ready_s", "state")

    def __init__(
        self, arrived_s: float, deadline_s: float, *, bounce: bool = False, margin: float = 1.0, expire: bool = False
    ) -> None:
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s
        self.bounce = bounce
        self.bounce_by_s = arrived_s + margin * (deadline_s - arrived_s)
        self.expire = expire
        self.ready_s = arrived_s
        self.cancelled = False
        self.state = EntryState.GONE


class QueueStatistics(msgspec.Struct, frozen=True, gc=False):
    """A queue at one moment. `counts` by `Attempt` code; arrived = sum(counts) + length."""

    capacity: int
    minimum: int
    maximum: int
    preparing: int
    waiting: int
    in_service: int
    arrived: int
    counts: tuple[int, ...]

    @property
    def length(self) -> int:
        """Places taken."""
        return self.preparing + self.waiting + self.in_service


class BoundedQueue:
    """First come, first served, with `capacity` places and Tan's batching rule (section 5.2.2)."""

    __slots__ = ("_counts", "_in_service", "_is_open", "_line", "arrived", "capacity", "maximum", "minimum")

    def __init__(self, capacity: int = 15, minimum: int = 1, maximum: int = 1) -> None:
        if capacity < 1:
            raise ValueError(f"capacity = {capacity}: a queue needs at least 1 place")
        self.capacity = capacity
        self.set_batch_limits(minimum, maximum)
        self.arrived = 0
        self._counts = [0] * _CODES
        self._line: list[Entry] = []
        self._in_service: list[Entry] = []
        self._is_open = False

    # settings

    def set_batch_limits(self, minimum: int, maximum: int) -> None:
        """Tan's limits, from the next batch on. A minimum above the capacity could never be met: it is cut there."""
        if not 1 <= minimum <= maximum:
            raise ValueError(f"batch limits = ({minimum}, {maximum}): 1 <= minimum <= maximum")
        self.minimum = min(minimum, self.capacity)
        self.maximum = maximum

    def open(self) -> None:
        """The instance is ready: entries are admitted from now on."""
        self._is_open = True

    def drain(self) -> None:
        """Admit nothing more; what is here is still served, without waiting for company."""
        self._is_open = False
        self.minimum = 1

    # arrivals

    def arrive(self, entry: Entry, start_s: float, service_s: float, least_s: float) -> Attempt | None:
        """Decide on arrival: None when admitted (now PREPARING), else how the attempt ends.

        start_s: predicted time at which the device has finished what it holds; service_s: predicted service time;
        least_s: the shortest service time that can be hoped for. The arrival time is the entry's.
        A device with nothing to do is never the cause of a bounce: if every guess about it were too slow, it would
        never get the request that corrects the guess.
        """
        self.arrived += 1
        now_s, deadline_s = entry.arrived_s, entry.deadline_s
        if not self._is_open:
            return self._refuse(Attempt.UNAVAILABLE)
        if entry.bounce and start_s > now_s and start_s + service_s > entry.bounce_by_s:
            return self._refuse(Attempt.BOUNCED)
        if self.length >= self.capacity:
            return self._refuse(Attempt.QUEUE_FULL)
        if entry.expire and cannot_finish(now_s, deadline_s, start_s, least_s):
            return self._refuse(Attempt.EXPIRED)
        entry.state = EntryState.PREPARING
        self._line.append(entry)
        return None

    def ready(self, entry: Entry, now_s: float) -> bool:
        """The entry's input is prepared: it waits for service. False if it has left in the meantime."""
        if entry.state is not EntryState.PREPARING:
            return False
        entry.state = EntryState.WAITING
        entry.ready_s = now_s
        return True

    # leaving before compute

    def leave(self, entry: Entry, attempt: Attempt) -> bool:
        """An entry that is not in service ends with `attempt`. False if it is in service or gone."""
        if entry.state is not EntryState.PREPARING and entry.state is not EntryState.WAITING:
            return False
        self._line.remove(entry)
        entry.state = EntryState.GONE
        self._counts[attempt] += 1
        return True

    def cancel(self, entry: Entry) -> bool:
        """The client has gone. True: the place is free at once. False: in service (it ends CANCELLED then) or gone."""
        if entry.state is EntryState.IN_SERVICE:
            entry.cancelled = True
            return False
        return self.leave(entry, Attempt.CANCELLED)

    def expire(self, now_s: float, least_s: float) -> list[Entry]:
        """Take out every entry that may expire and cannot finish any more, even if it started now."""
        late = [
            entry for entry in self._line if entry.expire and cannot_finish(now_s, entry.deadline_s, now_s, least_s)
        ]
        for entry in late:
            self.leave(entry, Attempt.EXPIRED)
        return late

    def next_expiry_s(self, least_s: float) -> float | None:
        """When `expire` would next find something, if nothing starts until then; None if nothing can expire."""
        if not self._line:
            return None
        return min((entry.deadline_s - least_s for entry in self._line if entry.expire), default=None)

    def end_all(self, attempt: Attempt) -> list[Entry]:
        """The instance dies: everything here, also what is in service, ends with `attempt`."""
        ended = self._in_service + self._line
        for entry in ended:
            entry.state = EntryState.GONE
        self._counts[attempt] += len(ended)
        self._in_service, self._line = [], []
        return ended

    # service

    def start_s(self, free_s: float) -> float | None:
        """Earliest time from free_s on at which the batching rule lets a batch start; None while it has to wait.

        Sees only the entries that are here now; one service at a time.
        """
        line = self._line
        if len(line) < self.minimum or self._in_service:
            return None
        start_s = free_s
        for entry in line[: self.minimum]:
            if entry.state is not EntryState.WAITING:
                return None
            if entry.ready_s > start_s:
                start_s = entry.ready_s
        return start_s

    def start(self, start_s: float) -> list[Entry]:
        """Put the next batch into service at `start_s`, of those who were ready by then. Empty: the rule says wait."""
        waiting = 0
        for entry in self._line:
            if entry.state is not EntryState.WAITING or entry.ready_s > start_s:
                break
            waiting += 1
        size = 0 if self._in_service else batch_size(waiting, self.minimum, self.maximum)
        batch, self._line = self._line[:size], self._line[size:]
        for entry in batch:
            entry.state = EntryState.IN_SERVICE
        if batch:
            self._in_service = batch
        return batch

    def finish(self, now_s: float, failed: bool = False) -> list[tuple[Entry, Attempt]]:
        """The batch in service has ended at `now_s`: each of its entries with how it ended, in order."""
        ended = []
        for entry in self._in_service:
            if entry.cancelled:
                attempt = Attempt.CANCELLED
            elif failed:
                attempt = Attempt.FAILED
            else:
                attempt = Attempt.LATE if now_s > entry.deadline_s else Attempt.OK
            entry.state = EntryState.GONE
            self._counts[attempt] += 1
            ended.append((entry, attempt))
        self._in_service = []
        return ended

    # reading

    @property
    def length(self) -> int:
        """Places taken: preparing, waiting and in service."""
        return len(self._line) + len(self._in_service)

    @property
    def not_started(self) -> int:
        """Entries that are still to be served: preparing and waiting."""
        return len(self._line)

    @property
    def in_service(self) -> int:
        """Size of the batch in service, 0 when idle."""
        return len(self._in_service)

    @property
    def head_arrived_s(self) -> float:
        """When the entry that is next in line arrived; infinity when there is none."""
        return self._line[0].arrived_s if self._line else float("inf")

    @property
    def counts(self) -> tuple[int, ...]:
        """Ended attempts by `Attempt` code."""
        return tuple(self._counts)

    def ages_s(self, now_s: float) -> tuple[float, ...]:
        """Time since arrival of everything here, in service first, then in order (Tan 3.1.3: φ₁ … φ_l)."""
        return tuple([now_s - entry.arrived_s for entry in self._in_service + self._line])

    def statistics(self) -> QueueStatistics:
        """The queue at this moment."""
        waiting = sum(1 for entry in self._line if entry.state is EntryState.WAITING)
        return QueueStatistics(
            capacity=self.capacity,
            minimum=self.minimum,
            maximum=self.maximum,
            preparing=len(self._line) - waiting,
            waiting=waiting,
            in_service=len(self._in_service),
            arrived=self.arrived,
            counts=self.counts,
        )

    def _refuse(self, attempt: Attempt) -> Attempt:
        self._counts[attempt] += 1
        return attempt
