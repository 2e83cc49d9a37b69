"""How `tidegate edge compare` tells its results: tables on a terminal, and a page with charts where asked."""

import html
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from plotly.offline import get_plotlyjs
from rich import box
from rich.console import Console
from rich.table import Table

from tidegate.edge_compare_figures import REAL_PARTS, PolicyFigures, ServiceFigures

_PIPE_WIDTH: Final = 120
_NONE: Final = "–"
_FIGURES: Final = re.compile(r"\d[\d.]*(e-?\d+)?")
_MOST_REASONS: Final = 4

MEANINGS: Final = (
    "reward: summed over all requests, -100 for each that was not answered in time · foreseen: by the environment when",
    "it decided · accuracy: expected by the tables; measured: of what was really answered, against the scenes' truth",
    "delay: emulated (Eq. 6: access, links, queue, computing) · cost: Eq. 11 · means are over the answers in time",
)


def print_figures(figures: Sequence[PolicyFigures], title: str, warning: str) -> None:
    """The comparison, real times beside it, parity and failures, on stdout."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    console.print(_table(title, _comparison(figures)))
    for line in MEANINGS:
        console.print(line, style="dim", markup=False)
    console.print(
        _table(
            "Real times beside it, ms: mean (99th percentile); wait: for the executor and for the emulated end",
            _beside(figures),
        )
    )
    for text in remarks(figures):
        console.print(text, markup=False, soft_wrap=True)
    if warning:
        console.print(warning, style="bold red", markup=False, soft_wrap=True)


def remarks(figures: Sequence[PolicyFigures]) -> Iterator[str]:
    """What does not fit into tables: how far answers are from the environment, who decided, what failed and why."""
    answered = sum(one.answered for one in figures)
    if answered:
        delay_s = max(one.difference.delay_s for one in figures)
        cost_usd = max(one.difference.cost_usd for one in figures)
        yield (
            f"largest difference between answers and the environment on what was observed, over {answered} answers:"
            f" {delay_s:.2g} s, {cost_usd:.2g} USD"
        )
    for one in figures:
        decided = ", ".join(f"{count} by {by}" for by, count in sorted(one.decided_by.items()))
        yield f"{one.policy}: {decided or 'nothing answered'}; {one.loads} loads, {one.second_choices} second choices"
        most = _alike(one.failures).most_common()
        for reason, count in most[:_MOST_REASONS]:
            yield f"  {count} × {reason}"
        if len(most) > _MOST_REASONS:
            others = most[_MOST_REASONS:]
            yield f"  and {sum(count for _, count in others)} for {len(others)} other reasons"


def _alike(failures: Mapping[str, int]) -> Counter[str]:
    """Failures by outcome and reason, whatever figures the reasons name."""
    found: Counter[str] = Counter()
    for reason, count in failures.items():
        found[_FIGURES.sub("…", reason)] += count
    return found


def write_page(
    file: Path, figures: Sequence[PolicyFigures], title: str, facts: Mapping[str, str], warning: str
) -> None:
    """One self-contained page: the tables, the remarks and a chart per figure."""
    import plotly.graph_objects as go

    charts = []
    for name, values in _charts(figures):
        figure = go.Figure(
            [go.Bar(name=series, x=list(bars), y=list(bars.values())) for series, bars in values.items()]
        )
        figure.update_layout(title=name, height=340, barmode="group", template="plotly_white")
        charts.append(figure.to_html(full_html=False, include_plotlyjs=False))
    tables = "".join(_html_table(rows) for rows in (_comparison(figures), _beside(figures)))
    said = "".join(f"<p class=warning>{html.escape(warning)}</p>" if warning else "")
    listed = "".join(f"<li><b>{html.escape(key)}</b>: {html.escape(value)}</li>" for key, value in facts.items())
    notes = "<br>".join(html.escape(line) for line in (*MEANINGS, *remarks(figures)))
    file.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        "<style>body{font:15px system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;margin:1em 0}"
        "td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ccc}"
        "td:first-child,th:first-child{text-align:left}.warning{color:#b00020;font-weight:bold}</style>"
        f"<script>{get_plotlyjs()}</script><h1>{html.escape(title)}</h1>{said}<ul>{listed}</ul>"
        f"{tables}<p>{notes}</p>{''.join(charts)}</html>\n"
    )


def _comparison(figures: Sequence[PolicyFigures]) -> list[tuple[str, ...]]:
    """Rows by figure, a column per policy; the head first."""

    def row(name: str, value: Callable[[PolicyFigures], float | None], how: str) -> tuple[str, ...]:
        return (name, *(_number(value(one), how) for one in figures))

    rows = [("", *(one.policy for one in figures))]
    rows += [
        row("reward, Eq. 21", lambda one: one.reward, ".2f"),
        row("  foreseen", lambda one: one.predicted_reward, ".2f"),
        row("not in time", lambda one: one.failure_ratio, ".1%"),
        row("accuracy", lambda one: one.accuracy, ".3f"),
    ]
    for name in sorted({name for one in figures for name in one.services}):
        mine = [one.services[name] for one in figures]
        rows.append((f"  {name}, expected", *(_number(one.expected_accuracy, ".3f") for one in mine)))
        rows.append((f"  {name}, measured", *(_measured(one) for one in mine)))
    rows += [
        row("delay, s", lambda one: one.delay_s, ".3f"),
        row("  foreseen", lambda one: one.predicted_delay_s, ".3f"),
        row("cost, 0.001 USD", lambda one: _thousandths(one.cost_usd), ".3f"),
        row("  foreseen", lambda one: _thousandths(one.predicted_cost_usd), ".3f"),
    ]
    return rows


def _measured(service: ServiceFigures) -> str:
    return f"{service.measured.name} {service.measured.value:.3f}" if service.measured is not None else _NONE


def _thousandths(usd: float | None) -> float | None:
    return None if usd is None else 1e3 * usd


def _beside(figures: Sequence[PolicyFigures]) -> list[tuple[str, ...]]:
    """Rows by part of the real time, a column per policy."""
    rows: list[tuple[str, ...]] = [("", *(one.policy for one in figures))]
    for part in REAL_PARTS:
        times = [one.beside_s.get(part) for one in figures]
        shown = [f"{1e3 * time.mean:.0f} ({1e3 * time.p99:.0f})" if time is not None else _NONE for time in times]
        rows.append((part, *shown))
    queues_s = [one.link_queue_s for one in figures]
    rows.append(("emulated queues on links", *(_NONE if one is None else f"{1e3 * one:.0f}" for one in queues_s)))
    return rows


def _charts(figures: Sequence[PolicyFigures]) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """A title, and by series the bars by policy."""
    yield (
        "Reward (Eq. 21), all requests",
        {
            "answered": {one.policy: one.reward for one in figures},
            "foreseen": {one.policy: one.predicted_reward for one in figures},
        },
    )
    accuracy = {"expected": {one.policy: one.accuracy or 0.0 for one in figures}}
    for name in _score_names(figures):
        accuracy[f"measured {name}"] = {
            one.policy: s.measured.value
            for one in figures
            for s in one.services.values()
            if s.measured is not None and s.measured.name == name
        }
    yield "Accuracy", accuracy
    yield (
        "Delay, s (emulated, mean)",
        {
            "answered": {one.policy: one.delay_s or 0.0 for one in figures},
            "foreseen": {one.policy: one.predicted_delay_s or 0.0 for one in figures},
        },
    )
    yield "Cost, USD (mean)", {"answered": {one.policy: one.cost_usd or 0.0 for one in figures}}
    yield "Failure ratio", {"not answered in time": {one.policy: one.failure_ratio for one in figures}}


def _score_names(figures: Sequence[PolicyFigures]) -> list[str]:
    return sorted({s.measured.name for one in figures for s in one.services.values() if s.measured is not None})


def _number(value: float | None, how: str) -> str:
    return _NONE if value is None else format(value, how)


def _table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, head in enumerate(rows[0]):
        table.add_column(head, justify="right" if place else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    lines = [
        "<tr>" + "".join(f"<{cell}>{html.escape(text)}</{cell}>" for text in row) + "</tr>"
        for cell, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True)
    ]
    return f"<table>{''.join(lines)}</table>"
