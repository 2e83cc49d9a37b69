"""Traces: three layouts, the stated end, scaling, and errors that name the line."""

from pathlib import Path

import numpy as np
import pytest

from loadgen.traces import Trace, TraceError, cut_trace, parse_workload, read_trace, scale_trace, write_trace
from policies.routing.workload import Arrivals, paper_process


def written(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_times_alone_end_with_the_last_request(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, "time_s\n0\n0.5\n0.5\n2.25\n"))
    assert trace.arrivals.time_s.tolist() == [0.0, 0.5, 0.5, 2.25]
    assert trace.arrivals.phase is None
    assert trace.labels is None
    assert trace.arrivals.end_s == 2.25


def test_all_columns_and_a_stated_end(tmp_path: Path) -> None:
    text = "# end_s=10\npayload,time_s,label,phase\na.png,1,7,bursty\n,2,,normal\n"
    trace = read_trace(written(tmp_path, text))
    assert trace.arrivals.end_s == 10.0
    assert trace.arrivals.phase is not None
    assert [trace.arrivals.phase_names[i] for i in trace.arrivals.phase] == ["bursty", "normal"]
    assert trace.labels is not None
    assert trace.labels.tolist() == [7, -1]
    assert trace.payloads == ("a.png", "")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    arrivals = paper_process(time_scale=0.01).generate(np.random.default_rng(3), duration_s=30.0)
    labels = np.arange(len(arrivals), dtype=np.int64) % 10
    trace = Trace("made", arrivals, labels, tuple(f"{i}.png" for i in range(len(arrivals))))
    write_trace(tmp_path / "out.csv", trace)
    back = read_trace(tmp_path / "out.csv")
    assert np.array_equal(back.arrivals.time_s, arrivals.time_s)  # to the last bit
    assert back.arrivals.end_s == arrivals.end_s
    assert back.arrivals.phase is not None
    assert arrivals.phase is not None
    read = [back.arrivals.phase_names[i] for i in back.arrivals.phase]
    assert read == [arrivals.phase_names[i] for i in arrivals.phase]
    assert back.labels is not None
    assert np.array_equal(back.labels, labels)
    assert back.payloads == trace.payloads


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("time_s\n1\n3\n2\n", r"line 4: the time falls from 3 to 2 s; sort"),
        ("# end_s=9\ntime_s\n1\n3\n2\n", r"line 5: the time falls"),
        ("time_s,phase\n1,a\n,b\n", r"line 3: time_s is missing"),
        ("phase,time_s\na,1\nb\n", r"line 3: time_s is missing; each line needs 2 fields"),
        ("time_s\n1\nsoon\n", r"line 3: time_s 'soon' is no number"),
        ("time_s\n1\nnan\n", r"line 3: time_s 'nan' is no number"),
        ("time_s\n-1\n", r"line 2: time_s -1 is negative"),
        ("# end_s=2\ntime_s\n1\n3\n", r"stated end 2 s lies before the last request at 3 s"),
        ("seconds\n1\n", r"header must name time_s, count or TIMESTAMP, not 'seconds'"),
        ("", r"header must name"),
        ("TIMESTAMP,ContextTokens\nyesterday,4\n", r"line 2: TIMESTAMP 'yesterday' is no time"),
        ("count\n3\n-1\n", r"line 3: count '-1' must be a whole number"),
    ],
)
def test_errors_name_the_line_and_the_remedy(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(TraceError, match=reason):
        read_trace(written(tmp_path, text))


def test_azure_times_count_from_the_first_and_keep_their_fractions(tmp_path: Path) -> None:
    rows = "2023-11-16 23:59:59.9799600,4808,10\n2023-11-17 00:00:00.0319601,3180,8\n2023-11-17 00:01:00Z,1,1\n"
    trace = read_trace(written(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows))
    assert trace.arrivals.time_s == pytest.approx([0.0, 0.0520001, 60.02004], abs=1e-9)


def test_counts_fill_their_intervals(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, "time_s,count\n10,3\n20,0\n30,200\n"))
    times = trace.arrivals.time_s
    assert len(times) == 203
    assert np.histogram(times, [10, 20, 30, 40])[0].tolist() == [3, 0, 200]
    assert trace.arrivals.end_s == 40.0
    assert times[3:].mean() == pytest.approx(35.0, abs=1.0)  # spread evenly, not at the border


def test_counts_without_times_take_the_given_interval(tmp_path: Path) -> None:
    trace = parse_workload(str(written(tmp_path, "count\n2\n5\n")), interval_s=3.0)
    assert np.histogram(trace.arrivals.time_s, [0, 3, 6])[0].tolist() == [2, 5]
    assert trace.arrivals.end_s == 6.0


