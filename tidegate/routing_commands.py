"""`tidegate routing ...`: score routers, train them, measure the simulator, and compute the limit."""

import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from loadgen.traces import TraceError, parse_workload
from policies.routing.contract import RoutingError

# The simulator needs numba, which serving machines do without: what needs it is imported by the commands that do.
if TYPE_CHECKING:
    from policies.routing.evaluate import Result
    from policies.routing.queueing_model import ArrivalModel, ServiceModel

app = typer.Typer(
    no_args_is_help=True,
    help="Routing (Tan): which instance answers a request.\n\n"
    "Start with: tidegate routing evaluate --policy deadline,threshold --slots 60000",
)
errors = Console(stderr=True)
WRONG = (RoutingError, TraceError, ValueError)

Workload = Annotated[
    str, typer.Option(help="paper, periodic, poisson:RATE, or a trace (CSV with time_s, optional phase)")
]
Seed = Annotated[int, typer.Option(help="seed of arrivals, service times and draws")]
Threads = Annotated[int, typer.Option(help="threads of the simulator")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]


def _fail(error: Exception) -> typer.Exit:
    errors.print(f"[red]error:[/red] {error}", highlight=False)
    return typer.Exit(2)


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


@app.command()
def evaluate(
    policy: Annotated[str, typer.Option(help="router names, a comma list, or all (Table 2 of the paper)")] = "all",
    workload: Workload = "paper",
    slots: Annotated[int, typer.Option(help="slots of 1 s (a trace is run to its end)")] = 600_000,
    seed: Seed = 1,
    requirement_ms: Annotated[float, typer.Option(help="latency requirement")] = 300.0,
    artifact: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH: use this trained policy instead of the pretrained one")
    ] = None,
    threads: Threads = 1,
    json_output: AsJson = False,
) -> None:
    """Score routers in the simulator: goodput, violations, heavy share, per phase of the workload."""
    from policies.routing.evaluate import LEARNED, ROUTERS, as_json, paper_evaluation

    try:
        arrivals = arrivals_of(workload)
        artifacts = {a.split("=", 1)[0]: Path(a.split("=", 1)[1]) for a in artifact or []}
        if policy == "all":
            names = [r for r in ROUTERS if r not in LEARNED or r in artifacts or _shipped(r, workload)]
        else:
            names = policy.split(",")
        for name in names:
            where = _shipped(name, workload)
            if name in LEARNED and name not in artifacts and where is not None:
                artifacts[name] = where
        with Progress(
            TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=errors, transient=True
        ) as bar:
            task = bar.add_task("compiling", total=len(names))

            def tell(router: str, share: float) -> None:
                bar.update(task, description=router, completed=names.index(router) + share)

            began = time.perf_counter()
            results = paper_evaluation(
                names, arrivals, slots=slots, seed=seed, requirement_s=requirement_ms / 1000.0, artifacts=artifacts,
                threads=threads, progress=tell,
            )  # fmt: skip
    except WRONG as error:
        raise _fail(error) from error
    if json_output:
        about = {"workload": workload, "slots": slots, "seed": seed, "seconds": round(time.perf_counter() - began, 1)}
        print(json.dumps(as_json(results, **about)))
        return
    print(f"{workload}, {slots} slots, seed {seed}; percent, the paper's figure in brackets")
    for line in score_lines(workload if requirement_ms == 300.0 else "", results):
        print(line)


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


def _shipped(router: str, workload: str) -> Path | None:
    """The pretrained artifact for a learned router on a workload, if there is one."""
    from policies.routing.artifact import PRETRAINED

    suffix = "-periodic" if workload == "periodic" else ""
    path = PRETRAINED / f"routing-{router}{suffix}.json"
    return path if path.exists() else None


def _cell(ratio: float, known: tuple[float | None, ...] | None, at: int) -> str:
    text = f"{100 * ratio:.2f}"
    if known is not None and at < len(known) and known[at] is not None:
        text += f" [{known[at]:g}]"
    return text


@app.command()
def bench(
    seconds: Annotated[float, typer.Option(help="CPU time per measurement")] = 2.0,
    json_output: AsJson = False,
) -> None:
    """Measure the simulator (arrivals per second of one core) and the cost of a routing decision in plain Python."""
    from policies.routing.benchmark import measure

    with errors.status("measuring"):
        found: dict[str, Any] = {"machine": platform.processor() or platform.machine(), **measure(seconds)}
    if json_output:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key:40s} {value:,.1f}" if isinstance(value, float) else f"{key:40s} {value}")


