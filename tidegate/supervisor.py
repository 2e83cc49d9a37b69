"""Runs the processes of one deployment on this machine: starts, watches, restarts, and ends them in order.

    board ─► workers, scheduler ─► gateways          and back in reverse at the end

A child that dies is restarted after a pause that doubles from 0.2 to 5 s and is forgotten after 10 s of health.
Each child is its own session, so that Ctrl-C reaches only this process, which then lets the gateways drain before the
workers go. Their standard error goes to one log file each.
"""

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from protocol.board import BOARD_ERRORS, Board
from protocol.deployment import DeploymentError, DeploymentFile
from protocol.link import LONGEST_SOCKET_PATH
from protocol.records import Deployment
from tidegate.check import refuse_unknown

log = logging.getLogger("tidegate.supervisor")

FIRST_PAUSE_S: Final = 0.2
LONGEST_PAUSE_S: Final = 5.0
HEALTHY_AFTER_S: Final = 10.0
STOP_PATIENCE_S: Final = 15.0


class ChildView(msgspec.Struct, frozen=True):
    """What `Child.statistics` tells."""

    name: str
    pid: int | None
    restarts: int


class Child:
    """One process kept alive. `on_event(text)` is told of deaths and restarts."""

    def __init__(
        self, name: str, command: list[str], log_file: Path, env: Mapping[str, str], on_event: Callable[[str], None]
    ) -> None:
        self.name = name
        self.command = command
        self.log_file = log_file
        self.process: asyncio.subprocess.Process | None = None
        self.restarts = 0
        self._env = dict(env)
        self._on_event = on_event
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the process and the watch over it."""
        await self._spawn()
        self._task = asyncio.create_task(self._watch(), name=f"watch {self.name}")

    async def _spawn(self) -> None:
        with self.log_file.open("ab") as output:
            self.process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._env,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    async def _watch(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            assert self.process is not None
            started_s = time.monotonic()
            code = await self.process.wait()
            if self._stopping:
                return
            if time.monotonic() - started_s > HEALTHY_AFTER_S:
                pause_s = FIRST_PAUSE_S
            self.restarts += 1
            self._on_event(f"{self.name} ended with {_cause(code)}; restarting in {pause_s:g} s (log: {self.log_file})")
            while True:
                await asyncio.sleep(pause_s)
                pause_s = min(LONGEST_PAUSE_S, pause_s * 2)
                try:
                    await self._spawn()
                    break
                except OSError as error:  # no memory, no descriptors: others may give some back
                    self._on_event(f"{self.name} cannot be started ({error}); trying again in {pause_s:g} s")

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL if it does not end within `STOP_PATIENCE_S`."""
        self._stopping = True
        process = self.process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_PATIENCE_S)
            except TimeoutError:
                self._on_event(f"{self.name} did not end within {STOP_PATIENCE_S:g} s: killing it")
                process.kill()
                await process.wait()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def last_words(self, lines: int = 8) -> str:
        """The end of the child's log, for an error message."""
        try:
            return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def statistics(self) -> ChildView:
        """Name, process id and restarts so far."""
        alive = self.process is not None and self.process.returncode is None
        return ChildView(self.name, self.process.pid if alive and self.process else None, self.restarts)


