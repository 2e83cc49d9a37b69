"""Random conversations on one connection, cut at random bytes, against a model that is written down apart.

The model: answers come in the order of the requests, one each; the first request that must close is the last that is
answered. What an image's answer is depends on nothing but what its worker said and on whether a worker was there.
"""

import asyncio
import random
import re
from collections import Counter
from collections.abc import Callable

import msgspec
import pytest

from gateway.handle import Gateway
from protocol.outcomes import Attempt
from tests.fakes.scripted_client import Client, soon
from tests.fakes.scripted_worker import ScriptedFleet
from tests.unit.gateway.test_gateway_handle import gateway_over, run

ANSWER = b'{"predictions":[]}'
_PNG = {"content-type": "image/png"}
_CHUNKED = {"transfer-encoding": "chunked", "content-length": ""}

KINDS = {
    "image": Client(b"img").request,
    "image in chunks": Client(b"1\r\ni\r\n2;e=f\r\nmg\r\n0\r\nt: u\r\n\r\n", _CHUNKED).request,
    "image with an offer": Client(b"img", {"connection": "Upgrade", "upgrade": "h2c"}).request,
    "image after 100": Client(b"img", {"expect": "100-continue"}).request,
    "tensor": Client(b"img", _PNG, "/v2/models/imagenet/infer").request,
    "last image": Client(b"img", {"connection": "close"}).request,
    "health": Client(b"", path="/healthz", method="GET").request,
    "no such page": Client(b"", path="/nothing", method="GET").request,
    "no such service": Client(b"img", path="/v1/nothing").request,
    "empty": Client(b"").request,
    "too large": Client(b"x" * 65).request,
    "bad deadline": Client(b"img", {"x-deadline-ms": "-1"}).request,
    "no chunk": Client(b"1\r\ni\r\nxyz\r\n", _CHUNKED).request,
    "no HTTP": b"\0\0\r\n\r\n",
}
FIXED = {
    "health": 200, "no such page": 404, "no such service": 404, "empty": 400, "too large": 413, "bad deadline": 400,
    "no chunk": 400, "no HTTP": 400,
}  # fmt: skip
LAST = {"last image", "no such service", "empty", "too large", "bad deadline", "no chunk", "no HTTP"}
COUNTED_INVALID = {"no such service", "empty", "too large", "bad deadline", "no chunk"}
"""What does not speak HTTP is no request, and an operator's call is not counted."""
ENDS = {
    Attempt.OK: (200, "OK"), Attempt.QUEUE_FULL: (429, "QUEUE_FULL"), Attempt.FAILED: (500, "FAILED"),
    Attempt.INVALID: (415, "INVALID"), Attempt.EXPIRED: (504, "EXPIRED"),
}  # fmt: skip
WEIGHTS = [8, 4, 4, 2, 3, 1, 4, 2, 1, 1, 1, 1, 1, 1]


async def converse(seed: int) -> None:
    """One connection's life: checked at every step and at the end."""
    draw = random.Random(seed)
    fleet = ScriptedFleet("uniform", capacity=99, a="light")
    fleet.router.configure(msgspec.structs.replace(fleet.router.spec, max_body_bytes=64))
    gateway, worker = gateway_over(fleet), fleet["a"]
    client = Client().connect(gateway)
    names = draw.choices(list(KINDS), WEIGHTS, k=draw.randrange(1, 12))
    data = b"".join(KINDS[name] for name in names)
    dies = len(names) if draw.random() < 0.7 else draw.randrange(len(names))  # the worker, while or before this one
    leaves = len(names) if draw.random() < 0.7 else draw.randrange(len(names))  # the client, while this one is served
    statuses: list[int] = []
    counted: Counter[str] = Counter()
    paused = left = False

    def send(most: int) -> None:
        nonlocal data
        if data and client.socket.reading:
            client.send(data[:most])
            data = data[most:]

    def heard() -> list[int]:
        found = re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", client.socket.written)
        return [int(status) for status in found if status != b"100"]

    for place, name in enumerate(names):
        served = name not in FIXED
        if place == dies:
            worker.die()
        size = draw.choice([1, 7, 50, 10_000])
        if served and worker.up:
            while not worker.in_flight:
                send(size)
                await soon_or_once(lambda: bool(worker.in_flight))
            if place == leaves:
                client.leave()
                left = True
                counted["CANCELLED"] += 1
                break
            if draw.random() < 0.3:
                send(size)
            if place + 1 == dies:
                worker.die()
                status, outcome = 503, "UNAVAILABLE"
            else:
                attempt = draw.choice(list(ENDS))
                status, outcome = ENDS[attempt]
                if draw.random() < 0.2:
                    client.connection.pause_writing()
                    paused = True
                http_status = 415 if attempt is Attempt.INVALID else 0
                worker.reply(attempt, payload=ANSWER, reason="so", http_status=http_status)
        elif served:
            status, outcome = 503, "UNAVAILABLE"
        else:
            status, outcome = FIXED[name], "INVALID"
        if name == "no HTTP":
            break
        statuses.append(status)
        if served or name in COUNTED_INVALID:
            counted[outcome] += 1
        if paused:
            send(size)
            client.connection.resume_writing()
            paused = False
        while len(heard()) < len(statuses):
            send(size)
            await soon_or_once(lambda: len(heard()) == len(statuses))
        assert heard()[: len(statuses)] == statuses, names
        outcomes(gateway)
        if name in LAST:
            break
    if not left:
        while data and not client.socket.ended:
            send(1000)
            await soon_or_once(lambda: client.socket.reading)
        client.leave()
    await soon(lambda: not client.connection.tasks)
    # Bytes that are no HTTP are told of only where that overtakes no answer.
    assert heard() == statuses or (name == "no HTTP" and heard() == [*statuses, 400]), names
    assert outcomes(gateway) == counted
    assert gateway.statistics().in_flight == 0
    assert gateway.uploads.held == 0
    assert gateway.dispatcher._under_way == set()
    assert worker.in_flight == 0
    assert [target.in_flight for target in fleet.router.targets] == [0]
    connection = client.connection
    assert connection._head_timer is connection.timeout_keep_alive_task is None
    assert vars(connection)["cycle"] is None


def outcomes(gateway: Gateway) -> Counter[str]:
    """How often each so far; the law holds at every look."""
    statistics = gateway.statistics()
    found: Counter[str] = Counter()
    for of_service in statistics.outcomes.values():
        found.update(of_service)
    assert statistics.arrived == found.total() + statistics.in_flight
    return found


async def soon_or_once(condition: Callable[[], bool]) -> None:
    """A few turns of the loop, fewer if the condition holds before."""
    for _ in range(30):
        if condition():
            return
        await asyncio.sleep(0)


@pytest.mark.parametrize("block", range(8))
def test_random_conversations_end_as_the_model_says(block: int) -> None:
    async def body() -> None:
        for seed in range(block * 20, block * 20 + 20):
            try:
                await converse(seed)
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise

    run(body)
