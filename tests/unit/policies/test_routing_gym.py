"""The Gymnasium wrapper: its own checker, repeatability, and rewards equal to the simulator's."""

import numpy as np
from gymnasium.utils.env_checker import check_env

from policies.routing.environment import SlotEnvironments
from policies.routing.gym_environment import LOGIT_SCALE, RoutingEnv
from policies.routing.presets import paper_service
from policies.routing.queueing_model import paper_arrivals


def test_gymnasiums_own_checker_passes() -> None:
    check_env(RoutingEnv(paper_service(), paper_arrivals(), observable=True), skip_render_check=True)


def test_rewards_are_those_of_the_simulator() -> None:
    env = RoutingEnv(paper_service(), paper_arrivals(), episode_slots=50, reward_scale=1.0)
    env.reset(seed=3)
    again = RoutingEnv(paper_service(), paper_arrivals(), episode_slots=50, reward_scale=1.0)
    again.reset(seed=3)
    action = (np.log([0.1, 0.1, 0.4, 0.4]) / LOGIT_SCALE).astype(np.float32)
    rewards = [env.step(action)[1:4] for _ in range(50)]
    assert rewards == [again.step(action)[1:4] for _ in range(50)]
    assert rewards[-1][2]
    drawn = int(np.random.default_rng(np.random.SeedSequence(3)).integers(2**31))
    plain = SlotEnvironments(paper_service(), paper_arrivals(), 1, drawn)
    expected = [float(plain.step(np.array([[0.1, 0.1, 0.4, 0.4]]))[0]) for _ in range(50)]
    assert np.allclose([r[0] for r in rewards], expected, atol=1e-6)
