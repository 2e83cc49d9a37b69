"""Settings of a training run: Tan's own (`paper`), and one for people in a hurry (`quick`).

What differs from the paper, in both presets, and why (papers/README.md: the objective is nearly flat there):
- `heavy_start`: the untrained policy leans to the heavy instances instead of sharing equally; the start decides
  which basin is reached, and no other setting moves.
- `input_baseline`: what arrivals and phases alone explain of a slot's reward (least squares, per update) is
  subtracted from it. No policy can change them, so the objective keeps its order of policies, but most of the noise
  goes: from a heavy start a burst costs 200 a slot, and when it ends is chance.
- `batch_start`: how likely the untrained policy takes batches as they come (minimum 1, maximum 5); 1/6 prefers none.
- `critic_first`: so many updates move the critic alone, for an actor that was trained before (`warm_start.py`).
- advantages are normalised per minibatch, returns are rescaled as they are learned, and the learning rate
  falls linearly to a tenth ("initial learning rate" in the paper says no more).
- one long trajectory is many shorter ones side by side: `environments` of them, T slots an update all told.
"""

from dataclasses import dataclass, replace

from policies.routing.contract import InstanceKind, RoutingError
from policies.routing.queueing_model import ArrivalModel, ServiceModel, paper_arrivals, periodic_arrivals

HEAVY = "pnasnet5large_t4"
LIGHT = "efficientnet_b0_t4"
PAPER_KINDS = (
    InstanceKind(HEAVY, 0, 0.043, 0.8278),
    InstanceKind(HEAVY, 0, 0.043, 0.8278),
    InstanceKind(LIGHT, 1, 0.0115, 0.7769),
    InstanceKind(LIGHT, 1, 0.0115, 0.7769),
)
"""Tan's four instances (5.1.1): names as in the catalog, service times inferred, ImageNet accuracies."""
PAPER_REWARD_ACCURACY = (0.7261, 0.7261, 0.6629, 0.6629)
"""g of Eq. 2: ImageNet-V2 matched frequency (papers/README.md)."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Every number of a training run. slots: length of the run; sigma: noise of the policy (Eq. 8)."""

    slots: int = 250_000_000
    environments: int = 500
    slots_per_update: int = 50_000
    minibatch: int = 10_000
    epochs: int = 5
    learning_rate: float = 2.5e-4
    final_rate: float = 0.1
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    sigma: float = 0.698
    heavy_start: float = 0.97
    input_baseline: bool = True
    entropy: float = 0.0
    batch_start: float = 1 / 6
    critic_first: int = 0

    def __post_init__(self) -> None:
        if self.slots_per_update % self.environments:
            raise RoutingError(
                f"slots_per_update = {self.slots_per_update}: must be a multiple of environments = {self.environments}"
            )
        if not 0.0 < self.heavy_start < 1.0:
            raise RoutingError(f"heavy_start = {self.heavy_start}: must be inside (0, 1)")
        if not 0.0 < self.batch_start < 1.0:
            raise RoutingError(f"batch_start = {self.batch_start}: must be inside (0, 1)")
        if self.sigma <= 0.0:
            raise RoutingError(f"sigma = {self.sigma}: training needs noise above 0")


PRESETS = {
    "paper": Preset(),
    "quick": Preset(
        slots=6_000_000, environments=250, slots_per_update=25_000, minibatch=5_000, learning_rate=1e-3, gamma=0.9
    ),
}
"""`paper` is Tan's 5.1.4 and 5.1.5; `quick` learns faster with a shorter horizon and larger steps, at some cost."""


def preset(name: str, slots: int | None = None) -> Preset:
    """A preset by name, with another length if given."""
    if name not in PRESETS:
        raise RoutingError(f"preset = {name!r}: must be one of {sorted(PRESETS)}")
    chosen = PRESETS[name]
    return chosen if slots is None else replace(chosen, slots=slots)


def paper_service(requirement_s: float = 0.3) -> ServiceModel:
    """Tan's service: two heavy and two light instances, 300 ms, deterministic service times."""
    return ServiceModel(PAPER_KINDS, requirement_s=requirement_s, reward_accuracy=PAPER_REWARD_ACCURACY)


def workload(name: str) -> ArrivalModel:
    """The arrivals behind a workload's name: paper or periodic."""
    if name == "paper":
        return paper_arrivals()
    if name == "periodic":
        return periodic_arrivals()
    raise RoutingError(f"workload = {name!r}: training knows 'paper' and 'periodic'")
