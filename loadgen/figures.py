"""The report's plots, as plotly.js data and layout in plain dictionaries.

Pure functions from a run's record to JSON values. Colours of text, grid and background are left to the page,
which follows the reader's light or dark theme; `legendgroup` names what a trace stands for, so that one
legend on the page switches it in every plot.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadgen.answers import UNKNOWN, Outcome
from loadgen.record import RunRecord
from loadgen.score import Score
from policies.routing.workload import Arrivals

Figure = dict[str, Any]

VARIANT_COLOURS = ("#2f74c0", "#e8973a", "#3a9d7c", "#9a6bc7", "#b8a13a", "#5aa9c9")  # heaviest first
UNANSWERED_COLOUR = "#cf4b63"
OTHER_COLOUR = "#8a8f98"
PHASE_COLOURS = {"overall": "#5b7083", "bursty": "#d9772b", "normal": "#3a9d9d"}
BURST_FILL = "rgba(217, 119, 43, 0.13)"
UNANSWERED = "not answered"

_POINTS = 3000  # latency points drawn per router; more would only slow the page down
_SAMPLE_SEED = 0
_BINS = 120  # time bins aimed at
_SHADES = 400  # bursts shaded at most
_QUEUE_POINTS = 2000  # per instance


@dataclass(frozen=True, eq=False)
class RouterRun:
    """One router's run over the trace. queue_lengths: instance id to (time in s, length) as polled."""

    name: str
    record: RunRecord
    scores: Mapping[str, Score]
    queue_lengths: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)


def bin_width_s(end_s: float) -> float:
    """Return a round number of seconds (1, 2 or 5 times a power of ten) that gives about 120 bins."""
    exact = max(end_s, 1e-3) / _BINS
    power = 10.0 ** np.floor(np.log10(exact))
    return float(next(power * step for step in (1, 2, 5, 10) if power * step >= exact * 0.999))


def burst_spans(arrivals: Arrivals) -> list[tuple[float, float]]:
    """Return (start_s, end_s) of the phases in which requests come faster than over the whole trace."""
    spans = arrivals.phase_spans()
    if not spans or arrivals.phase is None or arrivals.end_s <= 0:
        return []
    mean_rate = len(arrivals) / arrivals.end_s
    bursts = set()
    for phase, name in enumerate(arrivals.phase_names):
        length_s = sum(end - start for start, end, of in spans if of == name)
        if length_s > 0 and int((arrivals.phase == phase).sum()) / length_s > mean_rate:
            bursts.add(name)
    return [(start, end) for start, end, name in spans if name in bursts][:_SHADES]


def variants_by_rank(runs: Sequence[RouterRun]) -> list[tuple[str, int]]:
    """Return (variant, rank) of all variants that answered in any run, the heaviest first."""
    ranks: dict[str, int] = {}
    for run in runs:
        for i, name in enumerate(run.record.variants):
            seen = run.record.rank[run.record.variant == i]
            known = seen[seen != UNKNOWN]
            ranks[name] = int(known[0]) if len(known) else ranks.get(name, len(VARIANT_COLOURS))
    return sorted(ranks.items(), key=lambda item: (item[1], item[0]))


def variant_colours(runs: Sequence[RouterRun]) -> dict[str, str]:
    """Return one colour per variant, the same in every plot."""
    names = [name for name, _ in variants_by_rank(runs)]
    return {name: VARIANT_COLOURS[i % len(VARIANT_COLOURS)] for i, name in enumerate(names)}


def arrivals_figure(arrivals: Arrivals) -> Figure:
    """Requests per second over time, bursts shaded."""
    edges, width_s = _edges(arrivals.end_s)
    counts = np.histogram(arrivals.time_s, edges)[0]
    line = {
        "type": "scatter",
        "mode": "lines",
        "line": {"shape": "hv", "width": 1.6, "color": "#4f8fa8"},
        "fill": "tozeroy",
        "fillcolor": "rgba(79, 143, 168, 0.22)",
        "x": _rounded(edges),
        "y": _rounded(np.append(counts, counts[-1:]) / width_s),
        "hovertemplate": "%{y:.0f} requests/s at %{x:.1f} s<extra></extra>",
    }
    return _over_time([line], arrivals, "requests per second", {"rangemode": "tozero"})


