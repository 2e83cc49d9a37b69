"""`tidegate routing figures ...`: Tan's figures, each a table on the terminal and an HTML page (plotly)."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.routing_inputs import WRONG, AsJson, Seed, errors, fail, progress_bar

if TYPE_CHECKING:
    import plotly.graph_objects as go

app = typer.Typer(
    no_args_is_help=True,
    help="Tan's figures from trained policies and their learning curves: a table here, a page with --out FILE.html.",
)

Out = Annotated[Path | None, typer.Option(help="write the figure to this HTML file (plotly.min.js beside it)")]

CURVES = {
    "Fig. 2: main workload": ("learned-po", "learned-fo"),
    "Fig. 4: adaptive batching": ("learned-po-batch", "learned-fo-batch"),
    "Fig. 6: periodic workload": ("learned-po-periodic", "learned-fo-periodic"),
}
"""Shipped learning curves by the paper's figure."""
SHOWN = (("goodput_ratio", "goodput, %"), ("violation_ratio", "violations, %"), ("heavy_ratio", "heavy, %"))
PHASES = (("overall_50_50", "solid"), ("bursty", "dot"), ("normal", "dash"))
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf")


@app.command()
def curves(out: Out = None, json_output: AsJson = False) -> None:
    """Figs. 2, 4 and 6: scores without noise during the trainings of the shipped policies."""
    from policies.routing.artifact import PRETRAINED

    found: dict[str, list[dict[str, Any]]] = {}
    for names in CURVES.values():
        for name in names:
            path = PRETRAINED / f"routing-{name}-curve.json"
            if path.exists():
                found[name] = json.loads(path.read_text())
    if json_output:
        print(json.dumps(found))
    else:
        _print_curves(found)
    if out is not None:
        _write(out, "Learning curves", _curve_figures(found))


@app.command()
def negative(
    results: Annotated[Path, typer.Option(help="JSON of python -m policies.routing.negative_results")] = Path(
        "policies/pretrained/negative-results.json"
    ),
    out: Out = None,
    json_output: AsJson = False,
) -> None:
    """Section 4's negative results: learning curves of a recurrent policy and a deterministic gradient beside PPO's."""
    try:
        found = json.loads(results.read_text())
    except (OSError, ValueError) as error:
        raise fail(
            ValueError(f"{results}: {error}; make it with python -m policies.routing.negative_results")
        ) from error
    if json_output:
        print(json.dumps(found))
    else:
        _print_curves(found)
    if out is not None:
        _write(out, "Negative results", [_curve_figure("learned-po's task, by algorithm", found)])


@app.command()
def latencies(
    slots: Annotated[int, typer.Option(help="slots of 1 s per point")] = 100_000,
    seed: Seed = 1,
    routers: Annotated[str, typer.Option(help="router names, a comma list")] = "",
    out: Out = None,
    json_output: AsJson = False,
) -> None:
    """Fig. 3: goodput and violations (50:50) for required latencies of 150 to 450 ms."""
    from policies.routing.latency_sweep import SWEPT, SWEPT_MS, sweep

    names = tuple(routers.split(",")) if routers else SWEPT
    try:
        with progress_bar() as bar:
            task = bar.add_task("compiling", total=1.0)
            points = sweep(
                names, SWEPT_MS, slots=slots, seed=seed,
                progress=lambda what, share: bar.update(task, description=what, completed=share),
            )  # fmt: skip
    except WRONG as error:
        raise fail(error) from error
    if json_output:
        rows = [
            {
                "router": p.router,
                "requirement_ms": p.requirement_ms,
                "scores": {k: s.as_dict() for k, s in p.scores.items()},
            }
            for p in points
        ]
        print(json.dumps({"slots": slots, "seed": seed, "points": rows}))
    else:
        print("goodput (violations), percent, 50:50, by required latency in ms")
        print(f"{'router':16s}" + "".join(f"{ms:>16d}" for ms in SWEPT_MS))
        for name in names:
            even = {p.requirement_ms: p.scores["overall_50_50"] for p in points if p.router == name}
            cells = {ms: f"{100 * s.goodput_ratio:.2f} ({100 * s.violation_ratio:.2f})" for ms, s in even.items()}
            print(f"{name:16s}" + "".join(f"{cells.get(ms, 'not trained'):>16s}" for ms in SWEPT_MS))
    if out is not None:
        by_name = {
            name: [(p.requirement_ms, p.scores["overall_50_50"].as_dict()) for p in points if p.router == name]
            for name in names
        }
        _write(out, "Required latencies", [_lines("Fig. 3", "required latency, ms", by_name, ("overall_50_50",))])


@app.command()
def batches(
    policy: Annotated[str, typer.Option(help="a learned router with batching, or the path of its artifact")] = (
        "learned-po-batch"
    ),
    slots: Annotated[int, typer.Option(help="slots of 1 s")] = 100_000,
    seed: Seed = 1,
    out: Out = None,
    json_output: AsJson = False,
) -> None:
    """Fig. 5: the batch limits that a trained policy chooses, per model and phase, and how they came about."""
    from policies.routing.artifact import PRETRAINED
    from policies.routing.batch_choices import batch_choices
    from policies.routing.learned import PAIRS, load_policy
    from policies.routing.presets import paper_service
    from policies.routing.queueing_model import paper_arrivals

    try:
        arrivals = paper_arrivals()
        with errors.status("simulating"):
            shares = batch_choices(load_policy(policy), paper_service(), arrivals, slots=slots, seed=seed)
    except WRONG as error:
        raise fail(error) from error
    models = ("heavy", "light")[: shares.shape[1]]
    named = {
        f"{model}, {phase}": {f"{low} to {high}": float(shares[h, v, k]) for k, (low, high) in enumerate(PAIRS)}
        for v, model in enumerate(models)
        for h, phase in enumerate(arrivals.phase_names)
    }
    if json_output:
        print(json.dumps({"policy": policy, "slots": slots, "seed": seed, "shares": named}))
    else:
        print("share of slots, percent, by (minimum to maximum) batch size")
        print(f"{'model, phase':16s}" + "".join(f"{low} to {high}".rjust(9) for low, high in PAIRS))
        for name, row in named.items():
            print(f"{name:16s}" + "".join(f"{100 * share:9.1f}" for share in row.values()))
    if out is not None:
        curve = PRETRAINED / f"routing-{policy}-curve.json"
        points = json.loads(curve.read_text()) if curve.exists() else []
        _write(out, "Batch sizes", _batch_figures(named, [p for p in points if "batch_limits" in p], models))


