"""Trained placement actors in plain numpy: what serves, and what evaluation runs.

An artifact is `<path>.safetensors` (stacked actor weights) and `<path>.json` (shapes, layout hash, services, settings
and training record). Three ways to use one:
- blind (`hisper`): every agent sees only its own request and the nodes' state before the slot, as in the paper;
- sequential (`hisper-sequential`): a live controller is central, so each agent sees the nodes' state updated by the
  agents before it;
- guided or not, as trained: a guided actor's log-probabilities are added, with a weight, to the agent's own formula
  values of the actions (what `heuristic` maximises) instead of deciding alone. With learned prices in the artifact
  (`prices.py`), a value is the formula's less what the agent has to expect of the others.
Unless trained `plain`, actions that the formulas rule out for the agent's own request are masked.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from policies.placement.contract import ABSENT, REJECT, ArtifactError, FloatArray, IntArray, Slots
from policies.placement.edge_network import EdgeNetwork, NodeState, Options
from policies.placement.observation import Layout, observe
from policies.placement.prices import Prices

Float32Array = NDArray[np.float32]
PRETRAINED = Path(__file__).parents[1] / "pretrained"
PRICES = "prices."  # what the names of an artifact's price tables begin with


@dataclass(frozen=True)
class Artifact:
    """Stacked actor weights and what they were trained for."""

    weights: dict[str, Float32Array]
    actions: tuple[int, int, int]
    lstm: int
    autoregressive: bool
    layout: Layout
    groups: tuple[int, ...]
    hidden: int
    services: tuple[str, ...]
    settings: dict[str, Any]
    record: dict[str, Any]
    prices: Prices | None = None

    @property
    def shared(self) -> bool:
        """Whether there is one actor per service (any number of requests) instead of one per request."""
        return bool(self.settings["shared"])

    @cached_property
    def fused(self) -> dict[str, Float32Array]:
        """The weights arranged for few, larger products: one for all embeddings, one for the cells' shared input.

        Gates that pass through a sigmoid are halved, as sigmoid(x) = (tanh(x / 2) + 1) / 2: one tanh serves all four.
        """
        weights = self.weights
        count, ends = len(weights["embed0.weight"]), np.cumsum([0, *self.groups])
        sizes = [weights[f"embed{g}.weight"].shape[2] for g in range(len(self.groups))]
        columns = np.cumsum([0, *sizes])
        embed = np.zeros((count, ends[-1], columns[-1]), dtype=np.float32)
        for g in range(len(self.groups)):
            embed[:, ends[g] : ends[g + 1], columns[g] : columns[g + 1]] = weights[f"embed{g}.weight"]
        bias = np.concatenate([weights[f"embed{g}.bias"] for g in range(len(self.groups))], axis=2)
        found = {"embed.weight": embed, "embed.bias": bias}
        if not self.autoregressive:
            return found
        halves = np.repeat(np.array([0.5, 0.5, 1.0, 0.5], dtype=np.float32), self.lstm)
        cells = [weights[f"cell{d}.weight"] * halves for d in range(len(self.actions))]
        width = weights["head0.weight"].shape[1]
        width = cells[0].shape[1] - max(self.actions) - width
        found["cells.weight"] = np.concatenate([cell[:, :width] for cell in cells], axis=2)
        found["cells.bias"] = np.concatenate(
            [weights[f"cell{d}.bias"] * halves for d in range(len(self.actions))], axis=2
        )
        return found | {f"carried{d}.weight": cell[:, width:].copy() for d, cell in enumerate(cells)}


def load_artifact(path: Path, network: EdgeNetwork) -> Artifact:
    """Read `<path>.json` and `<path>.safetensors` for a network. Raises ArtifactError where they do not fit."""
    try:
        text = json.loads(path.with_suffix(".json").read_text())
        stored = load_file(path.with_suffix(".safetensors"))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error}; train one with `tidegate placement train`") from error
    layout = Layout(text["layout"]["name"], network.nodes, len(network.tables))
    if layout.hash != text["layout"]["hash"]:
        raise ArtifactError(f"{path}: trained on layout {text['layout']}, this network needs hash {layout.hash}")
    services = tuple(t.name for t in network.tables)
    if list(services) != text["services"]:
        raise ArtifactError(f"{path}: trained for services {text['services']}, this network has {list(services)}")
    shape = text["shape"]
    actions = (network.configurations, network.variants, network.nodes)
    if tuple(shape["actions"]) != actions:
        raise ArtifactError(f"{path}: trained for {shape['actions']} sub-actions, this network has {list(actions)}")
    tables = {name[len(PRICES) :]: stored.pop(name) for name in list(stored) if name.startswith(PRICES)}
    return Artifact(
        weights={name: array.astype(np.float32) for name, array in stored.items()},
        actions=actions,
        lstm=shape["lstm"],
        autoregressive=shape["autoregressive"],
        layout=layout,
        groups=tuple(shape["groups"]),
        hidden=len(shape["hidden"]),
        services=services,
        settings=text["settings"],
        record=text["record"],
        prices=Prices(**{name: table.astype(np.float64) for name, table in tables.items()}) if tables else None,
    )


def log_probabilities(
    artifact: Artifact, actors: IntArray | slice, observation: Float32Array, masks: list[Float32Array]
) -> list[Float32Array]:
    """Log-probabilities (n, B, size) of the three sub-actions from observations (n, B, size) of the named actors."""
    weights, fused = artifact.weights, artifact.fused

    def apply(store: dict[str, Float32Array], name: str, inputs: Float32Array) -> Float32Array:
        return np.asarray(inputs @ store[f"{name}.weight"][actors] + store[f"{name}.bias"][actors])

    features = np.maximum(apply(fused, "embed", observation), 0)
    for h in range(artifact.hidden):
        features = np.maximum(apply(weights, f"hidden{h}", features), 0)
    head, widest, lstm = features.shape[:2], max(artifact.actions), artifact.lstm
    carried = np.zeros((*head, widest + lstm), dtype=np.float32)  # the previous distribution and the hidden state
    memory = np.zeros((*head, lstm), dtype=np.float32)
    gates = apply(fused, "cells", features) if artifact.autoregressive else None
    found = []
    for d, size in enumerate(artifact.actions):
        if gates is not None:
            own = gates[:, :, 4 * lstm * d : 4 * lstm * (d + 1)]
            if d > 0:
                own = np.asarray(own + carried @ fused[f"carried{d}.weight"][actors], dtype=np.float32)
            gate = np.tanh(own).reshape(*head, 4, lstm)  # enter, forget, update, leave
            kept, entered = (gate[:, :, 1] + 1.0) * memory, (gate[:, :, 0] + 1.0) * gate[:, :, 2]
            memory = np.asarray(0.5 * (kept + entered), dtype=np.float32)
            state = 0.5 * (gate[:, :, 3] + 1.0) * np.tanh(memory)
            logits = apply(weights, f"head{d}", state)
        else:
            logits = apply(weights, f"head{d}", features)
        logits = logits + masks[d]
        logits = logits - logits.max(axis=2, keepdims=True)
        odds = np.exp(logits)
        total = odds.sum(axis=2, keepdims=True)
        if gates is not None:
            carried[:, :, :size], carried[:, :, size:widest] = odds / total, 0.0
            carried[:, :, widest:] = state
        found.append(logits - np.log(total))
    return found


class LearnedPolicy:
    """A trained policy as a `PlacementPolicy`."""

    def __init__(self, name: str, network: EdgeNetwork, artifact: Artifact, sequential: bool) -> None:
        """Check nothing more: `load_artifact` has."""
        self.name, self.network, self.artifact, self.sequential = name, network, artifact, sequential
        self.guide = float(artifact.settings.get("guide", 0.0))
        self.masked = bool(artifact.settings.get("masked", False)) or sequential or self.guide > 0
        self.sampled = bool(artifact.settings.get("sampled", False))
        valid = network.valid
        self.masks = [
            np.where(allowed, 0.0, -1e9).astype(np.float32)[:, None]
            for allowed in (valid.any(axis=2), valid.any(axis=1), np.ones((len(valid), network.nodes), dtype=bool))
        ]
        # Per-request actors stand in the order of training: per_service agents of each service.
        self.per_service = int(artifact.settings["per_service"])

    def decide(self, slots: Slots, rng: np.random.Generator) -> IntArray:
        """Placements (E, U, 3). Raises ArtifactError for more requests of a service than agents (unless shared)."""
        actors = self._actors(slots)
        placements = np.full((*slots.service.shape, 3), REJECT, dtype=np.int64)
        state = self.network.start(slots)
        if not self.sequential and not (slots.service != slots.service[:1]).any():
            options = [self._options(state, slots, u, int(actors[0, u])) for u in range(slots.requests)]
            observations = [
                observe(self.network, self.artifact.layout, state, slots, u, options[u]) for u in range(slots.requests)
            ]
            present = np.flatnonzero(slots.service[0] != ABSENT)
            if not len(present):
                return placements
            stacked = np.stack(observations).astype(np.float32)[present]
            masks = [mask[slots.service[0, present]] for mask in self.masks]
            found = log_probabilities(self.artifact, actors[0, present], stacked, masks)
            for n, where in enumerate(present):
                placements[:, where] = self._choose(options[where], [f[n] for f in found], rng)
            return placements
        for u in range(slots.requests):
            for service, actor, rows in _groups(slots.service[:, u], actors[:, u]):
                part = slots.take(rows)
                here = NodeState(state.waiting_tflop[rows], state.memory_used_mb[rows], state.deployed[rows])
                options_here = self._options(here, part, u, actor)
                seen = observe(self.network, self.artifact.layout, here, part, u, options_here).astype(np.float32)
                masks = [mask[service : service + 1] for mask in self.masks]
                found = log_probabilities(self.artifact, slice(actor, actor + 1), seen[None], masks)
                placements[rows, u] = self._choose(options_here, [f[0] for f in found], rng)
            if self.sequential and u + 1 < slots.requests:
                self.network.place(state, slots, u, placements[:, u])
        return placements

    def _actors(self, slots: Slots) -> IntArray:
        """(E, U): which stacked actor decides each request; the n-th request of a service goes to its n-th agent."""
        service = slots.service
        if self.artifact.shared:
            return service
        rank = np.zeros_like(service)
        for s in range(len(self.network.tables)):
            mine = service == s
            rank = np.where(mine, np.cumsum(mine, axis=1) - 1, rank)
        if rank.max(initial=0) >= self.per_service:
            raise ArtifactError(
                f"{self.name} was trained for {self.per_service} requests per service, a slot has {rank.max() + 1}; "
                "use a policy with shared weights or send further waves"
            )
        return np.where(service == ABSENT, 0, service * self.per_service + rank)

    def _options(self, state: NodeState, slots: Slots, u: int, agent: int) -> Options | None:
        """The actions of request u, where features or masks need them, at the agent's prices if it has any."""
        if not self.masked and self.artifact.layout.name != "derived":
            return None
        options, prices = self.network.options(state, slots, u), self.artifact.prices
        return options if prices is None else prices.less(self.network, slots, u, options, agent)

    def _choose(self, options: Options | None, log_probs: list[Float32Array], rng: np.random.Generator) -> IntArray:
        """(E, 3) for a request from its three distributions (E, size)."""
        if self.sampled:
            log_probs = [p + rng.gumbel(size=p.shape).astype(np.float32) for p in log_probs]
        if options is None or not self.masked:
            return np.stack([p.argmax(axis=1) for p in log_probs], axis=1)
        return choose_masked(options, log_probs, self.guide)


