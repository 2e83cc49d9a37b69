"""`tidegate workload ...`: fit an arrival process to a trace and show how well it fits."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from loadgen.traces import TraceError, read_trace
from policies.routing.contract import RoutingError
from policies.routing.fit import Fit, Statistics, statistics
from policies.routing.fit import fit as fit_process
from policies.routing.workload import Arrivals

app = typer.Typer(no_args_is_help=True, help="Workloads: what a trace looks like and which process behaves like it.")
errors = Console(stderr=True)


@app.callback()
def _commands() -> None:
    """Keeps `fit` a sub-command."""


@app.command()
def fit(
    trace: Annotated[Path, typer.Argument(help="CSV: time_s, or count, or TIMESTAMP")],
    bin_s: Annotated[
        float | None, typer.Option(help="width of the counting bins (default: about four arrivals)")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="write a page that shows trace and fit")] = None,
    seed: Annotated[int, typer.Option(help="seed of the fitted process's sample")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Fit a two-phase Markovian arrival process and compare moments, autocorrelation and dispersion.

    Example: tidegate record -o monday.csv && tidegate workload fit monday.csv --plot fit.html
    """
    try:
        arrivals = read_trace(trace).arrivals
        with errors.status("fitting"):
            found = fit_process(arrivals, bin_s)
            sample = found.process.generate(np.random.default_rng(seed), duration_s=arrivals.end_s)
            seen, made = statistics(arrivals), statistics(sample)
    except (RoutingError, TraceError, ValueError) as error:
        errors.print(f"[red]error:[/red] {error}", highlight=False)
        raise typer.Exit(2) from error
    if plot is not None:
        _draw(plot, trace.name, arrivals, sample, found, seen, made)
    if json_output:
        about: dict[str, Any] = {"trace": str(trace), "requests": len(arrivals), "length_s": arrivals.end_s}
        process = {"rates": found.rates, "hold_s": found.hold_s, "bin_s": found.bin_s}
        matrices = {"d0": found.process.d0.tolist(), "d1": found.process.d1.tolist()}
        print(json.dumps({**about, **process, **matrices, "seen": asdict(seen), "fitted": asdict(made)}))
        return
    print(f"{trace}: {len(arrivals)} arrivals in {arrivals.end_s:.1f} s")
    for name, rate, hold_s in zip(("bursty", "normal"), found.rates, found.hold_s, strict=True):
        print(f"  {name:7s} {rate:10.3f} per second, for {hold_s:.2f} s on average")
    print(f"{'':42s}{'trace':>12s}{'fitted':>12s}")
    for label, a, b in _rows(seen, made):
        print(f"{label:42s}{a:12.3f}{b:12.3f}")


def _rows(seen: Statistics, made: Statistics) -> list[tuple[str, float, float]]:
    rows = [
        ("arrivals per second", seen.rate, made.rate),
        ("interarrival squared variation", seen.scv, made.scv),
        ("interarrival skewness", seen.skewness, made.skewness),
    ]
    for lag, a, b in zip((1, 2, 5, 10), seen.autocorrelation, made.autocorrelation, strict=True):
        rows.append((f"interarrival autocorrelation, lag {lag}", a, b))
    for window_s, a, b in zip(seen.windows_s, seen.dispersion, made.dispersion, strict=True):
        rows.append((f"dispersion of counts over {window_s:.3g} s", a, b))
    return rows


def _draw(
    path: Path, name: str, arrivals: Arrivals, sample: Arrivals, found: Fit, seen: Statistics, made: Statistics
) -> None:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, subplot_titles=("arrivals per second", "index of dispersion for counts"))
    width_s = max(arrivals.end_s / 500.0, found.bin_s)
    edges = np.arange(0.0, arrivals.end_s + width_s, width_s)
    for label, times in ((name, arrivals.time_s), ("a sample of the fit", sample.time_s)):
        counts = np.histogram(times, edges)[0] / width_s
        figure.add_trace(go.Scatter(x=edges[:-1].tolist(), y=counts.tolist(), name=label, mode="lines"), row=1, col=1)
    for label, s in ((name, seen), ("a sample of the fit", made)):
        figure.add_trace(go.Scatter(x=s.windows_s, y=s.dispersion, name=label, mode="lines+markers"), row=2, col=1)
    figure.update_xaxes(title_text="seconds", row=1, col=1)
    figure.update_xaxes(title_text="window, seconds", type="log", row=2, col=1)
    figure.update_yaxes(type="log", row=2, col=1)
    figure.write_html(path, include_plotlyjs=True)
