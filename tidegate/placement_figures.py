"""Huang's Figs. 7 to 10 as one HTML page per number of agents, from evaluation JSON and the artifacts' curves.

Beside the page stand the same figures as Markdown tables.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

LEARNERS = ("hisper-paper", "hasac", "happo", "happo-discounted", "hisper", "hisper-sequential", "prices")
AGENT_FIGURES = (("accuracy", "accuracy"), ("delay_s", "delay, s"), ("cost_usd", "cost, USD"))
SUB_REWARDS = (("reward", "reward"), ("accuracy", "accuracy"), ("cost_usd", "cost, USD"), ("delay_s", "delay, s"))


def write_figures(results: dict[str, Any], agents: int, artifacts: Path, out: Path) -> Path:
    """Write `out`/placement-AGENTS.html (plotly.min.js beside it) and .md (tables), and return the page's path.

    `results` is what `tidegate placement evaluate --json` prints under `results`.
    """
    curves = _curves(artifacts, agents)
    figures = [
        _training(results, curves),
        _bars("Fig. 8: failure ratio", {name: r["failure_ratio"] for name, r in results.items()}, "share of requests"),
        _bars("Fig. 9: execution time per slot", {n: r["decide_ms"]["p50"] for n, r in results.items()}, "ms (p50)"),
        _per_agent(results),
    ]
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"placement-{agents}.html"
    parts = [
        figure.to_html(full_html=False, include_plotlyjs="directory" if n == 0 else False)
        for n, figure in enumerate(figures)
    ]
    path.write_text(
        f"<!doctype html><meta charset=utf-8><title>Placement, {agents} agents</title>\n" + "\n".join(parts)
    )
    path.with_suffix(".md").write_text(_tables(results, curves, agents))
    from plotly.offline import get_plotlyjs

    (out / "plotly.min.js").write_text(get_plotlyjs())
    return path


def _curves(artifacts: Path, agents: int) -> dict[str, list[dict[str, float]]]:
    """Training curves by learner, from the artifacts' records (per slot; the figures show sums of 100)."""
    found = {}
    for name in LEARNERS:
        for path in (artifacts / f"{name}-{agents}.json", artifacts / f"{name}.json"):
            if path.exists():
                found[name] = json.loads(path.read_text())["record"].get("curve", [])
                break
    return found


def _tables(results: dict[str, Any], curves: dict[str, list[dict[str, float]]], agents: int) -> str:
    """Figs. 7 to 10 as Markdown tables; a curve is shown at about ten of its points."""
    parts = [f"# Placement, {agents} agents", "", "## Figs. 7, 8 and 9: sums over the slots of a seed", ""]
    heads = ("policy", "reward", "accuracy", "delay s", "cost USD", "failed", "ms p50", "ms p99")
    rows = [
        (name, f"{r['reward']['mean']:.1f}", f"{r['accuracy']:.1f}", f"{r['delay_s']:.1f}", f"{r['cost_usd']:.2f}",
         f"{r['failure_ratio']:.3%}", f"{r['decide_ms']['p50']:.2f}", f"{r['decide_ms']['p99']:.2f}")
        for name, r in sorted(results.items(), key=lambda item: -item[1]["reward"]["mean"])
    ]  # fmt: skip
    parts += _markdown(heads, rows)
    for name, curve in curves.items():
        parts += ["", f"## Fig. 7: training of `{name}` (sums over 100 held-out slots)", ""]
        shown = curve[:: max(1, len(curve) // 10)]
        shown += curve[-1:] if curve and shown[-1] is not curve[-1] else []
        points = [
            (f"{p['step']:,}", *(f"{100 * p[key]:.1f}" for key, _ in SUB_REWARDS), f"{p['failure_ratio']:.3%}")
            for p in shown
        ]
        parts += _markdown(("step", *(title for _, title in SUB_REWARDS), "failed"), points)
    for key, title in AGENT_FIGURES:
        parts += ["", f"## Fig. 10: {title} of each agent, per slot", ""]
        agents_rows = [(name, *(f"{value:.3f}" for value in r["agents"][key])) for name, r in results.items()]
        parts += _markdown(("policy", *(f"agent {n + 1}" for n in range(agents))), agents_rows)
    return "\n".join(parts) + "\n"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---", *(["---:"] * (len(heads) - 1))], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _training(results: dict[str, Any], curves: dict[str, list[dict[str, float]]]) -> go.Figure:
    figure = make_subplots(rows=2, cols=2, subplot_titles=[f"Fig. 7: {title}" for _, title in SUB_REWARDS])
    for n, (key, _) in enumerate(SUB_REWARDS):
        row, column = n // 2 + 1, n % 2 + 1
        for name, curve in curves.items():
            steps, values = [p["step"] for p in curve], [100 * p[key] for p in curve]
            line = {"color": f"hsl({80 * list(curves).index(name)},60%,45%)"}
            trace = go.Scatter(x=steps, y=values, name=name, legendgroup=name, showlegend=n == 0, line=line)
            figure.add_trace(trace, row, column)
        last = max((p["step"] for curve in curves.values() for p in curve), default=1)
        for name in ("heuristic", "convention", "sequential", "exact"):
            if name in results:
                level = results[name]["reward"]["mean"] if key == "reward" else results[name][key]
                trace = go.Scatter(
                    x=[0, last], y=[level, level], name=name, legendgroup=name, showlegend=n == 0, line={"dash": "dot"}
                )
                figure.add_trace(trace, row, column)
    figure.update_layout(title="Sums over 100 slots while training (environment steps)", height=800)
    return figure


def _bars(title: str, values: dict[str, float], unit: str) -> go.Figure:
    figure = go.Figure(go.Bar(x=list(values), y=list(values.values())))
    figure.update_layout(title=title, yaxis_title=unit, height=400)
    return figure


def _per_agent(results: dict[str, Any]) -> go.Figure:
    figure = make_subplots(rows=1, cols=3, subplot_titles=[f"Fig. 10: {title} per slot" for _, title in AGENT_FIGURES])
    shown = [name for name in ("hisper", "hisper-paper", "hasac", "heuristic") if name in results]
    for column, (key, _) in enumerate(AGENT_FIGURES, start=1):
        for name in shown:
            values = results[name]["agents"][key]
            bar = go.Bar(
                x=[f"agent {n + 1}" for n in range(len(values))], y=values, name=name, legendgroup=name,
                showlegend=column == 1, marker_color=f"hsl({80 * shown.index(name)},60%,45%)",
            )  # fmt: skip
            figure.add_trace(bar, 1, column)
    figure.update_layout(title="Sub-rewards of each agent (a lost request counts -100 accuracy)", height=450)
    return figure
