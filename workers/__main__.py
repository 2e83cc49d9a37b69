"""`python -m workers`: start one worker process and serve until SIGTERM or Ctrl-C."""

import asyncio
import enum
import gc
import logging
import signal
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from models.catalog import VariantError, load_catalog
from models.clip_limits import Limits
from models.edge_catalog import load_edge_catalog
from protocol.logs import log_as_json_lines
from workers.config import ConfigError, WorkerConfig
from workers.server import serve_until

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class LogLevel(enum.StrEnum):
    """What is worth a line."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@app.command(epilog="Example: python -m workers --name a --board redis://127.0.0.1:6379/0 --address unix:/tmp/a.sock")
def main(
    name: Annotated[str, typer.Option(help="Which worker of the deployment this process is.")],
    board: Annotated[
        str, typer.Option(envvar="TIDEGATE_REDIS_URL", help="redis://host:port/0 or unix:///path/redis.sock")
    ] = "",
    address: Annotated[
        str, typer.Option(help="Where to listen: unix:/path or tcp:host:port (port 0: any). Default: a unix socket.")
    ] = "",
    advertise: Annotated[
        str, typer.Option(help="How gateways reach this worker, if not by --address: tcp:host:port.")
    ] = "",
    catalog: Annotated[
        list[Path] | None, typer.Option(help="A folder with variants' *.toml beside the built-in ones; repeatable.")
    ] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Serve Prometheus metrics here; 0: any free port.")] = None,
    metrics_host: Annotated[str, typer.Option(help="Interface for the metrics.")] = "127.0.0.1",
    drain_s: Annotated[float, typer.Option(help="After SIGTERM: longest wait for queued requests, in seconds.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Seed of emulated variants' service times and answers.")] = 0,
    prepare_threads: Annotated[int, typer.Option(help="Threads that decode and resize inputs.")] = 2,
    clip_frames: Annotated[
        int, typer.Option(help="Edge node: most frames of one clip; longer ones are refused.")
    ] = Limits().max_frames,
    clip_s: Annotated[
        float, typer.Option(help="Edge node: longest clip, in seconds; longer ones are refused.")
    ] = Limits().max_seconds,
    log_level: Annotated[LogLevel, typer.Option(help="JSON lines on stderr, from this level on.")] = LogLevel.INFO,
) -> None:
    """Host a deployment's instances on one device.

    The worker registers itself on the board, loads what the deployment asks of a worker with its NAME (and changes
    when the deployment changes), and answers inference frames from gateways. Device, threads, instances, capacities
    and batch limits are the deployment's; without a deployment that names it, the worker waits and says so.
    SIGTERM: announces that it is draining, finishes its queues, takes its records back, and exits with 0.
    """
    try:
        config = WorkerConfig(
            name=name,
            board=board,
            address=address or f"unix:{tempfile.gettempdir()}/tidegate-{name}.sock",
            advertise=advertise,
            catalog=tuple(catalog or ()),
            metrics_port=metrics_port,
            metrics_host=metrics_host,
            drain_s=drain_s,
            seed=seed,
            prepare_threads=prepare_threads,
            clip_frames=clip_frames,
            clip_s=clip_s,
        )
        load_catalog(config.catalog)
        load_edge_catalog(config.catalog)
    except (ConfigError, VariantError) as error:
        print(f"worker not started: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    log_as_json_lines(f"worker {name}", logging.getLevelNamesMapping()[log_level.name])
    try:
        _run(_serve(config))
    except ConfigError as error:
        print(f"worker not started: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    except OSError as error:
        print(f"worker not started: address = {config.address!r}: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


async def _serve(config: WorkerConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    gc.collect()
    gc.freeze()  # what was imported lives for ever: full collections need not walk it
    gc.set_threshold(20_000, 20, 50)  # requests leave no cycles behind: look for some less often
    await serve_until(stop, config)


def _run(serving: Coroutine[Any, Any, None]) -> None:
    """uvloop where it is installed: the same loop, about twice the frames per second."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(serving)
    else:
        uvloop.run(serving)


if __name__ == "__main__":
    app(prog_name="python -m workers")
