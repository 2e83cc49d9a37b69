"""Drawing from a table: both methods give each instance exactly its weight, and bad tables are named."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from policies.routing.contract import RoutingError, masked
from policies.routing.draw import Draw, by_alias, by_bisection

GRID = 200_000


@pytest.mark.parametrize("method", [by_bisection, by_alias])
@pytest.mark.parametrize("weights", [[1.0], [0.4, 0.4, 0.1, 0.1], [0.0, 3.0, 0.0, 1.0], [0.1] * 7, [1e-9, 1.0]])
def test_each_instance_gets_its_weight(method: Callable[[Sequence[float]], Draw], weights: list[float]) -> None:
    draw = method(weights)
    counts = np.bincount([draw((k + 0.5) / GRID) for k in range(GRID)], minlength=len(weights))
    assert np.allclose(counts / GRID, np.array(weights) / sum(weights), atol=2 * len(weights) / GRID)


@pytest.mark.parametrize("method", [by_bisection, by_alias])
def test_weight_zero_is_never_drawn(method: Callable[[Sequence[float]], Draw]) -> None:
    draw = method([0.0, 0.1, 0.2, 0.7, 0.0])
    seen = {draw(u) for u in (0.0, 1e-300, 0.5, 1.0 - 2**-53)} | {draw(k / 997) for k in range(997)}
    assert seen <= {1, 2, 3}


@pytest.mark.parametrize("weights", [[float("nan"), 1.0], [-0.1, 1.0], [0.0, 0.0], [float("inf")]])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(RoutingError, match="weight"):
        by_bisection(weights)


def test_masking_keeps_proportions_and_falls_back_to_equal_shares() -> None:
    table = np.array([0.5, 0.3, 0.2])
    assert np.allclose(masked(table, np.array([True, False, True])), [5 / 7, 0, 2 / 7])
    assert np.allclose(masked(np.array([1.0, 0.0, 0.0]), np.array([False, True, True])), [0, 0.5, 0.5])
    assert not masked(table, np.zeros(3, dtype=bool)).any()


def test_a_table_for_other_instances_is_refused() -> None:
    with pytest.raises(RoutingError, match="3 instances, but 2 exist"):
        masked(np.array([0.5, 0.3, 0.2]), np.array([True, True]))