@app.command()
def limit(
    workload: Workload = "paper",
    duration_s: Annotated[float, typer.Option(help="length of the trace drawn from a process")] = 20_000.0,
    seed: Seed = 1,
    requirement_ms: Annotated[float, typer.Option(help="latency requirement")] = 300.0,
    json_output: AsJson = False,
) -> None:
    """The best goodput that any router can have: a fluid bound by rates, a clairvoyant bound on a trace."""
    from policies.routing.evaluate import phase_rates
    from policies.routing.limit import EXACT_LIMIT_REQUESTS, clairvoyant_limit, exact_limit, fluid_limit
    from policies.routing.presets import PAPER_KINDS

    try:
        arrivals = arrivals_of(workload)
        drawn = parse_workload(
            workload, seed=seed, duration_s=None if Path(workload).is_file() else duration_s
        ).arrivals
        if len(drawn) == 0:
            raise RoutingError("the trace has no arrivals: give a longer --duration-s")
        fluid = fluid_limit(PAPER_KINDS, phase_rates(arrivals))
        bound, gain = clairvoyant_limit(drawn.time_s, PAPER_KINDS, requirement_ms / 1000.0)
        found: dict[str, Any] = {
            "workload": workload,
            "requests": len(drawn),
            "fluid": dict(zip(arrivals.phase_names, fluid, strict=True)),
            "fluid_mean_of_phases": float(np.mean(fluid)),
            "clairvoyant": bound,
        }
        if drawn.phase is not None:
            each = {name: float(gain[drawn.phase == h].mean()) for h, name in enumerate(drawn.phase_names)}
            found["clairvoyant_by_phase"] = each
            found["clairvoyant_50_50"] = float(np.mean(list(each.values())))
        if len(drawn) <= EXACT_LIMIT_REQUESTS:
            found["exact"] = exact_limit(drawn.time_s, PAPER_KINDS, requirement_ms / 1000.0)
    except WRONG as error:
        raise _fail(error) from error
    if json_output:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key:24s} {value}")


@app.command()
def train(
    policy: Annotated[str, typer.Option(help="learned-po, learned-fo, learned-po-batch or learned-fo-batch")],
    out: Annotated[Path, typer.Option(help="folder for checkpoint, curve, TensorBoard files and the artifact")],
    preset: Annotated[str, typer.Option(help="paper (250 million slots) or quick")] = "quick",
    workload: Annotated[str, typer.Option(help="paper or periodic")] = "paper",
    slots: Annotated[int | None, typer.Option(help="length of the run instead of the preset's")] = None,
    requirement_ms: Annotated[float, typer.Option(help="latency requirement")] = 300.0,
    seed: Seed = 1,
    threads: Threads = 2,
    resume: Annotated[bool, typer.Option(help="go on from the checkpoint in --out")] = False,
) -> None:
    """Learn a router on the paper's service (needs the `train` extra); Ctrl-C keeps the last checkpoint."""
    from policies.routing.train import main

    arguments = [
        "--policy", policy, "--out", str(out), "--preset", preset, "--workload", workload, "--seed", str(seed),
        "--threads", str(threads), "--requirement-ms", str(requirement_ms),
    ]  # fmt: skip
    if slots is not None:
        arguments += ["--slots", str(slots)]
    if resume:
        arguments.append("--resume")
    try:
        status = main(arguments)
    except WRONG as error:
        raise _fail(error) from error
    raise typer.Exit(status)


@app.command()
def learn(
    out: Annotated[Path, typer.Option(help="folder for the artifact and ranking.json")],
    workload: Workload = "paper",
    minutes: Annotated[float, typer.Option(help="time for training")] = 6.0,
    profile: Annotated[
        Path | None, typer.Option(help="profile file (tidegate models profile) instead of the paper's service")
    ] = None,
    instances: Annotated[str, typer.Option(help="with --profile: VARIANT=COUNT,..., heaviest variant first")] = "",
    requirement_ms: Annotated[float, typer.Option(help="latency requirement")] = 300.0,
    seed: Seed = 1,
    threads: Threads = 2,
    json_output: AsJson = False,
) -> None:
    """Train a router for this workload, score it against every rule, and name the winner."""
    from policies.routing.learn import learn as learn_router

    try:
        service = _service(profile, instances, requirement_ms / 1000.0)
        with Progress(
            TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=errors, transient=True
        ) as bar:
            task = bar.add_task("preparing", total=1.0)

            def tell(what: str, share: float) -> None:
                bar.update(task, description=what, completed=share)

            found = learn_router(
                service, arrivals_of(workload), out, minutes=minutes, seed=seed, threads=threads, report=tell
            )
    except WRONG as error:
        raise _fail(error) from error
    if json_output:
        print((out / "ranking.json").read_text())
        return
    print(f"winner: {found.winner} (trained {found.slots / 1e6:.2f} M slots; all scores in {out / 'ranking.json'})")
    for line in score_lines("", {r.router: r for r in found.results}):
        print(line)


