"""Which instance a request goes to: the arrays that rules look at, kept true by every send and every reply.

Synchronous and free of sockets. One `ServiceRouter` per service holds the instances in sorted order of their ids
(the order of tables and of `policies.routing.rules`), the rule, and the table of the current slot. Requests that a
rule says to HOLD wait in `dispatch.py`; this file only answers "which one?".

All mutable state: the parallel lists, the table and when it expires.
"""

from bisect import bisect_right
from collections.abc import Iterable, Set
from typing import Final

import msgspec

from policies.routing.batch_forecast import BatchForecast, choosable
from policies.routing.contract import HOLD, REJECT, Rule
from policies.routing.draw import cumulative
from policies.routing.estimation import (
    SERVICE_RATE,
    arrive,
    depart,
    learn_margin,
    learn_service,
    learn_spent,
    learn_tail,
    new_margin,
)
from policies.routing.rules import RULES
from protocol.records import InstanceRecord, PolicyStatus, ServiceSpec, Table

PHASE_ROUTERS: Final = frozenset({"stationary", "learned-fo", "learned-fo-batch"})
"""Routers that must be told the workload's hidden phase: live, only an experiment's load generator can."""
TABLE_ROUTERS: Final = frozenset(
    {
        "threshold",
        "stationary",
        "infaas",
        "learned-po",
        "learned-fo",
        "learned-po-batch",
        "learned-fo-batch",
        "learned-set",
    }
)
"""Routers whose table the scheduler sets every slot; without a valid table the gateway routes by `deadline`."""
ROUTERS: Final = tuple(sorted(TABLE_ROUTERS | RULES.keys()))

_UNKNOWN_SERVICE_S: Final = 0.01


class Target:
    """One instance as this gateway sees it. `index` is its number in the service's arrays, or -1 once it is gone.

    `heard`: whether it has served a request since its last registration.
    """

    __slots__ = ("heard", "id", "in_flight", "index", "record")

    def __init__(self, record: InstanceRecord) -> None:
        self.id = record.id
        self.record = record
        self.index = -1
        self.in_flight = 0
        self.heard = False


class InstanceView(msgspec.Struct, frozen=True):
    """What `ServiceRouter.statistics` tells of one instance. `reason`: why it is not ready, as far as is known."""

    id: str
    variant: str
    rank: int
    ready: bool
    reason: str
    length: int
    capacity: int
    clear_in_s: float
    service_s: float


class RouterStatistics(msgspec.Struct, frozen=True):
    """What `ServiceRouter.statistics` tells of a service.

    `routing_by` is the rule in force; `reason` says why it is not the configured `router`, empty if it is.
    """

    router: str
    routing_by: str
    reason: str
    margin: float
    table_version: int
    instances: list[InstanceView]


