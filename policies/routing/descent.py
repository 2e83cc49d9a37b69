"""The second half of an update of Algorithm 1: epochs of minibatches on what was seen (torch; training only)."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from policies.routing import fused, towers
from policies.routing.network import Scheduler
from policies.routing.presets import Preset


def descend(
    network: Scheduler,
    adam: torch.optim.Adam,
    rows: towers.Rows,
    seen: towers.Seen,
    p: Preset,
    scratch: Sequence[tuple[towers.Scratch, towers.Scratch]],
    noise: torch.Generator,
    *,
    sigma: float,
    actor_moves: bool = True,
) -> None:
    """The epochs of one update: steps of Adam on minibatches of what was seen, in an order drawn from `noise`.

    scratch: for the actor and the critic, once per thread; sigma: the policy's noise when `seen` was collected.
    """
    actor, critic = network.actor, network.critic
    with ThreadPoolExecutor(len(scratch)) as pool:
        for _ in range(p.epochs):
            order = torch.randperm(len(seen.target), generator=noise).numpy()
            for at in range(0, len(order), p.minibatch):
                chosen = order[at : at + p.minibatch]
                gain = seen.advantage[chosen]
                sides = towers.pack(actor), towers.pack(critic)
                # Whole parts of the minibatch side by side scale better than threads inside each operation.
                work = [
                    pool.submit(
                        fused.gradient, sides, one, rows, seen, part, choices=network.choices, mean=float(gain.mean()),
                        spread=float(gain.std()) + 1e-8, sigma=sigma, clip=p.clip, entropy=p.entropy,
                        weight=1.0 / len(chosen),
                    )
                    for part, one in zip(np.array_split(chosen, len(scratch)), scratch, strict=True)
                ]  # fmt: skip
                parts = [w.result() for w in work]
                for tower, found in zip((actor, critic), zip(*parts, strict=True), strict=True):
                    for weight, gradient in zip(tower.parameters(), towers.unpack(found, tower), strict=True):
                        weight.grad = gradient
                if not actor_moves:
                    for weight in actor.parameters():
                        weight.grad = None
                adam.step()
