"""A service's queues as a router would fill them: a small queueing model in plain Python, run beside the live system.

It lets a router be *shadowed*: it decides from the replica's own queues, which its own decisions have filled, and
nobody is served by it. Arrivals are those that the live system counted; within a slot their times are drawn uniformly,
which is exact for Poisson arrivals whose number is known. Service times are deterministic at the live estimates, one
request at a time: batching is not modelled. Serving machines have no numba, so this is not the compiled simulator; a
test holds the two together.

All mutable state: the queues, the central queue, the table, the counts.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from policies.routing.contract import (
    HOLD,
    Action,
    FloatArray,
    InstanceKind,
    Observation,
    Rule,
    masked,
    observation_of,
)
from policies.routing.draw import cumulative
from policies.routing.estimation import arrive, depart, new_margin
from policies.routing.rules import cannot_finish


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


class Replica:
    """Queues of `kinds` from idle at `now_s`. `rule`: a per-request rule; None: tables, set by `set_table`.

    expire: drop what cannot finish in time, on arrival. promise: share of violations that `deadline` plans with.
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
        self._requirement_s = requirement_s
        self._rule = rule
        self._expire = expire
        self._margin = new_margin(promise)
        n = len(self.kinds)
        self._held: list[deque[tuple[float, float, float]]] = [deque() for _ in range(n)]  # arrived, started, finishes
        self._length, self._clear_s = [0] * n, [now_s] * n
        self._service_s = [kind.service_s for kind in self.kinds]
        self._rank = [kind.rank for kind in self.kinds]
        self._capacity = [kind.capacity for kind in self.kinds]
        self._central: deque[float] = deque()
        self._sums: list[float] = []
        self._counts = Counts()

    def learn(self, kinds: Sequence[InstanceKind], ready: Sequence[bool]) -> None:
        """Takes over what the live system says of the same instances: service times, and who may be routed to."""
        self.kinds = tuple(kinds)
        self._service_s = [kind.service_s for kind in self.kinds]
        self._capacity = [kind.capacity if one else 0 for kind, one in zip(self.kinds, ready, strict=True)]

    def set_table(self, action: Action) -> FloatArray:
        """The table from now on, masked by who is ready; gives back its weights."""
        ready = np.array([places > 0 for places in self._capacity])
        weights = masked(action.probabilities, ready)
        self._sums = cumulative(weights.tolist()) if weights.sum() > 0.0 else []
        return weights

    def observe(self, phase: int = -1) -> Observation:
        """What a policy would see of the replica now."""
        serving = [held[0] if held and held[0][1] <= self.now_s else None for held in self._held]
        return observation_of(
            length=self._length,
            elapsed_s=[self.now_s - one[1] if one else 0.0 for one in serving],
            ages_s=[[self.now_s - arrived_s for arrived_s, _, _ in held] for held in self._held],
            in_service=[1 if one else 0 for one in serving],
            ready=[places > 0 for places in self._capacity],
            phase=phase,
        )

    def run(self, arrivals: int, until_s: float, rng: np.random.Generator) -> Counts:
        """That many arrivals between now and `until_s`, and everything that they lead to by then.

        A request counts when it is placed or refused: its end is known from then on.
        """
        for at_s in np.sort(self.now_s + rng.random(arrivals) * (until_s - self.now_s)).tolist():
            self._advance(at_s, rng)
            self._counts.requests += 1
            self._route(at_s, at_s, rng.random())
        self._advance(until_s, rng)
        counts, self._counts = self._counts, Counts()
        return counts

    def _advance(self, until_s: float, rng: np.random.Generator) -> None:
        """Everything that finishes by `until_s`, in order, and who of the central queue starts then."""
        while True:
            first = min(range(len(self._held)), key=lambda i: self._held[i][0][2] if self._held[i] else np.inf)
            if not self._held[first] or self._held[first][0][2] > until_s:
                break
            _, _, self.now_s = self._held[first].popleft()
            depart(self.now_s, first, len(self._held[first]), self._length, self._clear_s, self._service_s)
            if self._held[first]:
                self._clear_s[first] = self._held[first][-1][2]
            if self._central:
                self._route(self._central.popleft(), self.now_s, rng.random(), waited=True)
        self.now_s = until_s

    def _route(self, arrived_s: float, now_s: float, draw: float, *, waited: bool = False) -> None:
        if self._rule is None:
            i = bisect_right(self._sums, draw) if self._sums else HOLD - 1
        else:
            budget_s = arrived_s + self._requirement_s - now_s
            i = self._rule(
                now_s, budget_s, draw, self._length, self._capacity, self._clear_s, self._service_s, self._rank,
                self._margin,
            )  # fmt: skip
        if i == HOLD and len(self._central) + sum(self._length) < sum(self._capacity):
            (self._central.appendleft if waited else self._central.append)(arrived_s)
            return
        if i < 0 or self._length[i] >= self._capacity[i]:
            self._counts.refused += 1
            self._counts.heavy += i >= 0 and self._rank[i] == 0
            return
        self._counts.heavy += self._rank[i] == 0
        start_s = max(now_s, self._clear_s[i])
        if self._expire and cannot_finish(now_s, arrived_s + self._requirement_s, start_s, self._service_s[i]):
            self._counts.refused += 1
            return
        arrive(now_s, i, self._length, self._clear_s, self._service_s)
        finish_s = start_s + self._service_s[i]
        self._held[i].append((arrived_s, start_s, finish_s))
        if finish_s <= arrived_s + self._requirement_s:
            self._counts.in_time += 1
            self._counts.goodput += self.kinds[i].accuracy
        else:
            self._counts.late += 1
