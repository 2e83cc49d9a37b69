"""The open loop: send each request when the trace says so, whatever became of the ones before it.

A closed loop waits for answers and so slows down exactly when the service does, which hides the queues that
it should measure. Here nothing waits: latency counts from the *intended* send time, and a sender that falls
behind shows up in `RunRecord.sending_lag_s` instead of vanishing from the figures.

    for each request: wait for its time ──► task: post, read, score ──► Recorder ──► RunRecord
"""

import asyncio
import gc
import io
import resource
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
import numpy as np
import uvloop
from yarl import URL

from loadgen.answers import Answer, Outcome, read_answer
from loadgen.payloads import Payload, PayloadSet
from loadgen.record import Recorder, RunRecord
from loadgen.traces import Trace

T = TypeVar("T")

LEAD_S = 0.05  # from the start of a run to its time zero, so that the first request is not late
_NAP_S = 0.1  # longest sleep at a time, so that stopping is felt at once
_TICK_S = 0.001  # uvloop's timers count milliseconds; asking for less would turn waiting into spinning
_STOP_GRACE_S = 2.0  # how long a stopped run still waits for answers
_KEEPALIVE_S = 4.0  # below the 5 s after which common servers close an idle connection
_LARGE_BODY_BYTES = 1 << 20  # aiohttp wants larger bodies as files
_REFUSALS = (429, 503)

AnswerReader = Callable[[int, bool, bytes, int | None, str | None], Answer]
"""reader(HTTP status, whether marked late, body, true label, its name), as `read_answer` for Tidegate's answers."""


@dataclass(frozen=True)
class SendOptions:
    """How requests are sent.

    timeout_s: the client gives up, and closes the connection, this long after the intended send time.
    deadline_ms: sent as X-Deadline-Ms. headers: sent with every request; headers_of(i): with request i.
    report_phase: send the trace's hidden phase as X-Tidegate-Phase (for routers that may know it). seed:
    which payload goes with which request. urls_of(i): where request i goes instead of the run's address: to the
    first, and from one that refuses it (429, 503) to the next. reader: for answers of other servers.
    """

    timeout_s: float = 30.0
    deadline_ms: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    headers_of: Callable[[int], Mapping[str, str]] | None = None
    urls_of: Callable[[int], Sequence[str]] | None = None
    reader: AnswerReader = read_answer
    report_phase: bool = False
    progress_s: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("timeout_s", "progress_s", "deadline_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")


@dataclass(frozen=True)
class Progress:
    """A run at one moment; `counts` are the outcomes so far."""

    now_s: float
    end_s: float
    sent: int
    planned: int
    in_flight: int
    counts: Mapping[Outcome, int]


ProgressCallback = Callable[[Progress], None]


async def replay(
    url: str,
    trace: Trace,
    payloads: PayloadSet,
    options: SendOptions = SendOptions(),
    on_progress: ProgressCallback | None = None,
    stop: asyncio.Event | None = None,
) -> RunRecord:
    """Send a whole trace to one URL (as http://127.0.0.1:8000/v1/digits) and return what happened.

    Runs to the trace's stated end and on until every request is answered or timed out. Once `stop` is set
    nothing more is sent, and what is not answered within 2 s is CANCELLED. Errors of single requests are
    outcomes; only mistakes in the arguments raise.
    """
    run = _Run(url, trace, payloads, options, stop or asyncio.Event())
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None),  # our own counts from the intended time
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        auto_decompress=False,
    ) as session:
        return await run.run(session, on_progress)


def run_replay(
    url: str,
    trace: Trace,
    payloads: PayloadSet,
    options: SendOptions = SendOptions(),
    on_progress: ProgressCallback | None = None,
) -> RunRecord:
    """`replay` from ordinary code, on uvloop. Ctrl-C ends it early, and its record is still returned."""

    async def main() -> RunRecord:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
        return await replay(url, trace, payloads, options, on_progress, stop)

    return run_on_uvloop(main())


