"""What the routing commands take and say alike: options, workloads and profiles behind their names, errors, scores."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from loadgen.traces import TraceError, parse_workload
from policies.routing.contract import RoutingError
from protocol.records import InstanceSpec
from tidegate.deployed_service import service_model

# The simulator needs numba, which serving machines do without: what needs it is imported by the functions that do.
if TYPE_CHECKING:
    from policies.routing.evaluate import Result
    from policies.routing.queueing_model import ArrivalModel, ServiceModel

errors = Console(stderr=True)
WRONG = (RoutingError, TraceError, ValueError)

Workload = Annotated[
    str, typer.Option(help="paper, periodic, poisson:RATE, or a trace (CSV with time_s, optional phase)")
]
Seed = Annotated[int, typer.Option(help="seed of arrivals, service times and draws")]
Threads = Annotated[int, typer.Option(help="threads of the simulator")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]
ProfileFile = Annotated[
    Path | None, typer.Option("--profile", help="profile file (tidegate models profile) instead of the paper's service")
]
Instances = Annotated[str, typer.Option(help="with --profile: VARIANT=COUNT,..., heaviest variant first")]
DEFAULT_CAPACITY = InstanceSpec(variant="").capacity
RequirementMs = Annotated[float, typer.Option(help="latency requirement")]


def fail(error: Exception) -> typer.Exit:
    """Says the error on stderr; gives back what to raise."""
    errors.print(f"[red]error:[/red] {error}", highlight=False)
    return typer.Exit(2)


def progress_bar() -> Progress:
    """A bar with what is being done and the time left, on stderr."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=errors, transient=True
    )


def arrivals_of(workload: str) -> "ArrivalModel":
    """The simulator's arrivals behind a workload's name or trace file."""
    from policies.routing.queueing_model import markovian, paper_arrivals, periodic_arrivals, trace_arrivals

    if workload == "paper":
        return paper_arrivals()
    if workload == "periodic":
        return periodic_arrivals()
    if workload.startswith("poisson:"):
        rate = float(workload.split(":", 1)[1])
        return markovian(np.array([[-rate]]), np.array([[rate]]), ("steady",))
    drawn = parse_workload(workload).arrivals
    if drawn.phase is None:
        return trace_arrivals(drawn.time_s)
    return trace_arrivals(drawn.time_s, drawn.phase.astype(np.int64), drawn.phase_names)


def service_of(profile: Path | None, instances: str, requirement_s: float) -> "ServiceModel":
    """The paper's service, or one of profiled variants with their quantile grids."""
    from policies.routing.presets import paper_service

    if profile is None:
        return paper_service(requirement_s)
    from models.profiles import read_profiles

    known = {p.variant: p for p in read_profiles(profile)}
    chosen = []
    for rank, part in enumerate(instances.split(",")):
        name, _, count = part.partition("=")
        if name not in known or not count.isdigit() or int(count) < 1:
            raise RoutingError(f"instances = {instances!r}: write VARIANT=COUNT,... with variants of {sorted(known)}")
        chosen += [(known[name], rank, DEFAULT_CAPACITY)] * int(count)
    return service_model(chosen, requirement_s)


def score_lines(workload: str, results: "dict[str, Result]") -> list[str]:
    """Two lines of headings and one per router: goodput and violations 50:50, then each phase."""
    from policies.routing.evaluate import PAPER_TABLE_2

    phases = [p for p in next(iter(results.values())).scores if not p.startswith("overall")]
    heads = ["goodput", "violations", *["goodput", "violations", "rejected", "delayed", "heavy"] * len(phases)]
    widths = [15, 15, *[15, 15, 8, 8, 14] * len(phases)]
    groups = f"{'':20s}{'50:50':30s}" + "".join(f"{p:60s}" for p in phases)
    lines = [groups.rstrip(), f"{'':20s}" + "".join(f"{h:{w}s}" for h, w in zip(heads, widths, strict=True))]
    for name, result in results.items():
        known = PAPER_TABLE_2.get((workload, name))
        even = result.scores["overall_50_50"]
        cells = [_cell(even.goodput_ratio, known, 0), _cell(even.violation_ratio, known, 1)]
        for at, phase in enumerate(phases):
            s = result.scores[phase]
            first = 2 + 3 * at
            cells += [_cell(s.goodput_ratio, known, first), _cell(s.violation_ratio, known, first + 1)]
            cells += [_cell(s.rejection_ratio, None, 0), _cell(s.delay_ratio, None, 0)]
            cells.append(_cell(s.heavy_ratio, known, first + 2))
        lines.append(f"{name:20s}" + "".join(f"{c:{w}s}" for c, w in zip(cells, widths, strict=True)).rstrip())
    return lines


def _cell(ratio: float, known: tuple[float | None, ...] | None, at: int) -> str:
    text = f"{100 * ratio:.2f}"
    if known is not None and at < len(known) and known[at] is not None:
        text += f" [{known[at]:g}]"
    return text
