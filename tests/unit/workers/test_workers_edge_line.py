"""What is ahead of a request: by the table's figures, or by what computations really took."""

import pytest

from models.adapt import Configuration
from workers.edge_line import Line
from workers.edge_view import Task

TASK = Task("detection", Configuration(), "small", 100.0, 0.5)


def test_the_emulated_line_is_equation_5() -> None:
    """(A_j I_i + H) / A_k, H being what came before and is not done; what leaves makes room for who comes later."""
    line = Line(2.0, emulated=True)
    turns = [line.arrive(TASK, 1, 0.0) for _ in range(3)]
    assert [turn.waiting_tflop for turn in turns] == pytest.approx([0.0, 0.5, 1.0])
    assert [turn.ends_s for turn in turns] == pytest.approx([0.25, 0.5, 0.75])
    assert turns[2].emulated_queue_s + turns[2].emulated_compute_s == pytest.approx((0.5 + 1.0) / 2.0)
    assert line.waiting_tflop(0.25) == pytest.approx(1.0)
    assert line.late_s(TASK, 0.25, 0.9) == pytest.approx(0.1)
    line.leave(turns[2], 0.25)
    assert line.waiting_tflop(0.25) == pytest.approx(0.5)
    line.computed(turns[0], TASK, 1, 99.0)
    assert line.arrive(TASK, 1, 0.3).emulated_compute_s == pytest.approx(0.25)
    assert line.backlog_s(0.3) == pytest.approx(0.25 + 99.0), "what is really to be computed is another matter"


def test_the_measured_line_learns_by_variant_and_frames() -> None:
    """Before anything ran the table counts; then the running mean; who is running counts for the rest of its time."""
    line = Line(2.0, emulated=False, beside_s=lambda now_s: 0.0 if now_s < 20.0 else 3.0)
    first, second = line.arrive(TASK, 1, 0.0), line.arrive(TASK, 1, 0.0)
    assert [first.waiting_tflop, second.waiting_tflop] == pytest.approx([0.0, 0.5])
    assert second.ends_s == 0.0, "nobody waits longer than the computation takes"
    line.begin(first, 0.0)
    assert line.waiting_tflop(0.1) == pytest.approx(2.0 * (0.15 + 0.25))
    assert line.waiting_tflop(9.0) == pytest.approx(2.0 * 0.25), "one over its time counts as ending"
    line.computed(first, TASK, 1, 1.0)
    third = line.arrive(TASK, 10, 9.0)
    assert third.expected_s == pytest.approx(10.0), "ten frames take ten times as long as one"
    line.leave(second, 9.0)
    assert line.waiting_tflop(9.0) == pytest.approx(2.0 * 10.0)
    assert line.late_s(TASK, 9.0, 0.0) == 0.0
    assert line.waiting_tflop(20.0) == pytest.approx(2.0 * (10.0 + 3.0)), "the device is shared"
    other = Task("detection", Configuration(), "large", 100.0, 3.0)
    assert line.arrive(other, 1, 9.0).expected_s == pytest.approx(1.5)
