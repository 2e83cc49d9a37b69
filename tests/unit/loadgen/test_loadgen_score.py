"""Answers and scores, against counts by hand and numpy's percentiles."""

import json
from dataclasses import replace

import numpy as np
import pytest

from loadgen.answers import UNKNOWN, Answer, Outcome, read_answer
from loadgen.record import Recorder, RunRecord
from loadgen.score import changed_speed, details, late_ratio, not_comparable, score, service_ms, unanswered

OK = Outcome.OK


def body(label: object = "3", class_id: int | None = 3, **more: object) -> bytes:
    prediction = {"label": label, "class_id": class_id, "score": 0.9}
    return json.dumps({"predictions": [prediction, {"label": "x", "class_id": 9}], **more}).encode()


@pytest.mark.parametrize(
    ("status", "late", "outcome"),
    [
        (200, False, Outcome.OK),
        (200, True, Outcome.LATE),
        (504, True, Outcome.LATE),
        (504, False, Outcome.EXPIRED),
        (429, False, Outcome.QUEUE_FULL),
        (503, False, Outcome.UNAVAILABLE),
        (500, False, Outcome.FAILED),
        (502, False, Outcome.FAILED),
        (400, False, Outcome.INVALID),
        (404, False, Outcome.INVALID),
        (413, False, Outcome.INVALID),
        (307, False, Outcome.INVALID),
    ],
)
def test_status_and_header_give_the_outcome(status: int, late: bool, outcome: Outcome) -> None:
    assert read_answer(status, late, body()).outcome == outcome


def test_the_first_prediction_decides() -> None:
    assert read_answer(200, False, body(), label=3).correct == 1
    assert read_answer(200, False, body(), label=9).correct == 0
    assert read_answer(200, True, body(), label=3).correct == 1  # late, and right all the same
    assert read_answer(200, False, b'{"predictions": []}', label=3).correct == 0
    assert read_answer(200, False, body()).correct == UNKNOWN
    assert read_answer(429, False, b'{"error": "full", "code": "QUEUE_FULL"}', label=3).correct == UNKNOWN


def test_labels_may_be_names() -> None:
    assert read_answer(200, False, body("cat", 281), label_name="cat").correct == 1
    assert read_answer(200, False, body("dog", 281), label_name="cat").correct == 0
    assert read_answer(200, False, body("7", None), label=7).correct == 1


def test_who_answered() -> None:
    answer = read_answer(200, False, body(variant="heavy", instance="w0/heavy", rank=0, timings={"a": 1}))
    assert (answer.variant, answer.instance, answer.rank) == ("heavy", "w0/heavy", 0)
    refused = read_answer(429, False, b'{"error": "full", "code": "QUEUE_FULL", "rank": 1}')
    assert refused.rank == 1


@pytest.mark.parametrize("text", [b"", b"<html>", b"[1, 2]", b'{"predictions": 3}'])
def test_a_200_without_the_promised_json_is_a_failure(text: bytes) -> None:
    assert read_answer(200, False, text, label=3) == Answer(Outcome.FAILED)
    assert read_answer(429, False, text).outcome == Outcome.QUEUE_FULL


def recorded(
    answers: list[Answer], latencies_s: list[float] | None = None, phases: list[int] | None = None
) -> RunRecord:
    """A record of requests a second apart, each sent 1 ms late."""
    recorder = Recorder(np.arange(len(answers), dtype=np.float64))
    for i, answer in enumerate(answers):
        recorder.start(i, i + 0.001)
        recorder.end(i, i + (latencies_s[i] if latencies_s else 0.1), answer)
    phase = None if phases is None else np.array(phases, dtype=np.int16)
    return recorder.finish(phase, ("bursty", "normal", "never"), float(len(answers)), False)


def test_ratios_by_hand() -> None:
    answers = [
        Answer(OK, 1, "h", "h0", 0),
        Answer(OK, 0, "h", "h0", 0),
        Answer(OK, 1, "l", "l0", 1),
        Answer(Outcome.LATE, 1, "h", "h0", 0),
        Answer(Outcome.QUEUE_FULL, UNKNOWN, "", "", 0),
        Answer(Outcome.EXPIRED),
        Answer(Outcome.UNAVAILABLE),
        Answer(Outcome.FAILED),
        Answer(Outcome.TIMEOUT),
        Answer(Outcome.CONNECTION),
        Answer(Outcome.INVALID),
        Answer(Outcome.CANCELLED),
    ]
    row = score(recorded(answers))["overall"]
    assert row["requests"] == 12
    assert row["goodput_ratio"] == 2 / 10
    assert row["violation_ratio"] == 7 / 10
    assert row["heavy_ratio"] == 4 / 5


def test_phases_are_scored_apart_and_absent_ones_left_out() -> None:
    answers = [Answer(OK, 1, rank=0), Answer(OK, 0, rank=1), Answer(Outcome.QUEUE_FULL), Answer(OK, 1, rank=1)]
    scores = score(recorded(answers, phases=[1, 1, 0, 0]))
    assert list(scores) == ["overall", "bursty", "normal"]
    assert scores["bursty"]["requests"] == 2
    assert scores["bursty"]["violation_ratio"] == 0.5
    assert scores["bursty"]["goodput_ratio"] == 0.5
    assert scores["normal"]["heavy_ratio"] == 0.5
    assert list(score(recorded(answers))) == ["overall"]


