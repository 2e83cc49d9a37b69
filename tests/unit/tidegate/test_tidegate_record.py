"""`Recorder` brings several gateways' clocks and counts together; what it writes is what loadgen reads."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import aiohttp
import pytest

from gateway.arrivals import Arrivals, ArrivalsPage
from loadgen.traces import parse_workload, write_trace
from tidegate import record_command
from tidegate.record_command import PATIENCE_S, Recorder, RecordError, _Link


def page(gateway: str, now_s: float, next: int, *arrivals: tuple[float, str], lost: int = 0) -> ArrivalsPage:
    times, services = [time_s for time_s, _ in arrivals], [service for _, service in arrivals]
    return ArrivalsPage(gateway, now_s, next, lost, times, services)


def test_clocks_of_several_gateways_become_one() -> None:
    recorder = Recorder(start_s=1000.0)
    recorder.take(page("a", 50.0, 7), received_s=1000.0)
    recorder.take(page("b", 5.0, 0), received_s=1000.0)
    recorder.take(page("a", 52.0, 9, (50.5, "x"), (51.5, "x")), received_s=1002.0)
    recorder.take(page("b", 7.0, 1, (6.0, "y")), received_s=1002.0)
    assert recorder.trace(10.0).arrivals.time_s.tolist() == pytest.approx([0.5, 1.0, 1.5])
    assert recorder.next == {"a": 9, "b": 1}
    assert recorder.trace(1.2).arrivals.end_s == 1.2
    assert len(recorder.trace(1.2)) == 2


def test_a_slow_answer_does_not_shift_the_clock() -> None:
    recorder = Recorder(start_s=0.0)
    recorder.take(page("a", 10.0, 0), received_s=0.0)
    recorder.take(page("a", 12.0, 1, (11.0, "x")), received_s=2.8)
    assert recorder.times_s == pytest.approx([1.0])


def test_only_the_service_asked_for_and_nothing_from_before() -> None:
    recorder = Recorder(start_s=100.0, service="x")
    recorder.take(page("a", 10.0, 3, (9.0, "x"), (10.5, "y"), (10.5, "x")), received_s=100.0)
    assert recorder.times_s == pytest.approx([0.5])
    assert recorder.services == {"x", "y"}


def test_losses_are_counted_once_the_recording_runs() -> None:
    recorder = Recorder(start_s=0.0)
    recorder.take(page("a", 1.0, 500, lost=400), received_s=0.0)
    recorder.take(page("a", 2.0, 600, lost=30), received_s=1.0)
    assert recorder.lost == 30


def test_what_is_written_is_read(tmp_path: Path) -> None:
    recorder = Recorder(start_s=0.0)
    recorder.take(page("a", 0.0, 0), received_s=0.0)
    recorder.take(page("a", 3.0, 3, (0.25, "x"), (0.25, "x"), (2.0, "x")), received_s=3.0)
    write_trace(tmp_path / "trace.csv", recorder.trace(3.0))
    found = parse_workload(str(tmp_path / "trace.csv"))
    assert found.arrivals.time_s.tolist() == [0.25, 0.25, 2.0]
    assert found.arrivals.end_s == 3.0


def test_the_ring_forgets_the_oldest_and_says_so() -> None:
    ring = Arrivals("g", start_s=10.0, kept=3)
    for number in range(5):
        ring.add(10.0 + number, f"s{number}")
    first = ring.page(1, 20.0, most=2)
    assert (first.lost, first.services, first.time_s, first.next) == (1, ["s2", "s3"], [2.0, 3.0], 4)
    second = ring.page(first.next, 20.0)
    assert (second.lost, second.services, second.next) == (0, ["s4"], 5)
    assert ring.page(-1, 20.0).next == ring.page(99, 20.0).next == 5


class ScriptedLink(_Link):
    """A connection that answers with these pages, or breaks, one after the other; the last one for ever."""

    def __init__(self, *script: ArrivalsPage | Exception) -> None:
        super().__init__("http://gateway", cast(aiohttp.ClientSession, None))
        self.asked: list[int] = []
        self._script = list(script)

    async def page(self, since: int) -> ArrivalsPage:
        """The next."""
        self.asked.append(since)
        said = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        if isinstance(said, Exception):
            raise said
        return said


def test_a_gateway_that_was_started_anew_is_recorded_from_its_first_arrival() -> None:
    """Its numbers begin at 0 again: what came before the recorder noticed is not lost."""
    recorder = Recorder(0.0)
    link = ScriptedLink(
        page("old", 1.0, 7),  # what was there at the start
        page("old", 2.0, 8, (1.5, "a")),
        page("old", 2.0, 8),
        page("new", 0.5, 5),  # answered as for 8: only from now on
        page("new", 0.5, 2, (0.1, "a"), (0.2, "a")),
        page("new", 0.6, 2),
    )
    for _ in range(3):
        asyncio.run(link.poll(recorder))
    assert link.asked == [-1, 7, 8, 8, 0, 2]
    assert len(recorder.times_s) == 3
    assert recorder.lost == 0


def test_a_gateway_may_be_away_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(record_command, "time", SimpleNamespace(monotonic=lambda: now_s))
    link = ScriptedLink(page("one", 0.0, 0), aiohttp.ClientConnectionError("refused"))
    asyncio.run(link.poll(Recorder(0.0)))
    now_s = PATIENCE_S
    asyncio.run(link.poll(Recorder(0.0)))
    now_s = PATIENCE_S + 0.1
    with pytest.raises(RecordError, match=r"no gateway answers at http://gateway .*start one with tidegate up"):
        asyncio.run(link.poll(Recorder(0.0)))
