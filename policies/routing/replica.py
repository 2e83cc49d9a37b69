"""A service's queues as a router would fill them: the live queue and its laws, served by arithmetic instead of devices.

It lets a router be *shadowed*: it decides from the replica's own queues, which its own decisions have filled, and
nobody is served by it. Arrivals are those that the live system counted; within a slot their times are drawn uniformly,
which is exact for Poisson arrivals whose number is known. Queues, batches, expiry, forecasts and the learned margin are
the worker's and the gateway's own (`queueing.py`, `service_time.py`, `batch_forecast.py`, `rules.py`, `estimation.py`);
service times are deterministic at the live estimates. One gateway, whose view is exact, so nothing is bounced; one
device per instance. Serving machines have no numba, so this is not the compiled simulator; tests/parity holds the two
together, request by request.

All mutable state: the queues and what they are serving, what the gateway believes, the central queue, the table, the
counts.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from policies.routing.batch_forecast import BatchForecast, choosable
from policies.routing.contract import (
    BATCH_SIZES,
    HOLD,
    REJECT,
    Action,
    FloatArray,
    InstanceKind,
    Observation,
    Rule,
    masked,
    observation_of,
)
from policies.routing.draw import cumulative
from policies.routing.estimation import arrive, depart, learn_margin, learn_spent, learn_tail, new_margin
from policies.routing.queueing import BoundedQueue, Entry
from policies.routing.rules import deadline
from policies.routing.service_time import ServiceTimes
from protocol.outcomes import Attempt

Draw = Callable[[], float]
"""The next number of a stream that is uniform in [0, 1)."""


@dataclass(slots=True)
class Counts:
    """What became of the requests of some span; `goodput` sums accuracy over those in time."""

    requests: int = 0
    in_time: int = 0
    late: int = 0
    refused: int = 0
    heavy: int = 0
    goodput: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    @property
    def goodput_ratio(self) -> float:
        """Expected correct answers in time, over all requests; 0 without any."""
        return self.goodput / self.requests if self.requests else 0.0

    @property
    def violation_ratio(self) -> float:
        """Late and refused ones, over all requests."""
        return (self.late + self.refused) / self.requests if self.requests else 0.0

    @property
    def heavy_ratio(self) -> float:
        """Requests given to the heaviest variant, over all requests."""
        return self.heavy / self.requests if self.requests else 0.0


class _Request(Entry):
    """One request in a queue. foreseen_s: the sojourn that was forecast when it was sent."""

    __slots__ = ("foreseen_s",)

    def __init__(self, arrived_s: float, deadline_s: float, expire: bool, foreseen_s: float) -> None:
        super().__init__(arrived_s, deadline_s, expire=expire)
        self.foreseen_s = foreseen_s


class Replica:
    """Queues of `kinds` from idle at `now_s`. `rule`: a per-request rule; None: tables, set by `set_table`.

    expire: drop what cannot finish in time. promise: share of violations that `deadline` plans with; its margin starts
    as a gateway's that has learned nothing yet.
    """

    def __init__(
        self,
        kinds: Sequence[InstanceKind],
        requirement_s: float,
        *,
        rule: Rule | None = None,
        expire: bool = False,
        promise: float = 0.02,
        now_s: float = 0.0,
    ) -> None:
        self.kinds = tuple(kinds)
        self.now_s = now_s
        self.margin = new_margin(promise, max(kind.service_s for kind in kinds) / requirement_s)
        self._requirement_s = requirement_s
        self._rule = rule
        self._learns = rule is deadline
        self._expire = expire
        n = len(self.kinds)
        self._queues = [BoundedQueue(kind.capacity, *kind.batch) for kind in self.kinds]
        for queue in self._queues:
            queue.open()
        self._started_s, self._ends_s = [now_s] * n, [inf] * n
        self._rank = [kind.rank for kind in self.kinds]
        self._length, self._clear_s = [0] * n, [now_s] * n
        self._service_s = [kind.service_s for kind in self.kinds]
        times_s = [choosable(kind.batch, kind.batch_s) for kind in self.kinds]
        choosing = self._learns and any(times_s)
        self._forecast = BatchForecast(times_s, self._service_s, self._length) if choosing else None
        self._central: deque[float] = deque()
        self._sums: list[float] = []
        self._counts = Counts()
        self.learn(kinds, [True] * n)

    def learn(self, kinds: Sequence[InstanceKind], ready: Sequence[bool]) -> None:
        """Takes over what the live system says of the same instances: service times, and who may be routed to."""
        for queue, kind, before in zip(self._queues, kinds, self.kinds, strict=True):
            queue.capacity = kind.capacity
            if kind.batch != before.batch:
                queue.set_batch_limits(*kind.batch)
        self.kinds = tuple(kinds)
        self._service_s = [kind.service_s for kind in self.kinds]
        self._times = [_times_of(kind) for kind in self.kinds]
        if self._forecast is not None:
            self._forecast.times_s = [choosable(kind.batch, kind.batch_s) for kind in self.kinds]
        self._capacity = [kind.capacity if one else 0 for kind, one in zip(self.kinds, ready, strict=True)]

    def set_table(self, action: Action) -> FloatArray:
        """The table and batch limits from now on, masked by who is ready; gives back its weights."""
        ready = np.array([places > 0 for places in self._capacity])
        weights = masked(action.probabilities, ready)
        self._sums = cumulative(weights.tolist()) if weights.sum() > 0.0 else []
        for i, (queue, kind) in enumerate(zip(self._queues, self.kinds, strict=True)):
            limited = kind.rank < len(action.minimum)
            limits = (action.minimum[kind.rank], action.maximum[kind.rank]) if limited else kind.batch
            queue.set_batch_limits(*limits)
            if self._ends_s[i] == inf and queue.not_started:  # it has waited for company, perhaps for long enough
                self._end(i, self._start(i, self.now_s), self.now_s)
        return weights

    def observe(self, phase: int = -1) -> Observation:
        """What a policy would see of the replica now."""
        serving = [queue.in_service for queue in self._queues]
        return observation_of(
            length=[queue.length for queue in self._queues],
            elapsed_s=[self.now_s - self._started_s[i] if batch else 0.0 for i, batch in enumerate(serving)],
            ages_s=[queue.ages_s(self.now_s) for queue in self._queues],
            in_service=serving,
            ready=[places > 0 for places in self._capacity],
            phase=phase,
        )

    def run(self, arrivals: int, until_s: float, rng: np.random.Generator) -> Counts:
        """That many arrivals between now and `until_s`, and what has ended by then."""
        times_s = np.sort(self.now_s + rng.random(arrivals) * (until_s - self.now_s))
        return self.serve(times_s.tolist(), until_s, rng.random)

    def serve(self, times_s: Iterable[float], until_s: float, draw: Draw) -> Counts:
        """Arrivals at these times, none decreasing, from now to `until_s`, and what has ended by then.

        A request counts where it ends, as the workers count.
        """
        for at_s in times_s:
            self._advance(at_s, draw)
            self._route(at_s, at_s, draw())
        self._advance(until_s, draw)
        counts, self._counts = self._counts, Counts()
        return counts

    def _advance(self, until_s: float, draw: Draw) -> None:
        """Every batch that ends by `until_s`, in order, and who starts then."""
        while (now_s := min(self._ends_s)) <= until_s:
            i = self._ends_s.index(now_s)
            if self._learns:
                learn_tail(self._service_s[i], self._service_s[i], self.margin)
            ended: list[tuple[Entry, Attempt]] = self._queues[i].finish(now_s)
            self._ends_s[i] = inf
            self._end(i, ended + self._start(i, now_s), now_s)
            if self._central and self._ends_s[i] == inf:
                self._route(self._central.popleft(), now_s, draw(), waited=True)
        self.now_s = until_s

    def _start(self, i: int, now_s: float) -> list[tuple[Entry, Attempt]]:
        """Instance i, idle, starts a batch if the rule lets it; gives back what is dropped before."""
        queue, times = self._queues[i], self._times[i]
        dropped = queue.expire(now_s, times.least_s) if self._expire else []
        if batch := queue.start(now_s):
            self._started_s[i], self._ends_s[i] = now_s, now_s + times.mean_s(len(batch))
        return [(entry, Attempt.EXPIRED) for entry in dropped]

    def _route(self, arrived_s: float, now_s: float, draw: float, *, waited: bool = False) -> None:
        i = self._choose(arrived_s + self._requirement_s - now_s, now_s, draw)
        if i == HOLD and len(self._central) + sum(self._length) < sum(self._capacity):
            (self._central.appendleft if waited else self._central.append)(arrived_s)
            return
        if i < 0:
            self._count(i, arrived_s, Attempt.QUEUE_FULL if i == HOLD else Attempt.UNAVAILABLE, now_s)
            return
        queue, foreseen_s = self._queues[i], self._sent(i, now_s)
        request = _Request(arrived_s, arrived_s + self._requirement_s, self._expire, foreseen_s)
        backlog_s = self._backlog_s(i, now_s) if self._expire else 0.0
        refused = queue.arrive(request, now_s + backlog_s, 0.0, self._times[i].least_s)
        if refused is not None:
            self._end(i, [(request, refused)], now_s)
            return
        queue.ready(request, now_s)
        if self._ends_s[i] == inf:
            self._end(i, self._start(i, now_s), now_s)

    def _choose(self, budget_s: float, now_s: float, draw: float) -> int:
        if self._rule is None:
            return bisect_right(self._sums, draw) if self._sums else REJECT
        added_s = self._service_s if self._forecast is None else self._forecast.added_s
        return self._rule(
            now_s, budget_s, draw, self._length, self._capacity, self._clear_s, added_s, self._rank, self.margin
        )

    def _backlog_s(self, i: int, now_s: float) -> float:
        queue = self._queues[i]
        rest_s = self._ends_s[i] - now_s if queue.in_service else 0.0
        return rest_s + self._times[i].drain_s(queue.not_started, queue.minimum, queue.maximum)

    # what the gateway believes

    def _sent(self, i: int, now_s: float) -> float:
        """A request goes to instance i: the sojourn forecast; where `deadline` chooses batches, so many from now on."""
        if self._rule is None:
            return 0.0
        if self._forecast is None:
            arrive(now_s, i, self._length, self._clear_s, self._service_s)
        else:
            largest = self._forecast.sent(
                i, now_s, self._requirement_s, self.margin[0], self._length, self._clear_s, self._service_s
            )
            if self._forecast.times_s[i] is not None:
                self._queues[i].set_batch_limits(1, largest)
        return self._clear_s[i] - now_s

    def _told(self, i: int, now_s: float) -> None:
        """The gateway learns what instance i holds now."""
        queue = self._queues[i]
        if self._forecast is None:
            depart(now_s, i, queue.length, self._length, self._clear_s, self._service_s)
            return
        batch, elapsed_s = queue.in_service, now_s - self._started_s[i]
        self._forecast.answered(
            i, now_s, self._requirement_s, self.margin[0], queue.length, batch, elapsed_s,
            self._length, self._clear_s, self._service_s,
        )  # fmt: skip

    # endings

    def _end(self, i: int, ended: Sequence[tuple[Entry, Attempt]], now_s: float) -> None:
        """These requests of instance i end at now_s, and the gateway hears of it."""
        for entry, attempt in ended:
            self._count(i, entry.arrived_s, attempt, now_s)
            if self._learns and isinstance(entry, _Request):
                served = attempt is Attempt.OK or attempt is Attempt.LATE
                sojourn_s = now_s - entry.arrived_s if served else inf
                learn_margin(entry.foreseen_s, sojourn_s, self._requirement_s, self.margin)
                learn_spent(sojourn_s, self._requirement_s, self.margin)
        if ended and self._rule is not None:
            self._told(i, now_s)

    def _count(self, i: int, arrived_s: float, attempt: Attempt, now_s: float) -> None:
        """One request has ended at instance i, or (below 0) before any. Tests listen here."""
        counts = self._counts
        counts.requests += 1
        counts.heavy += i >= 0 and self._rank[i] == 0
        if attempt is Attempt.OK:
            counts.in_time += 1
            counts.goodput += self.kinds[i].accuracy
        elif attempt is Attempt.LATE:
            counts.late += 1
        else:
            counts.refused += 1


def _times_of(kind: InstanceKind) -> ServiceTimes:
    """What the worker says of its service times; sizes that it does not know follow from those that it does."""
    times = ServiceTimes()
    for size, duration_s in zip(BATCH_SIZES, kind.batch_s or (kind.service_s,), strict=False):
        times.observe(size, duration_s)
    return times
