"""The per-request rules, batching and expiry: what they must and must not choose, on plain lists."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.routing.contract import HOLD, REJECT
from policies.routing.estimation import LEAST_TAIL
from policies.routing.rules import (
    RULES,
    batch_size,
    cannot_finish,
    deadline,
    heavy_only,
    largest_batch,
    light_only,
    single_queue,
)

HEAVY_S, LIGHT_S = 0.043, 0.0115


def ask(rule: Any, **changes: Any) -> int:
    """The rule's choice at time 0 for two heavy and two light idle instances, unless changed."""
    values: dict[str, Any] = {
        "now_s": 0.0,
        "budget_s": 0.3,
        "draw": 0.0,
        "length": [0, 0, 0, 0],
        "capacity": [15] * 4,
        "clear_s": [0.0] * 4,
        "service_s": [HEAVY_S, HEAVY_S, LIGHT_S, LIGHT_S],
        "rank": [0, 0, 1, 1],
        "margin": [1.0, 0.02, 4.0, 1.0],
    }
    values.update(changes)
    return int(rule(*values.values()))


@pytest.mark.parametrize("name", sorted(RULES))
def test_nothing_routable_is_rejected(name: str) -> None:
    assert ask(RULES[name], capacity=[0] * 4) == REJECT


@given(
    name=st.sampled_from(sorted(RULES)),
    draw=st.floats(0.0, 1.0, exclude_max=True),
    length=st.lists(st.integers(0, 15), min_size=4, max_size=4),
    capacity=st.lists(st.sampled_from([0, 15]), min_size=4, max_size=4),
    busy_s=st.lists(st.floats(-1.0, 1.0), min_size=4, max_size=4),
    margin=st.floats(0.05, 1.0),
)
def test_never_an_instance_without_places(
    name: str, draw: float, length: list[int], capacity: list[int], busy_s: list[float], margin: float
) -> None:
    chosen = ask(
        RULES[name], draw=draw, length=length, capacity=capacity, clear_s=busy_s, margin=[margin, 0.02, 4.0, 1.0]
    )
    if any(capacity):
        assert chosen == HOLD if chosen < 0 else capacity[chosen] > 0
    else:
        assert chosen == REJECT


def test_one_model_rules_stay_with_their_model() -> None:
    assert {ask(light_only, draw=u / 10) for u in range(10)} == {2, 3}
    assert {ask(heavy_only, draw=u / 10, length=[15, 15, 0, 0]) for u in range(10)} == {0, 1}


def test_single_queue_takes_the_heaviest_idle_or_holds() -> None:
    assert ask(single_queue, length=[1, 0, 0, 0]) == 1
    assert ask(single_queue, length=[1, 1, 1, 0]) == 3
    assert ask(single_queue, length=[1, 1, 1, 1]) == HOLD


def test_deadline_prefers_heavy_until_its_forecast_misses() -> None:
    busy = [0.2, 0.25, 0.0, 0.0]
    assert ask(deadline, length=[5, 6, 0, 0], clear_s=busy) == 0
    assert ask(deadline, length=[5, 6, 0, 0], clear_s=[0.26, 0.258, 0.0, 0.0]) in (2, 3)
    assert ask(deadline, length=[5, 6, 0, 0], clear_s=busy, margin=[0.7, 0.02, 4.0, 1.0]) in (2, 3)


def test_deadline_without_any_fit_takes_the_soonest_finish() -> None:
    late = [0.9, 0.8, 0.5, 0.6]
    assert ask(deadline, length=[9] * 4, clear_s=late) == 2
    assert ask(deadline, length=[15] * 4, clear_s=late) == 2
    assert ask(deadline, length=[9, 9, 15, 9], clear_s=late) == 3


def test_deadline_trusts_an_idle_instance_only_with_room_to_spare() -> None:
    tight = {"margin": [0.05, 0.02, 4.0, 1.0], "draw": 0.2}
    assert ask(deadline, **tight) in (0, 1)
    assert ask(deadline, **tight, service_s=[0.08, 0.08, LIGHT_S, LIGHT_S]) in (2, 3)
    assert ask(deadline, **tight, clear_s=[0.03, 0.03, 0.0, 0.0]) in (0, 1), "its device is busy for a little"
    assert ask(deadline, **tight, clear_s=[0.03, 0.03, 0.0, 0.0], length=[1, 1, 0, 0]) in (2, 3)
    assert ask(deadline, **tight, clear_s=[-0.1, -0.1, 0.0, 0.0], length=[1, 1, 0, 0]) in (2, 3), "overdue, not idle"


@pytest.mark.parametrize(("heavy_s", "tail", "share"), [(0.075, 3.9, 1.0), (0.08, 4.0, 0.356), (0.15, 4.0, 0.0)])
def test_deadline_tries_an_idle_instance_the_rarer_the_slower_it_is(heavy_s: float, tail: float, share: float) -> None:
    """The share is (0.3 / (tail x heavy_s)) ** 16."""
    times_s = [heavy_s, heavy_s, LIGHT_S, LIGHT_S]
    chosen = [ask(deadline, draw=u / 4000, margin=[0.05, 0.02, tail, 1.0], service_s=times_s) for u in range(4000)]
    assert sum(one < 2 for one in chosen) / 4000 == pytest.approx(share, abs=0.002)


