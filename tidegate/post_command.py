"""`tidegate post -f FILE`: put a deployment onto a running board; where compose or Kubernetes runs the processes.

`tidegate up` does this itself. With `--keep` the process stays and fills a board again that came back empty; changes
that others post meanwhile (a router switched, a model unloaded) are kept, not overwritten.
"""

import asyncio
import contextlib
import logging
import signal
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from protocol.board import BOARD_ERRORS, Board
from protocol.deployment import DeploymentError, read_deployment
from protocol.logs import log_as_json_lines
from protocol.records import Deployment

LOOK_EVERY_S = 1.0
log = logging.getLogger("tidegate.post")


def post(
    file: Annotated[Path, typer.Option("-f", "--file", help="Deployment file, as deploy/imagenet-gpu.toml.")],
    board: Annotated[str, typer.Option(envvar="TIDEGATE_REDIS_URL", help="Redis: redis://host:port/0.")] = "",
    keep: Annotated[bool, typer.Option(help="Stay, and fill the board again should it lose its memory.")] = False,
    patience_s: Annotated[float, typer.Option(help="Longest wait for Redis at the start.")] = 60.0,
) -> None:
    """Post FILE on the board, for processes that something else starts.

    A board that already has this deployment, perhaps changed since by an operator, is left as it is.

    Example: tidegate post -f deploy/paper-t4.toml --board redis://127.0.0.1:6379/0
    """
    log_as_json_lines("post")
    try:
        wanted = read_deployment(file).desired_state()
        if not board:
            raise DeploymentError("no board is given: name it with --board or TIDEGATE_REDIS_URL (redis://host:port/0)")
        asyncio.run(_post(wanted, board, keep, patience_s))
    except (DeploymentError, ConnectionError) as error:
        typer.echo(f"tidegate post: {error}", err=True)
        raise typer.Exit(1) from None


async def _post(wanted: Deployment, url: str, keep: bool, patience_s: float) -> None:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        async with Board(url) as board:
            latest = await _first(board, wanted, url, patience_s)
            while keep:
                await asyncio.sleep(LOOK_EVERY_S)
                with contextlib.suppress(*BOARD_ERRORS):
                    latest = await keep_posted(board, latest)


async def _first(board: Board, wanted: Deployment, url: str, patience_s: float) -> Deployment:
    loop = asyncio.get_running_loop()
    ends_s = loop.time() + patience_s
    while True:
        try:
            present = await board.deployment()
            if present is not None and same_places(present, wanted):
                log.info("deployment %s is there already, version %d", present.name, present.version)
                return present
            posted = await board.put_deployment(wanted)
            log.info("posted deployment %s, version %d", posted.name, posted.version)
            return posted
        except BOARD_ERRORS as error:
            if loop.time() > ends_s:
                raise ConnectionError(f"no Redis answers at {url}: start it or correct the address ({error})") from None
            await asyncio.sleep(0.2)


async def keep_posted(board: Board, latest: Deployment) -> Deployment:
    """What the board has now; `latest` is posted again if it has nothing."""
    present = await board.deployment()
    if present is not None:
        return present
    log.warning("the board was empty: posting deployment %s again", latest.name)
    return await board.put_deployment(latest)


def same_places(present: Deployment, wanted: Deployment) -> bool:
    """Whether the board's deployment is the file's but for what clients and operators switch while it runs.

    That is: which instances are loaded, and the services' routers.
    """

    def plain(deployment: Deployment) -> Deployment:
        services = {name: msgspec.structs.replace(spec, router="") for name, spec in deployment.services.items()}
        workers = tuple(
            msgspec.structs.replace(
                worker, instances=tuple(msgspec.structs.replace(one, loaded=True) for one in worker.instances)
            )
            for worker in deployment.workers
        )
        return msgspec.structs.replace(deployment, services=services, workers=workers, version=0)

    return plain(present) == plain(wanted)


if __name__ == "__main__":
    typer.run(post)
