"""Service time estimates: what is learned, what is made of sizes never seen, and how long a line takes."""

import pytest

from policies.routing.service_time import RATE, ServiceTimes


def test_the_estimate_follows_a_change() -> None:
    """From 1 s towards 2 s: what remains of the difference after n observations is (1 - rate)^n."""
    times = ServiceTimes()
    times.observe(1, 1.0)
    for _ in range(20):
        times.observe(1, 2.0)
    assert times.mean_s(1) == pytest.approx(2.0 - (1.0 - RATE) ** 20)
    assert times.least_s == 1.0


def test_sizes_never_seen() -> None:
    """Above what is known: in proportion, which is at worst too long. Below: as long as the next larger."""
    times = ServiceTimes()
    assert times.mean_s(3) == 0.0
    times.observe(3, 0.6)
    assert times.mean_s(5) == pytest.approx(1.0)
    assert times.mean_s(1) == 0.6
    times.observe(1, 0.3)
    assert times.mean_s(2) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("waiting", "limits", "batches"),
    [
        (0, (1, 1), []),
        (4, (1, 1), [1, 1, 1, 1]),
        (9, (1, 5), [5, 3, 1]),
        (7, (3, 3), [3, 3, 1]),  # the last one alone: it will not be alone for ever
        (4, (5, 5), [4]),
    ],
)
def test_how_long_a_line_takes(waiting: int, limits: tuple[int, int], batches: list[int]) -> None:
    """Against the batches written out by hand."""
    times = ServiceTimes()
    for size in (1, 3, 4, 5):
        times.observe(size, 0.4 + 0.6 * size)
    assert times.drain_s(waiting, *limits) == pytest.approx(sum(0.4 + 0.6 * size for size in batches))
