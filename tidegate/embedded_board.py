"""`python -m tidegate.embedded_board --port N`: the board where no Redis is installed.

fakeredis' own TCP server on loopback: good enough for control state on one machine (about 10 ms from publish to
receive), not for several hosts. Nothing is kept on disk.
"""

import signal
import threading
from typing import Annotated

import typer
from fakeredis import TcpFakeServer


def main(port: Annotated[int, typer.Option(help="Loopback port to listen on.")] = 6390) -> None:
    """Serve an empty in-memory board until SIGTERM or Ctrl-C."""
    server = TcpFakeServer(("127.0.0.1", port), server_type="redis")
    server.daemon_threads = True

    def stop(number: int, frame: object) -> None:
        threading.Thread(target=server.shutdown, daemon=True).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    server.serve_forever(poll_interval=0.2)


if __name__ == "__main__":
    typer.run(main)
