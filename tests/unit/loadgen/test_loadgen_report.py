"""The report: self-contained, escaped, and its plots add up to what the record says."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from loadgen.answers import Answer, Outcome
from loadgen.console import print_results, results_table
from loadgen.figures import (
    RouterRun,
    bin_width_s,
    burst_spans,
    comparison_figure,
    latency_figure,
    queue_figure,
    shares_figure,
    variant_colours,
)
from loadgen.record import Recorder
from loadgen.report import _chance, build_report, check_place, finding
from loadgen.score import score, unanswered
from loadgen.traces import Trace, parse_workload


def trace_of(seed: int = 5) -> Trace:
    return parse_workload("paper", seed=seed, duration_s=60.0, time_scale=0.06)


def run_of(
    trace: Trace,
    name: str,
    right: float = 0.9,
    refused: float = 0.1,
    stopped: bool = False,
    variants: tuple[str, str] = ("big<net", "small"),
) -> RouterRun:
    rng = np.random.default_rng(7)
    recorder = Recorder(trace.arrivals.time_s)
    for i, time_s in enumerate(trace.arrivals.time_s.tolist()):
        recorder.start(i, time_s)
        if rng.random() < refused:
            recorder.end(i, time_s + 0.001, Answer(Outcome.QUEUE_FULL))
            continue
        rank = int(rng.integers(2))
        late = rng.random() < 0.02
        done = Answer(
            Outcome.LATE if late else Outcome.OK,
            int(rng.random() < right),
            variants[rank],
            f"w{rank}",
            rank,
        )
        recorder.end(i, time_s + (0.4 if late else 0.05), done)
    arrivals = trace.arrivals
    record = recorder.finish(arrivals.phase, arrivals.phase_names, arrivals.end_s, stopped)
    queues = {"w0": [(t / 4, t % 9) for t in range(240)], "w1": [(t / 4, 0) for t in range(240)]}
    return RouterRun(name, record, score(record), queues)


class Page(HTMLParser):
    """Collects what a browser would fetch, the texts of scripts, and ids."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.script: dict[str, str] = {}
        self.cells: list[str] = []
        self.at = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.fetched += [f"{tag} {given[key]}" for key in ("src", "href") if given.get(key)]
        self.at = f"script#{given.get('id')}" if tag == "script" else tag
        if given.get("id"):
            self.ids.append(str(given["id"]))

    def handle_data(self, data: str) -> None:
        if self.at.startswith("script"):
            self.script[self.at] = self.script.get(self.at, "") + data
        elif self.at == "td":
            self.cells.append(data)


def page_of(text: str) -> Page:
    page = Page()
    page.feed(text)
    return page


@pytest.fixture(scope="module")
def trace() -> Trace:
    return trace_of()


def test_the_page_is_self_contained_and_every_figure_has_its_place(trace: Trace) -> None:
    runs = [run_of(trace, "deadline"), run_of(trace, "light-only", right=0.7)]
    text = build_report(title="Bursts", facts={"Machine": "2 cores"}, trace=trace, runs=runs, requirement_ms=300.0)
    page = page_of(text)
    assert page.fetched == []
    assert text.count("plotly.js v") >= 1
    assert len(text) < 8_000_000  # plotly.js once, not once per figure
    figures = json.loads(page.script["script#figures"])
    assert set(figures) <= set(page.ids)
    assert len(figures) == 2 + 3 * len(runs)
    assert len(page.ids) == len(set(page.ids))
    assert "[[" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert "2 cores" in text


def test_names_cannot_break_the_page(trace: Trace) -> None:
    evil = '</script><img src="http://x/y">'
    run = run_of(trace, evil, variants=(evil, "small"))
    text = build_report(title=evil, facts={evil: evil}, trace=trace, runs=[run])
    page = page_of(text)
    assert json.loads(page.script["script#figures"])
    assert page.fetched == []
    assert any(evil in cell for cell in page.cells)


def test_the_table_holds_the_scores(trace: Trace) -> None:
    run = run_of(trace, "deadline")
    cells = page_of(build_report(title="t", facts={}, trace=trace, runs=[run])).cells
    row = run.scores["bursty"]
    assert f"{row['goodput_ratio']:.2%}" in cells
    assert f"{row['requests']:,}" in cells


