"""Batch choices and the latency sweep: what the figures are made of."""

import numpy as np
import pytest

from policies.routing.batch_choices import batch_choices
from policies.routing.contract import RoutingError
from policies.routing.evaluate import evaluate
from policies.routing.features import layout_for
from policies.routing.latency_sweep import artifact_for, sweep
from policies.routing.learned import PAIRS, LearnedPolicy, load_policy
from policies.routing.presets import PAPER_KINDS, paper_service
from policies.routing.queueing_model import paper_arrivals


def policy(heavy: tuple[int, int], light: tuple[int, int]) -> LearnedPolicy:
    """A policy whose batch limits depend on the phase alone: these in bursts, (1, 1) in calm."""
    layout = layout_for(PAPER_KINDS, batching=True, phases=2)
    tensors = {
        "0.weight": np.zeros((90, layout.size), dtype=np.float32),
        "0.bias": np.zeros(90, dtype=np.float32),
        "2.weight": np.eye(60, 90, dtype=np.float32),
        "2.bias": np.zeros(60, dtype=np.float32),
        "4.weight": np.zeros((16, 60), dtype=np.float32),
        "4.bias": np.zeros(16, dtype=np.float32),
    }
    tensors["0.weight"][0, -2] = 5.0
    for v, pair in enumerate((heavy, light)):
        tensors["4.weight"][4 + 6 * v + PAIRS.index(pair), 0] = 9.0
        tensors["4.bias"][4 + 6 * v + PAIRS.index((1, 1))] = 3.0
    return LearnedPolicy("by-phase", layout, tensors, 1.0, 2)


def test_choices_are_counted_by_the_phase_in_which_they_were_made() -> None:
    shares = batch_choices(policy((3, 5), (5, 5)), paper_service(), paper_arrivals(), slots=5_000, seed=1)
    assert shares.shape == (2, 2, 6)
    assert shares[0, 0, PAIRS.index((3, 5))] == 1.0
    assert shares[0, 1, PAIRS.index((5, 5))] == 1.0
    assert (shares[1, :, PAIRS.index((1, 1))] == 1.0).all()


def test_a_policy_without_batching_is_refused() -> None:
    with pytest.raises(RoutingError, match="learned-po-batch"):
        batch_choices(load_policy("learned-po"), paper_service(), paper_arrivals(), slots=100, seed=1)


def test_a_point_of_the_sweep_is_an_evaluation_at_that_latency() -> None:
    (point,) = sweep(("stationary",), (225,), slots=2_000, seed=4)
    alone = evaluate("stationary", paper_service(0.225), paper_arrivals(), slots=2_000, seed=4)
    assert point.requirement_ms == 225
    assert point.scores == alone.scores


def test_a_latency_that_nobody_trained_for_is_named() -> None:
    with pytest.raises(RoutingError, match=r"--requirement-ms 175 .*--start"):
        artifact_for("learned-po", 175)


def test_a_learned_router_is_left_out_where_none_was_trained() -> None:
    points = sweep(("learned-po",), (175, 300), slots=1_000, seed=4)
    assert [p.requirement_ms for p in points] == [300]
    with pytest.raises(RoutingError, match="--requirement-ms 175"):
        sweep(("learned-po",), (175,), slots=1_000, seed=4)
