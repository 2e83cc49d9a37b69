"""Batches by the `deadline` router's choice: the instance follows the margin in the frame."""

import pytest

from policies.routing.batch_forecast import choosable
from protocol.outcomes import Attempt
from protocol.records import BOUNCE, Infer, InstanceSpec
from workers.instance import Instance, Request, Site


def instance(batch: tuple[int, int], times_s: dict[int, float] | None = None) -> Instance:
    made = Instance("a/v", InstanceSpec(variant="v", batch=batch), "s")
    for size, duration_s in (times_s or {1: 0.043, 3: 0.0946, 5: 0.1462}).items():
        made.times.observe(size, duration_s)
    made.queue.open()
    return made


def request(margin: float = 1.0, flags: int = BOUNCE, budget_s: float = 0.3) -> Request:
    return Request(Infer("a/v", budget_s, flags=flags, margin=margin), b"", 0.0, 1, lambda *_: None)


@pytest.mark.parametrize(
    ("batch", "margin", "largest"), [((1, 5), 1.0, 5), ((1, 5), 0.6, 3), ((1, 5), 0.3, 1), ((1, 3), 1.0, 3)]
)
def test_the_largest_batch_follows_the_margin_within_the_deployment(
    batch: tuple[int, int], margin: float, largest: int
) -> None:
    one = instance(batch)
    assert one.admit(request(margin), 0.0) is None
    assert (one.queue.minimum, one.queue.maximum) == (1, largest)


def test_other_routers_get_the_deployments_limits_back() -> None:
    one = instance((1, 5))
    one.admit(request(0.3), 0.0)
    assert one.queue.maximum == 1
    one.admit(request(flags=0), 0.0)
    assert one.queue.maximum == 5
    one.queue.set_batch_limits(3, 3)
    one.admit(request(flags=0), 0.0)
    assert (one.queue.minimum, one.queue.maximum) == (3, 3), "a table's limits stay"


@pytest.mark.parametrize("batch", [(1, 1), (3, 5)])
def test_a_deployment_that_fixes_sizes_is_left_alone(batch: tuple[int, int]) -> None:
    one = instance(batch)
    one.admit(request(0.3), 0.0)
    assert (one.queue.minimum, one.queue.maximum) == batch
    record = one.record(Site("a", "here", "1"))
    assert record.batch == batch
    assert choosable(record.batch, record.batch_s) is None


def test_a_size_that_the_deployment_forbids_is_registered_and_counts_as_saving_nothing() -> None:
    record = instance((1, 3)).record(Site("a", "here", "1"))
    assert record.batch_s == pytest.approx((0.043, 0.0946, 0.1462))
    assert choosable(record.batch, record.batch_s) == pytest.approx((0.043, 0.0946, 0.215))


def test_nothing_is_registered_before_anything_was_measured() -> None:
    one = Instance("a/v", InstanceSpec(variant="v", batch=(1, 5)), "s")
    assert one.record(Site("a", "here", "1")).batch_s is None


def test_a_newcomer_bounces_where_a_full_batch_would_be_late() -> None:
    one = instance((1, 5))
    assert one.admit(request(), 0.0) is None
    before_s = 0.2 - 0.043  # what the device does before the one that waits, which may end in a batch of five
    assert before_s + 0.1462 > 0.3
    assert one.admit(request(), 0.2) is Attempt.BOUNCED
    assert one.admit(request(), 0.19) is None
