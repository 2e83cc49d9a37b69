"""report.html: one self-contained page with the table and plots of one or several routers over one trace.

`write_report` takes plain data: runs with their records, scores and queue lengths. The page (report_page.html)
is plain HTML around plotly.js, which is put into it once; nothing is fetched when it is opened.
"""

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from plotly.offline import get_plotlyjs

from loadgen.figures import (
    BURST_FILL,
    UNANSWERED,
    UNANSWERED_COLOUR,
    Figure,
    RouterRun,
    arrivals_figure,
    bin_width_s,
    burst_spans,
    comparison_figure,
    highest_queue,
    latency_figure,
    latency_range_ms,
    queue_figure,
    ratio,
    shares_figure,
    variant_colours,
    variants_by_rank,
)
from loadgen.score import LATE_SENDER_MS, Score, details, unanswered
from loadgen.traces import Trace

_PAGE = Path(__file__).with_name("report_page.html")
_COLUMNS = ("Router", "Phase", "Requests", "Goodput", "Violations", "Heavy", "P50 ms", "P98 ms", "P99 ms", "No answer")

NOTES = (
    (
        "Goodput",
        "Share of requests answered correctly (against the true label) and within the latency requirement.",
    ),
    ("Violations", "Share of requests that came late, were refused, dropped as hopeless, failed or timed out."),
    ("Heavy", "Share of requests that went to the largest, most accurate variant."),
    (
        "Latency",
        "From the moment at which the trace wanted a request sent to the end of its answer, as the client sees it. "
        "Percentiles are over the requests that were answered, in time or late; those without an answer (refused, "
        "dropped, failed, timed out) are counted in the last column and as violations.",
    ),
    (
        "Bursts",
        "Stretches in which the workload's hidden phase sends faster than its average. No router is told, "
        "unless its name says so.",
    ),
)


def check_place(path: Path | None) -> None:
    """Raise ValueError if a report could not be written there: asked before a run, not after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        wrong = "is a folder" if path.is_dir() else f"there is no folder {path.absolute().parent}"
        raise ValueError(f"report = {path}: {wrong}; name a file in a folder that exists")


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    trace: Trace,
    runs: Sequence[RouterRun],
    requirement_ms: float | None = None,
    warning: str = "",
) -> None:
    """Write the page. facts: what was run, as name and value, in the order to show. See `build_report`."""
    page = build_report(
        title=title, facts=facts, trace=trace, runs=runs, requirement_ms=requirement_ms, warning=warning
    )
    path.write_text(page, encoding="utf-8")


def build_report(
    *,
    title: str,
    facts: Mapping[str, str],
    trace: Trace,
    runs: Sequence[RouterRun],
    requirement_ms: float | None = None,
    warning: str = "",
) -> str:
    """Return the page as one string of about 5 MB, nearly all of it plotly.js.

    All runs must be over `trace`. requirement_ms draws the latency requirement; warning is shown above everything
    else. Needs at least one run.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    figures: dict[str, Figure] = {
        "arrivals": arrivals_figure(trace.arrivals),
        "comparison": comparison_figure(runs),
    }
    sections = [_router_section(i, run, runs, trace, requirement_ms, figures) for i, run in enumerate(runs)]
    parts = {
        "TITLE": html.escape(title),
        "NOTICES": "".join(_notices(runs, warning)),
        "FINDING": finding(runs),
        "FACTS": "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items()),
        "LOAD": _load(trace) + (" Every router got exactly these." if len(runs) > 1 else ""),
        "COMPARED": "Side by side" if len(runs) > 1 else "Scores",
        "TABLE": _table(runs, requirement_ms),
        "LEGEND": _legend(runs, trace, requirement_ms),
        "ROUTERS": "".join(sections),
        "NOTES": "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in NOTES),
        "PLOTLY": get_plotlyjs(),
        "FIGURES": json.dumps(figures, separators=(",", ":")).replace("</", "<\\/"),
    }
    # One pass over the template, so that no text that is put in can stand for another part.
    page = _PAGE.read_text(encoding="utf-8").split("[[")
    pieces = [page[0]]
    for piece in page[1:]:
        name, _, rest = piece.partition("]]")
        pieces.extend((parts[name], rest))
    return "".join(pieces)


