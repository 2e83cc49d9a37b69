"""`tidegate record`: the arrivals of a running gateway as a trace, to be replayed against any router later.

The gateway keeps its latest arrivals in memory (`gateway/arrivals.py`); this asks for them once or twice a second.
Several gateway processes on one port are found by opening connections until no new one answers; each has a clock and
a count of its own, which `Recorder` brings together.
"""

import asyncio
import contextlib
import signal
import time
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import quote

import aiohttp
import msgspec
import numpy as np
import typer
from rich.console import Console

from gateway.arrivals import ArrivalsPage
from loadgen.traces import Trace, write_trace
from policies.routing.workload import Arrivals
from tidegate.running import GatewayError, in_words, whole_url

POLL_EVERY_S: Final = 0.5
CONNECTIONS_TRIED: Final = 16
PATIENCE_S: Final = 5.0


class RecordError(RuntimeError):
    """Nothing can be recorded: says why and what to do."""


class Recorder:
    """Arrivals of all gateway processes on one time axis. `start_s`: the recording's begin on the local clock.

    State: per gateway process the offset between its clock and ours, and where its next page begins.
    """

    def __init__(self, start_s: float, service: str = "") -> None:
        self._start_s = start_s
        self._service = service
        self._offset_s: dict[str, float] = {}
        self.next: dict[str, int] = {}
        self.times_s: list[float] = []
        self.services: set[str] = set()
        self.lost = 0

    def take(self, page: ArrivalsPage, received_s: float) -> None:
        """Adds a page that came at `received_s` on the local clock. Arrivals before the start do not count."""
        offset_s = received_s - page.now_s - self._start_s
        # The answer that travelled fastest shows the offset best.
        offset_s = self._offset_s[page.gateway] = min(offset_s, self._offset_s.get(page.gateway, offset_s))
        if page.gateway in self.next:
            self.lost += page.lost
        self.next[page.gateway] = page.next
        self.services.update(page.services)
        for time_s, service in zip(page.time_s, page.services, strict=True):
            if (not self._service or service == self._service) and time_s + offset_s >= 0.0:
                self.times_s.append(time_s + offset_s)

    def trace(self, end_s: float) -> Trace:
        """Everything up to `end_s` seconds after the start, in order."""
        times_s = np.sort(np.asarray([one for one in self.times_s if one < end_s], dtype=np.float64))
        return Trace("recorded arrivals", Arrivals(times_s, None, end_s))


def record(
    url: Annotated[str, typer.Option(help="The gateway, as http://host:port or host:port.")] = "http://127.0.0.1:8700",
    service: Annotated[str, typer.Option(help="Only this service's arrivals; all of them if not given.")] = "",
    duration_s: Annotated[float | None, typer.Option(min=0.1, help="Length; until Ctrl-C if not given.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The trace (CSV) to write.")] = Path("trace.csv"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Write the arrivals of a running gateway to a trace that replay and compare read; Ctrl-C ends and writes.

    Example: tidegate record --service digits --duration-s 60 -o monday.csv && tidegate compare --workload monday.csv
    """
    console = Console(stderr=True)
    if not out.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {out.absolute().parent}", param_hint="--out")
    try:
        recorder, length_s = asyncio.run(_record(whole_url(url), service, duration_s, console))
        trace = recorder.trace(length_s)
        write_trace(out, trace)
    except (RecordError, GatewayError, OSError) as error:
        console.print(f"tidegate record: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if recorder.lost:
        console.print(f"{recorder.lost} arrivals were lost: the gateway keeps only the latest", style="yellow")
    if service and service not in recorder.services and recorder.services:
        console.print(f"nothing came for {service}; there was {', '.join(sorted(recorder.services))}", style="yellow")
    summary = {
        "file": str(out),
        "requests": len(trace),
        "duration_s": length_s,
        "lost": recorder.lost,
        "gateways": len(recorder.next),
    }
    if as_json:
        print(msgspec.json.encode(summary).decode())
    else:
        console.print(f"{len(trace)} arrivals in {length_s:.1f} s: {out}", highlight=False, markup=False)


async def _record(url: str, service: str, duration_s: float | None, console: Console) -> tuple[Recorder, float]:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        links = await find_gateways(url, stack)
        if service:
            await links[0].check_served(service)
        start_s = time.monotonic()
        recorder = Recorder(start_s, service)
        for link in links:
            await link.poll(recorder)
        ends_s = start_s + duration_s if duration_s is not None else float("inf")
        console.print(f"recording {url} ({len(links)} gateway processes); Ctrl-C ends", highlight=False, markup=False)
        with console.status("recording") as status:
            while not stop.is_set() and time.monotonic() < ends_s:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(POLL_EVERY_S, max(0.0, ends_s - time.monotonic()))):
                        await stop.wait()
                for link in links:
                    await link.poll(recorder)
                counted, so_far_s = len(recorder.times_s), time.monotonic() - start_s
                status.update(f"{counted} arrivals in {so_far_s:.0f} s")
        return recorder, min(time.monotonic(), ends_s) - start_s


class _Link:
    """One kept connection, and so one gateway process."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session
        self.gateway = ""
        self._answered_s = time.monotonic()

    async def page(self, since: int) -> ArrivalsPage:
        """One question."""
        async with self._session.get(f"{self._url}/v2/tidegate/arrivals", params={"since": str(since)}) as response:
            body = await response.read()
        if response.status != 200:
            raise RecordError(f"{self._url} answered {response.status}: is this a Tidegate gateway?")
        try:
            return msgspec.json.decode(body, type=ArrivalsPage)
        except msgspec.MsgspecError as error:
            raise RecordError(f"{self._url} is no Tidegate gateway: {error}") from error

    async def check_served(self, service: str) -> None:
        """Raises `RecordError` if the gateway has no such service or variant: its arrivals would never come."""
        async with self._session.get(f"{self._url}/v2/models/{quote(service, safe='')}") as response:
            answer = await response.json(content_type=None)
        if response.status == 404:
            raise RecordError(f"--service: {answer.get('error', 'unknown')}")

    async def poll(self, recorder: Recorder) -> None:
        """Takes everything new. A connection that now leads to another process (a restart) starts at its first."""
        try:
            while True:
                page = await self.page(recorder.next.get(self.gateway, -1))
                self._answered_s = time.monotonic()
                if self.gateway and page.gateway != self.gateway:
                    self.gateway = page.gateway
                    page = await self.page(recorder.next.get(page.gateway, 0))
                self.gateway = page.gateway
                recorder.take(page, time.monotonic())
                if not page.time_s:
                    return
        except (aiohttp.ClientError, TimeoutError) as error:
            if time.monotonic() - self._answered_s > PATIENCE_S:
                raise RecordError(
                    f"no gateway answers at {self._url} ({in_words(error)}): start one with tidegate up"
                ) from error


async def find_gateways(url: str, stack: contextlib.AsyncExitStack) -> list[_Link]:
    """One link per gateway process that answers at `url`."""
    found: dict[str, _Link] = {}
    for _ in range(CONNECTIONS_TRIED):
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=1, keepalive_timeout=60.0), timeout=aiohttp.ClientTimeout(total=3.0)
        )
        await stack.enter_async_context(session)
        link = _Link(url, session)
        try:
            link.gateway = (await link.page(-1)).gateway
        except (aiohttp.ClientError, TimeoutError) as error:
            raise RecordError(f"no gateway answers at {url} ({in_words(error)}): start one with tidegate up") from error
        if link.gateway in found:
            await session.close()
        else:
            found[link.gateway] = link
    return list(found.values())


if __name__ == "__main__":
    typer.run(record)