@pytest.mark.parametrize(
    ("spent", "longest_s"), [(0.0, 0.09375), (0.8, 0.09375), (0.9, 0.0833), (1.0, 0.075), (3.0, 0.075)]
)
def test_deadline_reaches_further_while_the_promise_is_hardly_used(spent: float, longest_s: float) -> None:
    """The tail alone allows 0.3 / 4 s; draws near 0.25 are out of luck."""
    for heavy_s, fits in ((0.999 * longest_s, True), (1.1 * longest_s, False)):
        chosen = ask(
            deadline, draw=0.2499, margin=[0.05, 0.02, 4.0, spent], service_s=[heavy_s, heavy_s, LIGHT_S, LIGHT_S]
        )
        assert (chosen < 2) is fits


def test_deadline_never_tries_what_hardly_fits_the_budget() -> None:
    """A steady service of 0.27 s fits 0.3 s; but its answer may take some time on its way."""
    times_s = [0.27, 0.27, LIGHT_S, LIGHT_S]
    assert {
        ask(deadline, draw=u / 400, margin=[0.05, 0.02, LEAST_TAIL, 1.0], service_s=times_s) for u in range(400)
    } == {
        2,
        3,
    }


def test_deadline_spreads_ties_by_the_draw() -> None:
    assert {ask(deadline, draw=u / 8) for u in range(8)} == {0, 1}


@given(st.integers(65, 400), st.integers(0, 399), st.floats(0.0, 0.999))
def test_among_many_deadline_finds_the_one_that_fits(n: int, at: int, draw: float) -> None:
    clear_s = [9.0] * n
    clear_s[at % n] = 0.0
    rank = [i % 3 for i in range(n)]
    arrays = {"length": [1] * n, "capacity": [15] * n, "clear_s": clear_s, "service_s": [0.04] * n, "rank": rank}
    assert ask(deadline, draw=draw, **arrays) == at % n


@given(st.integers(65, 300), st.floats(0.0, 0.999), st.integers(0, 1000))
def test_among_many_deadline_is_content_with_a_good_one(n: int, draw: float, seed: int) -> None:
    """Variants in blocks, as sorted ids have them; against looking at all of them."""
    rng = random.Random(seed)
    heavies = rng.randrange(1, n)
    rank = [0] * heavies + [1] * (n - heavies)
    clear_s = [rng.uniform(0.0, 0.5) for _ in range(n)]
    arrays = {"length": [1] * n, "capacity": [15] * n, "clear_s": clear_s, "service_s": [0.04] * n, "rank": rank}
    chosen = ask(deadline, draw=draw, **arrays)
    fits = [i for i in range(n) if clear_s[i] + 0.04 <= 0.3]
    if fits:
        assert chosen in fits
        heavy = sorted(clear_s[i] for i in fits if rank[i] == 0)
        if heavies < 8 and heavy:
            assert clear_s[chosen] == heavy[0]
        if len(heavy) > 100:
            assert rank[chosen] == 0
            assert clear_s[chosen] <= heavy[len(heavy) // 2]
    else:
        assert clear_s[chosen] == min(clear_s)


@pytest.mark.parametrize(
    ("waiting", "minimum", "maximum", "size"),
    [
        *[(0, 1, 5, 0), (1, 1, 5, 1), (2, 1, 5, 1), (3, 1, 5, 3), (4, 1, 5, 3), (5, 1, 5, 5), (9, 1, 5, 5)],
        *[(9, 1, 3, 3), (2, 3, 5, 0), (3, 3, 5, 3), (4, 5, 5, 0), (5, 5, 5, 5), (7, 1, 1, 1)],
    ],
)
def test_batches_follow_section_5_2_2(waiting: int, minimum: int, maximum: int, size: int) -> None:
    assert batch_size(waiting, minimum, maximum) == size


@pytest.mark.parametrize(
    ("times_s", "length", "margin", "size"),
    [
        ((0.043, 0.0946, 0.1462), 1, 1.0, 5),  # 1.25 x 0.1462 fits into 0.3
        ((0.043, 0.0946, 0.1462), 1, 0.6, 3),
        ((0.043, 0.0946, 0.1462), 1, 0.3, 1),
        ((0.043, 0.0946, 0.1462), 7, 0.3, 5),  # seven one by one are late anyhow
        ((0.0115, 0.0253, 0.0391), 1, 0.05, 5),  # a short batch is safe at any margin
        ((0.043, 0.129, 0.215), 7, 1.0, 1),  # batches that save nothing
        ((0.043, 0.09, 0.16), 1, 1.0, 3),  # five save less than three
        ((0.043, 0.14, 0.15), 1, 1.0, 5),  # three save nothing, five do
    ],
)
def test_the_largest_batch_pays_and_is_safe(
    times_s: tuple[float, float, float], length: int, margin: float, size: int
) -> None:
    assert largest_batch(*times_s, length, 0.3, margin) == size


def test_expiry_is_about_certain_misses_only() -> None:
    assert not cannot_finish(1.0, 1.3, 1.2, 0.1)
    assert cannot_finish(1.0, 1.3, 1.21, 0.1)
    assert cannot_finish(1.25, 1.3, 0.0, 0.1)