def finding(runs: Sequence[RouterRun]) -> str:
    """Return one or two HTML sentences that say what the runs show: who answers best, and by how much."""
    scored = [run for run in runs if run.record.counted.any()]
    if not scored:
        return "No request was counted."
    labelled = all(ratio(run.scores, "overall", "goodput_ratio") is not None for run in scored)
    key, sign = ("goodput_ratio", -1) if labelled else ("violation_ratio", 1)
    ranked = sorted(scored, key=lambda run: sign * _overall(run, key))
    best = ranked[0]
    name = f"<strong>{html.escape(best.name)}</strong>"
    violations = f"{_overall(best, 'violation_ratio'):.2%} violated the latency requirement"
    said = f"{name}: {violations}."
    if labelled:
        said = f"{name} answered {_overall(best, key):.1%} of all requests correctly and in time; {violations}."
    if len(ranked) > 1:
        gap = abs(_overall(best, key) - _overall(ranked[1], key))
        second = html.escape(ranked[1].name)
        if gap == 0.0:
            return f"{said} {second} did as well."
        said += f" Next comes {second}, {gap * 100:.1f} points behind"
        said += f": within chance for {len(best.record):,} requests." if gap < _chance(best, ranked[1], key) else "."
    return said


def _overall(run: RouterRun, key: str) -> float:
    return ratio(run.scores, "overall", key) or 0.0


def _chance(one: RouterRun, other: RouterRun, key: str) -> float:
    """Two standard errors of the difference of two ratios, as if requests were independent."""
    variance = 0.0
    for run in (one, other):
        share = _overall(run, key)
        variance += share * (1.0 - share) / int(run.record.counted.sum())
    return 2.0 * math.sqrt(variance)


def _notices(runs: Sequence[RouterRun], warning: str) -> list[str]:
    """What a reader has to know before trusting the figures: runs cut short, requests that left late."""
    notices = []
    late = []
    for run in runs:
        name = html.escape(run.name)
        if run.record.interrupted:
            sent, planned = len(run.record), run.record.planned
            notices.append(f"<strong>{name}</strong> was stopped after {sent:,} of {planned:,} requests.")
        if count := details(run.record)["sending"]["late"]:
            late.append(f"{name} {count:,} of {len(run.record):,}")
    if warning:
        notices.append(f"<strong>{html.escape(warning[0].upper() + warning[1:])}.</strong>")
    if late:
        notices.append(
            f"<strong>Busy machine:</strong> some requests left more than {LATE_SENDER_MS:g} ms late "
            f"({', '.join(late)}). The latencies below contain that delay."
        )
    return [f'<p class="notice">{text}</p>' for text in notices]


def _load(trace: Trace) -> str:
    arrivals = trace.arrivals
    rate = len(arrivals) / arrivals.end_s if arrivals.end_s > 0 else 0.0
    said = f"{len(arrivals):,} requests in {arrivals.end_s:,.0f} s ({rate:,.1f} per second on average)"
    spans = burst_spans(arrivals)
    if spans:
        said += (
            f"; {len(spans)} burst{'s' if len(spans) > 1 else ''}, shaded, {sum(b - a for a, b in spans):,.1f} s in all"
        )
    what = trace.description[:1].upper() + trace.description[1:]
    return f"{html.escape(what)}: {said}."


