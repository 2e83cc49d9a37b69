"""The networks of Tan's scheduler and the density of its softmax-Gaussian policy (torch; training only).

Actor and critic share nothing: two tanh layers of 90 and 60 units each (Tan 5.1.4). The actor's output f gives the
table softmax(f + noise) with independent normal noise of standard deviation sigma (Eq. 8); with adaptive batching,
also one categorical choice of (minimum, maximum) per variant.
"""

import math

import torch
from torch import Tensor, nn

HIDDEN = (90, 60)


def log_density(f: Tensor, log_y: Tensor, sigma: float) -> Tensor:
    """Logarithm of the density of the table y given the network's output f (Eq. 9); both [..., n], gives [...].

    The density is with respect to the first n - 1 coordinates of y (it integrates to 1 over those).
    """
    n = f.shape[-1]
    q = log_y - f
    quadratic = q.sum(-1).square() / (2.0 * n * sigma**2) - q.square().sum(-1) / (2.0 * sigma**2)
    constant = 0.5 * math.log(n) + (n - 1) * math.log(sigma * math.sqrt(2.0 * math.pi))
    return quadratic - constant - log_y.sum(-1)


def tower(inputs: int, outputs: int, last_gain: float) -> nn.Sequential:
    """Two hidden tanh layers and a linear one, orthogonal start, the last layer scaled by last_gain."""
    layers: list[nn.Module] = []
    width = inputs
    for units in HIDDEN:
        linear = nn.Linear(width, units)
        nn.init.orthogonal_(linear.weight, math.sqrt(2.0))
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
        width = units
    last = nn.Linear(width, outputs)
    nn.init.orthogonal_(last.weight, last_gain)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


class Scheduler(nn.Module):
    """Actor and critic. Actor outputs: n table logits, then `choices` logits per variant when batching."""

    def __init__(self, inputs: int, instances: int, variants: int = 0, choices: int = 0) -> None:
        super().__init__()
        self.instances, self.variants, self.choices = instances, variants, choices
        self.outputs = instances + variants * choices
        self.actor = tower(inputs, self.outputs, 0.01)
        self.critic = tower(inputs, 1, 1.0)

    def lean(self, start: list[float], batches: list[float]) -> None:
        """Set the start: with these probabilities, over instances and over batch choices, the untrained policy agrees.

        batches is the same for every variant; not used without batching.
        """
        last = self.actor[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.bias.copy_(torch.log(torch.tensor(start + batches * self.variants)))

    def heads(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Table logits [..., n] and batch logits [..., variants, choices] in the actor's output."""
        batches = out[..., self.instances :].reshape(*out.shape[:-1], self.variants, self.choices)
        return out[..., : self.instances], batches

    def log_prob(self, out: Tensor, log_y: Tensor, pairs: Tensor, sigma: float) -> Tensor:
        """Log-density of tables (and log-probability of batch choices int64[B, variants]) given actor outputs."""
        if self.variants == 0:
            return log_density(out, log_y, sigma)
        f, logits = self.heads(out)
        chosen = torch.log_softmax(logits, -1).gather(-1, pairs.unsqueeze(-1)).squeeze(-1)
        return log_density(f, log_y, sigma) + chosen.sum(-1)
