"""When slots start: at whole multiples of their length on the monotonic clock.

Nothing drifts, loops of one slot length decide at the same moments, and on one machine anybody who can read that clock
knows when a slot starts: `tidegate bench tables` measures from there, `tidegate routing sim-equals-live` simulates so.
"""

import math
from typing import Final

COARSENESS_S: Final = 0.0005
"""A loop's clock counts milliseconds: a moment this close before a start is taken for that start."""


def slot_start_s(after_s: float, slot_s: float) -> float:
    """The first start of a slot after `after_s`."""
    return (math.floor((after_s + COARSENESS_S) / slot_s) + 1) * slot_s
