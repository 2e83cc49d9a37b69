"""`python -m tests.fakes.edge_worker NAME BOARD ADDRESS`: a real worker, whose edge variants have no networks."""

import asyncio
import signal
import sys

import uvloop

from protocol.logs import log_as_json_lines
from tests.fakes.edge_models import open_bright
from workers.config import WorkerConfig
from workers.server import serve_until


async def main() -> None:
    """Serve until SIGTERM."""
    name, board, address = sys.argv[1:4]
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    log_as_json_lines(f"worker {name}", 20)
    await serve_until(
        stop, WorkerConfig(name=name, board=board, address=address, drain_s=3.0), open_variant=open_bright
    )


if __name__ == "__main__":
    uvloop.run(main())  # as `python -m workers` does
