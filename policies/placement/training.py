"""What the placement trainers share: settings, progress, checkpoints and artifacts.

Needs only numpy, torch and safetensors (TensorBoard if it is installed), so that a bare training machine can run it.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from policies.placement.actors import PRICES, Artifact
from policies.placement.contract import ABSENT, IntArray, PlacementPolicy, Slots
from policies.placement.deployed import experiment
from policies.placement.edge_network import EdgeNetwork
from policies.placement.networks import ActorShape, Parameters
from policies.placement.observation import Layout
from policies.placement.prices import Prices
from policies.placement.workload import Load


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training run. Defaults are the preset `paper` at 8 agents.

    From Section VI-B: layers, learning rates, 20 environments, prefill, total steps, evaluation every 2,000 steps.
    Left open by the paper and chosen here: minibatch 128; one critic update per 40 environment steps (two rounds of
    the 20 environments), with an actor update at every second one; 1,000 critic updates on the prefill before the
    first step; discount 0 (nothing done in a slot changes the next one, so any discount only adds the same amount to
    every Q-value, with noise); the share of old target kept, tau 0.995; buffer 2.8e5 slots, which fills at the step
    that the paper names; random actions for the prefill; the scale of the critics' targets (`reward_scale.py`);
    learning rates that fall linearly to a twentieth.
    """

    algorithm: str = "hisper"
    preset: str = "paper"
    graph: str = "eua16"  # or a deployment's file: see `deployed.experiment`
    per_service: int = 4
    layout: str = "paper"
    shared: bool = False  # one actor per service instead of one per request
    hra: bool = True
    autoregressive: bool = True
    alpha: float = 2.0
    alpha_end: float = 2.0  # reached geometrically at the last step
    actor_lr: float = 2e-4
    critic_lr: float = 5e-4
    discount: float = 0.0
    gae: float = 0.95  # HAPPO's lambda; means nothing without a discount
    tau: float = 0.995
    minibatch: int = 128
    interval: int = 40
    actor_every: int = 2  # critic updates per actor update
    warmup: int = 1_000  # critic updates before the first step
    normalise: bool = True
    lr_end: float = 0.05  # what is left of the learning rates at the end
    environments: int = 20
    prefill: int = 90_000
    prefill_rule: str = "random"
    buffer: int = 280_000
    steps: int = 600_000
    evaluate_every: int = 2_000
    evaluation_slots: int = 1_000
    checkpoint_every: int = 20_000
    limit_s: float = 0.0  # processor seconds; 0: no limit
    # How the actors decide (see `actors.py`) and, for `guided.py`, train.
    masked: bool = False  # drop actions that the formulas rule out for the agent's own request
    sampled: bool = False  # draw actions also when serving, instead of taking the likeliest
    sequential: bool = False  # agents see the nodes' state updated by those before them
    guide: float = 0.0  # weight of the log-probabilities beside the formula values; 0: they decide alone
    start: str = ""  # `convention`: guided actors and prices begin as that rule; `prices`: guided actors as those
    price_rounds: int = 8
    price_slots: int = 3_000
    temperature: float = 0.1  # of the guided softmax while training, at the start
    temperature_end: float = 0.01  # and at the end (geometric)
    bfloat16: bool = True  # the critics' passes: up to five times faster where the CPU has it
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse figures that cannot train."""
        counts = ("per_service", "minibatch", "interval", "actor_every", "environments", "buffer", "steps")
        for key in (*counts, "evaluate_every", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be at least 1")
        for key in ("alpha", "alpha_end", "actor_lr", "critic_lr"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be above 0")
        if not 0 <= self.discount < 1 or not 0 <= self.tau <= 1:
            raise ValueError(f"discount {self.discount} must be in [0, 1) and tau {self.tau} in [0, 1]")

    def share(self, step: int, elapsed_s: float) -> float:
        """How much of the run is over, 0 to 1: by steps, or by time where a limit is set and comes first."""
        by_time = elapsed_s / self.limit_s if self.limit_s > 0 else 0.0
        return min(1.0, max(step / self.steps, by_time))

    def alpha_at(self, share: float) -> float:
        """The entropy temperature: geometric from alpha to alpha_end over the run."""
        return float(self.alpha * (self.alpha_end / self.alpha) ** share)

    def lr_factor(self, share: float) -> float:
        """What is left of the learning rates: linear over the run."""
        return 1.0 - share * (1.0 - self.lr_end)

    def temperature_at(self, share: float) -> float:
        """The guided softmax's temperature: geometric over the run."""
        return float(self.temperature * (self.temperature_end / self.temperature) ** share)

    def network(self) -> EdgeNetwork:
        """The edge network that this run trains on: a named graph with Huang's tables, or a deployment's own."""
        return experiment(self.graph, self.per_service)[0]

    def load(self) -> Load:
        """The slots that this run trains on."""
        return experiment(self.graph, self.per_service)[1]


