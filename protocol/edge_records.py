"""Edge services on the wire and on the board: requests that enter at one node, are decided on, and run at another.

    gateway ── DECIDE ──► scheduler ── DECISION ──► gateway ── EDGE_INFER ──► local node
                                                                                  │ decode, adapt, re-encode, uplink
                                     each node passes it on to the next of the path: EDGE_RUN ──► … ──► decided node
                                     and hands the REPLY (`EdgeReply`) back the same way

Times are spans in seconds. *Emulated* ones come from the graph's capacities (Huang, Eqs. 3 to 5), *real* ones were
measured; they are never mixed in one field.
"""

import msgspec


class Emulation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What nodes emulate: each really waits as long as the graph's capacities say.

    `compute`: the placement table's operations over the node's TFLOPS ("table"), or nothing but the real computation
    ("real").
    """

    uplink: bool = True
    links: bool = True
    compute: str = "table"


class EdgeServiceSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One edge service. `table`: a shipped placement table's name or a path; its [[variant]] names are the catalog's.

    `requirement_ms`: a request's deadline unless it brings its own (X-Deadline-Ms).
    """

    table: str
    requirement_ms: float = 2000.0
    max_body_bytes: int = 32 << 20


class EdgeNodeSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One node of a graph that is given by hand: Huang's A_k, B_k and uplink bandwidth."""

    name: str
    latitude: float
    longitude: float
    tflops: float
    memory_mb: float
    uplink_mbps: float


class EdgeLinkSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One link between two nodes, by their names, equally fast both ways. `usd_per_megabit`: routing cost."""

    between: tuple[str, str]
    bandwidth_mbps: float
    usd_per_megabit: float = 0.002


class EdgeSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[edge]` of a deployment. `graph`: "eua16", "eua16:SEED", "FILE.csv:SEED"; or `nodes` and `links` by hand.

    A window closes `window_ms` after its first request, or once `per_service` requests of one service are in it.
    `queue_capacity`: requests that a node holds at once. `policy`: as in `policies.placement.evaluate`.
    """

    services: dict[str, EdgeServiceSpec]
    graph: str = ""
    nodes: tuple[EdgeNodeSpec, ...] = ()
    links: tuple[EdgeLinkSpec, ...] = ()
    policy: str = "beam"
    window_ms: float = 100.0
    per_service: int = 4
    queue_capacity: int = 16
    emulate: Emulation = Emulation()


class EdgeRequest(msgspec.Struct, array_like=True, frozen=True):
    """One request of a window, in arrival order. `node`: the index of its local node; `deadline_s`: time left."""

    service: str
    node: int
    deadline_s: float
    data_mb: float


class Decide(msgspec.Struct, array_like=True, frozen=True):
    """A closed window for the scheduler. `without`: nodes that must not be chosen (full or gone a moment ago)."""

    window: int
    requests: tuple[EdgeRequest, ...]
    without: tuple[int, ...] = ()


class Placement(msgspec.Struct, array_like=True, frozen=True):
    """Where one request goes, or `reason` why nowhere (the three are -1 then); `late`: for lack of time, not of room.

    The emulated figures are the environment's prediction at the decision (Huang, Eqs. 1, 3 to 5, 8 to 11).
    """

    configuration: int = -1
    variant: int = -1
    node: int = -1
    reason: str = ""
    late: bool = False
    accuracy: float = 0.0
    access_s: float = 0.0
    transmission_s: float = 0.0
    compute_s: float = 0.0
    cost_usd: float = 0.0


class Decision(msgspec.Struct, array_like=True, frozen=True):
    """The scheduler's answer: one placement per request, in order. `decide_s`: what deciding really took."""

    window: int
    policy: str
    placements: tuple[Placement, ...]
    decide_s: float = 0.0