def _groups(services: IntArray, actors: IntArray) -> Iterator[tuple[int, int, IntArray | slice]]:
    """Service, actor and rows of the slots whose request that actor decides; absent requests are left out."""
    if len(services) == 1:  # one live window: no copies
        if services[0] != ABSENT:
            yield int(services[0]), int(actors[0]), slice(None)
        return
    for service in np.unique(services[services != ABSENT]):
        for actor in np.unique(actors[services == service]):
            yield int(service), int(actor), np.flatnonzero((services == service) & (actors == actor))


def choose_masked(options: Options, log_probs: list[Float32Array], guide: float) -> IntArray:
    """(E, 3) the likeliest feasible action; with a guide weight, the best value + guide x log-probability."""
    configuration, variant, node = log_probs
    joint: FloatArray = (
        configuration[:, :, None, None].astype(np.float64) + variant[:, None, :, None] + node[:, None, None, :]
    )
    score = options.value + guide * joint if guide > 0 else joint
    flat = np.where(options.feasible, score, -np.inf).reshape(len(score), -1)
    best = flat.argmax(axis=1)
    placements = np.stack(np.unravel_index(best, score.shape[1:]), axis=1).astype(np.int64)
    placements[~np.isfinite(flat[np.arange(len(flat)), best])] = REJECT
    return placements
