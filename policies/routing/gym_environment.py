"""The routing simulator as a Gymnasium environment, so that other people's algorithms can learn on it.

Observation: the feature vector of `features.py`, in [0, 1]. Action: one number in [-1, 1] per instance; the slot's
table is the softmax of LOGIT_SCALE times them. Reward: Eq. 2 of Tan, divided by `reward_scale`. Episodes are cut
after `episode_slots` (truncation).
"""

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from policies.routing.environment import SlotEnvironments
from policies.routing.queueing_model import ArrivalModel, ServiceModel

LOGIT_SCALE = 4.0


class RoutingEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """One service under one workload; `reset(seed=...)` starts it empty in a stationary phase."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (gymnasium's own declaration)

    def __init__(
        self,
        service: ServiceModel,
        arrivals: ArrivalModel,
        *,
        observable: bool = False,
        episode_slots: int = 1000,
        reward_scale: float = 100.0,
    ) -> None:
        self._service, self._arrivals, self._observable = service, arrivals, observable
        self._episode_slots, self._reward_scale = episode_slots, reward_scale
        self._slots = SlotEnvironments(service, arrivals, 1, 0, observable=observable)
        size, n = self._slots.layout.size, len(service.kinds)
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (size,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (n,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """The first observation of a new episode."""
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(2**31))
        self._slots = SlotEnvironments(self._service, self._arrivals, 1, drawn, observable=self._observable)
        return self._slots.observe()[0], {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """One slot under the table softmax(LOGIT_SCALE * action)."""
        logits = LOGIT_SCALE * np.asarray(action, dtype=np.float64)
        table = np.exp(logits - logits.max())
        reward = float(self._slots.step((table / table.sum())[None])[0]) / self._reward_scale
        truncated = self._slots.slots >= self._episode_slots
        return self._slots.observe()[0], reward, False, truncated, {}
