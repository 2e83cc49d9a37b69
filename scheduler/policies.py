"""Which table policy stands behind a router's name. Per-request rules (`deadline` and the like) set no tables."""

from collections.abc import Sequence

from policies.routing.tables import slot_policy

from policies.routing.contract import InstanceKind, SlotPolicy
from policies.routing.rules import RULES
from protocol.records import ServiceSpec


def make_policy(router: str, kinds: Sequence[InstanceKind], spec: ServiceSpec, slot_s: float) -> SlotPolicy | None:
    """The policy for this set of instances, or None if the router needs no tables.

    Raises `ValueError` if there is none for the name or for this set of instances.
    """
    if router in RULES:
        return None
    return slot_policy(router, tuple(kinds), spec.requirement_ms / 1000.0, spec.percentile, slot_s)
