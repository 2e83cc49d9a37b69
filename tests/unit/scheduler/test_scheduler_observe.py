"""What is seen of a service at a slot's boundary: who answers, who may be routed to, who is desired and not there."""

import asyncio
from typing import cast

import msgspec

from protocol.board import Board
from protocol.frames import Frame, Kind
from protocol.link import LinkClosed
from protocol.peer import Peer
from protocol.records import (
    Deployment,
    InstanceRecord,
    InstanceSpec,
    InstanceState,
    ServiceSpec,
    Status,
    WorkerSpec,
    WorkerStatus,
)
from scheduler.observe import Observer, Seen

SPEC = ServiceSpec(variants=("heavy", "light"), requirement_ms=300.0, router="threshold")


class ScriptedPeer:
    """A link to a worker: answers with `status`, breaks with a `LinkClosed`, or is silent (None)."""

    def __init__(self, status: WorkerStatus | LinkClosed | None, up: bool = True) -> None:
        self.up = up
        self.status = status
        self.cancelled: list[int] = []

    def request(self, kind: Kind) -> tuple[int, asyncio.Future[Frame]]:
        """As `Peer.request`."""
        assert kind == Kind.STATUS_REQUEST
        future: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        if isinstance(self.status, LinkClosed):
            future.set_exception(self.status)
        elif self.status is not None:
            future.set_result(Frame(Kind.STATUS, 5, msgspec.msgpack.encode(self.status), b""))
        return 5, future

    def cancel(self, request_id: int) -> None:
        """As `Peer.cancel`."""
        self.cancelled.append(request_id)


def record(worker: str, variant: str = "heavy", state: InstanceState = InstanceState.READY) -> InstanceRecord:
    return InstanceRecord(
        id=f"{worker}/{variant}", worker=worker, address=f"unix:{worker}", service="s", variant=variant, capacity=15,
        state=state, epoch="1", service_s=0.04, accuracy=0.8,
    )  # fmt: skip


def said(*instances: str, draining: bool = False, length: int = 0) -> WorkerStatus:
    """What a worker says of its instances."""
    statuses = tuple(Status(one, length=length, counts=(length,) * 10) for one in instances)
    return WorkerStatus(instances[0].split("/")[0], statuses, draining, "1")


def observe(records: list[InstanceRecord], peers: dict[str, ScriptedPeer], *desired: str) -> Seen:
    """One look; `desired`: workers that the deployment asks for a heavy instance."""
    observer = Observer(cast(Board, None), 0.01)
    observer._records = {one.id: one for one in records}
    observer._peers = {f"unix:{name}": cast(Peer, peer) for name, peer in peers.items()}
    workers = tuple(WorkerSpec(name=name, instances=(InstanceSpec(variant="heavy"),)) for name in desired)
    observer.deployment = Deployment(name="d", services={"s": SPEC}, workers=workers)
    return asyncio.run(observer.observe("s", SPEC))


def test_only_who_answers_and_is_ready_and_is_not_draining_may_be_routed_to() -> None:
    records = [
        record("fine"),
        record("fine", "light", InstanceState.LOADING),
        record("draining"),
        record("silent"),
        record("broken"),
        record("down"),
        record("partial"),
    ]
    peers = {
        "fine": ScriptedPeer(said("fine/heavy", "fine/light", length=3)),
        "draining": ScriptedPeer(said("draining/heavy", draining=True)),
        "silent": ScriptedPeer(None),
        "broken": ScriptedPeer(LinkClosed("killed")),
        "down": ScriptedPeer(said("down/heavy"), up=False),
        "partial": ScriptedPeer(said("partial/light")),  # its instance has gone since its registration
    }
    seen = observe(records, peers, "fine", "absent")
    ids = ("absent/heavy", "broken/heavy", "down/heavy", "draining/heavy", "fine/heavy", "fine/light",
           "partial/heavy", "silent/heavy")  # fmt: skip
    assert seen.instances == ids
    assert dict(zip(ids, seen.observation.ready.tolist(), strict=True)) == dict.fromkeys(ids, False) | {
        "fine/heavy": True
    }
    assert seen.observation.length.tolist() == [0, 0, 0, 0, 3, 3, 0, 0]
    assert seen.counts == {
        "fine/heavy": (3,) * 10,
        "fine/light": (3,) * 10,
        "draining/heavy": (0,) * 10,
    }
    assert peers["silent"].cancelled == [5], "nobody waits for its answer any more"
    assert not any(peer.cancelled for name, peer in peers.items() if name != "silent")


def test_an_instance_that_is_desired_and_was_never_there_has_a_kind_all_the_same() -> None:
    """A policy that was trained for the whole set keeps its layout."""
    seen = observe([record("w", "light")], {"w": ScriptedPeer(said("w/light"))}, "absent")
    assert [(kind.variant, kind.rank, kind.capacity) for kind in seen.kinds] == [("heavy", 0, 15), ("light", 1, 15)]
    assert (seen.kinds[1].service_s, seen.kinds[1].accuracy) == (0.04, 0.8)
    assert seen.observation.ready.tolist() == [False, True]


def test_news_that_was_heard_is_not_heard_again() -> None:
    """A policy that does not see the phase is woken by instances once, and not again by the next phase."""

    async def body() -> None:
        observer = Observer(cast(Board, None), 0.01)
        first = asyncio.create_task(observer.event("s", phases=False))
        await asyncio.sleep(0)
        observer._tell("s", "instances")
        await asyncio.wait_for(first, 1.0)
        second = asyncio.create_task(observer.event("s", phases=False))
        await asyncio.sleep(0)
        observer._tell("s", "phase")
        for _ in range(3):
            await asyncio.sleep(0)
        assert not second.done()
        second.cancel()
        await asyncio.wait([second])

    asyncio.run(body())
