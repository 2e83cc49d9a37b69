"""`python -m scheduler`: one scheduler process, until SIGTERM or Ctrl-C."""

import asyncio
import contextlib
import os
import signal
import tempfile
from typing import Annotated

import typer
import uvloop

from protocol.board import Board
from protocol.logs import log_as_json_lines
from scheduler.config import ConfigError, SchedulerConfig
from scheduler.policies import make_policy
from scheduler.slot_loop import Scheduler


async def serve(config: SchedulerConfig) -> None:
    """Runs the slot loops until a signal."""
    async with Board(config.board_url) as board:
        task = asyncio.create_task(Scheduler(config, board, make_policy).run())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task


def main(
    board: Annotated[str, typer.Option(envvar="TIDEGATE_REDIS_URL", help="Redis: redis://host:port/0.")] = "",
    slot_s: Annotated[float, typer.Option(help="Length of a slot in seconds (Tan's τ).")] = 1.0,
    metrics_port: Annotated[int, typer.Option(help="Port for Prometheus metrics; 0 is off.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the policies' random numbers.")] = 0,
    address: Annotated[
        str, typer.Option(help="Where gateways bring windows of edge requests: unix:/path or tcp:host:port.")
    ] = "",
    advertise: Annotated[
        str, typer.Option(help="How gateways reach this scheduler, if not by --address: tcp:host:port.")
    ] = "",
) -> None:
    """Run the scheduler: what routers and edge nodes are told.

    Every slot a routing table for each service whose router wants one, and for edge services every window a joint
    placement of its requests.
    """
    log_as_json_lines("scheduler")
    try:
        config = SchedulerConfig(
            board_url=board,
            slot_s=slot_s,
            metrics_port=metrics_port,
            seed=seed,
            address=address or f"unix:{tempfile.gettempdir()}/tidegate-scheduler-{os.getpid()}.sock",
            advertise=advertise,
        )
    except ConfigError as error:
        typer.echo(f"scheduler: {error}", err=True)
        raise typer.Exit(2) from None
    uvloop.run(serve(config))


if __name__ == "__main__":
    typer.run(main)
