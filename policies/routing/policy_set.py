"""The trained policies of one router, each for one set of instances: the one that fits those that are ready acts.

A policy may be trained for exactly the instances that are left when one dies (Tan, section 6.3). Where there is none,
the smallest one is taken that covers what is ready and asks for nothing that does not exist; its probabilities for
instances that are not ready are masked when the table is made. Instances of one variant are alike, so a policy fits
whatever the order of their ids.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from policies.routing.artifact import PRETRAINED, read_record
from policies.routing.contract import Action, BoolArray, InstanceKind, IntArray, Observation, RoutingError
from policies.routing.learned import LearnedPolicy, load_policy


@dataclass(frozen=True, slots=True)
class Fitted:
    """A policy and which instance stands at each place of its layout: int64[places]."""

    policy: LearnedPolicy
    order: IntArray


class PolicySet:
    """A `SlotPolicy` made of several. `kinds`: all instances, in the order of their ids, ready or not."""

    def __init__(self, policies: Sequence[LearnedPolicy], kinds: tuple[InstanceKind, ...]) -> None:
        first = policies[0]
        for one in policies:
            mine, others = (one.name, one.slot_s, one.needs_phase), (first.name, first.slot_s, first.needs_phase)
            if mine != others:
                raise RoutingError(
                    f"policies of one router must agree in name, slot and need of the phase: {mine} beside {others}"
                )
        self.policies = tuple(sorted(policies, key=lambda one: len(one.layout.variants)))
        self.kinds = kinds
        self.name, self.slot_s, self.needs_phase = first.name, first.slot_s, first.needs_phase
        self._fitted: dict[bytes, Fitted] = {}

    def fitted(self, ready: BoolArray) -> Fitted:
        """The policy for these ready instances. Raises `RoutingError` that names what exists and what was trained."""
        key = ready.tobytes()
        if key not in self._fitted:
            self._fitted[key] = self._fit(ready)
        return self._fitted[key]

    def _fit(self, ready: BoolArray) -> Fitted:
        there = Counter(kind.variant for kind in self.kinds)
        needed = Counter(kind.variant for kind, one in zip(self.kinds, ready, strict=True) if one)
        for policy in self.policies:
            trained = Counter(policy.layout.variants)
            if needed <= trained <= there:
                return Fitted(policy, self._order(policy, ready))
        trained_for = " or ".join(_shown(Counter(policy.layout.variants)) for policy in self.policies)
        missing = f", of which {_shown(needed)} are ready" if needed != there else ""
        raise RoutingError(f"{self.name} was trained for {trained_for}, but {_shown(there)} exist{missing}")

    def _order(self, policy: LearnedPolicy, ready: BoolArray) -> IntArray:
        """Ready instances before the others, else by id; an error if one has more places than the layout knows."""
        waiting = sorted(range(len(self.kinds)), key=lambda i: (not ready[i], i))
        order = []
        for variant in policy.layout.variants:
            chosen = next(i for i in waiting if self.kinds[i].variant == variant)
            waiting.remove(chosen)
            order.append(chosen)
        largest = max(order, key=lambda i: self.kinds[i].capacity)
        if self.kinds[largest].capacity > policy.layout.places:
            raise RoutingError(
                f"capacity = {self.kinds[largest].capacity} of {self.kinds[largest].variant}: {self.name} was trained"
                f" for at most {policy.layout.places} places; set that capacity, or train it again"
            )
        return np.array(order, dtype=np.int64)

    def act(self, observation: Observation, rng: np.random.Generator) -> Action:
        """The table for the coming slot, over all instances; those outside the policy's set get nothing."""
        fitted = self.fitted(observation.ready)
        action = fitted.policy.act(_restricted(observation, fitted.order), rng)
        probabilities = np.zeros(len(self.kinds))
        probabilities[fitted.order] = action.probabilities
        return Action(probabilities, action.minimum, action.maximum)

    def remark(self, ready: BoolArray) -> str:
        """What is unusual about the policy that acts now; empty when all instances are ready."""
        if ready.all():
            return ""
        variants = Counter(self.fitted(ready).policy.layout.variants)
        exact = sum(variants.values()) == int(ready.sum())
        how = "a policy trained for exactly them acts" if exact else f"the policy for {_shown(variants)} acts, masked"
        return f"{int(ready.sum())} of {len(ready)} instances are ready: {how}"


def load_policies(source: Path | str, kinds: tuple[InstanceKind, ...], router: str = "") -> PolicySet:
    """The policies behind `source`: an artifact, a folder of artifacts, or a name among those shipped (`learned-po`).

    Beside an artifact NAME.json, those in the folder NAME/ belong to it: the same router for other sets of instances.
    Of a folder, those of `router` (where given) are taken. Raises `RoutingError` if there is none, one is broken, or a
    named one, or what belongs to it, is another router's. Whether one fits is seen when it acts: what does not fit the
    whole set may fit what is ready of it.
    """
    where = Path(source)
    if where.parent == Path(".") and not where.exists() and not where.with_suffix(".json").exists():
        where = PRETRAINED / f"routing-{where.name}"
        if not where.with_suffix(".json").exists():
            raise RoutingError(f"no trained policy is shipped for {source}: train one and name it in policy_file")
    stem = where.with_suffix("") if where.suffix == ".json" else where
    folder = [path for path in sorted(stem.glob("*.json")) if path.with_suffix(".safetensors").exists()]
    files = folder if where.is_dir() and not stem.with_suffix(".json").exists() else [stem, *folder]
    if not files:
        raise RoutingError(f"{where} holds no artifact: it needs NAME.json beside NAME.safetensors")
    if files is folder and router:
        names = [str(read_record(file)[0]["name"]) for file in folder]
        files = [file for file, name in zip(folder, names, strict=True) if name == router]
        if not files:
            raise RoutingError(f"{where} holds no artifact of {router}, but of {', '.join(sorted(set(names)))}")
    policies = [load_policy(file) for file in files]
    for policy, file in zip(policies, files, strict=True):
        if router and policy.name != router:
            raise RoutingError(f"artifact {file} is a {policy.name}, but the service's router is {router}")
    return PolicySet(policies, kinds)


def _restricted(observation: Observation, order: IntArray) -> Observation:
    return Observation(
        length=observation.length[order],
        elapsed_s=observation.elapsed_s[order],
        ages_s=observation.ages_s[order],
        in_service=observation.in_service[order],
        ready=observation.ready[order],
        phase=observation.phase,
        since_s=observation.since_s,
    )


def _shown(variants: "Counter[str]") -> str:
    return " + ".join(f"{count} {variant}" for variant, count in sorted(variants.items())) or "nothing"
