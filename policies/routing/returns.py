"""What an action was worth: advantages from rewards and values, and rewards less what no policy can change."""

import numpy as np
import torch
from numpy.typing import NDArray


def advantages(
    reward: NDArray[np.float32], value: NDArray[np.float32], gamma: float, gae_lambda: float
) -> NDArray[np.float32]:
    """Generalised advantage estimates (Eq. 11, with the discount on the next value that [57] of Tan has).

    reward float32[T, E], value float32[T + 1, E]; returns float32[T, E].
    """
    out = np.zeros_like(reward)
    running = np.zeros(reward.shape[1], dtype=np.float32)
    for t in range(len(reward) - 1, -1, -1):
        running = reward[t] + gamma * value[t + 1] - value[t] + gamma * gae_lambda * running
        out[t] = running
    return out


def without_input(reward: NDArray[np.float32], given: NDArray[np.float64]) -> NDArray[np.float32]:
    """The rewards [T, E] less what the exogenous input [T, E, K] explains of them by least squares.

    What no policy can change can be taken out of the reward without moving any policy's rank: each loses the same.
    The best policy stays the best, but the noise of when bursts come and how long they last is gone.
    """
    x = torch.from_numpy(given.reshape(-1, given.shape[-1]))
    y = torch.from_numpy(reward.reshape(-1).astype(np.float64))
    normal = x.T @ x + 1e-6 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    explained = (x @ torch.linalg.solve(normal, x.T @ y)).reshape(reward.shape)
    return np.asarray(reward - explained.numpy(), dtype=np.float32)
