"""From an action to a table: masked, renormalised, or refused with the reason."""

import numpy as np
import pytest

from policies.routing.contract import Action, InstanceKind, observation_of
from scheduler.config import ConfigError, SchedulerConfig
from scheduler.observe import Seen
from scheduler.publish import UnusableAction, table_from
from scheduler.slots import slot_start_s

RANK = {"heavy": 0, "light": 1}


def seen(*variants: str, ready: list[bool] | None = None) -> Seen:
    """Instances i0, i1, … of these variants, idle."""
    n = len(variants)
    return Seen(
        instances=tuple(f"i{number}" for number in range(n)),
        kinds=tuple(InstanceKind(variant, RANK[variant], 0.01, 0.8) for variant in variants),
        observation=observation_of([0] * n, [0.0] * n, [()] * n, [0] * n, ready if ready is not None else [True] * n),
    )


def test_weights_of_instances_that_are_not_ready_go_to_the_others_in_proportion() -> None:
    action = Action(np.array([0.5, 0.3, 0.2]))
    table = table_from("imagenet", "threshold", seen("heavy", "heavy", "light", ready=[False, True, True]), action, 3.0)
    assert table.instances == ("i0", "i1", "i2")
    assert table.weights == pytest.approx((0.0, 0.6, 0.4))
    assert (table.service, table.policy, table.valid_for_s, table.version) == ("imagenet", "threshold", 3.0, 0)


def test_if_only_others_were_chosen_the_ready_share_equally() -> None:
    table = table_from("s", "p", seen("heavy", "light", "light", ready=[False, True, True]), Action(np.eye(3)[0]), 1.0)
    assert table.weights == pytest.approx((0.0, 0.5, 0.5))


def test_batch_limits_are_named_by_variant() -> None:
    action = Action(np.array([0.5, 0.5]), minimum=(1, 3), maximum=(3, 5))
    assert table_from("s", "p", seen("light", "heavy"), action, 1.0).batch_limits == {"heavy": (1, 3), "light": (3, 5)}
    assert table_from("s", "p", seen("light", "heavy"), Action(np.array([0.5, 0.5])), 1.0).batch_limits == {}


@pytest.mark.parametrize(
    ("weights", "ready", "named"),
    [
        ([0.5], [True, True], "1 weights for 2 instances"),
        ([0.5, -0.1], [True, True], "-0.1 to i1"),
        ([float("nan"), 0.5], [True, True], "nan to i0"),
        ([0.5, float("inf")], [True, True], "inf to i1"),
        ([0.5, 0.5], [False, False], "no instance of s is ready"),
    ],
)
def test_what_is_no_table_is_refused(weights: list[float], ready: list[bool], named: str) -> None:
    with pytest.raises(UnusableAction, match=named):
        table_from("s", "p", seen("heavy", "light", ready=ready), Action(np.array(weights)), 1.0)


@pytest.mark.parametrize("bad", [{"slot_s": 0.0}, {"status_timeout_s": 2.0}, {"metrics_port": -1}, {"board_url": "x"}])
def test_a_bad_setting_is_named_with_its_value(bad: dict[str, object]) -> None:
    [(key, value)] = bad.items()
    with pytest.raises(ConfigError) as caught:
        SchedulerConfig(**{"board_url": "redis://x", **bad})  # type: ignore[arg-type]
    assert key in str(caught.value)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("after_s", "slot_s", "start_s"),
    [(0.0, 1.0, 1.0), (0.2, 1.0, 1.0), (1.0, 1.0, 2.0), (0.9998, 1.0, 2.0), (7.31, 0.1, 7.4), (7.4, 0.1, 7.5)],
)
def test_slots_start_at_whole_multiples(after_s: float, slot_s: float, start_s: float) -> None:
    assert slot_start_s(after_s, slot_s) == pytest.approx(start_s)
