"""What replay, compare and demo print at the end: a table and a finding, or one JSON object."""

import json

import numpy as np
import pytest

from loadgen.answers import Answer, Outcome
from loadgen.figures import RouterRun
from loadgen.record import Recorder
from loadgen.score import score
from loadgen.traces import Trace, parse_workload
from tidegate.replay_commands import tell


@pytest.fixture
def trace() -> Trace:
    return parse_workload("constant:20", duration_s=10.0)


def run_of(trace: Trace, name: str, right: int) -> RouterRun:
    """The first `right` of ten answers are right."""
    recorder = Recorder(trace.arrivals.time_s)
    for i, time_s in enumerate(trace.arrivals.time_s.tolist()):
        recorder.start(i, time_s)
        recorder.end(i, time_s + 0.05, Answer(Outcome.OK, int(i % 10 < right), "v", "a/v", 0))
    record = recorder.finish(None, (), trace.arrivals.end_s, False)
    return RouterRun(name, record, score(record))


def test_the_terminal_gets_table_and_finding(trace: Trace, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run_of(trace, "uniform", 5), run_of(trace, "deadline", 9)]
    tell(runs, trace, {}, 100.0, None, False, "x", "", {})
    said = capsys.readouterr().out
    assert "deadline answered 90.0% of all requests correctly and in time" in said
    assert "Next comes uniform, 40.0 points behind." in said
    assert "<" not in said


def test_runs_that_cannot_be_compared_get_a_warning_and_no_finding(
    trace: Trace, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run_of(trace, "uniform", 5), run_of(trace, "deadline", 9)]
    tell(runs, trace, {}, 100.0, None, False, "x", "not comparable: slow", {})
    said = capsys.readouterr().out
    assert "not comparable: slow" in said
    assert "answered 90.0%" not in said


def test_one_json_object_says_it_all(trace: Trace, capsys: pytest.CaptureFixture[str]) -> None:
    tell([run_of(trace, "deadline", 9)], trace, {}, 100.0, None, True, "x", "not comparable: slow", {"left_out": {}})
    told = json.loads(capsys.readouterr().out)
    assert (told["comparable"], told["warning"], told["left_out"]) == (False, "not comparable: slow", {})
    assert told["results"]["deadline"]["overall"]["goodput_ratio"] == pytest.approx(0.9)
    assert told["details"]["deadline"]["unanswered"] == {"overall": 0}
    assert np.isfinite(told["details"]["deadline"]["sending"]["late_ratio"])


def test_nothing_is_said_of_no_run(trace: Trace, capsys: pytest.CaptureFixture[str]) -> None:
    tell([], trace, {}, None, None, False, "x", "", {})
    assert capsys.readouterr().out == ""
