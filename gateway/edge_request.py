"""A request to an edge service on its way through the gateway, and what is known of it when it ends.

Plain values that the edge surface, the windows and the answers share; classification's are in `request.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gateway.request import End, Stage
from policies.placement.edge_network import EdgeNetwork
from policies.placement.rules import Sequential
from protocol.edge_records import EdgeReply, EdgeSpec, Placement


class Net:
    """A deployment's edge part and the network that it describes; nodes and services by name. Never changes."""

    __slots__ = ("alone", "edge", "network", "node_of", "service_of")

    def __init__(self, edge: EdgeSpec, network: EdgeNetwork) -> None:
        self.edge = edge
        self.network = network
        self.alone = Sequential(network)
        self.node_of = {name: index for index, name in enumerate(network.graph.names)}
        self.service_of = {table.name: index for index, table in enumerate(network.tables)}


class Decided(NamedTuple):
    """A window's decision: a placement for each request, by which policy, who made it, and what that really took."""

    placements: Sequence[Placement]
    policy: str
    by: str
    took_s: float


@dataclass(slots=True)
class Choice:
    """What was decided for one request. `entry`: the node that takes it in, its own one or the nearest that lives."""

    placement: Placement
    entry: int
    policy: str
    by: str
    second: bool


class EdgeRequest:
    """One admitted request. `arrived_s` and `deadline_s` are local monotonic times; `local` is its node's index.

    `stage`, `ended`, `give_up`, `choice` and the spans are the dispatcher's: waiting for the window's end (`window_s`)
    and for its decision (`decide_s`).
    """

    __slots__ = (
        "arrived_s",
        "body",
        "choice",
        "content_type",
        "data_mb",
        "deadline_s",
        "decide_s",
        "ended",
        "give_up",
        "id",
        "local",
        "net",
        "service",
        "stage",
        "window_s",
    )

    def __init__(
        self,
        id: str,
        net: Net,
        service: str,
        local: int,
        arrived_s: float,
        deadline_s: float,
        body: Sequence[bytes | bytearray],
        content_type: str,
    ) -> None:
        self.id = id
        self.net = net
        self.service = service
        self.local = local
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s
        self.body = body
        self.data_mb = sum(map(len, body)) / 1e6
        self.content_type = content_type
        self.stage: Stage | None = None
        self.ended: OnEdgeEnd | None = None
        self.give_up: Callable[[], object] | None = None
        self.choice: Choice | None = None
        self.window_s = 0.0
        self.decide_s = 0.0

    def abandon(self, why: Exception) -> None:
        """As `Request.abandon`: nobody waits for it any more. Nothing happens if it has ended already."""
        stage, self.stage = self.stage, None
        if stage is not None:
            stage.abandon(why)


class EdgeAnswered:
    """A request that was answered: what was decided, what the nodes say it took, and the answer (JSON)."""

    __slots__ = ("choice", "payload", "reply", "request")

    def __init__(self, request: EdgeRequest, choice: Choice, reply: EdgeReply, payload: bytes) -> None:
        self.request = request
        self.choice = choice
        self.reply = reply
        self.payload = payload


EdgeEnd = EdgeAnswered | Exception
Ending = End | EdgeAnswered
"""How a request of any kind ends."""
OnEdgeEnd = Callable[[EdgeEnd], None]
