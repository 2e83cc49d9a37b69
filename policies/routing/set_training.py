"""Training of `learned-set` with PPO on several sizes of service at once (torch; training only).

The softmax-Gaussian policy of Tan (Eqs. 8, 9) over the variants' shares, the clipped objective (Eq. 10), advantages
by Eq. 11, and the input baseline of `ppo.py`. Every size contributes its own slots to each update; rewards are per
four instances, so that sizes count alike.

    python -m policies.routing.set_training --minutes 9 --out runs/set
    python -m policies.routing.set_training --compare policies/pretrained/routing-learned-set.safetensors
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from policies.routing.contract import InstanceKind
from policies.routing.environment import SlotEnvironments
from policies.routing.evaluate import evaluate
from policies.routing.network import log_density
from policies.routing.presets import PAPER_KINDS, PAPER_REWARD_ACCURACY
from policies.routing.queueing_model import LENGTH, ServiceModel, paper_arrivals
from policies.routing.returns import advantages, without_input
from policies.routing.scores import Scores, scores_of
from policies.routing.set_network import ABOUT, SEEN, WIDTH, SetPolicy, Shape, describe, spread

SIGMA, GAMMA, GAE, CLIP, EPOCHS, MINIBATCH = 0.698, 0.9, 0.95, 0.2, 5, 2500
STEPS = 50
"""Slots of every environment in an update."""
MIDDLE = InstanceKind("modelled_middle", 1, 0.022, 0.805)
"""A variant between the paper's two: service time and accuracy are modelled."""
MIDDLE_REWARD = 0.7


def paper_mix(each: int) -> tuple[ServiceModel, float]:
    """The paper's two variants, `each` instances of both, and the factor on its rates that keeps the load."""
    kinds = (PAPER_KINDS[0],) * each + (PAPER_KINDS[2],) * each
    gain = (PAPER_REWARD_ACCURACY[0],) * each + (PAPER_REWARD_ACCURACY[2],) * each
    return ServiceModel(kinds, reward_accuracy=gain), each / 2.0


def three_variants(each: int) -> tuple[ServiceModel, float]:
    """Three variants, `each` instances of all; bursts load them about as much as the paper's load its four."""
    light = replace(PAPER_KINDS[2], rank=2)
    kinds = (PAPER_KINDS[0],) * each + (MIDDLE,) * each + (light,) * each
    gain = (PAPER_REWARD_ACCURACY[0],) * each + (MIDDLE_REWARD,) * each + (PAPER_REWARD_ACCURACY[2],) * each
    return ServiceModel(kinds, reward_accuracy=gain), each * 0.65


