"""The scale on which HISPER's critics learn their targets (Eq. 32): signed logarithms, standardised per head.

A lost request costs -100; what configurations, delay and cost are worth lies between 0 and 1. Learned as they are, or
divided by their spread, the small differences are some thousandths of a head's range, and no critic resolves them.
With discount 0 a head's target is a function of state and joint action alone, so that learning its logarithm biases
nothing. Not from the paper, which says nothing about scaling.
"""

import torch
from torch import Tensor

LARGEST_LEVEL = 8.0  # |log(1 + |r|)| of a reward of about 3,000, beyond any slot's


def signed_log(rewards: Tensor) -> Tensor:
    """sign(r) log(1 + |r|)."""
    return rewards.sign() * torch.log1p(rewards.abs())


class RewardScale:
    """Maps rewards (..., heads) to what critics learn and back; the identity until `fit`."""

    def __init__(self, heads: int, device: str) -> None:
        """The identity: a standard deviation of 0 stands for "not fitted"."""
        self.center, self.scale = torch.zeros(heads, device=device), torch.zeros(heads, device=device)

    def fit(self, rewards: Tensor) -> None:
        """Take mean and standard deviation of the levels of rewards (B, heads)."""
        levels = signed_log(rewards)
        self.center, self.scale = levels.mean(dim=0), levels.std(dim=0).clamp_min(1e-6)

    def learned(self, rewards: Tensor) -> Tensor:
        """Rewards as the critics learn them."""
        return (signed_log(rewards) - self.center) / self.scale if bool(self.scale.any()) else rewards

    def rewards(self, values: Tensor) -> Tensor:
        """The critics' values as rewards."""
        if not bool(self.scale.any()):
            return values
        levels = (values * self.scale + self.center).clamp(-LARGEST_LEVEL, LARGEST_LEVEL)
        return levels.sign() * torch.expm1(levels.abs())

    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs."""
        return {"scale.center": self.center, "scale.scale": self.scale}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        self.center, self.scale = (saved[f"scale.{k}"].to(self.scale.device) for k in ("center", "scale"))