def _table(runs: Sequence[RouterRun], requirement_ms: float | None) -> str:
    best: dict[str, float] = {}
    for run in runs:
        for phase, row in run.scores.items():
            if row["goodput_ratio"] is not None:
                best[phase] = max(best.get(phase, 0.0), row["goodput_ratio"])
    lines = ["<table><thead><tr>", *(f'<th scope="col">{name}</th>' for name in _COLUMNS), "</tr></thead><tbody>"]
    for run in runs:
        missing = unanswered(run.record)
        for i, (phase, row) in enumerate(run.scores.items()):
            lines.append(f'<tr class="{"first" if i == 0 else ""}">')
            lines.append(f"<td>{html.escape(run.name)}</td>")
            lines.append(f'<td class="phase">{html.escape(phase)}</td>')
            lines.extend(_cells(row, best.get(phase) if len(runs) > 1 else None, requirement_ms))
            lines.append(f"<td>{missing[phase]:,}</td>")
            lines.append("</tr>")
    return "".join([*lines, "</tbody></table>"])


def _cells(row: Score, best_goodput: float | None, requirement_ms: float | None) -> list[str]:
    cells = [f"<td>{row['requests']:,}</td>"]
    goodput = row["goodput_ratio"]
    mark = ' class="best"' if goodput is not None and goodput == best_goodput else ""
    cells.append(f"<td{mark}>{_percent(goodput)}</td>")
    cells.append(f"<td>{_percent(row['violation_ratio'])}</td><td>{_percent(row['heavy_ratio'])}</td>")
    for value in (row["p50_ms"], row["p98_ms"], row["p99_ms"]):
        over = value is not None and requirement_ms is not None and value > requirement_ms
        text = "–" if value is None else f"{value:,.1f}"
        cells.append(f'<td class="over" title="above the requirement">{text}</td>' if over else f"<td>{text}</td>")
    return cells


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def _legend(runs: Sequence[RouterRun], trace: Trace, requirement_ms: float | None) -> str:
    colours = variant_colours(runs)
    chips = [
        (name, colours[name], f"{name}{' (heaviest)' if rank == 0 else ''}") for name, rank in variants_by_rank(runs)
    ]
    if any((run.record.counted & ~run.record.answered).any() for run in runs):
        chips.append((UNANSWERED, UNANSWERED_COLOUR, UNANSWERED))
    parts = [
        f'<button type="button" aria-pressed="true" data-group="{html.escape(group)}">'
        f'<i style="background:{colour}"></i>{html.escape(text)}</button>'
        for group, colour, text in chips
    ]
    if burst_spans(trace.arrivals):
        fill = BURST_FILL.replace("0.13", "0.4")
        parts.append(f'<span class="key"><i style="background:{fill}"></i>burst</span>')
    if requirement_ms is not None:
        dash = f"border-top:2px dashed {UNANSWERED_COLOUR};height:0;width:20px;vertical-align:middle;border-radius:0"
        parts.append(f'<span class="key"><i style="{dash}"></i>requirement {requirement_ms:g} ms</span>')
    return "".join(parts)


def _router_section(
    number: int,
    run: RouterRun,
    runs: Sequence[RouterRun],
    trace: Trace,
    requirement_ms: float | None,
    figures: dict[str, Figure],
) -> str:
    """Add this router's plots to `figures`; return the card that holds their places."""
    arrivals = trace.arrivals
    colours = variant_colours(runs)
    latency = latency_figure(run, arrivals, colours, latency_range_ms(runs, requirement_ms), requirement_ms)
    queues = queue_figure(run, arrivals, colours, highest_queue(runs))
    shares = shares_figure(run, arrivals, colours)
    outcomes = ", ".join(f"{count:,} {name}" for name, count in details(run.record)["outcomes"].items())
    name = html.escape(run.name)
    parts = [f'<section class="card" aria-label="{name}"><h3>{name}</h3><p class="caption">{outcomes}</p>']
    for kind, figure, what in (
        ("latency", latency, "latency of each answer over time"),
        ("queues", queues, "queue length of each instance over time"),
        ("shares", shares, f"who answered, in steps of {bin_width_s(arrivals.end_s):g} s"),
    ):
        if figure is not None:
            place = f"{kind}-{number}"
            figures[place] = figure
            tall = " tall" if kind == "latency" else ""
            parts.append(f'<div class="plot{tall}" id="{place}" role="img" aria-label="{name}: {what}"></div>')
    return "".join([*parts, "</section>"])