class SetActorCritic(nn.Module):
    """Actor (`look`, `weigh`, as in `set_network.py`) and a critic of the same form, of which the mean is the value."""

    def __init__(self, per_instance: int) -> None:
        super().__init__()
        self.look, self.weigh = self._tower(per_instance, 0.01)
        self.critic_look, self.critic_weigh = self._tower(per_instance, 1.0)

    @staticmethod
    def _tower(per_instance: int, last_gain: float) -> tuple[nn.Linear, nn.Sequential]:
        layers = [
            nn.Linear(per_instance + ABOUT, SEEN), nn.Linear(2 * SEEN + ABOUT, WIDTH), nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 1),
        ]  # fmt: skip
        for layer, gain in zip(layers, (2**0.5, 2**0.5, 2**0.5, last_gain), strict=True):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
        look, first, second, last = layers
        return look, nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last)

    def forward(self, seen: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Logits [B, k] and values [B] for features [B, n * per_instance]."""
        about = torch.from_numpy(shape.about).float()
        member = torch.from_numpy(shape.member).float()
        b, n = len(seen), len(shape.rank)
        x = torch.cat([seen.reshape(b, n, -1), about[torch.from_numpy(shape.rank)].expand(b, n, ABOUT)], 2)

        def tower(look: nn.Linear, weigh: nn.Sequential) -> Tensor:
            pooled = member @ torch.tanh(look(x))
            around = pooled.mean(1, keepdim=True).expand_as(pooled)
            out: Tensor = weigh(torch.cat([pooled, around, about.expand(b, *about.shape)], 2))
            return out.squeeze(2)

        logits = tower(self.look, self.weigh) + torch.from_numpy(shape.start).float()
        return logits, tower(self.critic_look, self.critic_weigh).mean(1)

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """The actor for `SetPolicy`."""
        kept = {k: v.detach().numpy().copy() for k, v in self.state_dict().items() if not k.startswith("critic")}
        return dict(kept)


class Size:
    """One size of service in training: its environments and how its returns are scaled."""

    def __init__(self, service: ServiceModel, rate_scale: float, environments: int, seed: int) -> None:
        self.environments = SlotEnvironments(service, paper_arrivals(rate_scale), environments, seed)
        self.shape = describe(service.kinds)
        self.per_reward = 4.0 / len(service.kinds)
        self.mean, self.scale = 0.0, 0.0

    def collect(self, network: SetActorCritic, noise: torch.Generator) -> list[Tensor]:
        """STEPS slots with the noisy policy: features, log shares, log densities, advantages, value targets."""
        envs, k = self.environments, len(self.shape.start)
        e = envs.environments
        seen = np.zeros((STEPS + 1, e, self.shape.layout.size), dtype=np.float32)
        value = np.zeros((STEPS + 1, e), dtype=np.float32)
        reward = np.zeros((STEPS, e), dtype=np.float32)
        given = np.zeros((STEPS, e, 18))
        log_y, old = torch.zeros((STEPS, e, k)), torch.zeros((STEPS, e))
        with torch.no_grad():
            for t in range(STEPS + 1):
                envs.observe(seen[t])
                logits, values = network(torch.from_numpy(seen[t]), self.shape)
                value[t] = values.numpy() * (self.scale or 1.0) + self.mean
                if t == STEPS:
                    break
                log_y[t] = torch.log_softmax(logits + SIGMA * torch.randn(logits.shape, generator=noise), 1)
                old[t] = log_density(logits, log_y[t], SIGMA)
                shares = np.exp(log_y[t].numpy().astype(np.float64))
                reward[t] = self.per_reward * envs.step(spread(self.shape, shares, envs.state.queue[:, :, LENGTH]))
                given[t] = envs.exogenous()
        reward = without_input(reward, given)
        if not self.scale:
            value[:] = 0.0
        advantage = advantages(reward, value, GAMMA, GAE)
        returns = advantage + value[:-1]
        pace = 1.0 if not self.scale else 0.05
        self.mean += pace * (float(returns.mean()) - self.mean)
        self.scale += pace * (max(float(returns.std()), 1e-3) - self.scale)
        target = torch.from_numpy((returns - self.mean) / self.scale)
        parts = (torch.from_numpy(seen[:-1]), log_y, old, torch.from_numpy(advantage), target)
        return [part.flatten(0, 1) for part in parts]


def learn(network: SetActorCritic, adam: torch.optim.Adam, shape: Shape, data: list[Tensor], rows: Tensor) -> None:
    """One step of Adam on a minibatch of one size."""
    seen, log_y, old, advantage, target = (part[rows] for part in data)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    logits, values = network(seen, shape)
    ratio = torch.exp(log_density(logits, log_y, SIGMA) - old)
    clipped = torch.minimum(ratio * advantage, ratio.clamp(1.0 - CLIP, 1.0 + CLIP) * advantage)
    loss = 0.5 * (values - target).square().mean() - clipped.mean()
    adam.zero_grad()
    loss.backward()
    adam.step()


def score(policy: SetPolicy, service: ServiceModel, rate_scale: float, *, slots: int, seed: int) -> dict[str, Scores]:
    """Scores of a policy without noise over `slots` slots of a service, by phase, overall and 50:50."""
    e = max(1, min(60, slots // 100))
    arrivals = paper_arrivals(rate_scale)
    envs = SlotEnvironments(service, arrivals, e, seed)
    for _ in range(slots // e):
        envs.step(policy.tables(envs.observe(), envs.state.queue[:, :, LENGTH]))
    return scores_of(envs.take_counts(), arrivals.phase_names)


def load_set_policy(path: Path, kinds: tuple[InstanceKind, ...]) -> SetPolicy:
    """The policy of a `.safetensors` file for these instances."""
    return SetPolicy(load_file(path), kinds)


def compare(path: Path, slots: int, seed: int) -> None:
    """Prints goodput, violations (50:50) and heavy shares beside the rules', at sizes met in training and others."""
    for name, (service, scale) in {
        "2 x 2": paper_mix(2), "2 x 8": paper_mix(8), "3 x 16": three_variants(16), "2 x 128": paper_mix(128),
    }.items():  # fmt: skip
        seen = max(600, int(slots / scale))
        rows = {"learned-set": score(load_set_policy(path, service.kinds), service, scale, slots=seen, seed=seed)}
        rules = ("learned-po",) * (name == "2 x 2") + ("deadline", "infaas", "uniform")
        for rule in rules:
            rows[rule] = evaluate(rule, service, paper_arrivals(scale), slots=seen, seed=seed).scores
        for router, s in rows.items():
            even = s["overall_50_50"]
            line = f"{name:8s} {router:12s} {100 * even.goodput_ratio:6.2f} ({100 * even.violation_ratio:5.2f})"
            for phase in ("bursty", "normal"):
                one = s[phase]
                line += f"  {phase} {100 * one.goodput_ratio:6.2f} ({100 * one.violation_ratio:5.2f})"
                line += f" heavy {100 * one.heavy_ratio:5.1f}"
            print(f"{line}  {even.requests} requests", flush=True)


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description="Train learned-set, one table network for any number of instances.")
    parser.add_argument("--minutes", type=float, default=9.0, help="processor time to spend")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1e-3, help="first rate of Adam; falls linearly to a tenth")
    parser.add_argument("--out", type=Path, default=None, help="folder for learned-set.safetensors")
    parser.add_argument("--compare", type=Path, default=None, help="only compare this .safetensors with the rules")
    parser.add_argument("--slots", type=int, default=30_000, help="slots per size of --compare")
    options = parser.parse_args()
    if options.compare is not None:
        compare(options.compare, options.slots, options.seed)
        return
    if options.out is None:
        parser.error("--out FOLDER (to train) or --compare FILE is needed")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    noise = torch.Generator().manual_seed(options.seed + 1)
    services = {"2 x 2": (paper_mix(2), 200), "2 x 8": (paper_mix(8), 60), "3 x 4": (three_variants(4), 80)}
    sizes = {
        name: Size(service, scale, environments, options.seed + k)
        for k, (name, ((service, scale), environments)) in enumerate(services.items())
    }
    network = SetActorCritic(next(iter(sizes.values())).shape.layout.per_instance)
    adam = torch.optim.Adam(network.parameters(), lr=options.rate)
    began, update = time.process_time(), 0
    while (done := (time.process_time() - began) / (60.0 * options.minutes)) < 1.0:
        for group in adam.param_groups:
            group["lr"] = options.rate * (1.0 - 0.9 * done)
        data = {name: size.collect(network, noise) for name, size in sizes.items()}
        for _ in range(EPOCHS):
            for name, size in sizes.items():
                order = torch.randperm(len(data[name][0]), generator=noise)
                for at in range(0, len(order), MINIBATCH):
                    rows = order[at : at + MINIBATCH]
                    learn(network, adam, size.shape, data[name], rows)
        update += 1
        if update % 10 == 0:
            line = f"{update:5d} updates, {(1.0 - done) * options.minutes:4.1f} min left"
            for name, size in sizes.items():
                s = scores_of(size.environments.take_counts(), ("bursty", "normal"))["overall_50_50"]
                line += f"  |  {name}: {100 * s.goodput_ratio:.2f} v {100 * s.violation_ratio:.2f}"
            print(line, flush=True)
            save_file(network.tensors(), options.out / "learned-set.safetensors")
    save_file(network.tensors(), options.out / "learned-set.safetensors")
    slots = {name: update * STEPS * size.environments.environments for name, size in sizes.items()}
    record = {"seed": options.seed, "updates": update, "slots": slots, "minutes": options.minutes}
    (options.out / "learned-set.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