@app.command()
def advise(
    workload: Workload = "paper",
    profile: Annotated[
        Path | None, typer.Option(help="profile file (tidegate models profile) instead of the paper's service")
    ] = None,
    instances: Annotated[str, typer.Option(help="with --profile: VARIANT=COUNT,..., heaviest variant first")] = "",
    requirement_ms: Annotated[float, typer.Option(help="latency requirement")] = 300.0,
    promise: Annotated[float, typer.Option(help="share of violations that is promised")] = 0.02,
    router: Annotated[str, typer.Option(help="router to simulate")] = "deadline",
    slots: Annotated[int, typer.Option(help="slots per simulation")] = 20_000,
    seed: Seed = 1,
    json_output: AsJson = False,
) -> None:
    """Whether a deployment will keep its promise, at what load it breaks, and what would change that."""
    from policies.routing.advise import advise as advise_on

    try:
        service = _service(profile, instances, requirement_ms / 1000.0)
        with errors.status("simulating"):
            found = advise_on(service, arrivals_of(workload), promise=promise, router=router, slots=slots, seed=seed)
    except WRONG as error:
        raise _fail(error) from error
    if json_output:
        changes = [{"what": c.what, "breaks_at": c.breaks_at, **c.now.as_dict()} for c in found.changes]
        print(json.dumps({"keeps": found.keeps, "promise": promise, "changes": changes}))
        return
    verdict = "keeps" if found.keeps else "breaks"
    print(f"{router} on {workload}: {verdict} its promise of at most {100 * promise:g}% violations")
    print(f"{'deployment':48s}{'goodput':>9s}{'violations':>12s}   breaks at")
    for c in found.changes:
        goodput, violations = 100 * c.now.goodput_ratio, 100 * c.now.violation_ratio
        print(f"{c.what:48s}{goodput:8.2f}%{violations:11.3f}%   {c.breaks_at:.2f} x today's rates")


def _service(profile: Path | None, instances: str, requirement_s: float) -> "ServiceModel":
    """The paper's service, or one of profiled variants with their quantile grids."""
    from policies.routing.contract import BATCH_SIZES, InstanceKind
    from policies.routing.presets import paper_service
    from policies.routing.queueing_model import ServiceModel

    if profile is None:
        return paper_service(requirement_s)
    from models.profiles import read_profiles

    known = {p.variant: p for p in read_profiles(profile)}
    kinds, grids = [], []
    for rank, part in enumerate(instances.split(",")):
        name, _, count = part.partition("=")
        if name not in known or not count.isdigit() or int(count) < 1:
            raise RoutingError(f"instances = {instances!r}: write VARIANT=COUNT,... with variants of {sorted(known)}")
        found = known[name]
        largest = found.times[-1].batch_size
        grid = np.stack([found.grid_s(min(b, largest)) for b in BATCH_SIZES])
        accuracy = found.accuracy.value
        if accuracy is None:
            raise RoutingError(f"profile of {name} has no accuracy: routing needs one to weigh variants")
        kinds += [InstanceKind(name, rank, float(grid[0].mean()), float(accuracy))] * int(count)
        grids += [grid] * int(count)
    return ServiceModel(tuple(kinds), requirement_s=requirement_s, law="empirical", quantiles_s=np.stack(grids))


@app.command()
def robustness(
    slots: Annotated[int, typer.Option(help="slots per setting")] = 100_000,
    seed: Seed = 1,
    json_output: AsJson = False,
) -> None:
    """How `deadline` holds with random service times, several gateways with stale views, and drift."""
    from policies.routing import robustness as measure

    rows: list[dict[str, Any]] = []
    with errors.status("simulating"):
        for law in ("gamma", "lognormal"):
            for cv in (0.0, 0.1, 0.3, 0.5, 1.0):
                r = measure.variable_service(law, cv, slots=slots, seed=seed)
                best = None if r.best is None else r.best.goodput_ratio
                about = {"law": law, "cv": cv, "gateways": 1, "best_margin": r.best_margin, "best_goodput": best}
                rows.append({**about, **r.learned.as_dict()})
        for cv in (0.0, 0.3, 0.5, 1.0):
            for gateways in (2, 4, 8):
                for bounce in (False, True):
                    r = measure.several_gateways(cv, gateways, bounce, slots=slots, seed=seed)
                    about = {"law": "gamma", "cv": cv, "gateways": gateways, "bounce": bounce}
                    rows.append({**about, **r.learned.as_dict()})
        drift = {str(cv): measure.recovery(cv, seed=seed) for cv in (0.0, 0.3)}
    if json_output:
        print(json.dumps({"rows": rows, "recovery": drift}))
        return
    print(f"{'law':10s}{'cv':>5s}{'gateways':>10s}{'bounce':>8s}{'goodput':>9s}{'violations':>12s}   best fixed margin")
    for row in rows:
        line = f"{row['law']:10s}{row['cv']:5.1f}{row['gateways']:10d}{'yes' if row.get('bounce') else 'no':>8s}"
        line += f"{100 * row['goodput_ratio']:9.2f}{100 * row['violation_ratio']:12.3f}"
        if row.get("best_margin") is not None:
            line += f"   {100 * row['best_goodput']:.2f} at {row['best_margin']}"
        print(line)
    for variation, points in drift.items():
        text = ", ".join(f"{t:.0f} s: {100 * v:.2f}%" for t, v in points)
        print(f"heavy service 1.5 times as slow, cv {variation}: violations by time since: {text}")
