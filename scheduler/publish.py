"""From an action to a table on the board: masked, renormalised, in sorted order, and refused if it is no table."""

import math

from policies.routing.contract import Action, masked
from protocol.records import Table
from scheduler.observe import Seen


class UnusableAction(ValueError):
    """The policy gave no usable table: says which entry, so that the last good one stays in force."""


def table_from(service: str, policy: str, seen: Seen, action: Action, valid_for_s: float) -> Table:
    """The table for the coming slot, version still 0 (the board numbers it). Raises `UnusableAction`."""
    probabilities = action.probabilities
    if len(probabilities) != len(seen.instances):
        raise UnusableAction(f"{policy} gave {len(probabilities)} weights for {len(seen.instances)} instances")
    for one, weight in zip(seen.instances, probabilities, strict=True):
        if not math.isfinite(weight) or weight < 0.0:
            raise UnusableAction(f"{policy} gave the weight {weight} to {one}")
    weights = masked(probabilities, seen.observation.ready)
    if weights.sum() <= 0.0:
        raise UnusableAction(f"no instance of {service} is ready")
    limits = {
        kind.variant: (action.minimum[kind.rank], action.maximum[kind.rank])
        for kind in seen.kinds
        if kind.rank < len(action.minimum)
    }
    return Table(
        service=service,
        version=0,
        valid_for_s=valid_for_s,
        instances=seen.instances,
        weights=tuple(float(weight) for weight in weights),
        policy=policy,
        batch_limits=limits,
    )
