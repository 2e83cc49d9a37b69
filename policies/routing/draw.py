"""Drawing an instance from a routing table: cumulative weights with bisection, and the alias method beside it.

Both are built once per table and drawn from once per request. Bisection is the one in use: in plain Python it is
the faster of the two up to hundreds of instances; the alias method's cost does not grow with n.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from math import isfinite

from policies.routing.contract import RoutingError

Draw = Callable[[float], int]
"""draw(u) -> instance number, for u uniform in [0, 1)."""


def checked_weights(weights: Sequence[float]) -> list[float]:
    """The weights as floats summing to 1; an error names the first one that is negative or not finite."""
    values = [float(w) for w in weights]
    for i, w in enumerate(values):
        if not isfinite(w) or w < 0.0:
            raise RoutingError(f"weight of instance {i} is {w}: weights must be finite and at least 0")
    total = sum(values)
    if total <= 0.0:
        raise RoutingError(f"weights {values} sum to {total}: at least one must be above 0")
    return [w / total for w in values]


def cumulative(weights: Sequence[float]) -> list[float]:
    """Cumulative weights for `bisect_right`: the last entry is 1 exactly from the last positive weight on.

    So no rounding can lead to an instance of weight 0: draw with `bisect_right(cumulative, u)`.
    """
    values = checked_weights(weights)
    sums = list(accumulate(values))
    last = max(i for i, w in enumerate(values) if w > 0.0)
    return [min(s, 1.0) if i < last else 1.0 for i, s in enumerate(sums)]


def by_bisection(weights: Sequence[float]) -> Draw:
    """A draw in O(log n) through the cumulative weights."""
    sums = cumulative(weights)

    def draw(u: float) -> int:
        return bisect_right(sums, u)

    return draw


def by_alias(weights: Sequence[float]) -> Draw:
    """A draw in O(1) by the alias method (Kronmal and Peterson 1979; Tan 3.1.4), one uniform per draw."""
    values = checked_weights(weights)
    n = len(values)
    scaled = [w * n for w in values]
    threshold = [1.0] * n
    alias = list(range(n))
    small = [i for i, w in enumerate(scaled) if w < 1.0]
    large = [i for i, w in enumerate(scaled) if w >= 1.0]
    while small and large:
        low, high = small.pop(), large[-1]
        threshold[low], alias[low] = scaled[low], high
        scaled[high] -= 1.0 - scaled[low]
        if scaled[high] < 1.0:
            small.append(large.pop())
    # What rounding left over is 1 up to an error, unless it is a weight of 0: that one must never be drawn.
    heaviest = max(range(n), key=values.__getitem__)
    for i in small:
        if values[i] == 0.0:
            threshold[i], alias[i] = 0.0, heaviest

    def draw(u: float) -> int:
        x = u * n
        i = int(x)
        return i if x - i < threshold[i] else alias[i]

    return draw
