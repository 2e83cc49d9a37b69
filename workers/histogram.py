"""Counts by bucket: what a Prometheus histogram needs, without its locks on the request's path. Pure."""

import bisect

import msgspec

TIME_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds in seconds; the last bucket is open."""


class HistogramStatistics(msgspec.Struct, frozen=True):
    """`counts` per bucket (not cumulative), one more than `bounds_s`; `total_s` the sum of all observations."""

    bounds_s: tuple[float, ...]
    counts: tuple[int, ...]
    total_s: float


class Histogram:
    """Observations in seconds, counted by bucket; a value on a bound belongs below it."""

    __slots__ = ("_counts", "_total_s")

    def __init__(self) -> None:
        self._counts = [0] * (len(TIME_BOUNDS_S) + 1)
        self._total_s = 0.0

    def observe(self, value_s: float) -> None:
        """Count one observation."""
        self._counts[bisect.bisect_left(TIME_BOUNDS_S, value_s)] += 1
        self._total_s += value_s

    def statistics(self) -> HistogramStatistics:
        """The counts at this moment."""
        return HistogramStatistics(TIME_BOUNDS_S, tuple(self._counts), self._total_s)