class ServiceRouter:
    """Routes the requests of one service."""

    def __init__(self, name: str, spec: ServiceSpec) -> None:
        self.name = name
        self.targets: list[Target] = []
        self.length: list[int] = []
        self.capacity: list[int] = []
        self.clear_s: list[float] = []
        self.service_s: list[float] = []
        self.rank: list[int] = []
        self.routable = 0
        self.margin = new_margin(1.0 - spec.percentile)
        self._first_margin = self.margin[0]
        self.batches: BatchForecast | None = None  # only while an instance batches by `deadline`'s choice
        self._by_id: dict[str, Target] = {}
        self._table: Table | None = None
        self._table_sums: list[float] = []
        self._table_ends_s = 0.0
        self.spec = spec
        self.policy: PolicyStatus | None = None
        self.uses_tables = False
        self.wants_phase = False
        self.bounces = False
        self.expires = False
        self._rule: Rule = RULES["deadline"]
        self.configure(spec)

    def configure(self, spec: ServiceSpec) -> None:
        """Takes a changed service setting; requests under way keep what they were given."""
        if spec.router not in ROUTERS:
            raise ValueError(f"router = {spec.router!r} of service {self.name!r}: must be one of {', '.join(ROUTERS)}")
        if spec.percentile != self.spec.percentile:
            self.margin = new_margin(1.0 - spec.percentile)
            self._first_margin = self.margin[0]
        self.spec = spec
        self._requirement_s = spec.requirement_ms / 1e3
        self.uses_tables = spec.router in TABLE_ROUTERS
        self.wants_phase = spec.router in PHASE_ROUTERS
        self.expires = spec.expire or spec.router == "heavy-expire"
        self.bounces = spec.router == "deadline"
        self._rule = RULES["deadline" if self.uses_tables else spec.router]
        self._renumber(list(self._by_id.values()))

    # who is there

    def set_instances(self, records: Iterable[InstanceRecord], connected: Set[str]) -> None:
        """The registrations of this service, and the worker addresses that can be reached now.

        An instance keeps its state while it stays; one that restarted (another epoch) starts afresh.
        """
        targets: list[Target] = []
        for record in records:
            target = self._by_id.get(record.id)
            if target is None or target.record.epoch != record.epoch or target.record.address != record.address:
                if target is not None:
                    target.index = -1
                target = Target(record)
            target.record = record
            targets.append(target)
        kept = {target.id for target in targets}
        for old in self._by_id.values():
            if old.id not in kept:
                old.index = -1
        self._renumber(targets)
        self.set_connected(connected)

    def _renumber(self, targets: list[Target]) -> None:
        """Rebuilds the arrays in sorted order, keeping the values of instances that stay."""
        targets = sorted(targets, key=lambda target: target.id)
        before = {
            target.id: (self.length[target.index], self.clear_s[target.index], self.service_s[target.index])
            for target in targets
            if target.index >= 0
        }
        capacity = {target.id: self.capacity[target.index] for target in targets if target.index >= 0}
        order = {variant: rank for rank, variant in enumerate(self.spec.variants)}
        self.targets = targets
        self._by_id = {target.id: target for target in targets}
        self.length, self.clear_s, self.service_s, self.capacity, self.rank = [], [], [], [], []
        for index, target in enumerate(targets):
            fresh = (0, 0.0, target.record.service_s or _UNKNOWN_SERVICE_S)
            length, clear_s, service_s = before.get(target.id, fresh)
            target.index = index
            self.length.append(length)
            self.clear_s.append(clear_s)
            self.service_s.append(service_s)
            self.capacity.append(capacity.get(target.id, 0))
            self.rank.append(order.get(target.record.variant, len(order)))
        records = [target.record for target in targets]
        times_s = [choosable(record.batch, record.batch_s) if self.bounces else None for record in records]
        batching = any(one is not None for one in times_s)
        self.batches = BatchForecast(times_s, self.service_s, self.length) if batching else None
        self._count()
        self._read_table()

    def set_connected(self, connected: Set[str]) -> None:
        """Only instances that are ready, of a variant that the service names, at a reachable worker get places."""
        for index, target in enumerate(self.targets):
            record = target.record
            routable = (
                record.state == "ready" and record.address in connected and self.rank[index] < len(self.spec.variants)
            )
            if not routable:
                self.capacity[index] = 0
            else:
                back = self.capacity[index] == 0
                self.capacity[index] = record.capacity
                if back:
                    self.length[index] = target.in_flight
                    self.clear_s[index] = 0.0
                # It has been loading, away or idle: its worker's own measurement is the best that there is now.
                if record.service_s > 0.0 and (back or not (target.heard or target.in_flight)):
                    self.service_s[index] = record.service_s
                    if self.batches is not None:
                        self.batches.added_s[index] = record.service_s
            target.heard = False
        self._count()
        if self.margin[0] == self._first_margin:  # nothing learned yet: start as these instances' service times ask
            longest_s = max((self.service_s[i] for i, places in enumerate(self.capacity) if places > 0), default=1e9)
            self._first_margin = new_margin(1.0 - self.spec.percentile, longest_s / self._requirement_s)[0]
            self.margin[0] = self._first_margin

    def close(self, target: Target) -> None:
        """No further request for this instance until the next registration says that it is ready."""
        if target.index >= 0:
            self.capacity[target.index] = 0
            self._count()

    def _not_ready(self, target: Target) -> str:
        """Why no request goes to this instance; empty if requests do."""
        if self.capacity[target.index] > 0:
            return ""
        if target.record.state != "ready":
            return target.record.reason or str(target.record.state)
        if target.record.variant not in self.spec.variants:
            return f"the service does not list the variant {target.record.variant}"
        return f"its worker at {target.record.address} cannot be reached, or has said that it is not ready"

    def _count(self) -> None:
        self.routable = sum(1 for places in self.capacity if places > 0)

    # tables

    def set_table(self, table: Table, now_s: float, age_s: float = 0.0) -> bool:
        """Takes the table of a slot; False (and nothing changed) if it is older than the one in use or unusable."""
        newest = self._table is None or table.version > self._table.version or now_s >= self._table_ends_s
        if not newest or len(table.instances) != len(table.weights):
            return False
        previous, previous_ends_s = self._table, self._table_ends_s
        self._table, self._table_ends_s = table, now_s + table.valid_for_s - age_s
        if not self._read_table():
            self._table, self._table_ends_s = previous, previous_ends_s
            self._read_table()
            return False
        return True

    def _read_table(self) -> bool:
        """Spreads the table's weights over the present numbering; instances it does not know get none.

        Another router's table is kept but not used: the scheduler may learn of a change before this gateway does.
        """
        self._table_sums = []
        if self._table is None:
            return False
        weights = dict(zip(self._table.instances, self._table.weights, strict=True))
        try:
            sums = cumulative([weights.get(target.id, 0.0) for target in self.targets])
        except ValueError:
            return False
        if self._table.policy == self.spec.router:
            self._table_sums = sums
        return True

    # one request

    def route(
        self, now_s: float, budget_s: float, draw: float, avoid: Target | None = None, variant: str = ""
    ) -> Target | int:
        """The instance for a request with `budget_s` left, or HOLD, or REJECT. `draw` is uniform in [0, 1).

        `avoid` is left out (the instance that a first attempt has just failed at). `variant`, where given, is the
        only one that may answer; among its instances `deadline` chooses, whatever the service's router is.
        """
        narrowed = avoid is not None or variant != ""
        if self.uses_tables and now_s < self._table_ends_s and self._table_sums and not narrowed:
            index = bisect_right(self._table_sums, draw)
            if self.capacity[index] > 0:
                return self.targets[index]
        capacity = self.capacity
        rule = self._rule
        if narrowed:
            capacity = [
                0 if target is avoid or (variant and target.record.variant != variant) else places
                for target, places in zip(self.targets, capacity, strict=True)
            ]
            rule = RULES["deadline"]
        added_s = self.service_s if self.batches is None else self.batches.added_s
        index = rule(now_s, budget_s, draw, self.length, capacity, self.clear_s, added_s, self.rank, self.margin)
        return self.targets[index] if index >= 0 else index

    def sent(self, target: Target, now_s: float) -> float:
        """A request goes to `target`: its predicted sojourn in seconds."""
        target.in_flight += 1
        index = target.index
        if self.batches is None:
            arrive(now_s, index, self.length, self.clear_s, self.service_s)
        else:
            self.batches.sent(
                index, now_s, self._requirement_s, self.margin[0], self.length, self.clear_s, self.service_s
            )
        return self.clear_s[index] - now_s

    def answered(
        self, target: Target, now_s: float, length: int, backlog_s: float, service_s: float, served: int = 1,
        batch: int = 0, elapsed_s: float = 0.0,
    ) -> None:  # fmt: skip
        """A reply came from `target`, which then held `length` requests on a device busy for `backlog_s`.

        `service_s`: what this one and those it was served with (`served` in all) took in service, 0.0 if it was not
        served. `batch`: in service now, since elapsed_s. What other gateways sent is in the reply's figures; what
        this one sent and the worker had not yet seen is in `in_flight`.
        """
        target.in_flight -= 1
        index = target.index
        if index < 0:
            return
        if service_s > 0.0:
            target.heard = True
            times = served if self.batches is None else self.batches.times(index, served)
            learn_tail(service_s / times, self.service_s[index], self.margin)
            learn_service(index, service_s / times, self.service_s, SERVICE_RATE)
        remaining = max(length, target.in_flight)
        if self.batches is None:
            depart(now_s, index, remaining, self.length, self.clear_s, self.service_s)
        else:
            self.batches.answered(
                index, now_s, self._requirement_s, self.margin[0], remaining, batch, elapsed_s,
                self.length, self.clear_s, self.service_s,
            )  # fmt: skip
        if now_s + backlog_s > self.clear_s[index]:
            self.clear_s[index] = now_s + backlog_s

    def lost(self, target: Target) -> None:
        """The request will get no reply from `target` (cancelled, or the link broke)."""
        target.in_flight -= 1
        if target.index >= 0:
            self.length[target.index] = max(0, self.length[target.index] - 1)

    def learn(self, predicted_s: float, observed_s: float, budget_s: float) -> None:
        """Feeds one outcome of the `deadline` rule back into what it has learned."""
        learn_margin(predicted_s, observed_s, budget_s, self.margin)
        learn_spent(observed_s, budget_s, self.margin)

    def substituted(self, now_s: float) -> str:
        """Why the configured router is not in force and `deadline` routes instead; empty if it is in force."""
        if not self.uses_tables or (now_s < self._table_ends_s and self._table_sums):
            return ""
        said = self.policy
        if said is not None and said.policy == self.spec.router and not said.in_force:
            return said.reason
        if self._table is None:
            return "the scheduler has not sent a table yet: is one running?"
        if self._table.policy != self.spec.router:
            return f"the scheduler has not sent a table of {self.spec.router} yet, the last was {self._table.policy}'s"
        if not self._table_sums:
            return f"table {self._table.version} has no weight for an instance that is there"
        late_s = now_s - self._table_ends_s
        return f"table {self._table.version} expired {late_s:.1f} s ago and the scheduler has not sent another"

    def statistics(self, now_s: float) -> RouterStatistics:
        """The present view, for metrics, `/state` and tests."""
        reason = self.substituted(now_s)
        return RouterStatistics(
            router=self.spec.router,
            routing_by="deadline" if reason else self.spec.router,
            reason=reason,
            margin=self.margin[0],
            table_version=self._table.version if self._table is not None else 0,
            instances=[
                InstanceView(
                    id=target.id,
                    variant=target.record.variant,
                    rank=self.rank[index],
                    ready=self.capacity[index] > 0,
                    reason=self._not_ready(target),
                    length=self.length[index],
                    capacity=self.capacity[index],
                    clear_in_s=max(0.0, self.clear_s[index] - now_s),
                    service_s=self.service_s[index],
                )
                for index, target in enumerate(self.targets)
            ],
        )


__all__ = ["HOLD", "REJECT", "ROUTERS", "TABLE_ROUTERS", "RouterStatistics", "ServiceRouter", "Target"]