def run_on_uvloop(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on a fresh uvloop and return its result."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


class _Run:
    """One replay. Mutable state: the recorder, the tasks in flight, the start time, the first error."""

    def __init__(self, url: str, trace: Trace, payloads: PayloadSet, options: SendOptions, stop: asyncio.Event) -> None:
        self._url = URL(url)
        if self._url.scheme not in ("http", "https") or not self._url.host:
            raise ValueError(f"{url!r} is no HTTP address; write http://HOST:PORT/v1/SERVICE")
        self._trace = trace
        self._options = options
        self._stop = stop
        self._payloads = payloads.payloads
        self._choice = choose_payloads(trace, payloads, options.seed)
        self._headers = _header_table(trace, self._payloads, options)
        self._recorder = Recorder(trace.arrivals.time_s)
        self._in_flight: set[asyncio.Task[None]] = set()
        self._start_s = 0.0
        self._error: BaseException | None = None

    async def run(self, session: aiohttp.ClientSession, on_progress: ProgressCallback | None) -> RunRecord:
        arrivals = self._trace.arrivals
        _raise_file_limit()
        gc.collect()
        gc.freeze()  # a full collection over a long trace would hold up the sender
        self._start_s = time.perf_counter() + LEAD_S
        reporting = asyncio.create_task(self._report(on_progress)) if on_progress else None
        try:
            await self._send_all(session)
            await self._sleep_until(arrivals.end_s)
            end_s = min(self._now_s(), arrivals.end_s) if self._stop.is_set() else arrivals.end_s
            await self._wait_for_answers()
        finally:
            gc.unfreeze()
            left = [*self._in_flight, *([reporting] if reporting else [])]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        if self._error is not None:
            raise self._error
        if on_progress:
            on_progress(self._progress())
        return self._recorder.finish(arrivals.phase, arrivals.phase_names, end_s, self._stop.is_set())

    async def _send_all(self, session: aiohttp.ClientSession) -> None:
        for request, intended_s in enumerate(self._trace.arrivals.time_s.tolist()):
            if intended_s > self._now_s():
                await self._sleep_until(intended_s)
            elif request % 16 == 0:
                await asyncio.sleep(0)  # when behind, let answers be read between sends
            if self._stop.is_set():
                return
            task = asyncio.create_task(self._send(session, request, intended_s))
            self._in_flight.add(task)
            task.add_done_callback(self._ended)

    async def _send(self, session: aiohttp.ClientSession, request: int, intended_s: float) -> None:
        payload = self._payloads[self._choice[request]]
        headers = self._headers[self._header_key(request, payload)]
        if self._options.headers_of is not None:
            headers = {**headers, **self._options.headers_of(request)}
        answer = Answer(Outcome.CANCELLED)
        urls = (self._url,) if self._options.urls_of is None else self._options.urls_of(request)
        self._recorder.start(request, self._now_s())
        try:
            async with asyncio.timeout(intended_s + self._options.timeout_s - self._now_s()):
                for url in urls:
                    async with session.post(
                        url, data=_body(payload.body), headers=headers, allow_redirects=False
                    ) as reply:
                        body = await reply.read()
                    if reply.status not in _REFUSALS:
                        break
            late = "X-Tidegate-Late" in reply.headers
            answer = self._options.reader(reply.status, late, body, payload.label, payload.label_name)
        except TimeoutError:
            answer = Answer(Outcome.TIMEOUT)
        except (aiohttp.ClientError, OSError):
            answer = Answer(Outcome.CONNECTION)
        finally:
            self._recorder.end(request, self._now_s(), answer)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._in_flight.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._error = error  # a mistake in the caller's headers or in this file: end the run with it
            self._stop.set()

    async def _wait_for_answers(self) -> None:
        """Until none is in flight: each ends by its timeout at the latest, or 2 s after a stop."""
        give_up_s = None
        while self._in_flight:
            if self._stop.is_set() and give_up_s is None:
                give_up_s = self._now_s() + _STOP_GRACE_S
            if give_up_s is not None and self._now_s() > give_up_s:
                return
            await asyncio.wait(self._in_flight, timeout=_NAP_S)

    async def _report(self, on_progress: ProgressCallback) -> None:
        while True:
            on_progress(self._progress())
            await asyncio.sleep(self._options.progress_s)

    async def _sleep_until(self, moment_s: float) -> None:
        # In short naps, not by waiting for `stop`: a timeout around it costs more than the whole send.
        while True:
            left_s = moment_s - self._now_s()
            if left_s <= 0 or self._stop.is_set():
                return
            await asyncio.sleep(min(max(left_s, _TICK_S), _NAP_S))

    def _now_s(self) -> float:
        # uvloop's own clock only has milliseconds.
        return time.perf_counter() - self._start_s

    def _progress(self) -> Progress:
        recorder = self._recorder
        return Progress(
            now_s=max(self._now_s(), 0.0),
            end_s=self._trace.arrivals.end_s,
            sent=recorder.sent,
            planned=len(self._trace),
            in_flight=len(self._in_flight),
            counts=dict(recorder.counts),
        )

    def _header_key(self, request: int, payload: Payload) -> tuple[str, int]:
        phase = self._trace.arrivals.phase
        known = self._options.report_phase and phase is not None
        return payload.content_type, int(phase[request]) if known and phase is not None else -1


def choose_payloads(trace: Trace, payloads: PayloadSet, seed: int) -> Sequence[int]:
    """Return which payload each request carries: the trace's own labels and names first, else by the seed."""
    labels = None if trace.labels is None else trace.labels.tolist()
    return payloads.choose(np.random.default_rng(seed), len(trace), labels, trace.payloads)


def _header_table(
    trace: Trace, payloads: Sequence[Payload], options: SendOptions
) -> dict[tuple[str, int], dict[str, str]]:
    """Headers by (content type, phase or -1), made once: building them per request would cost the loop."""
    table = {}
    phases = [(-1, "")]
    if options.report_phase:
        phases += list(enumerate(trace.arrivals.phase_names))
    for content_type in {payload.content_type for payload in payloads}:
        for phase, name in phases:
            headers = {"Content-Type": content_type, **options.headers}
            if options.deadline_ms is not None:
                headers["X-Deadline-Ms"] = f"{options.deadline_ms:g}"
            if name:
                headers["X-Tidegate-Phase"] = name
            table[content_type, phase] = headers
    return table


def _body(body: bytes) -> Any:
    if len(body) < _LARGE_BODY_BYTES:
        return body
    return io.BytesIO(body)


def _raise_file_limit() -> None:
    """An overloaded service holds one connection per waiting request: allow as many as the system does."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
