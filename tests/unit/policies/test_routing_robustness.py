"""How `deadline` is compared on services unlike the paper's."""

import pytest

from policies.routing.robustness import FIXED_MARGINS, OTHER_SERVICES, PROMISE, OtherService, other_service


def test_a_service_is_what_its_line_says() -> None:
    other = OtherService((120.0, 50.0, 20.0), (1, 2, 3), 400.0, (0.9, 0.8, 0.7))
    model = other.model("gamma", 0.5)
    assert [(kind.rank, kind.service_s, kind.accuracy) for kind in model.kinds] == [
        (0, 0.12, 0.9), *[(1, 0.05, 0.8)] * 2, *[(2, 0.02, 0.7)] * 3,
    ]  # fmt: skip
    assert model.requirement_s == 0.4
    assert other.capacity() == pytest.approx(1 / 0.12 + 2 / 0.05 + 3 / 0.02)


@pytest.mark.parametrize(("load", "kept"), [(0.5, True), (1.3, False)])
def test_the_best_fixed_margin_is_one_that_keeps_the_promise_if_any_does(load: float, kept: bool) -> None:
    learned, margin, best = other_service(OTHER_SERVICES[0], load, "gamma", 0.3, requests=20_000, seed=3)
    assert margin in FIXED_MARGINS
    assert (best.violation_ratio <= PROMISE) is kept
    if kept:
        assert learned.goodput_ratio == pytest.approx(best.goodput_ratio, abs=0.003)


@pytest.mark.parametrize("other", [OTHER_SERVICES[4], OTHER_SERVICES[5]])
def test_heavy_instances_of_varying_service_times_are_not_locked_out(other: OtherService) -> None:
    """A fifth of the requirement each, exponential: with a threshold on learned means this was 1.3 points worse."""
    learned, _, best = other_service(other, 0.6, "gamma", 1.0, requests=100_000, seed=3)
    assert learned.goodput_ratio > best.goodput_ratio - 0.003
    assert learned.violation_ratio < PROMISE