class Supervisor:
    """The processes of `file`. `async with` starts them all and ends them in order."""

    def __init__(
        self,
        file: DeploymentFile,
        *,
        redis_url: str = "",
        embedded: bool = False,
        on_event: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.file = file
        self.folder = Path(tempfile.gettempdir())
        self.board_url = redis_url
        self.board_kind = "given" if redis_url else ""
        self._embedded = embedded
        self._on_event = on_event
        self._deployment: Deployment | None = None
        self._board: Child | None = None
        self.workers: list[Child] = []
        self.schedulers: list[Child] = []
        self.gateways: list[Child] = []
        self._keeper: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where clients connect."""
        host = self.file.gateway.host
        shown = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
        return f"http://{shown}:{self.file.gateway.port}"

    @property
    def children(self) -> list[Child]:
        """All of them, the board first."""
        return [*([self._board] if self._board else []), *self.workers, *self.schedulers, *self.gateways]

    async def __aenter__(self) -> Self:
        refuse_unknown(self.file)
        _refuse_taken_port(self.file.gateway.host, self.file.gateway.port)
        _refuse_long_paths([worker.name for worker in self.file.workers])
        self.folder = Path(tempfile.mkdtemp(prefix="tidegate-"))
        try:
            await self._start_board()
            async with Board(self.board_url) as board:
                self._deployment = await board.put_deployment(self.file.desired_state())
            for worker in self.file.workers:
                self.workers.append(self._child(f"worker-{worker.name}", self._worker_command(worker.name)))
            self.schedulers.append(self._child("scheduler", self._scheduler_command()))
            for number in range(self.file.gateway.processes):
                self.gateways.append(self._child(f"gateway-{number}", self._gateway_command()))
            for child in [*self.workers, *self.schedulers, *self.gateways]:
                await child.start()
            self._keeper = asyncio.create_task(self._keep_deployment(), name="keep deployment")
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        await asyncio.gather(*(child.stop() for child in self.gateways))
        await asyncio.gather(*(child.stop() for child in [*self.schedulers, *self.workers]))
        if self._board is not None:
            await self._board.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _child(self, name: str, command: list[str]) -> Child:
        env = {**os.environ, "TIDEGATE_REDIS_URL": self.board_url, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        return Child(name, command, self.folder / f"{name}.log", env, self._on_event)

    async def _start_board(self) -> None:
        if self.board_url:
            async with Board(self.board_url) as board:
                await _until_answered(
                    board, 5.0, f"no Redis answers at {self.board_url}: start it or correct the address"
                )
            return
        server = None if self._embedded else shutil.which("redis-server")
        if server:
            socket_file = self.folder / "redis.sock"
            self.board_url, self.board_kind = f"unix://{socket_file}", "redis-server"
            command = [server, "--port", "0", "--unixsocket", str(socket_file), "--save", "", "--appendonly", "no"]
            command += ["--dir", str(self.folder)]
        else:
            port = free_port()
            self.board_url, self.board_kind = f"redis://127.0.0.1:{port}/0", "embedded"
            command = [sys.executable, "-m", "tidegate.embedded_board", "--port", str(port)]
        self._board = self._child("board", command)
        await self._board.start()
        async with Board(self.board_url) as board:
            await _until_answered(board, 10.0, f"the board did not start: {self._board.last_words()}")

    async def _keep_deployment(self) -> None:
        """A board that comes back empty is told the deployment again."""
        async with Board(self.board_url) as board:
            while True:
                with contextlib.suppress(*BOARD_ERRORS):
                    posted = await board.deployment()
                    if posted is not None:
                        self._deployment = posted
                    elif self._deployment is not None:
                        await board.put_deployment(self._deployment)
                await asyncio.sleep(1.0)

    def _worker_command(self, name: str) -> list[str]:
        command = [sys.executable, "-m", "workers", "--name", name, "--address", f"unix:{self.folder}/{name}.sock"]
        for folder in self.file.catalog:
            command += ["--catalog", folder]
        return command

    def _scheduler_command(self) -> list[str]:
        command = [sys.executable, "-m", "scheduler", "--slot-s", str(self.file.scheduler.slot_s)]
        return [*command, "--address", f"unix:{self.folder}/scheduler.sock"]

    def _gateway_command(self) -> list[str]:
        settings = self.file.gateway
        command = [sys.executable, "-m", "gateway", "--host", settings.host, "--port", str(settings.port)]
        command += ["--header-timeout-s", str(settings.header_timeout_s)]
        command += ["--body-timeout-s", str(settings.body_timeout_s), "--drain-s", str(settings.drain_s)]
        command += ["--uploads-mb", str(settings.uploads_mb)]
        if settings.processes == 1:
            return command
        counts = self.folder / "metrics"
        counts.mkdir(exist_ok=True)
        return [*command, "--reuse-port", "--metrics-folder", str(counts)]


async def _until_answered(board: Board, patience_s: float, otherwise: str) -> None:
    ends_s = time.monotonic() + patience_s
    while True:
        try:
            await board.ping()
            return
        except BOARD_ERRORS as error:
            if time.monotonic() > ends_s:
                raise ConnectionError(f"{otherwise} ({error})") from error
            await asyncio.sleep(0.05)


def _refuse_taken_port(host: str, port: int) -> None:
    if not 0 < port < 65_536:
        raise DeploymentError(f"gateway.port = {port}: must be from 1 to 65535")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"port {port} on {host} cannot be used ({error.strerror}): choose another with --port"
            ) from error


def socket_path_length(longest_name: int, folder: str | None = None) -> int:
    """Bytes of a socket's path for a process with a name of so many, below the folder for temporary files."""
    return len(os.fsencode(f"{folder or tempfile.gettempdir()}/tidegate-xxxxxxxx/.sock")) + longest_name


def _refuse_long_paths(workers: Iterable[str]) -> None:
    if socket_path_length(max(map(len, ["scheduler", *workers]))) > LONGEST_SOCKET_PATH:
        raise OSError(
            f"paths of sockets below {tempfile.gettempdir()} are longer than {LONGEST_SOCKET_PATH} bytes: "
            "set TMPDIR=/tmp or another short one"
        )


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port at `host` (loopback) that nobody uses at this moment.

    Below those that outgoing connections get (32768 on, on Linux): one of them could take it before a server does.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in (*(10_240 + secrets.randbelow(22_528) for _ in range(100)), 0):
        with socket.socket(family) as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    raise OSError(errno.EADDRINUSE, f"no free port at {host}")


def _die_with_parent() -> None:
    """Linux: the child gets SIGTERM if this process is killed. Elsewhere: nothing."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
