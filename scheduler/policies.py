"""Which table policy stands behind a router's name. Per-request rules (`deadline` and the like) set no tables."""

from collections.abc import Sequence

from policies.routing.contract import InstanceKind, SlotPolicy
from policies.routing.policy_set import load_policies
from policies.routing.rules import RULES
from policies.routing.set_network import NAME as LEARNED_SET
from policies.routing.set_network import load_set_policy
from policies.routing.tables import Infaas, Stationary, Threshold
from protocol.records import ServiceSpec


def make_policy(router: str, kinds: Sequence[InstanceKind], spec: ServiceSpec, slot_s: float) -> SlotPolicy | None:
    """The policy for this set of instances, or None if the router needs no tables.

    Learned policies come from the service's `policy_file`, else from those shipped (`policies/pretrained`).
    Raises `ValueError` if there is none for the name, or it is broken.
    """
    instances = tuple(kinds)
    if router in RULES:
        return None
    if router == "threshold":
        return Threshold(instances, slot_s=slot_s)
    if router == "infaas":
        return Infaas(instances)
    if router == "stationary":
        if not spec.phase_rates:
            raise ValueError("stationary needs phase_rates in the service's settings: requests/s in each phase")
        return Stationary.solve(instances, spec.phase_rates, spec.requirement_ms / 1e3, 1.0 - spec.percentile)
    if router == LEARNED_SET:
        return load_set_policy(spec.policy_file or router, instances)
    return load_policies(spec.policy_file or router, instances, router)