def comparison_figure(runs: Sequence[RouterRun]) -> Figure:
    """Goodput, violations and heavy share per router, one bar per phase; `height_px` grows with the bars."""
    measures = (
        ("goodput_ratio", "correct and in time"),
        ("violation_ratio", "violations"),
        ("heavy_ratio", "to the heaviest variant"),
    )
    phases = list(dict.fromkeys(phase for run in runs for phase in run.scores))
    data = []
    layout: dict[str, Any] = {
        "barmode": "group",
        "bargap": 0.28,
        "showlegend": len(phases) > 1,
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 0, "yanchor": "top", "traceorder": "normal"},
        "annotations": [],
        "yaxis": {"autorange": "reversed", "showgrid": False},  # the first router on top
    }
    gap = 0.04
    width = (1 - gap * (len(measures) - 1)) / len(measures)
    for place, (key, title) in enumerate(measures):
        left = place * (width + gap)
        name = f"x{place + 1}" if place else "x"
        axis = {"domain": [left, left + width], "range": [0, 1.18], "tickvals": [], "zeroline": True}
        layout[name.replace("x", "xaxis")] = axis
        heading = {"text": title, "x": left, "y": 1, "xref": "paper", "yref": "paper", "showarrow": False}
        layout["annotations"].append({**heading, "xanchor": "left", "yanchor": "bottom", "font": {"size": 14}})
        for phase in phases:
            values = [ratio(run.scores, phase, key) for run in runs]
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": _plain(phase),
                    "legendgroup": phase,
                    "showlegend": place == 0,
                    "xaxis": name,
                    "y": [_plain(run.name) for run in runs],
                    "x": values,
                    "text": ["" if value is None else f"{value:.1%}" for value in values],
                    "textposition": "outside",
                    "textfont": {"size": 11},
                    "textangle": 0,
                    "cliponaxis": False,
                    "marker": {"color": PHASE_COLOURS.get(phase, OTHER_COLOUR)},
                    "hovertemplate": f"%{{y}}, {_plain(phase)}: %{{x:.2%}}<extra></extra>",
                }
            )
    height_px = 90 + len(runs) * (18 * len(phases) + 12)
    return {"kind": "bars", "data": data, "layout": layout, "height_px": height_px}


def ratio(scores: Mapping[str, Score], phase: str, key: str) -> float | None:
    """Return one ratio of one row, or None where the run has no such row."""
    row: Mapping[str, Any] = {**scores[phase]} if phase in scores else {}
    return row.get(key)


