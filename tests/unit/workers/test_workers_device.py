"""Real runtimes: prepared in a pool, executed on one thread."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from models.preprocess import InvalidInput, Prepared
from models.runtime import Answer
from policies.routing.queueing import EntryState
from protocol.outcomes import Attempt
from protocol.records import Infer, InstanceSpec, InstanceState, Reply
from workers.device import Device, LoopClock
from workers.host import Host
from workers.instance import Instance, Request
from workers.preparing import Preparer

Bench = Any  # of this folder's conftest.py


class ThreadedRuntime:
    """Not emulated: prepared in the pool, executed on the device's thread. `gate` holds the preparation of class 0."""

    def __init__(self, variant: Any) -> None:
        self.variant = variant
        self.gate = threading.Event()
        self.threads: set[str] = set()

    def prepare(self, payload: bytes, content_type: str) -> Prepared:
        """The payload is the class; "0" waits at the gate."""
        if not payload.isdigit():
            raise InvalidInput("not a number", 415)
        if payload == b"0":
            assert self.gate.wait(5)
        return Prepared(label=int(payload))

    def execute(self, batch: Sequence[Prepared]) -> list[Answer]:
        """One-hot answers; class 2 gives one answer too few."""
        self.threads.add(threading.current_thread().name)
        rows = [np.eye(3, dtype=np.float32)[prepared.label] for prepared in batch]
        return [Answer(row) for row in rows if row[2] == 0.0]

    def warm_up(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def test_real_runtimes_prepare_aside_and_keep_the_order(bench: Bench, eventually: Any) -> None:
    """The first is decoded last and still answered first, on one thread; a wrong answer count fails its batch."""

    async def scenario() -> None:
        runtime = ThreadedRuntime(bench.add("donor", 1.0).runtime.variant)
        device, preparer = Device(LoopClock()), Preparer(2)
        host = Host(LoopClock(), device, preparer)
        instance = Instance("a", InstanceSpec(variant="a"), "things")
        instance.runtime, instance.state = runtime, InstanceState.READY
        instance.queue.open()
        host.instances["a"] = instance
        ended: list[tuple[bytes, Reply]] = []
        names: dict[int, bytes] = {}

        def respond(request: Request, reply: Reply, payload: bytes) -> None:
            ended.append((names[request.request_id], reply))

        for number, payload in enumerate([b"0", b"1", b"x", b"2"]):
            names[number] = payload
            host.arrive(Request(Infer("a", 60.0), payload, host.clock.now_s(), number, respond))
        await eventually(lambda: bool(ended))
        assert ended[0][0] == b"x", "an unreadable one need not wait"
        assert (ended[0][1].attempt, ended[0][1].http_status) == (Attempt.INVALID, 415)
        runtime.gate.set()
        await eventually(lambda: len(ended) == 4)
        assert [payload for payload, _ in ended[1:]] == [b"0", b"1", b"2"]
        assert [reply.attempt for _, reply in ended[1:]] == [Attempt.OK, Attempt.OK, Attempt.FAILED]
        assert "0 answers" in ended[3][1].reason
        assert len(runtime.threads) == 1
        preparer.close()
        device.close()

    asyncio.run(scenario())


def test_who_has_left_is_not_decoded(bench: Bench, eventually: Any) -> None:
    """One thread, held by the first; the second leaves before its turn, the third is prepared after the first."""

    async def scenario() -> None:
        runtime = ThreadedRuntime(bench.add("donor", 1.0).runtime.variant)
        preparer = Preparer(1)
        prepared: list[int] = []
        requests = [Request(Infer("a", 60.0), payload, 0.0, 0, lambda *_: None) for payload in (b"0", b"1", b"2")]
        for request in requests:
            request.state = EntryState.PREPARING
            preparer.submit(request, runtime, lambda outcome: prepared.append(getattr(outcome, "label", -1)))
        requests[1].state = EntryState.GONE
        runtime.gate.set()
        await eventually(lambda: 2 in prepared)
        assert prepared == [0, 2]
        preparer.close()

    asyncio.run(scenario())
