"""The time beyond predictions: nine of ten of the latest fit in, old ones are forgotten, half of the time is left."""

import pytest

from gateway.edge_overhead import KEPT, OLDEST_S, Overhead


def test_nothing_is_kept_before_anything_was_learned() -> None:
    assert Overhead().allowance_s(0.0, 1.0) == 0.0


def test_nine_of_ten_fit_and_half_of_the_time_is_left() -> None:
    overhead = Overhead()
    for hundredth in range(50):
        overhead.learn(1.0, hundredth / 100)
    assert overhead.allowance_s(1.0, 10.0) == pytest.approx(0.45)
    assert overhead.allowance_s(1.0, 0.5) == 0.25


def test_answers_before_their_time_take_nothing_away() -> None:
    overhead = Overhead()
    overhead.learn(1.0, -0.3)
    assert overhead.allowance_s(1.0, 1.0) == 0.0


def test_what_is_old_or_beyond_the_latest_is_forgotten() -> None:
    overhead = Overhead()
    overhead.learn(1.0, 5.0)
    assert overhead.allowance_s(1.0 + OLDEST_S, 20.0) == 5.0
    assert overhead.allowance_s(1.1 + OLDEST_S, 20.0) == 0.0
    for _ in range(KEPT):
        overhead.learn(2.0, 0.1)
    assert overhead.allowance_s(2.0, 20.0) == 0.1