def actor_shape(settings: Settings, network: EdgeNetwork) -> ActorShape:
    """The actor's sizes for a run."""
    layout = Layout(settings.layout, network.nodes, len(network.tables))
    actions = (network.configurations, network.variants, network.nodes)
    return ActorShape(layout.groups, actions, autoregressive=settings.autoregressive)


def action_masks(network: EdgeNetwork, services: IntArray, device: str) -> tuple[torch.Tensor, ...]:
    """Per sub-action (n, 1, size): 0 where agent n's service has it, -1e9 where it has not."""
    valid = network.valid[services]
    masks = (valid.any(axis=2), valid.any(axis=1), np.ones((len(services), network.nodes), dtype=bool))
    return tuple(torch.where(torch.as_tensor(m)[:, None], 0.0, -1e9).to(device) for m in masks)


class Run:
    """One run's folder: progress on stderr, curve.jsonl, TensorBoard events, checkpoint and artifact."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        """Name the folder; `open` makes it."""
        self.settings, self.folder = settings, folder
        self.started, self.began, self.first_step = 0.0, 0.0, 0
        self.before_s = 0.0  # processor seconds before this process, in a resumed run
        self.writer: Any = None

    def open(self, step: int) -> None:
        """Start the clock of the progress line (training resumes at `step`)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "settings.json").write_text(json.dumps(asdict(self.settings), indent=1))
        self.started, self.began, self.first_step = time.process_time(), time.monotonic(), step
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder / "tensorboard"))
        except ImportError:
            print("tensorboard is not installed: no event files (curve.jsonl holds the same figures)", file=sys.stderr)

    def elapsed_s(self) -> float:
        """Processor seconds of the run so far: a busy machine or a stopped process does not cut a run short."""
        return self.before_s + time.process_time() - self.started

    def share(self, step: int) -> float:
        """How much of the run is over, 0 to 1."""
        return self.settings.share(step, self.elapsed_s())

    def out_of_time(self) -> bool:
        """Whether the run's own time limit has passed."""
        return self.settings.limit_s > 0 and self.elapsed_s() > self.settings.limit_s

    def report(self, step: int, figures: Mapping[str, float]) -> None:
        """Log one evaluation: a line with the time left, a row of the curve, TensorBoard scalars."""
        elapsed = self.elapsed_s()
        speed = (step - self.first_step) / max(elapsed - self.before_s, 1e-9)
        left = (self.settings.steps - step) / speed if speed > 0 else np.inf
        if self.settings.limit_s > 0:
            left = min(left, self.settings.limit_s - elapsed)
        left_text = f"{max(left, 0.0):6.0f} s left" if np.isfinite(left) else "time left unknown"
        shown = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
        print(f"step {step:>8}  {elapsed:7.1f} s  {left_text}  {shown}", file=sys.stderr, flush=True)
        wall_s = time.monotonic() - self.began
        row = {
            "step": step,
            "processor_s": round(elapsed, 3),
            "wall_s": round(wall_s, 3),
            **{k: round(v, 6) for k, v in figures.items()},
        }
        with (self.folder / "curve.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.writer is not None:
            for key, value in figures.items():
                self.writer.add_scalar(key, value, step)
            self.writer.flush()

    def save_checkpoint(self, step: int, tensors: Parameters, rng: np.random.Generator) -> None:
        """Write everything that resuming needs; an interrupted write leaves the old checkpoint in place."""
        fresh = self.folder / "checkpoint.new"
        figures = {"step": step, "elapsed_s": self.elapsed_s(), "rng": rng.bit_generator.state}
        kept = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_file(kept, fresh, {"run": json.dumps(figures)})
        fresh.replace(self.folder / "checkpoint.safetensors")

    def load_checkpoint(self, rng: np.random.Generator) -> tuple[int, Parameters]:
        """The step and tensors of the last checkpoint; sets `rng`. Raises FileNotFoundError if there is none."""
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            raise FileNotFoundError(f"{path}: nothing to resume; start without --resume")
        with safe_open(path, "pt") as file:
            figures = json.loads(file.metadata()["run"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        rng.bit_generator.state = figures["rng"]
        self.before_s = float(figures["elapsed_s"])
        return int(figures["step"]), tensors


def save_artifact(
    path: Path,
    settings: Settings,
    shape: ActorShape,
    actors: Parameters,
    record: Mapping[str, Any],
    prices: Prices | None = None,
) -> None:
    """Write `path`.safetensors (actors, prices) and `path`.json (shape, layout, settings, training record)."""
    network = settings.network()
    layout = Layout(settings.layout, network.nodes, len(network.tables))
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in actors.items()}
    if prices is not None:
        tensors |= {PRICES + k: torch.as_tensor(v, dtype=torch.float32) for k, v in asdict(prices).items()}
    save_file(tensors, path.with_suffix(".safetensors"))
    text = {
        "shape": asdict(shape),
        "layout": {"name": layout.name, "hash": layout.hash},
        "services": [t.name for t in network.tables],
        "settings": asdict(settings),
        "record": dict(record),
    }
    path.with_suffix(".json").write_text(json.dumps(text, indent=1) + "\n")


def artifact_of(
    settings: Settings, network: EdgeNetwork, shape: ActorShape, actors: Parameters, prices: Prices | None = None
) -> Artifact:
    """The actors as they would be loaded from an artifact, for evaluation while training."""
    return Artifact(
        weights={k: v.detach().cpu().numpy() for k, v in actors.items()},
        actions=shape.actions,
        lstm=shape.lstm,
        autoregressive=shape.autoregressive,
        layout=Layout(settings.layout, network.nodes, len(network.tables)),
        groups=shape.groups,
        hidden=len(shape.hidden),
        services=tuple(t.name for t in network.tables),
        settings=asdict(settings),
        record={},
        prices=prices,
    )


def score(network: EdgeNetwork, policy: PlacementPolicy, slots: Slots) -> dict[str, float]:
    """Mean figures per slot of a policy on given slots (seed 0 for policies that draw)."""
    outcome = network.evaluate(slots, policy.decide(slots, np.random.default_rng(0)))
    accuracy, delay, cost = outcome.reward_parts.mean(axis=0)
    present = max(int((slots.service != ABSENT).sum()), 1)
    return {
        "reward": float(outcome.reward.mean()),
        "accuracy": float(accuracy),
        "delay_s": float(-delay),
        "cost_usd": float(-cost),
        "failure_ratio": 1.0 - float(outcome.accepted.sum()) / present,
    }


def with_overrides(settings: Settings, overrides: Mapping[str, str]) -> Settings:
    """Settings with KEY=VALUE texts applied. Raises ValueError that names an unknown key or a bad value."""
    values: dict[str, Any] = {}
    for key, text in overrides.items():
        if key not in settings.__dataclass_fields__:
            raise ValueError(f"setting {key!r} is unknown; known: {', '.join(settings.__dataclass_fields__)}")
        kind = type(getattr(settings, key))
        try:
            values[key] = text.lower() in ("1", "true", "yes") if kind is bool else kind(text)
        except ValueError as error:
            raise ValueError(f"setting {key} is {text!r}; it must be of type {kind.__name__}") from error
    return replace(settings, **values)


def optimiser_state(name: str, optimiser: torch.optim.Optimizer, leaves: Parameters) -> Parameters:
    """An optimiser's figures as tensors for a checkpoint, by leaf."""
    return {
        f"{name}|{key}|{figure}": value
        for key, leaf in leaves.items()
        for figure, value in optimiser.state.get(leaf, {}).items()
    }


def restore_optimiser(name: str, optimiser: torch.optim.Optimizer, leaves: Parameters, saved: Parameters) -> None:
    """Take over what `optimiser_state` gave."""
    for key, leaf in leaves.items():
        found = {k.split("|")[2]: v for k, v in saved.items() if k.startswith(f"{name}|{key}|")}
        if found:
            optimiser.state[leaf] = {k: v.clone().to(leaf.device if k != "step" else "cpu") for k, v in found.items()}


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """One rate for all of an optimiser's parameters."""
    for group in optimiser.param_groups:
        group["lr"] = rate
