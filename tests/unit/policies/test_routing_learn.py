"""Learning within a budget: who survives whom, what is written, and what a budget of no time gives."""

import json
from pathlib import Path

import numpy as np
import pytest

from policies.routing.contract import RoutingError
from policies.routing.learn import learn, survivors
from policies.routing.policy_set import load_policies
from policies.routing.presets import HEAVY, LIGHT, PAPER_KINDS, Preset, paper_service
from policies.routing.queueing_model import ServiceModel, paper_arrivals

TINY = Preset(slots=4_000, environments=20, slots_per_update=1_000, minibatch=500, epochs=1)


def test_survivors_are_the_sets_with_one_instance_fewer() -> None:
    grids = np.stack([np.full((3, 101), kind.service_s) for kind in PAPER_KINDS])
    service = ServiceModel(PAPER_KINDS, law="empirical", quantiles_s=grids, reward_accuracy=(0.7, 0.71, 0.6, 0.61))
    found = survivors(service)
    assert set(found) == {f"without-one-{HEAVY}", f"without-one-{LIGHT}"}
    fewer = found[f"without-one-{LIGHT}"]
    assert fewer.kinds == (PAPER_KINDS[0], PAPER_KINDS[1], PAPER_KINDS[3])
    assert fewer.reward_accuracy == (0.7, 0.71, 0.61)
    assert fewer.quantiles_s is not None
    assert fewer.quantiles_s[:, 0, 0].tolist() == [0.043, 0.043, 0.0115]
    assert survivors(service.with_instances([0])) == {}


def test_what_is_learned_serves_every_set_that_it_was_learned_for(tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    found = learn(
        paper_service(), paper_arrivals(), tmp_path, minutes=0.3, slots=2_000, threads=1, with_survivors=True,
        settings=TINY, command="as typed", report=lambda what, share: told.append((what, share)),
    )  # fmt: skip
    policies = load_policies(found.artifact, PAPER_KINDS, "learned-po")
    for ready, places in (([True] * 4, 4), ([False, True, True, True], 3), ([True, True, False, True], 3)):
        assert len(policies.fitted(np.array(ready)).policy.layout.variants) == places
    ranking = json.loads((tmp_path / "ranking.json").read_text())
    assert ranking["trained_slots"] == found.slots == 4_000
    assert json.loads(found.artifact.read_text())["training"]["command"] == "as typed"
    shares = [share for what, share in told if what.startswith("training")]
    assert shares == sorted(shares), "progress does not go back"
    assert shares[-1] <= 1.0 + 1e-9
    # Rules of one model keep to the instances that are there: two light ones take 174 of a burst's 180 a second.
    light = {r.router: r.scores for r in found.results}["light-only"]
    assert light["bursty"].violation_ratio > 0.01


def test_a_budget_of_no_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RoutingError, match="minutes = 0"):
        learn(paper_service(), paper_arrivals(), tmp_path, minutes=0.0)
