"""The Gymnasium wrapper: its own checker, repeatability, and rewards equal to the simulator's."""

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from policies.routing.environment import SlotEnvironments
from policies.routing.gym_environment import LOGIT_SCALE, RoutingEnv
from policies.routing.presets import paper_service
from policies.routing.queueing_model import markovian, paper_arrivals


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


@pytest.mark.slow
def test_stable_baselines3_learns_on_it() -> None:
    """An endless burst: the even table that an untrained policy gives drowns the heavy instances; PPO learns to spare
    them."""
    ppo = pytest.importorskip("stable_baselines3").PPO
    burst = markovian(np.array([[-150.0]]), np.array([[150.0]]), ("bursty",))

    def mean_reward(model: object) -> float:
        env = RoutingEnv(paper_service(), burst, episode_slots=300)
        seen, _ = env.reset(seed=7)
        total, over = 0.0, False
        while not over:
            action, _ = model.predict(seen, deterministic=True)  # type: ignore[attr-defined]
            seen, reward, _, over, _ = env.step(action)
            total += reward / 300
        return total

    env = RoutingEnv(paper_service(), burst, episode_slots=100)
    model = ppo("MlpPolicy", env, n_steps=512, batch_size=128, gamma=0.9, seed=1, device="cpu", verbose=0)
    before = mean_reward(model)
    model.learn(8_000)
    # In units of 100: every request in time is worth 150 * 0.67 / 100 = 1.0; the even table loses a third of them.
    assert before < 0.5
    assert mean_reward(model) > before + 0.3