def latency_figure(
    run: RouterRun,
    arrivals: Arrivals,
    colours: Mapping[str, str],
    range_ms: tuple[float, float],
    requirement_ms: float | None,
) -> Figure:
    """Each answer's latency at its intended send time, coloured by variant, with the requirement as a line."""
    record = run.record
    latency_ms = record.latency_s * 1000.0
    shown = np.flatnonzero(record.answered)
    if len(shown) > _POINTS:
        late = shown[record.outcome[shown] == Outcome.LATE][:_POINTS]
        rest = np.setdiff1d(shown, late)
        chosen = np.random.default_rng(_SAMPLE_SEED).permutation(rest)[: _POINTS - len(late)]
        shown = np.sort(np.concatenate((late, chosen)))
    data = []
    for name, answered in _answered_by(record):
        mine = shown[answered[shown]]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "legendgroup": name,
                "marker": {"size": 3.5, "opacity": 0.65, "color": colours.get(name, OTHER_COLOUR)},
                "x": _rounded(record.intended_s[mine]),
                "y": _rounded(latency_ms[mine]),
                "hovertemplate": f"{_plain(name)}: %{{y:.1f}} ms at %{{x:.2f}} s<extra></extra>",
            }
        )
    bounds = [float(np.log10(range_ms[0])), float(np.log10(range_ms[1]))]
    ticks = [step * 10.0**power for power in range(-1, 6) for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if range_ms[0] <= tick <= range_ms[1]]
    y_axis = {"type": "log", "range": bounds, "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    figure = _over_time(data, arrivals, "latency, ms", y_axis)
    if requirement_ms is not None:
        line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": requirement_ms, "y1": requirement_ms}
        line["line"] = {"color": UNANSWERED_COLOUR, "width": 1.5, "dash": "dash"}
        figure["layout"]["shapes"].append(line)
    return figure


def queue_figure(run: RouterRun, arrivals: Arrivals, colours: Mapping[str, str], highest: float) -> Figure | None:
    """Queue length of every instance over time; None where nothing was polled."""
    if not run.queue_lengths:
        return None
    variant_of = _variant_of_instance(run.record)
    data = []
    for instance in sorted(run.queue_lengths):
        series = run.queue_lengths[instance]
        step = max(1, -(-len(series) // _QUEUE_POINTS))
        name = variant_of.get(instance, "")
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "legendgroup": name,
                "opacity": 0.7,  # instances of one variant share its colour and often lie on one another
                "line": {"shape": "hv", "width": 1.5, "color": colours.get(name, OTHER_COLOUR)},
                "x": [round(time_s, 3) for time_s, _ in series[::step]],
                "y": [length for _, length in series[::step]],
                "hovertemplate": f"{_plain(instance)}: %{{y}} at %{{x:.1f}} s<extra></extra>",
            }
        )
    return _over_time(data, arrivals, "queue length", {"range": [0, highest * 1.06 + 0.5]})


def shares_figure(run: RouterRun, arrivals: Arrivals, colours: Mapping[str, str]) -> Figure:
    """What became of each time bin's requests: the share that each variant answered, and the rest."""
    record = run.record
    edges, width_s = _edges(arrivals.end_s)
    whole = np.histogram(record.intended_s[record.counted], edges)[0]
    order = list(colours)
    parts = sorted(_answered_by(record), key=lambda part: order.index(part[0]) if part[0] in order else len(order))
    parts.append((UNANSWERED, record.counted & ~record.answered))
    data = []
    for name, part in parts:
        colour = UNANSWERED_COLOUR if name == UNANSWERED else colours.get(name, OTHER_COLOUR)
        count = np.histogram(record.intended_s[part], edges)[0]
        share = np.divide(count, whole, out=np.zeros(len(whole)), where=whole > 0)
        data.append(
            {
                "type": "bar",
                "legendgroup": name,
                "x": _rounded(edges[:-1] + width_s / 2),
                "y": _rounded(share),
                "width": width_s,
                "marker": {"color": colour, "line": {"width": 0}},
                "hovertemplate": f"{_plain(name)}: %{{y:.0%}} at %{{x:.1f}} s<extra></extra>",
            }
        )
    figure = _over_time(data, arrivals, "share of requests", {"range": [0, 1], "tickformat": ".0%"})
    figure["layout"].update(barmode="stack", bargap=0)
    for shape in figure["layout"]["shapes"]:
        # The bars fill the plot: mark bursts along its top edge instead of behind them.
        shape.update(y0=1.0, y1=1.05, fillcolor="rgba(217, 119, 43, 0.75)")
    return figure


def latency_range_ms(runs: Sequence[RouterRun], requirement_ms: float | None) -> tuple[float, float]:
    """Return the latency axis that all routers share, so that heights can be compared by eye."""
    values = [run.record.latency_s[run.record.answered] * 1000.0 for run in runs]
    every = np.concatenate([*values, np.array([requirement_ms or 10.0])])
    return max(float(every.min()) * 0.8, 0.1), float(every.max()) * 1.25


def highest_queue(runs: Sequence[RouterRun]) -> float:
    """Return the longest queue of any run: the top of the queue axis that all routers share."""
    return max((length for run in runs for s in run.queue_lengths.values() for _, length in s), default=1.0)


def _answered_by(record: RunRecord) -> list[tuple[str, NDArray[np.bool_]]]:
    """Return (variant, where it answered); answers that name no variant come last, as "other"."""
    parts = [(name, record.answered & (record.variant == i)) for i, name in enumerate(record.variants)]
    nameless = record.answered & (record.variant == UNKNOWN)
    return [*parts, ("other", nameless)] if nameless.any() else parts


def _variant_of_instance(record: RunRecord) -> dict[str, str]:
    found = {}
    for i, instance in enumerate(record.instances):
        variant = record.variant[(record.instance == i) & (record.variant != UNKNOWN)]
        if len(variant):
            found[instance] = record.variants[int(variant[0])]
    return found


def _over_time(data: list[dict[str, Any]], arrivals: Arrivals, title: str, y_axis: dict[str, Any]) -> Figure:
    shades = [
        {
            "type": "rect",
            "yref": "paper",
            "x0": round(start, 3),
            "x1": round(end, 3),
            "y0": 0,
            "y1": 1,
            "fillcolor": BURST_FILL,
            "line": {"width": 0},
            "layer": "below",
        }
        for start, end in burst_spans(arrivals)
    ]
    layout = {
        "showlegend": False,
        "hovermode": "closest",
        "shapes": shades,
        "xaxis": {"range": [0, arrivals.end_s], "ticksuffix": " s", "zeroline": False},
        "yaxis": {"title": {"text": title}, "fixedrange": True, "zeroline": False, **y_axis},
    }
    return {"kind": "time", "data": data, "layout": layout}


def _edges(end_s: float) -> tuple[NDArray[np.float64], float]:
    width_s = bin_width_s(end_s)
    edges = np.arange(int(np.ceil(end_s / width_s - 1e-9)) + 1, dtype=np.float64) * width_s
    return edges, width_s


def _rounded(values: NDArray[np.floating[Any]]) -> list[float]:
    rounded: list[float] = np.round(values, 3).tolist()
    return rounded


def _plain(text: str) -> str:
    return html.escape(text)  # plotly reads a few tags in its texts
