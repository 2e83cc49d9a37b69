"""What one more request would add to the work of instances that serve several together, as `deadline` forecasts it.

Only for instances of which `deadline` may choose how many they serve together (`choosable`); the others add their
service time, as always. The arithmetic is `policies.routing.estimation`'s and the size of the largest batch
`policies.routing.rules.largest_batch`'s: the worker calls the same function with the margin in the frame, and the
simulator both. Synchronous and free of sockets.

All mutable state: the two lists.
"""

from collections.abc import Sequence

from policies.routing.estimation import arrive_batched, depart_batched
from policies.routing.rules import largest_batch

BatchTimes = tuple[float, float, float]
"""Seconds that batches of 1, 3 and 5 take."""


def choosable(batch: tuple[int, int], batch_s: BatchTimes | None) -> BatchTimes | None:
    """What `deadline` chooses from under the deployment's limits, None if there is no choice: only from 1 on.

    A size that the deployment forbids saves nothing, and so is never chosen.
    """
    if batch_s is None or batch[0] != 1 or batch[1] == 1 or batch_s[0] <= 0.0:
        return None
    one_s, three_s, five_s = batch_s
    return one_s, three_s if batch[1] >= 3 else 3.0 * one_s, five_s if batch[1] >= 5 else 5.0 * one_s


class BatchForecast:
    """Lists beside the router's own: `added_s` is what a rule is given in place of `service_s`."""

    def __init__(self, times_s: Sequence[BatchTimes | None], service_s: Sequence[float], length: Sequence[int]) -> None:
        self.times_s = list(times_s)
        self.added_s = list(service_s)
        self.serving = [min(held, 1) for held in length]

    def sent(
        self, index: int, now_s: float, budget_s: float, margin: float, length: list[int], clear_s: list[float],
        service_s: list[float],
    ) -> int:  # fmt: skip
        """A request goes to the instance; how many that will then serve together, at most."""
        maximum, full_s = self._largest(index, service_s[index], length[index] + 1, budget_s, margin)
        arrive_batched(now_s, index, maximum, full_s, length, clear_s, self.added_s, self.serving)
        return maximum

    def answered(
        self, index: int, now_s: float, budget_s: float, margin: float, remaining: int, batch: int, elapsed_s: float,
        length: list[int], clear_s: list[float], service_s: list[float],
    ) -> None:  # fmt: skip
        """The instance holds `remaining`, `batch` of them in service since elapsed_s."""
        one_s = service_s[index]
        batch = min(batch, remaining)
        maximum, full_s = self._largest(index, one_s, remaining, budget_s, margin)
        left_s = max(0.0, one_s * self.times(index, batch) - elapsed_s) if batch else 0.0
        depart_batched(
            now_s, index, remaining, batch, left_s, maximum, one_s, full_s, length, clear_s, self.added_s, self.serving
        )

    def times(self, index: int, size: int) -> float:
        """How many times one request's service time a batch of `size` takes at the instance."""
        times_s = self.times_s[index]
        if times_s is None or size <= 1:
            return 1.0
        return times_s[1 if size <= 3 else 2] / times_s[0]

    def _largest(self, index: int, one_s: float, held: int, budget_s: float, margin: float) -> tuple[int, float]:
        if self.times_s[index] is None:
            return 1, one_s
        three_s, five_s = one_s * self.times(index, 3), one_s * self.times(index, 5)
        maximum = largest_batch(one_s, three_s, five_s, held, budget_s, margin)
        return maximum, (one_s, three_s, five_s)[maximum >> 1]
