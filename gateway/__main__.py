"""`python -m gateway`: one gateway process, until SIGTERM or Ctrl-C."""

import gc
import logging
import os
import socket
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
import uvicorn
import uvloop

from gateway.app import TidegateApp
from gateway.config import ConfigError, GatewayConfig
from gateway.connection import GuardedConnection
from gateway.handle import Gateway
from protocol.board import Board
from protocol.logs import log_as_json_lines

log = logging.getLogger("gateway")

FIRST_LOOK_S = 3.0
"""Longest wait for the board and the workers before the port is opened; later they may come and go."""


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which says to the gateway that it drains, and ends with exit code 0 after a signal."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: drain. uvicorn would raise it again at the end, past our own clean-up."""
        self._gateway.draining = True
        self.should_exit = True


async def serve(config: GatewayConfig) -> None:
    """Serves until a signal; then refuses new connections and answers what is under way."""
    GuardedConnection.max_header_bytes = config.max_header_bytes
    GuardedConnection.header_timeout_s = config.header_timeout_s
    async with Board(config.board_url) as board:
        gateway = GuardedConnection.gateway = Gateway(config, board)
        async with gateway.fleet, gateway.edge_view, gateway.exposition:
            await gateway.fleet.settle(FIRST_LOOK_S)
            await gateway.edge_view.settle(FIRST_LOOK_S)
            server = DrainingServer(
                uvicorn.Config(
                    TidegateApp(gateway),
                    http=GuardedConnection,
                    ws="none",
                    lifespan="off",
                    access_log=False,
                    server_header=False,
                    proxy_headers=False,
                    date_header=False,
                    log_config=None,
                    timeout_keep_alive=75,
                    timeout_graceful_shutdown=int(config.drain_s),
                    backlog=4096,
                ),
                gateway,
            )
            gc.collect()
            gc.freeze()  # what was imported lives for ever: full collections need not walk it
            gc.set_threshold(20_000, 20, 50)  # requests leave no cycles behind: look for some less often
            await server.serve(sockets=[_listen(config)])


def _listen(config: GatewayConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if config.reuse_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((config.host, config.port))
    listener.setblocking(False)
    return listener


def main(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port.")] = 8700,
    board: Annotated[str, typer.Option(envvar="TIDEGATE_REDIS_URL", help="Redis: redis://host:port/0.")] = "",
    reuse_port: Annotated[bool, typer.Option(help="Share the port with other gateway processes.")] = False,
    admin_token: Annotated[str, typer.Option(envvar="TIDEGATE_ADMIN_TOKEN", help="Asked of admin calls.")] = "",
    drain_s: Annotated[float, typer.Option(help="Longest wait for requests under way at the end.")] = 10.0,
    body_timeout_s: Annotated[float, typer.Option(help="Longest time that a body may take to arrive.")] = 10.0,
    uploads_mb: Annotated[float, typer.Option(help="MiB that all bodies still arriving may take together.")] = 256.0,
    header_timeout_s: Annotated[float, typer.Option(help="Longest time that a request's head may take.")] = 10.0,
    metrics_folder: Annotated[
        Path | None, typer.Option(help="Where the gateway processes of one port share what they count.")
    ] = None,
    answer_timeout_s: Annotated[float, typer.Option(help="Longest wait for a worker beyond the budget.")] = 30.0,
) -> None:
    """Run one gateway: HTTP in, routed to the workers that the board knows."""
    log_as_json_lines("gateway")
    try:
        config = GatewayConfig(
            host=host,
            port=port,
            board_url=board,
            reuse_port=reuse_port,
            admin_token=admin_token,
            drain_s=drain_s,
            body_timeout_s=body_timeout_s,
            uploads_mb=uploads_mb,
            metrics_folder=metrics_folder,
            header_timeout_s=header_timeout_s,
            answer_timeout_s=answer_timeout_s,
        )
    except ConfigError as error:
        typer.echo(f"gateway: {error}", err=True)
        raise typer.Exit(2) from None
    try:
        uvloop.run(serve(config))
    except OSError as error:
        typer.echo(f"gateway: cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}; give --port", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        log.info("interrupted")


if __name__ == "__main__":
    typer.run(main)
