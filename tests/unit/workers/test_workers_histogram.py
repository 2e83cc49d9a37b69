"""The histogram that workers keep of queueing and service times."""

import pytest

from workers.histogram import TIME_BOUNDS_S, Histogram


def test_histogram_counts_by_bucket() -> None:
    """A value on a bound belongs to it, as in Prometheus; one beyond all belongs to the open bucket."""
    histogram = Histogram()
    for value_s in (0.0, 0.001, 0.0011, 99.0):
        histogram.observe(value_s)
    reading = histogram.statistics()
    assert len(reading.counts) == len(TIME_BOUNDS_S) + 1
    assert (reading.counts[0], reading.counts[1], reading.counts[-1], sum(reading.counts)) == (2, 1, 1, 4)
    assert reading.total_s == pytest.approx(99.0021)