class EdgeInfer(msgspec.Struct, array_like=True, frozen=True):
    """One request for its local node. The frame's payload: the client's body as it came, of type `content_type`."""

    service: str
    configuration: int
    variant: int
    node: int
    budget_s: float
    content_type: str = ""


class Spent(msgspec.Struct, array_like=True, frozen=True):
    """What a request has been through so far. Real: decode to compute; emulated: access to node queue."""

    decode_s: float = 0.0
    adapt_s: float = 0.0
    forward_s: float = 0.0
    load_s: float = 0.0
    wait_s: float = 0.0
    compute_s: float = 0.0
    emulated_access_s: float = 0.0
    emulated_uplink_queue_s: float = 0.0
    emulated_transmission_s: float = 0.0
    emulated_link_queue_s: float = 0.0
    emulated_queue_s: float = 0.0
    emulated_compute_s: float = 0.0


class EdgeRun(msgspec.Struct, array_like=True, frozen=True):
    """An adapted request on its way to the decided node. The payload: one JPEG, or the kept frames one after another.

    `scale`: what the adapted size is of the original; `frame_numbers`: the kept frames' numbers in the clip, from 1.
    `hops`: links that it has passed, so that nodes of different deployments cannot send it round and round.
    """

    service: str
    configuration: int
    variant: int
    node: int
    budget_s: float
    width: int
    height: int
    scale: float
    fps: float = 0.0
    frame_numbers: tuple[int, ...] = ()
    adapted_mb: float = 0.0
    spent: Spent = Spent()
    hops: int = 0


class NodeStatus(msgspec.Struct, array_like=True, frozen=True):
    """A node at one moment. `waiting_tflop`: work that its executor still has to do (H of Eq. 5).

    `deployed`: variants that are loaded, in memory; `loading`: on their way; `idle`: of those deployed, what nobody
    uses and nobody pinned, so that their memory can be had; `counts` by `Attempt` code: requests that this node
    executed or refused, arrived = sum(counts) + length.
    """

    node: str
    epoch: str = ""
    length: int = 0
    waiting_tflop: float = 0.0
    memory_used_mb: float = 0.0
    deployed: tuple[str, ...] = ()
    loading: tuple[str, ...] = ()
    loads: int = 0
    evictions: int = 0
    draining: bool = False
    arrived: int = 0
    counts: tuple[int, ...] = ()
    idle: tuple[str, ...] = ()


class EdgeReply(msgspec.Struct, array_like=True, frozen=True):
    """How a request ended at the nodes (`outcomes.Attempt`). The payload, when OK or LATE: the answer as JSON.

    `status` is the decided node's (or that of the node where it ended). `waiting_tflop`: what was ahead of it there
    when it arrived, and `new_instance`, whether its variant had to be loaded: with them the environment's formulas
    give the emulated figures again.
    """

    attempt: int
    status: NodeStatus
    reason: str = ""
    http_status: int = 0
    adapted_mb: float = 0.0
    waiting_tflop: float = 0.0
    new_instance: bool = False
    spent: Spent = Spent()


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`node:{name}` on the board, renewed by its worker every second, gone 3 s after the worker is."""

    node: str
    worker: str
    address: str
    epoch: str
    deployed: tuple[str, ...] = ()
    memory_mb: float = 0.0
    memory_used_mb: float = 0.0
    draining: bool = False
    reason: str = ""


class ControllerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`controller` on the board (expires in 3 s): where the leading scheduler takes DECIDE frames."""

    address: str
    epoch: str
    policy: str = ""
    reason: str = ""


class WindowRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the `placements` stream: what a window's decision rested on, and what it was.

    By node, in the graph's order: backlog and memory in use with what was on its way; `closed` could not be chosen.
    """

    policy: str
    decide_ms: float
    requests: tuple[EdgeRequest, ...]
    placements: tuple[Placement, ...]
    waiting_tflop: tuple[float, ...]
    memory_used_mb: tuple[float, ...]
    closed: dict[str, str] = {}
