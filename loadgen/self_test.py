"""Does the sender itself keep up on this machine? Measured against an app that does nothing.

Before blaming a service for its latency, look at the load generator: `python -m loadgen --self-test` sends
1 kB bodies at 2,000 requests/s to a bare ASGI app in a process of its own and reports how late they left.
"""

import socket
import subprocess
import sys
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loadgen.payloads import emulated
from loadgen.score import details, score
from loadgen.sender import ProgressCallback, SendOptions, run_replay
from loadgen.traces import parse_workload

_BODY = b'{"predictions":[{"label":"0","class_id":0,"score":1.0}],"variant":"none","instance":"self-test","rank":0}'
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(_BODY)).encode())]
_START_TIMEOUT_S = 15.0

BEHIND_SHARE = 0.01
"""The sender has fallen behind when more than this share of requests left over 10 ms late."""


async def answer(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """The app: read the body, answer the same JSON to everything."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": _BODY})


@contextmanager
def bare_server() -> Iterator[str]:
    """Run `answer` under uvicorn in a child process; gives its URL."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        # Inherited by the connections. Uvicorn takes an inherited socket for a unix one and would not ask for
        # it: head and body of an answer are two writes, and the second would wait 40 ms for an ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        command = [sys.executable, "-m", "uvicorn", "loadgen.self_test:answer", "--fd", str(listener.fileno())]
        command += ["--app-dir", str(Path(__file__).parents[1]), "--log-level", "warning", "--lifespan", "off"]
        child = subprocess.Popen(command, pass_fds=[listener.fileno()])
        try:
            # The socket listens already: the first answer comes when the app is up.
            with urllib.request.urlopen(url, data=b"", timeout=_START_TIMEOUT_S) as reply:
                reply.read()
            yield url
        finally:
            child.terminate()
            child.wait()


def self_test(
    rate_per_s: float = 2000.0,
    size_bytes: int = 1000,
    duration_s: float = 5.0,
    on_progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Send at a constant rate and return {"kept_up", "rate_per_s", "score", "details"}."""
    trace = parse_workload(f"constant:{rate_per_s}", duration_s=duration_s)
    with bare_server() as url:
        record = run_replay(url, trace, emulated(size_bytes), SendOptions(), on_progress)
    found = details(record)
    late_share = found["sending"]["late"] / max(len(record), 1)
    all_answered = found["outcomes"].get("OK", 0) == len(record)
    return {
        "kept_up": bool(all_answered and late_share <= BEHIND_SHARE and not record.interrupted),
        "rate_per_s": rate_per_s,
        "late_share": late_share,
        "score": score(record)["overall"],
        "details": found,
    }