def many(count: int = 20_000, end_s: float = 1_000.0) -> Trace:
    times = np.sort(np.random.default_rng(5).random(count) * end_s)
    phase = (times > end_s / 2).astype(np.int16)
    arrivals = Arrivals(times, phase, end_s, ("first", "second"))
    return Trace("many", arrivals, np.arange(count, dtype=np.int64))


@pytest.mark.parametrize(("rate_scale", "time_scale"), [(0.25, 1.0), (2.5, 1.0), (1.0, 0.2), (3.0, 0.5)])
def test_rate_and_time_scale_apart(rate_scale: float, time_scale: float) -> None:
    trace = scale_trace(many(), np.random.default_rng(6), rate_scale, time_scale)
    arrivals = trace.arrivals
    assert arrivals.end_s == pytest.approx(1_000.0 * time_scale)
    assert len(arrivals) / arrivals.end_s == pytest.approx(20.0 * rate_scale, rel=0.03)
    assert arrivals.phase is not None
    second = arrivals.time_s > 500.0 * time_scale
    assert (arrivals.phase == second).mean() > 0.999  # each request keeps its phase
    assert trace.labels is not None
    assert len(trace.labels) == len(arrivals)


def test_time_and_rate_scaled_against_each_other_keep_every_request() -> None:
    trace = scale_trace(many(), np.random.default_rng(6), rate_scale=4.0, time_scale=0.25)
    assert trace.arrivals.time_s == pytest.approx(many().arrivals.time_s / 4.0)
    assert trace.labels is not None
    assert trace.labels.tolist() == list(range(20_000))


def test_repeated_requests_stay_before_the_next_one() -> None:
    trace = Trace("two", Arrivals(np.array([1.0, 5.0]), None, 6.0), np.array([0, 1]))
    tripled = scale_trace(trace, np.random.default_rng(0), rate_scale=3.0)
    assert tripled.labels is not None
    assert tripled.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert tripled.arrivals.time_s[0] == 1.0
    assert tripled.arrivals.time_s[3] == 5.0
    assert 1.0 < tripled.arrivals.time_s[1] < tripled.arrivals.time_s[2] < 5.0
    assert 5.0 < tripled.arrivals.time_s[4] < tripled.arrivals.time_s[5] < 6.0


def test_cutting_states_the_end() -> None:
    cut = cut_trace(many(), 100.0)
    assert cut.arrivals.end_s == 100.0
    assert cut.arrivals.time_s[-1] < 100.0
    assert len(cut) == int((many().arrivals.time_s < 100.0).sum())
    even = Trace("even", Arrivals(np.arange(4.0), None, 3.0))
    assert cut_trace(even, 2.0).arrivals.time_s.tolist() == [0.0, 1.0], "one at the end belongs to what comes next"


def test_workloads_by_name() -> None:
    assert len(parse_workload("constant:50", duration_s=2.0)) == 100
    assert len(parse_workload("constant:50", duration_s=2.0, rate_scale=0.5)) == 50
    assert parse_workload("poisson:100").arrivals.end_s == 60.0
    assert len(parse_workload("poisson:100", seed=1)) == pytest.approx(6_000, rel=0.06)
    periodic = parse_workload("periodic", duration_s=60.0, time_scale=0.1, rate_scale=0.5).arrivals
    assert periodic.phase_spans()[0][:2] == pytest.approx((0.0, 50.0), abs=0.5)
    assert periodic.phase_spans()[1][:2] == pytest.approx((50.0, 52.8), abs=0.5)
    paper = parse_workload("paper", seed=2, duration_s=100.0, time_scale=0.01)
    assert paper.arrivals.phase_names == ("bursty", "normal")
    assert "x 0.01" in paper.description


def test_the_seed_fixes_the_trace() -> None:
    one, two = (parse_workload("paper", seed=3, time_scale=0.1).arrivals.time_s for _ in range(2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, parse_workload("paper", seed=4, time_scale=0.1).arrivals.time_s)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("poison:3", "write paper, periodic"),
        ("poisson", "positive rate"),
        ("constant:-1", "positive rate"),
        ("paper:2", "no workload"),
        ("/no/such.csv", "no such file"),
    ],
)
def test_unknown_workloads_say_what_there_is(spec: str, reason: str) -> None:
    with pytest.raises(TraceError, match=reason):
        parse_workload(spec)


def test_scales_must_be_positive() -> None:
    with pytest.raises(TraceError, match="rate_scale must be a positive number"):
        parse_workload("paper", rate_scale=0.0)
