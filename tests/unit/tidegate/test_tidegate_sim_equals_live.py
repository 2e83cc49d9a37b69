"""What a live run is worth in expectation: accuracy of those in time, over all that count."""

import numpy as np
import pytest

from loadgen.answers import Outcome
from loadgen.record import RunRecord
from tidegate.routing_sim_equals_live import live_figures


def test_goodput_is_expected_and_every_request_that_counts_is_in_the_denominator() -> None:
    outcome = np.array(
        [Outcome.OK, Outcome.OK, Outcome.LATE, Outcome.QUEUE_FULL, Outcome.CANCELLED, Outcome.OK], dtype=np.int8
    )
    n = len(outcome)
    record = RunRecord(
        intended_s=np.arange(n, dtype=np.float64),
        sent_s=np.arange(n, dtype=np.float64),
        done_s=np.arange(n, dtype=np.float64) + 0.1,
        outcome=outcome,
        service_s=np.full(n, 0.01),
        correct=np.array([0] * n, dtype=np.int8),
        rank=np.array([0, 1, 0, -1, -1, 1], dtype=np.int8),
        variant=np.array([0, 1, 0, -1, -1, 1], dtype=np.int16),
        instance=np.array([0, 1, 0, -1, -1, 1], dtype=np.int16),
        variants=("heavy", "light"),
        instances=("a", "b"),
        phase=np.array([0, 0, 0, 0, 0, 1], dtype=np.int16),
        phase_names=("bursty", "normal"),
        end_s=6.0,
        planned=n,
    )
    accuracy = {"heavy": 0.8, "light": 0.6}
    overall = live_figures(record, accuracy, "overall")
    assert overall.goodput_ratio == pytest.approx((0.8 + 0.6 + 0.6) / 5), "labels do not matter"
    assert overall.violation_ratio == pytest.approx(2 / 5)
    bursty = live_figures(record, accuracy, "bursty")
    assert bursty.goodput_ratio == pytest.approx((0.8 + 0.6) / 4)
    assert bursty.violation_ratio == pytest.approx(2 / 4)
    assert live_figures(record, accuracy, "normal").goodput_ratio == pytest.approx(0.6)
