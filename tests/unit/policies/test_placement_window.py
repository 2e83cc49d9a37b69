"""Live windows: requests in, reasons out, and the PettingZoo wrapper."""

import numpy as np
import pytest
from pettingzoo.test import parallel_api_test

from policies.placement.contract import REJECT
from policies.placement.edge_network import EdgeNetwork, PlacementError
from policies.placement.graph import eua16
from policies.placement.pettingzoo_env import PlacementParallelEnv
from policies.placement.rules import Sequential
from policies.placement.tables import shipped_tables
from policies.placement.window import Request, refusals, window_slots
from policies.placement.workload import Load

NETWORK = EdgeNetwork(eua16(), shipped_tables())
WAITING, USED = np.full(16, 0.2), np.full(16, 200.0)
RNG = np.random.default_rng(0)


def test_a_window_is_placed_and_nothing_is_refused() -> None:
    requests = [Request("tracking", 3, 10.0, 8.0), Request("detection", 5, 1.0, 2.0)]
    slots = window_slots(NETWORK, requests, WAITING, USED)
    placements = Sequential(NETWORK).decide(slots, RNG)[0]
    assert refusals(NETWORK, slots, placements) == [None, None]
    assert slots.service.tolist() == [[1, 0]]


def test_refusals_say_why() -> None:
    slots = window_slots(NETWORK, [Request("detection", 0, 0.01, 2.0)], WAITING, USED)
    placements = Sequential(NETWORK).decide(slots, RNG)[0]
    reason = refusals(NETWORK, slots, placements)[0]
    assert reason is not None
    assert "deadline of 0.01 s" in reason
    full = window_slots(NETWORK, [Request("detection", 0, 2.0, 2.0)], WAITING, NETWORK.graph.memory_mb)
    assert "memory" in str(refusals(NETWORK, full, Sequential(NETWORK).decide(full, RNG)[0])[0])
    late = window_slots(NETWORK, [Request("detection", 0, 0.5, 10.0)], WAITING, USED)
    assert refusals(NETWORK, late, np.array([[0, 1, 9]])) == ["misses its deadline"]


def test_reject_with_alternatives_blames_the_other_requests() -> None:
    slots = window_slots(NETWORK, [Request("detection", 0, 2.0, 2.0)], WAITING, USED)
    assert "other requests" in str(refusals(NETWORK, slots, np.array([[REJECT] * 3]))[0])


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request("ocr", 0, 1.0, 1.0), "'ocr' is unknown; known: detection, tracking"),
        (Request("detection", 16, 1.0, 1.0), "node 16"),
        (Request("detection", 0, 1.0, float("nan")), "data_mb"),
        (Request("detection", 0, float("inf"), 1.0), "deadline_s"),
        (Request("detection", 0, 1.0, -2.0), "data_mb"),
    ],
)
def test_bad_requests_are_refused_by_name(request_: Request, says: str) -> None:
    with pytest.raises(PlacementError, match=says):
        window_slots(NETWORK, [request_], WAITING, USED)


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(PlacementError, match="no request"):
        window_slots(NETWORK, [], WAITING, USED)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_pettingzoo_wrapper_passes_its_api_test() -> None:
    parallel_api_test(PlacementParallelEnv(NETWORK, Load(), horizon=5), num_cycles=20)


def test_the_wrapper_repeats_with_a_seed_and_ends() -> None:
    env = PlacementParallelEnv(NETWORK, Load(per_service=2), horizon=2, layout="derived")
    rewards = []
    for _ in range(2):
        env.reset(seed=4)
        actions = {agent: np.array([15, 0, n]) for n, agent in enumerate(env.agents)}
        rewards.append([env.step(actions)[1]["tracking_1"] for _ in range(2)])
        assert env.agents == []
    assert rewards[0] == rewards[1]
