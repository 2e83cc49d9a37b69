"""Peers and a fleet for the gateway's dispatcher, in memory: a test says how each attempt at a worker ends."""

import msgspec

from gateway.router import ServiceRouter
from protocol.frames import Frame, Kind
from protocol.link import LinkClosed, OnReply
from protocol.outcomes import Attempt
from protocol.records import Infer, InstanceRecord, InstanceState, Reply, ServiceSpec, Status


class ScriptedPeer:
    """Stands in for `protocol.peer.Peer`: keeps what it was asked, answers when and as the test says."""

    def __init__(self) -> None:
        self.up = True
        self.asked: dict[int, Infer] = {}
        self.payloads: dict[int, bytes] = {}
        self.cancelled: list[int] = []
        self._waiting: dict[int, OnReply] = {}

    @property
    def in_flight(self) -> int:
        """Requests without an end."""
        return len(self._waiting)

    def ask(self, kind: Kind, meta: msgspec.Struct | None, payload: bytes, on_reply: OnReply) -> int:
        """As `Peer.ask`."""
        if not self.up:
            raise LinkClosed("down")
        assert isinstance(meta, Infer)
        number = len(self.asked) + 1
        self.asked[number] = meta
        self.payloads[number] = payload
        self._waiting[number] = on_reply
        return number

    def cancel(self, request_id: int) -> None:
        """As `Peer.cancel`."""
        self.cancelled.append(request_id)
        self._waiting.pop(request_id, None)

    def reply(self, attempt: Attempt, number: int = 0, payload: bytes = b"{}", **settings: object) -> None:
        """Ends the oldest request, or request `number`."""
        number = number or min(self._waiting)
        status = Status(self.asked[number].instance)
        meta = msgspec.msgpack.encode(Reply(attempt, status, **settings))  # type: ignore[arg-type]
        self._waiting.pop(number)(Frame(Kind.REPLY, number, meta, payload))

    def die(self) -> None:
        """The worker is gone, and every request with it."""
        self.up = False
        waiting, self._waiting = self._waiting, {}
        for on_reply in waiting.values():
            on_reply(LinkClosed("the peer closed the connection"))


class ScriptedFleet:
    """Stands in for `gateway.fleet.Fleet`: one service, one scripted peer per instance."""

    def __init__(self, router: str, capacity: int = 2, **instances: str) -> None:
        spec = ServiceSpec(variants=("heavy", "light"), requirement_ms=300.0, router=router, expire=False)
        self.router = ServiceRouter("imagenet", spec)
        self.services = {"imagenet": self.router}
        self.peers = {f"unix:/{name}": ScriptedPeer() for name in instances}
        self.router.set_instances(
            [
                InstanceRecord(
                    id=f"{name}/{variant}", worker=name, address=f"unix:/{name}", service="imagenet", variant=variant,
                    capacity=capacity, state=InstanceState.READY, epoch="1", service_s=0.05,
                )
                for name, variant in instances.items()
            ],
            set(self.peers),
        )  # fmt: skip

    def __getitem__(self, name: str) -> ScriptedPeer:
        return self.peers[f"unix:/{name}"]
