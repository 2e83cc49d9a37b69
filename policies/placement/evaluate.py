"""Score placement policies on the same slots, against the exact optimum.

A result is the sum over the slots of one seed, averaged over seeds, as in Huang's Fig. 7. `gap_per_slot` is the
optimum's mean reward per slot less the policy's. Optima are kept in a cache file, since they take the longest.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from policies.placement.actors import PRETRAINED, LearnedPolicy, load_artifact
from policies.placement.contract import ALL, LEARNED, SOLVERS, ArtifactError, FloatArray, PlacementPolicy, Slots
from policies.placement.edge_network import EdgeNetwork
from policies.placement.prices import PricedAgents, load_prices
from policies.placement.rules import Beam, Convention, Heuristic, RandomRule, Sequential, TwoTier
from policies.placement.workload import Load, draw_slots


def build_policy(
    name: str, network: EdgeNetwork, load: Load, artifacts: Path = PRETRAINED / "placement"
) -> PlacementPolicy:
    """A policy by name; a learned one from `artifacts`, or from the path that the name is (without suffix).

    `artifacts` holds those for Huang's setting, its folders those for deployments (edge4, ...): the first that fits the
    network is taken. Raises ValueError for an unknown name and ArtifactError where no artifact fits.
    """
    if name == "random":
        return RandomRule(network)
    if name == "heuristic":
        return Heuristic(network)
    if name == "convention":
        return Convention(network, load)
    if name == "sequential":
        return Sequential(network)
    if name == "two-tier":
        return TwoTier(network)
    if name == "beam":
        return Beam(network)
    if name in SOLVERS:
        from policies.placement.exact import Exact

        return Exact(network) if name == "exact" else Exact(network, 0.03, beam_width=32, name=name, most_actions=8)
    if "/" in name:
        return _learned(Path(name).name, Path(name), network, load)
    if name not in LEARNED:
        raise ValueError(f"policy {name!r} is unknown; use one of {', '.join(ALL)}, all, or an artifact's path")
    misfits: list[str] = []
    for folder in (artifacts, *sorted(path for path in artifacts.iterdir() if path.is_dir())):
        try:
            path = _artifact_path(folder, name, load.per_service * len(network.tables))
            return _learned(name, path, network, load)
        except ArtifactError as error:
            misfits.append(str(error))
    raise ArtifactError(misfits[0])


def _learned(name: str, path: Path, network: EdgeNetwork, load: Load) -> PlacementPolicy:
    """The learned policy at `path` (without suffix). Raises ArtifactError where it does not fit."""
    if _kind(path) == "prices":
        return PricedAgents(network, load_prices(path, network, load.per_service * len(network.tables)), name)
    artifact = load_artifact(path, network)
    if not artifact.shared and int(artifact.settings["per_service"]) < load.per_service:
        raise ArtifactError(
            f"{name}: trained for {artifact.settings['per_service']} requests per service, asked for "
            f"{load.per_service}; use hisper-sequential or train with --set per_service={load.per_service}"
        )
    return LearnedPolicy(name, network, artifact, bool(artifact.settings["sequential"]))


def _kind(path: Path) -> str:
    file = path.with_suffix(".json")
    return str(json.loads(file.read_text()).get("kind", "actors")) if file.exists() else "actors"


def _artifact_path(artifacts: Path, name: str, agents: int) -> Path:
    """`name` itself where one artifact serves any number, else the smallest `name-AGENTS` that has enough of them."""
    counts = sorted(
        int(file.stem.rpartition("-")[2])
        for file in artifacts.glob(f"{name}-*.json")
        if file.stem.rpartition("-")[0] == name and file.stem.rpartition("-")[2].isdigit()
    )
    if not counts:
        return artifacts / name
    return artifacts / f"{name}-{next((count for count in counts if count >= agents), counts[-1])}"


@dataclass
class Optima:
    """Exact optima by slot, remembered in a JSON file (none: not kept)."""

    network: EdgeNetwork
    path: Path | None = None
    limit_s: float = 60.0
    known: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # reward, bound, seconds

    def open(self) -> None:
        """Read the file if it is there."""
        if self.path is not None and self.path.exists():
            self.known = {k: (v[0], v[1], v[2]) for k, v in json.loads(self.path.read_text()).items()}

    def rewards(self, slots: Slots, tick: Callable[[], None]) -> FloatArray:
        """(E, 3) optimum, bound and solving seconds of every slot; `tick` is called once per slot."""
        from policies.placement.exact import Exact

        solver = Exact(self.network, self.limit_s, beam_width=128)
        found = np.empty((slots.slots, 3))
        for e in range(slots.slots):
            one = slots.take(slice(e, e + 1))
            key = slot_key(self.network, one)
            if key not in self.known:
                began = time.perf_counter()
                answer = solver.solve(one)
                self.known[key] = (answer.reward, answer.bound, time.perf_counter() - began)
            found[e] = self.known[key]
            tick()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.known))
        return found


def slot_key(network: EdgeNetwork, slot: Slots) -> str:
    """Identity of one slot on one network, for the cache of optima."""
    digest = hashlib.sha256()
    arrays: Iterable[Any] = (
        slot.service,
        slot.local,
        slot.deadline_s,
        slot.data_mb,
        slot.system_tflop,
        slot.memory_used_mb,
        slot.deployed,
        network.s_per_megabit,
        network.paths.usd_per_megabit,
        network.graph.tflops,
        network.graph.memory_mb,
        network.accuracy,
        network.size_factor,
        network.work_tflop,
    )
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:24]


def evaluation_slots(network: EdgeNetwork, load: Load, slots: int, seeds: int) -> list[Slots]:
    """The slots of each seed: what every evaluated policy is given."""
    return [draw_slots(network, load, slots, np.random.default_rng([seed, 777])) for seed in range(seeds)]


def evaluate_policy(
    network: EdgeNetwork,
    policy: PlacementPolicy,
    batches: Sequence[Slots],
    optima: FloatArray | None = None,
    timed: int = 100,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """The issue's result record of one policy, and `agents`: sub-rewards per agent (Fig. 10).

    `optima` (seeds, slots) are the exact rewards; the first `timed` slots are decided one by one to time them.
    """
    rng = np.random.default_rng(0)
    parts, failures, per_agent, seconds = [], [], [], []
    for s, slots in enumerate(batches):
        alone = min(timed, slots.slots) if s == 0 else 0
        placements = []
        for e in range(alone):
            one = slots.take(slice(e, e + 1))
            began = clock()
            placements.append(policy.decide(one, rng))
            seconds.append(clock() - began)
        if alone < slots.slots:
            placements.append(policy.decide(slots.take(slice(alone, None)), rng))
        outcome = network.evaluate(slots, np.concatenate(placements))
        parts.append(outcome.reward_parts.sum(axis=0))
        failures.append(1.0 - outcome.accepted.sum() / max((slots.service >= 0).sum(), 1))
        figures = (outcome.standard_accuracy, outcome.delay_s, outcome.cost_usd)
        per_agent.append(np.stack([figure.mean(axis=0) for figure in figures]))
    table = np.array(parts)
    rewards = table.sum(axis=1)
    agents = np.mean(per_agent, axis=0)
    milliseconds = np.array(seconds) * 1e3
    return {
        "reward": {"mean": float(rewards.mean()), "std": float(rewards.std())},
        "accuracy": float(table[:, 0].mean()),
        "delay_s": float(-table[:, 1].mean()),
        "cost_usd": float(-table[:, 2].mean()),
        "failure_ratio": float(np.mean(failures)),
        "decide_ms": {"p50": float(np.median(milliseconds)), "p99": float(np.quantile(milliseconds, 0.99))},
        "gap_per_slot": None
        if optima is None
        else float(optima.mean() - rewards.sum() / sum(batch.slots for batch in batches)),
        "agents": {
            key: [float(x) for x in row] for key, row in zip(("accuracy", "delay_s", "cost_usd"), agents, strict=True)
        },
    }