def test_shares_add_up_to_one_and_match_the_record(trace: Trace) -> None:
    run = run_of(trace, "deadline")
    figure = shares_figure(run, trace.arrivals, variant_colours([run]))
    shares = np.array([bars["y"] for bars in figure["data"]])
    centres = np.array(figure["data"][0]["x"])
    width = bin_width_s(60.0)
    counts = np.array([((trace.arrivals.time_s // width) == centre // width).sum() for centre in centres])
    assert shares.sum(axis=0)[counts > 0] == pytest.approx(1.0, abs=0.002)
    refused = (shares[-1] * counts).sum()
    assert refused == pytest.approx((run.record.outcome == Outcome.QUEUE_FULL).sum(), abs=0.5)


def test_latency_points_are_the_answers_and_late_ones_are_never_dropped() -> None:
    trace = parse_workload("constant:200", duration_s=60.0)
    run = run_of(trace, "deadline")
    figure = latency_figure(run, trace.arrivals, variant_colours([run]), (1.0, 1000.0), 300.0)
    heights = np.concatenate([points["y"] for points in figure["data"]])
    assert len(heights) == 3000 < run.record.answered.sum()
    assert (heights > 300).sum() == (run.record.outcome == Outcome.LATE).sum()
    assert figure["layout"]["shapes"][-1]["y0"] == 300.0


def test_bursts_are_the_phases_that_send_faster(trace: Trace) -> None:
    spans = burst_spans(trace.arrivals)
    inside: np.ndarray[Any, np.dtype[np.bool_]] = np.zeros(len(trace), dtype=bool)
    for start, end in spans:
        inside |= (trace.arrivals.time_s >= start) & (trace.arrivals.time_s < end)
    assert trace.arrivals.phase is not None
    assert (inside == (trace.arrivals.phase == 0)).mean() > 0.99
    assert burst_spans(parse_workload("poisson:50").arrivals) == []


def test_queues_are_drawn_per_instance_in_the_colour_of_their_variant(trace: Trace) -> None:
    run = run_of(trace, "deadline")
    colours = variant_colours([run])
    figure = queue_figure(run, trace.arrivals, colours, 9.0)
    assert figure is not None
    assert [line["line"]["color"] for line in figure["data"]] == [colours["big<net"], colours["small"]]
    silent = RouterRun("x", run.record, run.scores)
    assert queue_figure(silent, trace.arrivals, colours, 9.0) is None


def test_bars_leave_out_what_a_run_has_not(trace: Trace) -> None:
    plain = parse_workload("poisson:20")
    figure = comparison_figure([run_of(trace, "a"), run_of(plain, "b")])
    bursty = [bars for bars in figure["data"] if bars["name"] == "bursty"]
    assert len(bursty) == 3
    assert all(bars["x"][0] is not None and bars["x"][1] is None for bars in bursty)


@pytest.mark.parametrize(("end_s", "width"), [(60.0, 0.5), (6000.0, 50.0), (12.0, 0.1), (30.0, 0.5)])
def test_bins_have_round_widths(end_s: float, width: float) -> None:
    assert bin_width_s(end_s) == pytest.approx(width)


def test_the_finding_names_the_best_and_says_when_it_is_chance(trace: Trace) -> None:
    good, bad = run_of(trace, "good", right=0.95), run_of(trace, "bad", right=0.5)
    said = finding([bad, good])
    assert said.startswith("<strong>good</strong>")
    gap = 100 * (good.scores["overall"]["goodput_ratio"] or 0) - 100 * (bad.scores["overall"]["goodput_ratio"] or 0)
    assert f"bad, {gap:.1f} points behind." in said
    assert finding([good, run_of(trace, "twin", right=0.95)]).endswith(" twin did as well.")
    assert "within chance" in finding([good, run_of(trace, "near", right=0.945)])
    variance = 0.0
    for run in (good, bad):
        counted = run.record.counted
        right = (run.record.correct == 1) & (run.record.outcome == Outcome.OK)
        variance += float(np.var(right[counted])) / int(counted.sum())
    assert _chance(good, bad, "goodput_ratio") == pytest.approx(2.0 * np.sqrt(variance)), "two standard errors"


def test_a_stopped_run_says_so(trace: Trace) -> None:
    text = build_report(title="t", facts={}, trace=trace, runs=[run_of(trace, "deadline", stopped=True)])
    assert "was stopped after" in text


def test_requests_that_left_late_are_not_hidden(trace: Trace) -> None:
    run = run_of(trace, "deadline")
    assert "Busy machine" not in build_report(title="t", facts={}, trace=trace, runs=[run])
    late_s = run.record.sent_s + np.where(np.arange(len(run.record)) < 7, 0.011, 0.0)
    late = RouterRun("deadline", replace(run.record, sent_s=late_s), run.scores)
    assert f"deadline 7 of {len(run.record):,}" in build_report(title="t", facts={}, trace=trace, runs=[late])


def test_a_warning_stands_above_the_figures_and_requests_without_answer_beside_them(trace: Trace) -> None:
    run = run_of(trace, "deadline")
    assert 'class="notice"' not in build_report(title="t", facts={}, trace=trace, runs=[run])
    page = build_report(title="t", facts={}, trace=trace, runs=[run], warning="not comparable: <slow>")
    assert page.index("Not comparable: &lt;slow&gt;.") < page.index("<table>")
    refused = int((run.record.outcome == Outcome.QUEUE_FULL).sum())
    row = page_of(page).cells[:10]
    assert row[-1] == f"{refused:,}" != "0"


def test_the_terminal_says_what_its_columns_mean(trace: Trace, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(trace, "deadline")
    print_results([run], "Bursts", "not comparable: slow")
    said = capsys.readouterr().out
    lines = said.splitlines()
    overall = next(line for line in lines if line.strip().startswith("deadline")).split()
    assert overall[-1] == f"{unanswered(run.record)['overall']:,}"
    for word in ("answered correctly and in time", "late, refused", "largest variant", "no latency percentile"):
        assert word in " ".join(said.split())
    assert lines[-1] == "not comparable: slow"


def test_a_place_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    check_place(None)
    check_place(tmp_path / "report.html")
    check_place(Path("report.html"))
    for place in (tmp_path, tmp_path / "nowhere" / "report.html"):
        with pytest.raises(ValueError, match="folder that exists"):
            check_place(place)


def test_no_run_is_an_error(trace: Trace) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        build_report(title="t", facts={}, trace=trace, runs=[])


def test_the_table_fits_into_a_terminal_of_80_columns(trace: Trace) -> None:
    console = Console(width=80, file=io.StringIO(), highlight=False)
    console.print(results_table([run_of(trace, "single-queue")]))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    for word in ("sent", "goodput", "violations", "heavy", "P50 ms", "P98", "P99", "answer"):
        assert word in said
    assert "…" not in said