def test_percentiles_are_those_of_the_answered_to_three_digits() -> None:
    latencies = np.random.default_rng(1).lognormal(-3.0, 1.0, 5_000)
    answers = [Answer(OK if i % 10 else Outcome.QUEUE_FULL) for i in range(5_000)]
    row = score(recorded(answers, latencies.tolist()))["overall"]
    answered = latencies[np.arange(5_000) % 10 > 0] * 1000.0
    for key, percent in (("p50_ms", 50), ("p98_ms", 98), ("p99_ms", 99)):
        expected = np.percentile(answered, percent, method="inverted_cdf")
        assert row[key] == pytest.approx(expected, rel=0.002)  # type: ignore[literal-required]


def test_nothing_to_stand_on_is_none_and_still_json() -> None:
    row = score(recorded([Answer(Outcome.INVALID), Answer(Outcome.CANCELLED)]))["overall"]
    assert json.loads(json.dumps(row)) == {
        "requests": 2,
        "goodput_ratio": None,
        "violation_ratio": None,
        "heavy_ratio": None,
        "p50_ms": None,
        "p98_ms": None,
        "p99_ms": None,
    }
    assert score(recorded([]))["overall"]["requests"] == 0


def test_goodput_without_labels_is_none_but_zero_when_all_labelled_ones_were_refused() -> None:
    assert score(recorded([Answer(OK)]))["overall"]["goodput_ratio"] is None
    answers = [Answer(Outcome.QUEUE_FULL), Answer(OK, 1)]
    assert score(recorded(answers, phases=[0, 1]))["bursty"]["goodput_ratio"] == 0.0


def test_details_hold_outcomes_refusals_and_the_senders_own_delay() -> None:
    answers = [Answer(OK, 1, "h", "h0", 0), Answer(Outcome.QUEUE_FULL), Answer(OK, 1, "l", "l1", 1)]
    found = details(recorded(answers, [0.2, 0.015, 0.4]), requirement_ms=300.0)
    assert found["outcomes"] == {"OK": 2, "QUEUE_FULL": 1}
    assert found["variants"] == {"h": 1, "l": 1}
    assert found["refusal_p99_ms"] == pytest.approx(15.0, rel=0.002)
    assert found["sending"]["p99_ms"] == pytest.approx(1.0, rel=0.002)
    assert found["sending"]["late"] == 0
    assert found["late_at_client"] == 1
    assert found["offered_per_s"] == 1.0
    json.dumps(found)


def test_requests_without_an_answer_are_stated_beside_the_percentiles() -> None:
    answers = [Answer(OK, 1), Answer(Outcome.LATE, 1), Answer(Outcome.TIMEOUT), Answer(Outcome.EXPIRED)]
    answers += [Answer(Outcome.INVALID), Answer(Outcome.CANCELLED)]
    record = recorded(answers, phases=[0, 0, 0, 1, 1, 1])
    assert unanswered(record) == details(record)["unanswered"] == {"overall": 2, "bursty": 1, "normal": 1}
    row = score(record)["overall"]
    assert unanswered(record)["overall"] + 1 == round((row["violation_ratio"] or 0) * 4), "LATE is answered"


def test_a_sender_that_fell_behind_makes_runs_incomparable() -> None:
    def run(late: int) -> RunRecord:
        record = recorded([Answer(OK, 1)] * 100)
        return replace(record, sent_s=record.intended_s + np.where(np.arange(100) < late, 0.011, 0.0))

    assert not_comparable({"deadline": run(5), "uniform": run(0)}) == "", "5 of 100 may"
    said = not_comparable({"deadline": run(6), "uniform": run(0)})
    assert said.startswith("not comparable: this machine could not keep the load up")
    assert "deadline 6.0%" in said
    assert "uniform" not in said
    assert late_ratio(run(6)) == details(run(6))["sending"]["late_ratio"] == 0.06


def test_a_machine_that_changes_its_speed_makes_runs_incomparable() -> None:
    def run(heavy_ms: float, light_ms: float = 8.0) -> RunRecord:
        answers = [Answer(OK, 1, "heavy", "a", 0, heavy_ms / 1e3), Answer(OK, 1, "light", "b", 1, light_ms / 1e3)]
        return recorded([*answers, Answer(OK, 1, "light", "b", 1), Answer(Outcome.EXPIRED)])

    assert service_ms(run(50.0)) == {"heavy": 50.0, "light": 8.0}
    assert changed_speed({"x": run(50.0), "y": run(62.0)}) == ""
    said = changed_speed({"x": run(50.0), "y": run(63.0)})
    assert "heavy took 50.0 ms with x and 63.0 ms with y" in said
    assert "light took 6.0 ms with y" in changed_speed({"x": run(50.0, 8.0), "y": run(50.0, 6.0)})


@pytest.mark.parametrize("timings", [None, 3, {"service": "slow"}, {"total": 4.0}])
def test_a_service_time_that_is_not_told_is_unknown(timings: object) -> None:
    answer = read_answer(200, False, body(timings_ms=timings), label=3)
    assert answer.outcome is Outcome.OK
    assert np.isnan(answer.service_s)
    assert read_answer(200, False, body(timings_ms={"service": 12.5})).service_s == 0.0125
