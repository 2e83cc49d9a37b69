"""What a request takes beyond the environment's prediction: decoding, re-encoding, sockets, queues on links.

The environment knows nothing of it, so the time is taken off the deadline before the policy decides: else whatever is
placed with a little time to spare would be late. Learned from answers, forgotten soon, for refused requests teach
nothing.
"""

from collections import deque
from typing import Final

KEPT: Final = 64
OLDEST_S: Final = 10.0
QUANTILE: Final = 0.9


class Overhead:
    """The latest spans between prediction and answer, in seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=KEPT)

    def learn(self, now_s: float, beyond_s: float) -> None:
        """An answer came so much after it was predicted to."""
        self._seen.append((now_s, beyond_s))

    def allowance_s(self, now_s: float, left_s: float) -> float:
        """What to keep of the time left: enough for nine of ten requests of late, never more than half of it."""
        recent = sorted(beyond_s for at_s, beyond_s in self._seen if now_s - at_s <= OLDEST_S)
        if not recent:
            return 0.0
        return min(max(0.0, recent[min(len(recent) - 1, int(QUANTILE * len(recent)))]), left_s / 2)
