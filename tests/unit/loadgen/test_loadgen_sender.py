"""The open loop against a real HTTP server on loopback that answers as each test wants it to."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Self, cast

import aiohttp
import numpy as np
import pytest
from aiohttp import web

from loadgen import sender
from loadgen.answers import Answer, Outcome
from loadgen.payloads import Payload, PayloadSet, emulated, raw
from loadgen.record import RunRecord
from loadgen.sender import Progress, SendOptions, _Run, replay, run_on_uvloop
from loadgen.traces import Trace
from policies.routing.workload import Arrivals

DEFAULTS = SendOptions()

Handler = Callable[[web.Request], Awaitable[web.Response]]


def every(gap_s: float, count: int, end_s: float | None = None, phase: list[int] | None = None) -> Trace:
    times = np.arange(count, dtype=np.float64) * gap_s
    phases = None if phase is None else np.array(phase, dtype=np.int16)
    last_s = float(times[-1]) if end_s is None else end_s
    return Trace("even", Arrivals(times, phases, last_s, ("bursty", "normal")))


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    async def route(request: web.Request) -> web.StreamResponse:
        return await handler(request)

    app = web.Application()
    app.router.add_post("/v1/test", route)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/v1/test"
    finally:
        await runner.cleanup()


def send(
    handler: Handler,
    trace: Trace,
    payloads: PayloadSet,
    options: SendOptions = DEFAULTS,
    on_progress: Callable[[Progress], None] | None = None,
) -> RunRecord:
    async def main() -> RunRecord:
        async with serving(handler) as url:
            return await replay(url, trace, payloads, options, on_progress)

    return run_on_uvloop(main())


def answer(class_id: int, rank: int = 0) -> Mapping[str, object]:
    names = {"variant": f"v{rank}", "instance": f"w/{rank}", "rank": rank}
    return {"predictions": [{"label": str(class_id), "class_id": class_id, "score": 1.0}], **names}


async def echo_label(request: web.Request) -> web.Response:
    label = int((await request.read()).split(b"\n")[0].removeprefix(b"tidegate-label:"))
    return web.json_response(answer(label, rank=label % 2))


def test_labels_are_scored_and_the_answering_variant_recorded() -> None:
    record = send(echo_label, every(0.001, 40), emulated(64, classes=10))
    assert (record.outcome == Outcome.OK).all()
    assert (record.correct == 1).all()
    assert set(record.variants) == {"v0", "v1"}
    assert (record.rank == [int(record.variants[i][1]) for i in record.variant]).all()
    assert not record.interrupted
    assert (record.sent_s >= record.intended_s).all()
    assert (record.done_s > record.sent_s).all()


def test_a_wrong_label_is_wrong() -> None:
    async def always_three(request: web.Request) -> web.Response:
        return web.json_response(answer(3))

    payloads = PayloadSet("two", (Payload(b"a", "image/png", 3), Payload(b"b", "image/png", 4)))
    record = send(always_three, every(0.001, 10), payloads)
    assert sorted(record.correct.tolist()) == [0] * 5 + [1] * 5


def test_every_status_becomes_its_outcome() -> None:
    wanted = [
        (200, {}, Outcome.OK),
        (200, {"X-Tidegate-Late": "1"}, Outcome.LATE),
        (429, {"Retry-After": "1"}, Outcome.QUEUE_FULL),
        (503, {}, Outcome.UNAVAILABLE),
        (504, {}, Outcome.EXPIRED),
        (413, {}, Outcome.INVALID),
        (500, {}, Outcome.FAILED),
    ]

    async def by_index(request: web.Request) -> web.Response:
        status, headers, _ = wanted[int(request.headers["X-Index"])]
        return web.json_response(answer(0), status=status, headers=headers)

    options = SendOptions(headers_of=lambda i: {"X-Index": str(i)})
    record = send(by_index, every(0.001, len(wanted)), raw(10), options)
    assert record.outcome.tolist() == [outcome for _, _, outcome in wanted]


def test_a_refused_request_goes_on_to_the_next_address_and_no_other_failure_does() -> None:
    asked: list[tuple[str, str]] = []
    statuses = {"/v1/test?full": 503, "/v1/test?many": 429, "/v1/test?broken": 500, "/v1/test?free": 200}

    async def by_address(request: web.Request) -> web.Response:
        asked.append((request.headers["X-Index"], request.query_string))
        return web.json_response(answer(0), status=statuses[request.path_qs])

    orders = [["full", "many", "free"], ["broken", "free"], ["free", "full"], ["full", "many"]]

    async def main() -> RunRecord:
        async with serving(by_address) as url:
            options = SendOptions(
                headers_of=lambda i: {"X-Index": str(i)}, urls_of=lambda i: [f"{url}?{one}" for one in orders[i]]
            )
            return await replay(url, every(0.02, len(orders)), raw(10), options)

    record = run_on_uvloop(main())
    assert record.outcome.tolist() == [Outcome.OK, Outcome.FAILED, Outcome.OK, Outcome.QUEUE_FULL]
    assert [[one for index, one in asked if index == str(i)] for i in range(4)] == [
        ["full", "many", "free"],
        ["broken"],
        ["free"],
        ["full", "many"],
    ]


def test_answers_of_another_server_are_read_by_the_callers_reader() -> None:
    async def plain(request: web.Request) -> web.Response:
        return web.Response(text="7", status=200)

    def read(status: int, late: bool, body: bytes, label: int | None, label_name: str | None) -> Answer:
        return Answer(Outcome.OK, correct=int(int(body) == label), rank=int(body))

    payloads = PayloadSet("one", (Payload(b"a", "image/png", 7),))
    record = send(plain, every(0.001, 3), payloads, SendOptions(reader=read))
    assert record.rank.tolist() == [7, 7, 7]
    assert record.correct.tolist() == [1, 1, 1]


def test_headers_say_deadline_phase_type_and_what_the_caller_adds() -> None:
    seen: list[Mapping[str, str]] = []

    async def note(request: web.Request) -> web.Response:
        seen.append(request.headers)
        return web.json_response(answer(0))

    options = SendOptions(
        deadline_ms=300.0, headers={"X-Token": "t"}, headers_of=lambda i: {"X-Request-Id": f"r{i}"}, report_phase=True
    )
    payloads = PayloadSet("png", (Payload(b"1", "image/png"),))
    send(note, every(0.002, 2, phase=[1, 0]), payloads, options)
    by_id = {headers["X-Request-Id"]: headers for headers in seen}
    assert by_id["r0"]["X-Tidegate-Phase"] == "normal"
    assert by_id["r1"]["X-Tidegate-Phase"] == "bursty"
    assert by_id["r1"]["X-Deadline-Ms"] == "300"
    assert by_id["r1"]["X-Token"] == "t"
    assert by_id["r1"]["Content-Type"] == "image/png"


def test_the_loop_is_open_no_answer_is_waited_for() -> None:
    arrived = 0
    everyone = asyncio.Event()

    async def answer_when_all_are_here(request: web.Request) -> web.Response:
        nonlocal arrived
        arrived += 1
        if arrived == 50:
            everyone.set()
        await everyone.wait()  # a closed loop would never send the second request
        return web.json_response(answer(0))

    record = send(answer_when_all_are_here, every(0.002, 50), raw(10), SendOptions(timeout_s=5.0))
    assert (record.outcome == Outcome.OK).all()
    assert record.done_s.min() > record.sent_s.max()


def test_latency_counts_from_the_intended_time_and_the_senders_delay_is_kept() -> None:
    async def block(request: web.Request) -> web.Response:
        if request.headers["X-Index"] == "0":
            until = time.perf_counter() + 0.1
            while time.perf_counter() < until:  # holds up the one loop that also sends
                pass
        return web.json_response(answer(0))

    record = send(block, every(0.005, 10), raw(10), SendOptions(headers_of=lambda i: {"X-Index": str(i)}))
    assert record.sending_lag_s.max() > 0.05
    worst = int(record.sending_lag_s.argmax())
    assert record.latency_s[worst] > record.sending_lag_s[worst]


def test_a_client_that_gives_up_closes_the_connection() -> None:
    cancelled = 0

    async def never(request: web.Request) -> web.Response:
        nonlocal cancelled
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled += 1
            raise
        return web.Response()

    record = send(never, every(0.005, 4), raw(10), SendOptions(timeout_s=0.1))
    assert (record.outcome == Outcome.TIMEOUT).all()
    assert cancelled == 4
    assert record.latency_s.max() < 1.0


def test_patience_counts_from_the_intended_time() -> None:
    """A sender that is 100 s behind has nothing left of 30 s: nobody is waited for longer than a client would."""

    class Silent:
        def post(self, *_: object, **__: object) -> Self:
            return self

        async def __aenter__(self) -> Self:
            await asyncio.Event().wait()
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

    async def main() -> RunRecord:
        run = _Run("http://nobody/v1/x", every(1.0, 1), raw(1), SendOptions(timeout_s=30.0), asyncio.Event())
        run._start_s = time.perf_counter() - 100.0
        await asyncio.wait_for(run._send(cast(aiohttp.ClientSession, Silent()), 0, 0.0), 5.0)
        return run._recorder.finish(None, (), 1.0, False)

    record = run_on_uvloop(main())
    assert record.outcome.tolist() == [Outcome.TIMEOUT]


def test_connections_are_used_again() -> None:
    ports = set()

    async def note(request: web.Request) -> web.Response:
        assert request.transport is not None
        ports.add(request.transport.get_extra_info("peername")[1])
        return web.json_response(answer(0))

    send(note, every(0.01, 20), raw(10))
    assert len(ports) <= 10, "each of 20 its own if none were; on a busy machine some overlap"


def test_nobody_listening_is_a_connection_error() -> None:
    record = run_on_uvloop(replay("http://127.0.0.1:9/v1/x", every(0.001, 3), raw(1)))
    assert (record.outcome == Outcome.CONNECTION).all()


def test_stopping_keeps_what_was_sent() -> None:
    async def main() -> RunRecord:
        stop = asyncio.Event()

        async def third_stops(request: web.Request) -> web.Response:
            if request.headers["X-Index"] == "2":
                stop.set()
            return web.json_response(answer(0))

        async with serving(third_stops) as url:
            options = SendOptions(headers_of=lambda i: {"X-Index": str(i)})
            return await replay(url, every(0.05, 1000), raw(1), options, stop=stop)

    record = run_on_uvloop(main())
    assert record.interrupted
    assert 3 <= len(record) <= 5
    assert record.planned == 1000
    assert (record.outcome == Outcome.OK).all()
    assert record.end_s < 1.0


def test_a_sender_that_is_behind_still_hears_of_a_stop() -> None:
    """2000 requests are due at once; the first that arrives stops the run."""

    async def main() -> RunRecord:
        stop = asyncio.Event()

        async def stops(request: web.Request) -> web.Response:
            stop.set()
            return web.json_response(answer(0))

        async with serving(stops) as url:
            return await replay(url, every(0.0, 2000), raw(1), stop=stop)

    record = run_on_uvloop(main())
    assert record.interrupted
    assert 1 <= len(record) < 2000


def test_what_a_stop_cuts_off_is_cancelled_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "_STOP_GRACE_S", 0.01)
    seen: list[Progress] = []

    async def main() -> RunRecord:
        stop = asyncio.Event()

        async def second_stops(request: web.Request) -> web.Response:
            if request.headers["X-Index"] == "1":
                stop.set()
            await asyncio.Event().wait()
            return web.Response()

        async with serving(second_stops) as url:
            options = SendOptions(headers_of=lambda i: {"X-Index": str(i)})
            return await replay(url, every(0.01, 1000), raw(1), options, seen.append, stop)

    record = run_on_uvloop(main())
    assert record.interrupted
    assert len(record) >= 2
    assert (record.outcome == Outcome.CANCELLED).all()
    assert (record.done_s >= record.sent_s).all(), "when it was given up is known"
    assert seen[-1].counts[Outcome.CANCELLED] == seen[-1].sent == len(record)


def test_the_run_lasts_to_the_stated_end(monkeypatch: pytest.MonkeyPatch) -> None:
    waited_for: list[float] = []
    sleep_until = _Run._sleep_until

    async def spy(run: _Run, moment_s: float) -> None:
        await sleep_until(run, moment_s)
        assert run._now_s() >= moment_s
        waited_for.append(moment_s)

    monkeypatch.setattr(_Run, "_sleep_until", spy)
    record = send(echo_label, every(0.001, 2, end_s=0.25), emulated(64))
    assert waited_for[-1] == record.end_s == 0.25


def test_progress_is_told_and_ends_complete() -> None:
    seen: list[Progress] = []
    options = SendOptions(progress_s=0.02)
    send(echo_label, every(0.005, 20), emulated(64), options, seen.append)
    assert len(seen) >= 3
    assert [progress.sent for progress in seen] == sorted(progress.sent for progress in seen)
    assert seen[-1].counts[Outcome.OK] == seen[-1].planned == 20
    assert seen[-1].in_flight == 0


def test_a_mistake_of_the_caller_ends_the_run() -> None:
    def wrong(request: int) -> Mapping[str, str]:
        raise KeyError("no header for this one")

    with pytest.raises(KeyError, match="no header for this one"):
        send(echo_label, every(0.01, 100), emulated(64), SendOptions(headers_of=wrong))


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1/x", "ftp://host/x", "http:///x"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="write http"):
        run_on_uvloop(replay(url, every(0.001, 1), raw(1)))
