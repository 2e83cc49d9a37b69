"""The latest arrivals of this gateway process, kept in memory so that `tidegate record` can turn them into a trace.

The hot path appends one pair; everything else happens when somebody asks. Bounded: who asks too seldom is told how
many were lost.
"""

from collections import deque
from itertools import islice
from typing import Final

import msgspec

KEPT: Final = 65_536
MOST_AT_ONCE: Final = 20_000


class ArrivalsPage(msgspec.Struct, frozen=True):
    """Answer of `GET /v2/tidegate/arrivals?since=N`.

    `gateway` differs for every gateway process and every start; `now_s` and `time_s` are seconds since that start.
    `next` is the `since` of the following question; `lost` arrivals after `since` were no longer kept. `services[i]`
    is what arrived at `time_s[i]`: a service, or the variant that a request was pinned to.
    """

    gateway: str
    now_s: float
    next: int
    lost: int
    time_s: list[float]
    services: list[str]


class Arrivals:
    """A ring of (time, service). State: the ring and how many ever came."""

    def __init__(self, gateway: str, start_s: float, kept: int = KEPT) -> None:
        self._gateway = gateway
        self._start_s = start_s
        self._ring: deque[tuple[float, str]] = deque(maxlen=kept)
        self._count = 0

    def add(self, now_s: float, service: str) -> None:
        """A request for `service` has arrived."""
        self._ring.append((now_s, service))
        self._count += 1

    def page(self, since: int, now_s: float, most: int = MOST_AT_ONCE) -> ArrivalsPage:
        """Arrivals number `since`, `since` + 1, … of this process, at most `most`; negative: only newer."""
        oldest = self._count - len(self._ring)
        since = self._count if since < 0 or since > self._count else since
        first = max(since, oldest)
        taken = list(islice(self._ring, first - oldest, first - oldest + most))
        return ArrivalsPage(
            gateway=self._gateway,
            now_s=round(now_s - self._start_s, 6),
            next=first + len(taken),
            lost=first - since,
            time_s=[round(arrived_s - self._start_s, 6) for arrived_s, _ in taken],
            services=[service for _, service in taken],
        )
