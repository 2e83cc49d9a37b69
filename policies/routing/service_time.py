"""What an instance has learned about its own service times, by batch size. Pure.

The estimate starts from a measurement at warm-up (or an emulated variant's own law) and follows every batch served.
"""

from policies.routing.estimation import learn_service
from policies.routing.rules import batch_size

RATE = 0.1
"""Weight of the newest observation: half forgotten after 7 batches of a size."""
IDLE_RATE = 0.5
"""Weight of a measurement while idle: there are few, and a wrong estimate should not outlive many of them."""


class ServiceTimes:
    """Running mean service time in seconds per batch size, and the least one ever seen."""

    __slots__ = ("_mean_s", "least_s")

    def __init__(self) -> None:
        self._mean_s: dict[int, float] = {}
        self.least_s = 0.0
        """The shortest service time seen, of any batch; 0 before the first."""

    def observe(self, size: int, duration_s: float, rate: float = RATE) -> None:
        """A batch of `size` took `duration_s`; `rate`: the weight of this news."""
        if size not in self._mean_s:
            self._mean_s[size] = duration_s
        else:
            learn_service(size, duration_s, self._mean_s, rate)
        if duration_s < self.least_s or self.least_s == 0.0:
            self.least_s = duration_s

    def mean_s(self, size: int = 1) -> float:
        """Expected service time of a batch of `size`; 0 before the first observation.

        A size never seen is scaled up in proportion from the next smaller one that was (at worst too long), or is
        taken as long as the next larger one.
        """
        known = self._mean_s.get(size)
        if known is not None:
            return known
        smaller = [one for one in self._mean_s if one < size]
        if smaller:
            return self._mean_s[max(smaller)] * size / max(smaller)
        return self._mean_s[min(self._mean_s)] if self._mean_s else 0.0

    def batch_s(self) -> tuple[float, float, float]:
        """Expected times of batches of 1, 3 and 5, Tan's sizes."""
        return self.mean_s(1), self.mean_s(3), self.mean_s(5)

    def drain_s(self, waiting: int, minimum: int, maximum: int) -> float:
        """Expected time to serve `waiting` requests by the batching rule; a remainder below the minimum goes as one."""
        if maximum == 1:
            return waiting * self.mean_s(1)
        total_s = 0.0
        while waiting > 0:
            size = batch_size(waiting, minimum, maximum) or waiting
            total_s += self.mean_s(size)
            waiting -= size
        return total_s