@app.command()
def draws(
    seconds: Annotated[float, typer.Option(help="CPU time per measurement")] = 0.5,
    out: Out = None,
    json_output: AsJson = False,
) -> None:
    """The cost of drawing an instance from a table, by bisection and by the alias method, for 4 to 256 instances."""
    import plotly.graph_objects as go

    from policies.routing.benchmark import draw_costs

    with errors.status("measuring"):
        found = draw_costs(seconds)
    if json_output:
        print(json.dumps(found))
    else:
        for method, costs in found.items():
            print(f"{method:12s}" + "".join(f"  {n} instances: {ns:.0f} ns" for n, ns in costs.items()))
    if out is not None:
        figure = go.Figure([go.Scatter(x=list(c), y=list(c.values()), name=m) for m, c in found.items()])
        figure.update_layout(xaxis_type="log", xaxis_title="instances", yaxis_title="ns per draw")
        _write(out, "Cost of a draw", [figure])


def _print_curves(found: dict[str, list[dict[str, Any]]]) -> None:
    """At slots 1, 2, 4, 8, ... million and at the end: goodput, violations, heavy shares."""
    print(f"{'':22s}{'slots':>10s}{'goodput':>9s}{'violations':>12s}{'bursty heavy':>14s}{'normal heavy':>14s}")
    for name, points in found.items():
        wanted = [p for k, p in enumerate(points) if k == len(points) - 1 or (k + 1) & k == 0]
        for p in wanted:
            even, s = p["scores"]["overall_50_50"], p["scores"]
            print(
                f"{name:22s}{p['slots'] / 1e6:8.2f} M{100 * even['goodput_ratio']:9.2f}"
                f"{100 * even['violation_ratio']:12.2f}{100 * s['bursty']['heavy_ratio']:14.1f}"
                f"{100 * s['normal']['heavy_ratio']:14.1f}"
            )


def _curve_figures(found: dict[str, list[dict[str, Any]]]) -> "list[go.Figure]":
    return [
        _curve_figure(title, {n: found[n] for n in names if n in found})
        for title, names in CURVES.items()
        if any(n in found for n in names)
    ]


def _curve_figure(title: str, found: dict[str, list[dict[str, Any]]]) -> "go.Figure":
    by_name = {n: [(p["slots"], p["scores"]) for p in points] for n, points in found.items()}
    return _lines(title, "slots", by_name, tuple(phase for phase, _ in PHASES))


def _lines(title: str, x: str, by_name: dict[str, list[tuple[int, Any]]], phases: tuple[str, ...]) -> "go.Figure":
    """Goodput, violations and heavy share side by side; scores are per phase, or those of the one phase."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=len(SHOWN), subplot_titles=[label for _, label in SHOWN])
    dashes = dict(PHASES)
    for column, (key, _) in enumerate(SHOWN, start=1):
        for colour, (name, points) in zip(COLOURS, by_name.items(), strict=False):
            for phase in phases:
                values = [100 * (s[phase] if len(phases) > 1 else s)[key] for _, s in points]
                line = go.Scatter(
                    x=[at for at, _ in points], y=values, name=f"{name} {phase}" if len(phases) > 1 else name,
                    legendgroup=f"{name}{phase}", showlegend=column == 1,
                    line={"color": colour, "dash": dashes[phase]},
                )  # fmt: skip
                figure.add_trace(line, 1, column)
        figure.update_xaxes(title_text=x, row=1, col=column)
    figure.update_layout(title=title, height=450)
    return figure


def _batch_figures(
    shares: dict[str, dict[str, float]], points: list[dict[str, Any]], models: tuple[str, ...]
) -> "list[go.Figure]":
    import plotly.graph_objects as go

    chosen = go.Figure([go.Bar(x=list(row), y=list(row.values()), name=name) for name, row in shares.items()])
    chosen.update_layout(title="Fig. 5 c, f: batch limits chosen", yaxis_title="share of slots", height=400)
    if not points:
        return [chosen]
    slots = [p["slots"] for p in points]
    course = go.Figure(
        [
            go.Scatter(x=slots, y=[p["batch_limits"][v][k] for p in points], name=f"{model}, {kind}")
            for v, model in enumerate(models)
            for k, kind in enumerate(("minimum", "maximum"))
        ]
    )
    course.update_layout(title="Fig. 5 a, b, d, e: mean batch limits while training", xaxis_title="slots", height=400)
    return [chosen, course]


def _write(out: Path, title: str, figures: "list[go.Figure]") -> None:
    """One page with these figures; plotly's script goes beside it."""
    from plotly.offline import get_plotlyjs

    out.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        f.to_html(full_html=False, include_plotlyjs="directory" if k == 0 else False) for k, f in enumerate(figures)
    ]
    out.write_text(f"<!doctype html><meta charset=utf-8><title>{title}</title>\n" + "\n".join(parts))
    (out.parent / "plotly.min.js").write_text(get_plotlyjs())
    errors.print(f"wrote {out}", highlight=False)
