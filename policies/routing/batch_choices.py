"""Fig. 5 of Tan: which batch sizes a trained policy with adaptive batching chooses, per model and phase."""

import numpy as np

from policies.routing.contract import FloatArray, RoutingError
from policies.routing.environment import SlotEnvironments
from policies.routing.learned import PAIRS, LearnedPolicy
from policies.routing.queueing_model import PHASE, ArrivalModel, ServiceModel


def batch_choices(
    policy: LearnedPolicy, service: ServiceModel, arrivals: ArrivalModel, *, slots: int, seed: int
) -> FloatArray:
    """Shares float64[phases, variants, 6] of the batch limits (`PAIRS`) that the policy chose, by the phase then."""
    if not policy.batching:
        raise RoutingError(f"{policy.name} chooses no batches: name a policy with batching, such as learned-po-batch")
    environments = SlotEnvironments(
        service, arrivals, max(1, slots // 1000), seed, batching=True, observable=policy.needs_phase,
        slot_s=policy.slot_s, at_changes=policy.needs_phase,
    )  # fmt: skip
    variants = environments.state.limits.shape[2]
    count = np.zeros((arrivals.phases, variants, len(PAIRS)))
    number = {pair: k for k, pair in enumerate(PAIRS)}
    for _ in range(slots // environments.environments):
        phase = environments.state.marks[:, PHASE].copy()
        tables, low, high = policy.tables(environments.observe())
        for v in range(variants):
            chosen = np.array([number[pair] for pair in zip(low[:, v].tolist(), high[:, v].tolist(), strict=True)])
            np.add.at(count[:, v], (phase, chosen), 1.0)
        environments.step(tables, low, high)
    return np.asarray(count / np.maximum(count.sum(axis=2, keepdims=True), 1.0))
