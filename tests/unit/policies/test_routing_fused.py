"""The compiled forward and gradient against torch's own."""

import numpy as np
import pytest
import torch
from torch import Tensor

from policies.routing import fused, towers
from policies.routing.network import Scheduler

SIGMA, CLIP, ENTROPY = 0.7, 0.2, 0.01
ROWS, FEATURES = 203, 37
"""Not a multiple of the block: the last one is partly empty."""


def network(variants: int) -> Scheduler:
    """A scheduler for four instances with random weights."""
    torch.manual_seed(5)
    made = Scheduler(FEATURES, 4, variants, 6 if variants else 0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(0.0, 0.3)
    return made


def features() -> Tensor:
    """Mostly zeros, as one-hot lengths and padded ages are."""
    rng = np.random.default_rng(1)
    x = rng.random((ROWS, FEATURES)) * (rng.random((ROWS, FEATURES)) < 0.2)
    return torch.from_numpy(x.astype(np.float32))


def seen(made: Scheduler, x: Tensor) -> towers.Seen:
    """Actions whose probability ratios lie on both sides of the clipping range."""
    rng = torch.Generator().manual_seed(2)
    log_y = torch.log_softmax(torch.randn(ROWS, 4, generator=rng), -1)
    pairs = torch.randint(0, 6, (ROWS, made.variants), generator=rng)
    with torch.no_grad():
        old = made.log_prob(made.actor(x), log_y, pairs, SIGMA) + 0.3 * torch.randn(ROWS, generator=rng)
    gain, target = torch.randn(ROWS, generator=rng), torch.randn(ROWS, generator=rng)
    return towers.Seen(log_y.numpy(), pairs.numpy(), old.numpy(), gain.numpy(), target.numpy())


def by_torch(made: Scheduler, x: Tensor, done: towers.Seen, rows: Tensor) -> list[Tensor]:
    """Eq. 10 and the squared error as they are written, differentiated by torch."""
    out = made.actor(x[rows])
    log_y, pairs, old, gain, target = (torch.from_numpy(a)[rows] for a in done)
    gain = (gain - 0.1) / 1.5
    ratio = (made.log_prob(out, log_y, pairs, SIGMA) - old).exp()
    objective = torch.minimum(ratio * gain, ratio.clamp(1.0 - CLIP, 1.0 + CLIP) * gain).sum()
    loss = (made.critic(x[rows]).squeeze(-1) - target).square().sum() - objective
    if made.variants:
        choice = torch.log_softmax(made.heads(out)[1], -1)
        loss = loss + ENTROPY * (choice.exp() * choice).sum()
    return list(torch.autograd.grad(loss / ROWS, list(made.parameters())))


@pytest.mark.parametrize("variants", [0, 2])
def test_gradient_equals_torchs(variants: int) -> None:
    made, x = network(variants), features()
    done = seen(made, x)
    order = np.random.default_rng(3).permutation(ROWS)
    sides = towers.pack(made.actor), towers.pack(made.critic)
    scratch = fused.scratch_for(sides[0]), fused.scratch_for(sides[1])
    parts = [
        fused.gradient(
            sides, scratch, towers.compact(x.numpy()), done, part, choices=made.choices, mean=0.1, spread=1.5,
            sigma=SIGMA, clip=CLIP, entropy=ENTROPY, weight=1.0 / ROWS,
        )
        for part in np.array_split(order, 2)
    ]  # fmt: skip
    found = towers.unpack([p[0] for p in parts], made.actor) + towers.unpack([p[1] for p in parts], made.critic)
    expected = by_torch(made, x, done, torch.from_numpy(order))
    for a, b in zip(expected, found, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) < 1e-5 * float(a.abs().max())


def test_forward_equals_torchs() -> None:
    made, x = network(2), features()
    tower = towers.pack(made.actor)
    found = fused.forward(tower, fused.scratch_for(tower), towers.compact(x.numpy()), made.outputs)
    with torch.no_grad():
        assert np.abs(found - made.actor(x).numpy()).max() < 1e-5


def test_features_without_zeros_are_the_features() -> None:
    x = features().numpy()
    rows = towers.compact(x)
    again = np.zeros_like(x)
    for r in range(ROWS):
        where = slice(rows.start[r], rows.start[r + 1])
        again[r, rows.place[where]] = rows.value[where]
    assert np.array_equal(again, x)
    assert (rows.value != 0.0).all()


def test_saturated_units_stay_within_one() -> None:
    """Far beyond the fraction's range tanh is 1 to float32's precision, and its slope must not turn negative."""
    made = network(0)
    with torch.no_grad():
        made.actor[0].bias.fill_(50.0)  # type: ignore[operator]
    tower, x = towers.pack(made.actor), features()
    found = fused.forward(tower, fused.scratch_for(tower), towers.compact(x.numpy()), 4)
    with torch.no_grad():
        assert np.abs(found - made.actor(x).numpy()).max() < 1e-5
