"""`tidegate up -f FILE`: serve a deployment on this machine until Ctrl-C."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import aiohttp
import msgspec
import typer
from rich.console import Console

from protocol.deployment import DeploymentError, DeploymentFile, read_deployment
from tidegate.supervisor import Supervisor, free_port
from tidegate.watch import Watch

READY_PATIENCE_S = 120.0


def up(
    file: Annotated[Path, typer.Option("-f", "--file", help="Deployment file, as deploy/digits.toml.")],
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="HTTP port instead of the file's; 0 takes a free one.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on instead of the file's; 0.0.0.0 for all.")
    ] = None,
    board: Annotated[
        str, typer.Option(envvar="TIDEGATE_REDIS_URL", help="An existing Redis; otherwise a private one is started.")
    ] = "",
    embedded: Annotated[bool, typer.Option(help="Use the embedded board even if redis-server is installed.")] = False,
) -> None:
    """Start board, scheduler, workers and gateway of FILE; serve until Ctrl-C, then drain.

    Instances that are not ready and routers that are not in force are told, with the reason, as long as it serves.

    Example: tidegate up -f deploy/digits.toml
    """
    console = Console(stderr=True)
    try:
        asyncio.run(_serve(with_address(read_deployment(file), host, port), board, embedded, console))
    except (DeploymentError, OSError, StartFailed) as error:
        console.print(f"tidegate up: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


class StartFailed(RuntimeError):
    """The system did not become ready: says what is missing and what the processes said last."""


def with_address(file: DeploymentFile, host: str | None, port: int | None) -> DeploymentFile:
    """The deployment, listening somewhere else where asked; port 0 becomes one that is free now."""
    chosen_host = host if host is not None else file.gateway.host
    chosen_port = file.gateway.port if port is None else port or free_port(chosen_host)
    settings = msgspec.structs.replace(file.gateway, host=chosen_host, port=chosen_port)
    return msgspec.structs.replace(file, gateway=settings)


async def _serve(file: DeploymentFile, board: str, embedded: bool, console: Console) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    started_s = time.monotonic()
    supervisor = Supervisor(
        file,
        redis_url=board,
        embedded=embedded,
        on_event=lambda text: console.print(text, style="yellow", markup=False, soft_wrap=True),
    )
    async with supervisor:
        console.print(f"{file.name}: board {supervisor.board_kind}, logs in {supervisor.folder}", highlight=False)
        ready = asyncio.create_task(until_ready(supervisor))
        stopped = asyncio.create_task(stop.wait())
        watching: asyncio.Task[None] | None = None
        await asyncio.wait({ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            ready.result()
            console.print(
                f"ready after {time.monotonic() - started_s:.1f} s at {supervisor.url}  (docs: {supervisor.url}/docs,"
                f" state: {supervisor.url}/state) - Ctrl-C drains and ends",
                style="green",
                highlight=False,
                soft_wrap=True,
            )
            watching = asyncio.create_task(Watch(_teller(console)).run(supervisor.url), name="watch")
        ready.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stopped
        if watching is not None:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        console.print("draining …")
    console.print("ended")


def _teller(console: Console) -> Callable[[str, bool], None]:
    def say(text: str, good: bool) -> None:
        style = "green" if good else "yellow"
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    return say


async def until_ready(supervisor: Supervisor, patience_s: float = READY_PATIENCE_S) -> None:
    """Returns once every service can be answered. Raises `StartFailed` with what is missing.

    Several gateway processes share the port and the kernel chooses who answers: so many agree, one after the other,
    that all are likely to have been asked.
    """
    ends_s = time.monotonic() + patience_s
    reasons: list[str] = ["the gateway does not answer yet"]
    processes = supervisor.file.gateway.processes
    wanted, agreed = 1 if processes == 1 else 6 * processes, 0
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=2.0)) as session:
        while time.monotonic() < ends_s:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{supervisor.url}/readyz") as response:
                    agreed = agreed + 1 if response.status == 200 else 0
                    if agreed == wanted:
                        return
                    if agreed:
                        continue
                    reasons = (await response.json())["reasons"]
            if any(child.restarts >= 3 for child in supervisor.children):
                break
            await asyncio.sleep(0.05)
    words = [f"--- {child.name}\n{child.last_words()}" for child in supervisor.children if child.restarts]
    raise StartFailed("; ".join(reasons) + "".join(f"\n{one}" for one in words))
