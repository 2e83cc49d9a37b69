"""First come, first served at a constant rate: an emulated uplink (Huang, Eq. 3), link (Eq. 4) or node (Eq. 5). Pure.

Amounts are megabits where the rate is a bandwidth and tera-operations where it is a node's capacity. The clock is an
argument; waiting for the times that are given back is the caller's part.
"""

from typing import NamedTuple


class Span(NamedTuple):
    """When one amount is served. Durations come from amounts, not from differences of clock readings: those are coarse.

    `waiting`: what was ahead of it when it came.
    """

    waiting: float
    amount: float
    rate: float
    ends_s: float

    @property
    def queue_s(self) -> float:
        """Time behind others."""
        return self.waiting / self.rate

    @property
    def service_s(self) -> float:
        """Its own time."""
        return self.amount / self.rate


class Fifo:
    """A queue without places whose server never rests. State: when it is free, and what it has served in all."""

    __slots__ = ("_free_s", "busy_s", "rate")

    def __init__(self, rate: float) -> None:
        """`rate`: amount per second, above 0."""
        self.rate = rate
        self.busy_s = 0.0
        """Seconds of service given out since the start."""
        self._free_s = 0.0

    def waiting(self, now_s: float) -> float:
        """What is still to be served: H of Eq. 5 for a node."""
        return max(0.0, self._free_s - now_s) * self.rate

    def ends_s(self, amount: float, now_s: float) -> float:
        """When `amount` would be served if it came now."""
        return max(self._free_s, now_s) + amount / self.rate

    def arrive(self, amount: float, now_s: float) -> Span:
        """Takes its turn behind everything that came before."""
        span = Span(self.waiting(now_s), amount, self.rate, self.ends_s(amount, now_s))
        self._free_s = span.ends_s
        self.busy_s += span.service_s
        return span

    def withdraw(self, span: Span, now_s: float) -> None:
        """What has not been served of a span is given back to who comes next; who came meanwhile keeps its times."""
        unserved_s = min(span.service_s, span.ends_s - now_s)
        if unserved_s > 0.0:
            self._free_s -= unserved_s
            self.busy_s -= unserved_s
