"""The placement problem as a PettingZoo parallel environment, so that other people's algorithms run on it.

One agent per request, named `SERVICE_N`; an action is (configuration, variant, node); every agent gets the slot's
reward (Eq. 21), and its own share and outcome in `infos`. An episode is `horizon` slots (100 in the paper).
"""

from typing import Any

import numpy as np
from gymnasium.spaces import Box, MultiDiscrete
from numpy.typing import NDArray
from pettingzoo import ParallelEnv

from policies.placement.contract import Slots
from policies.placement.edge_network import REASONS, EdgeNetwork
from policies.placement.observation import Layout, observe_all
from policies.placement.workload import Load, draw_slots


class PlacementParallelEnv(ParallelEnv):  # type: ignore[misc]
    """`parallel_env` over one edge network; see the module's docstring."""

    metadata = {"name": "tidegate_placement_v0", "render_modes": []}  # noqa: RUF012 (PettingZoo's own declaration)

    def __init__(self, network: EdgeNetwork, load: Load, horizon: int = 100, layout: str = "paper") -> None:
        """Describe the spaces; nothing is drawn before `reset`."""
        if load.present < 1.0 or load.mixed:
            raise ValueError("agents are fixed here: use a Load with present=1 and mixed=False")
        self.network, self.load, self.horizon = network, load, horizon
        self.layout = Layout(layout, network.nodes, len(network.tables))
        self.possible_agents = [f"{t.name}_{n + 1}" for t in network.tables for n in range(load.per_service)]
        self.agents: list[str] = []
        bounds = (-np.inf, np.inf)
        self.observation_spaces = {
            agent: Box(*bounds, (self.layout.size,), np.float32) for agent in self.possible_agents
        }
        self.action_spaces = {
            f"{t.name}_{n + 1}": MultiDiscrete([len(t.configurations), len(t.variants), network.nodes])
            for t in network.tables
            for n in range(load.per_service)
        }
        self._rng = np.random.default_rng(0)
        self._slots: Slots | None = None
        self._played = 0

    def observation_space(self, agent: str) -> Box:
        """What `agent` sees: the layout's features."""
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> MultiDiscrete:
        """What `agent` can do: configuration, variant, node."""
        return self.action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, dict[str, Any]]]:
        """A new episode; with a seed, the same one each time."""
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self.agents = list(self.possible_agents)
        self._played = 0
        return self._draw(), {agent: {} for agent in self.agents}

    def step(
        self, actions: dict[str, NDArray[np.int64]]
    ) -> tuple[
        dict[str, NDArray[np.float32]],
        dict[str, float],
        dict[str, bool],
        dict[str, bool],
        dict[str, dict[str, Any]],
    ]:
        """Play one slot with every agent's action."""
        if self._slots is None:
            raise RuntimeError("step before reset; call reset() first")
        placements = np.array([[actions[agent] for agent in self.agents]], dtype=np.int64)
        outcome = self.network.evaluate(self._slots, placements)
        reward = float(outcome.reward[0])
        infos = {
            agent: {
                "outcome": REASONS[int(outcome.reason[0, n])],
                "accuracy": float(outcome.standard_accuracy[0, n]),
                "delay_s": float(outcome.delay_s[0, n]),
                "cost_usd": float(outcome.cost_usd[0, n]),
            }
            for n, agent in enumerate(self.agents)
        }
        self._played += 1
        over = self._played >= self.horizon
        agents = self.agents
        observations = self._draw()
        if over:
            self.agents = []
        return (
            observations,
            dict.fromkeys(agents, reward),
            dict.fromkeys(agents, False),
            dict.fromkeys(agents, over),
            infos,
        )

    def _draw(self) -> dict[str, NDArray[np.float32]]:
        self._slots = draw_slots(self.network, self.load, 1, self._rng)
        seen = observe_all(self.network, self.layout, self._slots)[:, 0].astype(np.float32)
        return dict(zip(self.possible_agents, seen, strict=True))
