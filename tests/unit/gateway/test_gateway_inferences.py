"""Sums by model for the Open Inference Protocol: batches share an execution, one name is counted once."""

import msgspec
import pytest

from gateway.inferences import Inferences, InferenceTimes
from protocol.outcomes import Attempt
from protocol.records import Reply, Status


def reply(batch: int) -> Reply:
    return Reply(
        Attempt.OK, Status("w/light"), prepare_s=0.001, queue_s=0.02, service_s=0.003, batch=batch
    )  # fmt: skip


def told(inferences: Inferences, name: str) -> tuple[object, object, InferenceTimes]:
    """Requests, executions, times."""
    entry = inferences.of(name)
    return (
        entry["inference_count"],
        entry["execution_count"],
        msgspec.convert(msgspec.to_builtins(entry["inference_stats"]), InferenceTimes),
    )


def test_who_was_served_together_shares_an_execution() -> None:
    inferences = Inferences()
    for batch in (3, 3, 3, 1, 5, 5, 5, 5, 5):
        inferences.add("pets", "light", 0.025, reply(batch))
    for name in ("pets", "light"):
        count, executions, times = told(inferences, name)
        assert (count, executions) == (9, 3)
        assert times.success.count == times.queue.count == 9
        spans = (times.success, times.queue, times.compute_input, times.compute_infer)
        assert [one.ns for one in spans] == pytest.approx([9 * ms * 1_000_000 for ms in (25, 20, 1, 3)], abs=9)
    last_inference = inferences.of("pets")["last_inference"]
    assert isinstance(last_inference, int)
    assert last_inference > 1_600_000_000_000, "milliseconds since 1970"


def test_a_service_that_is_called_as_its_variant_is_counted_once() -> None:
    inferences = Inferences()
    inferences.add("light", "light", 0.025, reply(1))
    inferences.add_failure("light", "light")
    count, executions, times = told(inferences, "light")
    assert (count, executions, times.fail.count) == (1, 1, 1)


def test_a_failure_counts_for_the_service_and_for_a_variant_that_was_pinned() -> None:
    inferences = Inferences()
    inferences.add_failure("pets", "")
    inferences.add_failure("pets", "light")
    assert [told(inferences, name)[2].fail.count for name in ("pets", "light", "heavy")] == [2, 1, 0]
    assert told(inferences, "heavy")[:2] == (0, 0)
