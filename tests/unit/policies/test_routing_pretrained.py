"""The shipped learned routers: they load for the deployment they are for, and still have their scores."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from policies.routing.artifact import PRETRAINED
from policies.routing.contract import observation_of
from policies.routing.evaluate import evaluate, trained
from policies.routing.learned import load_policy
from policies.routing.presets import PAPER_KINDS, paper_service, workload
from policies.routing.queueing_model import paper_arrivals
from policies.routing.set_sizes import sized

SHIPPED = sorted(p for p in PRETRAINED.glob("routing-*.json") if not p.stem.endswith("-curve"))

FOR_LATENCIES = sorted((PRETRAINED / "latency").glob("*.json"))


def test_the_partially_observable_router_is_shipped() -> None:
    assert PRETRAINED / "routing-learned-po.json" in SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_it_loads_acts_and_has_a_training_record(path: Path) -> None:
    record = json.loads(path.read_text())
    policy = trained(record["name"], path, PAPER_KINDS)
    assert record["training"]["slots"] > 1_000_000
    assert re.search(r"policies\.routing\.(set_training|train) ", record["training"]["command"])
    quiet = observation_of([0] * 4, [0.0] * 4, [[]] * 4, [0] * 4, [True] * 4, phase=1, since_s=10.0)
    action = policy.act(quiet, np.random.default_rng(0))
    assert action.probabilities[:2].sum() > 0.9
    assert all(low <= high for low, high in zip(action.minimum, action.maximum, strict=True))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_it_still_scores_near_what_was_written_down(path: Path) -> None:
    record = json.loads(path.read_text())
    policy, name = trained(record["name"], path, PAPER_KINDS), record["workload"]
    found = evaluate(policy.name, paper_service(), workload(name), slots=15_000, seed=5, policy=policy).scores
    assert found["overall_50_50"].goodput_ratio > 0.786
    assert found["overall_50_50"].violation_ratio < 0.022


@pytest.mark.parametrize(("size", "least", "most"), [("1+2", 0.785, 0.025), ("2x8", 0.79, 0.02), ("3x16", 0.79, 0.02)])
def test_learned_set_carries_over_to_other_sizes(size: str, least: float, most: float) -> None:
    service, load = sized(size)
    found = evaluate("learned-set", service, paper_arrivals(load), slots=10_000, seed=5).scores["overall_50_50"]
    assert found.goodput_ratio > least
    assert found.violation_ratio < most


@pytest.mark.parametrize("path", FOR_LATENCIES, ids=lambda p: p.stem)
def test_policies_for_other_latencies_beat_light_only_there(path: Path) -> None:
    policy = load_policy(path, PAPER_KINDS)
    requirement_s = int(path.stem.rsplit("-", 1)[1]) / 1000.0
    assert f"--requirement-ms {1000 * requirement_s:.0f} " in json.loads(path.read_text())["training"]["command"]
    found = evaluate(
        policy.name, paper_service(requirement_s), workload("paper"), slots=15_000, seed=5, policy=policy
    ).scores
    assert found["overall_50_50"].goodput_ratio > 0.777
