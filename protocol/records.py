"""The structs that go over the wire (array-like msgpack: small, positional) and onto the board (JSON: readable).

Times are spans in seconds, never clock readings: two machines' clocks never meet here.
"""

import enum
from typing import Final

import msgspec

from protocol.edge_records import EdgeSpec

BOUNCE: Final = 1
"""`Infer.flags`: the worker may refuse at once what its own queue would make late (the `deadline` router)."""
EXPIRE: Final = 2
"""`Infer.flags`: drop before compute what cannot finish in time (the service's setting)."""
TENSORS: Final = 4
"""`Infer.flags`: answer raw float32 scores instead of JSON predictions."""
PREDICTIONS: Final = 8
"""`Infer.flags`, beside `TENSORS`: answer both, the JSON first, then the scores (4 bytes per element of the shape)."""


class Infer(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One request for one instance. `budget_s`: time left until the deadline when the frame was written.

    `margin`: the share of the budget that a worker may plan with when it decides whether to bounce.
    """

    instance: str
    budget_s: float
    content_type: str = ""
    flags: int = 0
    top_k: int = 5
    margin: float = 1.0


class Status(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What an instance's queue looks like at this moment (Tan section 3.1.3: l, ω, φ₁ … φ_l).

    `backlog_s` is the predicted time until everything that the *device* now holds is done (instances of one worker
    share it); `service_s` the worker's own running estimate for one request; `counts` by `Attempt` code, `arrived`
    the requests that ever came: arrived = sum(counts) + length.
    """

    instance: str
    length: int = 0
    elapsed_s: float = 0.0
    ages_s: tuple[float, ...] = ()
    batch: int = 0
    backlog_s: float = 0.0
    service_s: float = 0.0
    arrived: int = 0
    counts: tuple[int, ...] = ()


class Reply(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How one attempt ended (`outcomes.Attempt`), and what it took. The frame's payload is the answer when OK or LATE.

    `reason` says why otherwise; `http_status` refines INVALID (400, 413, 415, 422).
    """

    attempt: int
    status: Status
    reason: str = ""
    http_status: int = 0
    prepare_s: float = 0.0
    queue_s: float = 0.0
    service_s: float = 0.0
    batch: int = 0
    shape: tuple[int, ...] = ()


class WorkerStatus(msgspec.Struct, array_like=True, frozen=True):
    """Every instance of a worker at one moment.

    `epoch` is that of this start of the worker: a registration of another one is out of date, however fresh it looks.
    """

    worker: str
    instances: tuple[Status, ...]
    draining: bool = False
    epoch: str = ""


class Goodbye(msgspec.Struct, array_like=True, frozen=True):
    """Why the sender closes the connection."""

    reason: str


class InstanceState(enum.StrEnum):
    """Life of an instance. Only `READY` ones are routed to; `DRAINING` ones finish what they hold."""

    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class InputRecord(msgspec.Struct, frozen=True):
    """The tensor that a loaded variant takes beside encoded images: one input, without its batch axis."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class InstanceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`instance:{id}` on the board, renewed by its worker every second, gone 3 s after the worker is.

    `epoch` differs after each start of the worker, so that a reader notices a restart that kept the address.
    `input` and `classes` say what the variant takes and how many scores it gives, once it is loaded. `batch`: the
    deployment's limits; `batch_s`: what batches of 1, 3 and 5 take (a size never made: in proportion), once known.
    """

    id: str
    worker: str
    address: str
    service: str
    variant: str
    capacity: int
    state: InstanceState
    epoch: str
    accuracy: float | None = None
    accuracy_source: str = "none"
    service_s: float = 0.0
    profile: str | None = None
    reason: str = ""
    input: InputRecord | None = None
    classes: int = 0
    batch: tuple[int, int] = (1, 1)
    batch_s: tuple[float, float, float] | None = None


ONE_GATEWAY_ROUTERS: Final = frozenset({"single-queue", "single-queue-random"})
"""Routers that keep waiting requests in the gateway: with several gateways there would be several "single" queues."""


class ServiceSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A service as the operator states it. `variants` run from the heaviest to the lightest.

    `policy_file`: a trained policy instead of the shipped one, for routers named learned-…; `phase_rates`: requests/s
    in each phase of the workload, which only the router `stationary` has to be told.
    """

    variants: tuple[str, ...]
    requirement_ms: float
    percentile: float = 0.98
    router: str = "deadline"
    expire: bool = True
    on_late: str = "serve"
    max_body_bytes: int = 16 << 20
    top_k: int = 5
    policy_file: str = ""
    phase_rates: tuple[float, ...] = ()


class InstanceSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One desired instance in a worker: a variant with a queue. `batch` is (minimum, maximum), Tan section 5.2.2.

    `loaded = false` keeps its place in the deployment without loading it: what "unload" sets and "load" takes back.
    """

    variant: str
    capacity: int = 15
    batch: tuple[int, int] = (1, 1)
    loaded: bool = True


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One worker process: a device, and what should be loaded on it.

    With a `node` it is that node of the edge graph, too; `preload`: edge variants that it loads at once and keeps.
    """

    name: str
    instances: tuple[InstanceSpec, ...] = ()
    node: str = ""
    preload: tuple[str, ...] = ()
    device: str = "cpu"
    threads: int = 1
    memory_mb: float | None = None


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """`deployment` on the board: the desired state. `version` grows with every change, so readers skip old news."""

    name: str
    services: dict[str, ServiceSpec]
    workers: tuple[WorkerSpec, ...]
    edge: EdgeSpec | None = None
    version: int = 0

    def instance_ids(self, service: str, *, loaded_only: bool = False) -> dict[str, str]:
        """Desired instances of a service: id -> variant. Ids are worker/variant, a second one worker/variant#2.

        With `loaded_only`, those that are to be loaded now.
        """
        variants = self.services[service].variants if service in self.services else ()
        ids: dict[str, str] = {}
        for worker in self.workers:
            seen: dict[str, int] = {}
            for instance in worker.instances:
                number = seen[instance.variant] = seen.get(instance.variant, 0) + 1
                if instance.variant in variants and (instance.loaded or not loaded_only):
                    suffix = f"#{number}" if number > 1 else ""
                    ids[f"{worker.name}/{instance.variant}{suffix}"] = instance.variant
        return ids


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """`table:{service}`: routing probabilities for one slot. `instances` are sorted; `weights` sum to one.

    `batch_limits` maps a variant to (minimum, maximum); readers fall back to (1, largest) when the table expires.
    """

    service: str
    version: int
    valid_for_s: float
    instances: tuple[str, ...]
    weights: tuple[float, ...]
    policy: str
    batch_limits: dict[str, tuple[int, int]] = {}


class PolicyStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`policy_status:{service}`: whether the scheduler can set tables for the service's router, and why not.

    `policy` is the router's name as in the deployment, so that readers notice news of one that has been replaced.
    Written by the leading scheduler while it has something to say, gone 10 s after it last did.
    """

    policy: str
    in_force: bool
    reason: str = ""


class RouterChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A router for a service, with its trained policy where it is not a shipped one.

    `former:{service}`: a list of what changes have replaced, for rollbacks. `shadow_choice:{service}`: what the
    operator wants to see deciding beside the real one; an empty `router` means nothing.
    """

    router: str
    policy_file: str = ""


class WouldBe(msgspec.Struct, frozen=True, kw_only=True):
    """What became of requests, or would have. Ratios are fractions; goodput is expected (accuracy summed in time)."""

    requests: int = 0
    goodput_ratio: float = 0.0
    violation_ratio: float = 0.0
    heavy_ratio: float = 0.0


class ShadowRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`shadow:{service}` (expires in 10 s): how a shadowed router would have done since it was asked for.

    `shadow` and `active` come from one queueing model (`policies.routing.replica`) fed with the same counted arrivals,
    so they compare like with like; `observed` is what the workers counted. `weights`: the shadow's present table, by
    instance; empty for a per-request rule. `reason`: why it cannot decide, empty if it does.
    """

    choice: RouterChoice
    active_router: str
    slots: int = 0
    reason: str = ""
    weights: dict[str, float] = {}
    shadow: WouldBe = WouldBe()
    active: WouldBe = WouldBe()
    observed: WouldBe = WouldBe()


class DecisionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the `decisions` stream: what the scheduler saw, what it chose, which table that became."""

    service: str
    slot: int
    policy: str
    table_version: int
    instances: tuple[str, ...]
    weights: tuple[float, ...]
    lengths: tuple[int, ...]
    elapsed_s: tuple[float, ...]
    publish_ms: float = 0.0
