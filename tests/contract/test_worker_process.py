"""A real worker process on a unix socket with a real board: serve, cancel, lose things, come back, drain."""

import asyncio
import contextlib
import io
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
from PIL import Image

from protocol.board import BOARD_ERRORS, Board
from protocol.frames import Kind
from protocol.link import Connection, LinkClosed, connect
from protocol.outcomes import Attempt
from protocol.records import (
    TENSORS,
    Deployment,
    Infer,
    InstanceRecord,
    InstanceSpec,
    InstanceState,
    Reply,
    ServiceSpec,
    WorkerSpec,
    WorkerStatus,
)

RedisServer = Any  # of this folder's conftest.py, which importlib mode does not let tests import
T = TypeVar("T")

ENTRY = """
name = "steady"
service = "things"
runtime = "emulated"
labels = ["cat", "dog", "cow"]
[accuracy]
value = 1.0
source = "modelled"
[emulated]
service_ms = 200
"""


class Rig:
    """A worker process named `w`, its board, and what is needed to talk to both."""

    def __init__(self, folder: Path, board: Board) -> None:
        self.folder = folder
        self.board = board
        self.address = f"unix:{folder}/w.sock"
        self.log = folder / "worker.log"
        self.processes: list[asyncio.subprocess.Process] = []

    async def start(self) -> None:
        """Start the worker (again)."""
        command = [sys.executable, "-m", "workers", "--name", "w", "--board", self.board.url]
        command += ["--address", self.address, "--catalog", str(self.folder / "catalog")]
        with self.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(*command, stderr=log, cwd=Path(__file__).parents[2])
        self.processes.append(process)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the running worker."""
        self.processes[-1].send_signal(number)

    async def ended(self) -> int:
        """Wait for the worker's end: its exit status."""
        async with asyncio.timeout(10.0):
            return await self.processes[-1].wait()

    def resident_mb(self) -> float:
        """Physical memory that the worker holds, from /proc."""
        status_lines = Path(f"/proc/{self.processes[-1].pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in status_lines if line.startswith("VmRSS:"))

    async def deploy(self, *instances: InstanceSpec, variants: tuple[str, ...] = ("steady", "null")) -> None:
        """Put a deployment for this worker onto the board."""
        service = ServiceSpec(variants=variants, requirement_ms=300)
        worker = WorkerSpec(name="w", instances=instances)
        await self.board.put_deployment(Deployment(name="test", services={"things": service}, workers=(worker,)))

    async def record(self, state: InstanceState = InstanceState.READY, *, not_epoch: str = "") -> InstanceRecord:
        """The first instance on the board in this state (of another start of the worker), once there is one."""

        async def look() -> InstanceRecord | None:
            for record in await self.board.instances():
                if record.state is state and record.epoch != not_epoch:
                    return record
            return None

        return await self.until(look)

    async def until(self, look: Callable[[], Awaitable[T | None]]) -> T:
        """What `look` gives once it is not None; at most 8 s."""
        try:
            async with asyncio.timeout(8.0):
                while True:
                    # The first calls after a board's return meet broken connections.
                    with contextlib.suppress(*BOARD_ERRORS):
                        if (found := await look()) is not None:
                            return found
                    await asyncio.sleep(0.01)
        except TimeoutError as error:
            raise AssertionError(f"it never came; the worker's log:\n{self.log.read_text()}") from error

    async def link(self) -> Connection:
        """A connection to the worker."""
        return await connect(self.address, lambda: Connection(lambda *_: None))

    async def __aexit__(self, *_: object) -> None:
        """Leave no process behind."""
        for process in self.processes:
            if process.returncode is None:
                process.kill()
                await process.wait()


@asynccontextmanager
async def rig(
    folder: Path, board_url: str, *instances: InstanceSpec, variants: tuple[str, ...] = ("steady", "null")
) -> AsyncIterator[Rig]:
    """A running worker, for a deployment of `instances`."""
    (folder / "catalog").mkdir()
    (folder / "catalog" / "steady.toml").write_text(ENTRY)
    async with Board(board_url) as board:
        made = Rig(folder, board)
        try:
            await made.deploy(*instances, variants=variants)
            await made.start()
            await made.record()
            yield made
        finally:
            await made.__aexit__()


def send(link: Connection, budget_s: float = 60.0, payload: bytes = b"tidegate-label:1\n") -> asyncio.Future[Any]:
    """One request for the instance `w/steady`; the future of its frame."""
    return link.request(Kind.INFER, Infer("w/steady", budget_s), payload)[1]


async def reply(future: asyncio.Future[Any]) -> Reply:
    """The decoded reply."""
    async with asyncio.timeout(8.0):
        return msgspec.msgpack.decode((await future).meta, type=Reply)


async def status(link: Connection) -> WorkerStatus:
    """The worker's status."""
    async with asyncio.timeout(8.0):
        return msgspec.msgpack.decode((await link.request(Kind.STATUS_REQUEST)[1]).meta, type=WorkerStatus)


def test_serve_refuse_cancel_and_drain(tmp_path: Path, board_url: str) -> None:
    """Three places of 200 ms: answers, refusals, freed places, many in flight; SIGTERM finishes what is there."""

    async def scenario() -> None:
        async with rig(tmp_path, board_url, InstanceSpec(variant="steady", capacity=3)) as worker:
            record = await worker.record()
            assert (record.id, record.worker, record.service) == ("w/steady", "w", "things")
            assert (record.address, record.capacity, record.accuracy) == (worker.address, 3, 1.0)
            link = await worker.link()

            frame = await send(link)
            assert json.loads(frame.payload)["predictions"][0] == {"label": "dog", "class_id": 1, "score": 1.0}
            first = msgspec.msgpack.decode(frame.meta, type=Reply)
            assert (first.attempt, first.batch) == (Attempt.OK, 1)
            assert first.service_s == pytest.approx(0.2)

            waiting = [send(link) for _ in range(2)]
            request_id, cancelled = link.request(Kind.INFER, Infer("w/steady", 60.0), b"x")
            refused = await reply(send(link))
            assert (refused.attempt, refused.status.length) == (Attempt.QUEUE_FULL, 3)
            link.send(Kind.CANCEL, request_id)
            assert (await reply(cancelled)).attempt == Attempt.CANCELLED
            assert (await status(link)).instances[0].length == 2
            assert [(await reply(one)).attempt for one in waiting] == [Attempt.OK, Attempt.OK]

            other = await worker.link()
            left_behind = [send(other) for _ in range(3)]
            assert (await status(other)).instances[0].length == 3
            other.close("the gateway has gone")
            for one in left_behind:
                with pytest.raises(LinkClosed):
                    await reply(one)

            async def left() -> bool | None:
                # What waited has gone at once; what was in service is computed, for nobody.
                return (await status(link)).instances[0].length <= 1 or None

            await worker.until(left)

            last = [send(link) for _ in range(2)]
            assert (await status(link)).instances[0].length >= 2
            worker.signal(signal.SIGTERM)
            await worker.record(InstanceState.DRAINING)
            assert [(await reply(one)).attempt for one in last] == [Attempt.OK, Attempt.OK]
            assert await worker.ended() == 0
            assert await worker.board.instances() == []
            assert "ended" in link.close_reason

    asyncio.run(scenario())


def test_the_law_of_conservation_and_bad_frames(tmp_path: Path, fake_redis_url: str) -> None:
    """The status adds up after a storm of requests and cancellations; nonsense closes only its own connection."""

    async def scenario() -> None:
        async with rig(tmp_path, fake_redis_url, InstanceSpec(variant="steady", capacity=4)) as worker:
            link, storm = await worker.link(), await worker.link()
            futures = []
            for number in range(300):
                request_id, future = storm.request(Kind.INFER, Infer("w/steady", 0.1), b"" if number % 7 == 0 else b"x")
                futures.append(future)
                if number % 3 == 0:
                    storm.send(Kind.CANCEL, request_id)
            replies = [await reply(future) for future in futures]
            now = (await status(link)).instances[0]
            assert now.arrived == 300 == sum(now.counts)
            for attempt in Attempt:
                assert now.counts[attempt] == sum(one.attempt == attempt for one in replies)

            nonsense = await worker.link()
            assert nonsense._transport is not None
            nonsense._transport.write(b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n")

            async def closed() -> bool | None:
                return nonsense.closed or None

            await worker.until(closed)
            assert "version" in nonsense.close_reason
            assert (await status(link)).instances[0].arrived == 300

    asyncio.run(scenario())


def test_a_killed_worker_rejoins_by_itself(tmp_path: Path, fake_redis_url: str) -> None:
    """kill -9: the link ends at once; started again it takes over the socket and registers under a new epoch."""

    async def scenario() -> None:
        async with rig(tmp_path, fake_redis_url, InstanceSpec(variant="steady")) as worker:
            epoch = (await worker.record()).epoch
            link = await worker.link()
            lost = send(link)
            await status(link)
            worker.signal(signal.SIGKILL)
            with pytest.raises(LinkClosed):
                await reply(lost)
            await worker.ended()
            await worker.start()
            assert (await worker.record(not_epoch=epoch)).address == worker.address
            assert (await reply(send(await worker.link()))).attempt == Attempt.OK

    asyncio.run(scenario())


@pytest.mark.redis
def test_a_lost_board_costs_nothing(tmp_path: Path, redis_server: RedisServer) -> None:
    """Redis killed: requests are served on. Redis back and empty: registered again; a new deployment is followed."""

    async def scenario() -> None:
        async with rig(tmp_path, redis_server.url, InstanceSpec(variant="steady")) as worker:
            epoch = (await worker.record()).epoch
            link = await worker.link()
            redis_server.kill()
            assert (await reply(send(link))).attempt == Attempt.OK
            redis_server.start()
            assert (await worker.record()).epoch == epoch, "the same worker, not a new one"
            await worker.deploy(InstanceSpec(variant="null", capacity=2))

            async def replaced() -> bool | None:
                records = await worker.board.instances()
                return ([one.id for one in records] == ["w/null"] and records[0].state is InstanceState.READY) or None

            await worker.until(replaced)
            assert (await reply(send(link))).attempt == Attempt.UNAVAILABLE

    asyncio.run(scenario())


def test_real_images_in_little_memory(tmp_path: Path, fake_redis_url: str) -> None:
    """Both digit variants on one device: PNG in, predictions out; what is no image is INVALID; under 250 MB."""

    async def scenario() -> None:
        variants = InstanceSpec(variant="digits_heavy"), InstanceSpec(variant="digits_light", batch=(1, 3))
        async with rig(tmp_path, fake_redis_url, *variants, variants=("digits_heavy", "digits_light")) as worker:

            async def both_ready() -> list[InstanceRecord] | None:
                records = await worker.board.instances()
                return records if [one.state for one in records] == [InstanceState.READY] * 2 else None

            heavy, light = await worker.until(both_ready)
            assert heavy.service_s > light.service_s > 0.0, "measured while warming up"
            link = await worker.link()
            image = io.BytesIO()
            Image.new("L", (8, 8), 128).save(image, "PNG")
            futures = [
                link.request(Kind.INFER, Infer(id, 60.0, "image/png", flags, 3), image.getvalue())[1]
                for id in (heavy.id, light.id, light.id, light.id, light.id)
                for flags in (0, TENSORS)
            ]
            scores: dict[str, list[float]] = {}
            for future in futures:
                frame, answer = await future, await reply(future)
                assert answer.attempt == Attempt.OK
                if answer.shape:
                    assert answer.shape == (10,)
                    scores[answer.status.instance] = np.frombuffer(frame.payload, "<f4").tolist()
                else:
                    predictions = json.loads(frame.payload)["predictions"]
                    assert len(predictions) == 3
                    assert [one["label"] for one in predictions] == [str(one["class_id"]) for one in predictions]
            assert [sum(scores[one.id]) for one in (heavy, light)] == pytest.approx([1.0, 1.0], abs=1e-4)

            for payload, content_type, http_status in (
                (image.getvalue()[:40], "image/png", 400),
                (b"plain text", "image/jpeg", 400),
                (image.getvalue(), "text/plain", 415),
            ):
                answer = await reply(link.request(Kind.INFER, Infer(light.id, 60.0, content_type), payload)[1])
                assert (answer.attempt, answer.http_status) == (Attempt.INVALID, http_status)
                assert answer.reason
            assert worker.resident_mb() < 250

    asyncio.run(scenario())


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    """Key, value, remedy; nothing started; exit status 2."""

    async def scenario() -> None:
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "workers", "--name", "w", "--board", "redis://127.0.0.1:1/0", "--address", "here"],
            stderr=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        _, errors = await process.communicate()
        assert process.returncode == 2
        assert "address = 'here'" in errors.decode()
        assert "unix:/absolute/path" in errors.decode()

    asyncio.run(scenario())
