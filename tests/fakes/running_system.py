"""A whole Tidegate in real processes, for tests: supervised in a thread of the test process, asked over HTTP.

`RunningSystem` starts board, workers, scheduler and gateways as `tidegate up` does. `Load` sends requests at a steady
rate, open loop, and keeps every answer. `assert_conserved` holds gateway, workers and client to the conservation law.
"""

import asyncio
import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from protocol.deployment import DeploymentFile, read_deployment
from protocol.frames import Kind
from protocol.link import Connection as Link
from protocol.link import connect
from protocol.outcomes import HTTP_STATUS, Outcome
from protocol.records import Status, WorkerStatus
from tidegate.supervisor import Child, Supervisor, free_port
from tidegate.up_command import until_ready

IMAGENET = {"content-type": "image/jpeg"}
LABEL = b"tidegate-label:3\n"


def any_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    return free_port()


def deployment(path: Path, text: str, **gateway: Any) -> DeploymentFile:
    """The deployment that `text` (TOML) describes, written to `path`, on a free port."""
    settings = {"port": any_port(), **gateway}
    lines = "\n".join(f"{key} = {value!r}" for key, value in settings.items())
    path.write_text(f"{text}\n[gateway]\n{lines}\n")
    return read_deployment(path)


class RunningSystem:
    """The processes of one deployment, from construction of the context until its end."""

    def __init__(self, file: DeploymentFile, *, embedded: bool = True, ready: bool = True) -> None:
        self.file = file
        self.supervisor = Supervisor(file, embedded=embedded, on_event=self._note)
        self.events: list[tuple[float, str]] = []
        self.forgotten: dict[str, int] = {}  # by instance: arrivals whose counters died with an earlier life of it
        self._ready = ready
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="running system")

    def __enter__(self) -> "RunningSystem":
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(self, *error: object) -> None:
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with self.supervisor:
                if self._ready:
                    await until_ready(self.supervisor, 60.0)
                self._started.set()
                await self._stop.wait()
        except BaseException as error:
            self._failure = error
        finally:
            self._started.set()

    def _note(self, text: str) -> None:
        self.events.append((time.monotonic(), text))

    # where and who

    @property
    def url(self) -> str:
        """Of the gateways."""
        return self.supervisor.url

    @property
    def port(self) -> int:
        """Of the gateways."""
        return self.file.gateway.port

    def child(self, name: str) -> Child:
        """`board`, `scheduler`, `gateway-0`, `worker-NAME`."""
        return next(child for child in self.supervisor.children if child.name == name)

    def pid(self, name: str) -> int:
        """Of a child that is alive."""
        pid = self.child(name).statistics().pid
        assert pid is not None, f"{name} is not alive: {self.child(name).last_words()}"
        return pid

    def resident_mb(self, name: str) -> float:
        """Resident memory of a child in MiB."""
        for line in Path(f"/proc/{self.pid(name)}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError(f"{name} has no VmRSS")

    def raw(self, timeout_s: float = 10.0) -> socket.socket:
        """A plain connection to the gateway."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s)

    def say(self, data: bytes, timeout_s: float = 10.0) -> bytes:
        """Sends bytes on a connection of their own; everything that comes back until the gateway closes it."""
        with self.raw(timeout_s) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
            return read_until_closed(connection)

    # what it says

    async def state(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        """`/state` of one gateway process."""
        async with session.get(f"{self.url}/state") as response:
            assert response.status == 200
            answer: dict[str, Any] = await response.json()
            return answer

    async def worker_statuses(self) -> dict[str, Status]:
        """Every instance of every worker that can be reached, asked over a link of our own."""
        statuses: dict[str, Status] = {}
        for worker in self.file.workers:
            address = f"unix:{self.supervisor.folder}/{worker.name}.sock"
            link = await connect(address, lambda: Link(on_frame=lambda one, frame: None))
            _, future = link.request(Kind.STATUS_REQUEST)
            frame = await asyncio.wait_for(future, 5.0)
            link.close("done")
            for status in msgspec.msgpack.decode(frame.meta, type=WorkerStatus).instances:
                statuses[status.instance] = status
        return statuses


class Sent(msgspec.Struct):
    """One request of a load and how it ended. Times are monotonic seconds; `status` 0 means a broken connection."""

    at_s: float
    ended_s: float = 0.0
    status: int = -1
    answers: int = 0
    body: dict[str, Any] = {}
    error: str = ""


class Load:
    """Requests at `rate` per second until stopped, whatever becomes of them."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, rate: float, body: bytes = LABEL, deadline_ms: float = 5000.0
    ) -> None:
        self.sent: list[Sent] = []
        self._session = session
        self._url = url
        self._rate = rate
        self._body = body
        self._headers = {**IMAGENET, "x-deadline-ms": f"{deadline_ms:g}"}
        self._tasks: set[asyncio.Task[None]] = set()
        self._pacer: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Load":
        self._pacer = asyncio.create_task(self._pace())
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._pacer is not None
        self._pacer.cancel()
        await asyncio.gather(self._pacer, return_exceptions=True)
        await asyncio.gather(*self._tasks)

    async def _pace(self) -> None:
        started_s, number = time.monotonic(), 0
        while True:
            due_s = started_s + number / self._rate
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            task = asyncio.create_task(self._one())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            number += 1

    async def _one(self) -> None:
        sent = Sent(time.monotonic(), body={})
        self.sent.append(sent)
        try:
            async with self._session.post(self._url, data=self._body, headers=self._headers) as response:
                sent.body = await response.json()
                sent.status = response.status
                sent.answers += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            sent.status, sent.error = 0, repr(error)
        sent.ended_s = time.monotonic()

    def statuses(self) -> Counter[int]:
        """Requests by HTTP status."""
        return Counter(sent.status for sent in self.sent)

    def codes(self) -> Counter[str]:
        """Requests by outcome as the client was told."""
        return Counter(sent.body.get("outcome") or sent.body.get("code") or sent.error for sent in self.sent)

    def retried(self) -> int:
        """Answers that needed a second attempt."""
        return sum(sent.body.get("attempts", 1) > 1 for sent in self.sent)


