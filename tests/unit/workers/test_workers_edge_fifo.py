"""First come, first served at a constant rate: against a queue that is played second by second."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.edge_fifo import Fifo


@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(0.001, 20)), min_size=1, max_size=30),
    st.floats(0.1, 10),
)
def test_times_are_those_of_a_queue_played_job_by_job(jobs: list[tuple[float, float]], rate: float) -> None:
    """Each begins when the one before has ended, or when it comes; what waits is what is unserved at that moment."""
    fifo = Fifo(rate)
    now_s = ended_s = 0.0
    spans = []
    for gap_s, amount in jobs:
        now_s += gap_s
        begins_s = max(now_s, ended_s)
        span = fifo.arrive(amount, now_s)
        assert span.queue_s == pytest.approx(begins_s - now_s, abs=1e-9)
        assert span.service_s == pytest.approx(amount / rate)
        ended_s = begins_s + amount / rate
        assert span.ends_s == pytest.approx(ended_s)
        spans.append((now_s, amount, begins_s))
    for at_s in (now_s, now_s + 0.5 * (ended_s - now_s), ended_s):
        unserved = sum(amount - min(amount, max(0.0, at_s - begins_s) * rate) for _, amount, begins_s in spans)
        assert fifo.waiting(at_s) == pytest.approx(unserved, abs=1e-6)
    assert fifo.busy_s == pytest.approx(sum(amount for _, amount in jobs) / rate)


def test_what_was_not_served_is_given_back() -> None:
    """All of a span that has not begun, the rest of one that has, nothing of one that has ended."""
    fifo = Fifo(2.0)
    first, second, third = (fifo.arrive(4.0, 0.0) for _ in range(3))
    assert (first.ends_s, second.ends_s, third.ends_s) == (2.0, 4.0, 6.0)
    fifo.withdraw(third, 1.0)
    assert fifo.waiting(1.0) == pytest.approx(6.0)
    fifo.withdraw(second, 3.0)
    assert fifo.waiting(3.0) == 0.0
    assert fifo.busy_s == pytest.approx(3.0)
    fifo.withdraw(first, 3.0)
    assert fifo.arrive(1.0, 3.0).queue_s == 0.0


def test_durations_stay_exact_however_long_the_machine_has_been_up() -> None:
    """A clock that has run for a year is coarser than 1e-9 s: durations come from amounts."""
    rng = random.Random(3)
    fifo, now_s = Fifo(1.26), 3.2e7
    total = 0.0
    for _ in range(50):
        amount = rng.uniform(0.001, 0.1)
        span = fifo.arrive(amount, now_s)
        assert span.service_s == pytest.approx(amount / 1.26, abs=1e-12)
        assert span.queue_s == pytest.approx(total / 1.26, abs=1e-6)
        total += amount