def client() -> aiohttp.ClientSession:
    """A session without a limit on connections, and with patience for a busy machine."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=30.0), raise_for_status=False
    )


async def assert_conserved(
    system: RunningSystem, session: aiohttp.ClientSession, *, restarted: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The conservation law, once the gateway has come to rest: at the gateway, at each worker, between them.

    `restarted`: workers that were killed or whose instances were loaded anew since the last call; what their earlier
    lives saw died with them, so the gateway has made at least as many attempts as they saw arrive. Gives back the
    gateway's state.
    """
    await until(lambda: _at_rest(system, session), 20.0, "the gateway still has requests in flight")
    state = await system.state(session)
    ended = sum(number for outcomes in state["outcomes"].values() for number in outcomes.values())
    assert state["arrived"] == ended + state["in_flight"], state
    statuses = await system.worker_statuses()
    for id, status in statuses.items():
        assert status.arrived == sum(status.counts) + status.length, status
        ends = state["dispatch"]["attempts"].get(id, {})
        reached = sum(ends.values()) - ends.get("LOST", 0)
        if id.partition("/")[0] in restarted:
            assert reached >= status.arrived, (id, ends, status)
            system.forgotten[id] = reached - status.arrived
        assert reached == status.arrived + system.forgotten.get(id, 0), (id, ends, status)
    return state


async def _at_rest(system: RunningSystem, session: aiohttp.ClientSession) -> bool:
    state = await system.state(session)
    try:
        statuses = await system.worker_statuses()
    except OSError:
        return False  # one is being restarted
    return state["in_flight"] == 0 and all(status.length == 0 for status in statuses.values())


def assert_client_agrees(load: Load, before: dict[str, Any], after: dict[str, Any], service: str) -> None:
    """Every request got one answer, and what clients were told is what the gateway counted."""
    assert all(sent.answers == 1 for sent in load.sent), [sent for sent in load.sent if sent.answers != 1][:3]
    counted = Counter(after["outcomes"].get(service, {})) - Counter(before["outcomes"].get(service, {}))
    assert counted == load.codes(), (counted, load.codes())
    for sent in load.sent:
        told = sent.body.get("outcome") or sent.body["code"]
        assert sent.status in (HTTP_STATUS[Outcome[told]], 504)


async def until(condition: Any, patience_s: float, otherwise: str) -> None:
    """Waits for an asynchronous condition; fails with `otherwise`."""
    ends_s = time.monotonic() + patience_s
    while not await condition():
        assert time.monotonic() < ends_s, otherwise
        await asyncio.sleep(0.05)


def read_until_closed(connection: socket.socket) -> bytes:
    """What the other side sends until it closes (an abortive close counts as one)."""
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(65_536):
            received += data
    return bytes(received)


class Answer(msgspec.Struct):
    """One HTTP/1.1 response, taken apart."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        """Its body."""
        decoded: dict[str, Any] = msgspec.json.decode(self.body)
        return decoded


def answers(data: bytes) -> Iterator[Answer]:
    """The responses in a byte stream, one after the other. Fails on anything that is not one."""
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        assert first.startswith("HTTP/1.1 "), f"not a response: {data[:200]!r}"
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size = int(headers.get("content-length", 0))
        yield Answer(int(first.split()[1]), headers, rest[:size])
        data = rest[size:]
