"""`tidegate placement ...`: evaluate, train and time placement policies, and draw the paper's figures."""

import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from policies.placement.actors import PRETRAINED
from policies.placement.contract import ALL, LEARNED, RULES, ArtifactError, PlacementPolicy
from policies.placement.deployed import experiment
from policies.placement.edge_network import EdgeNetwork, PlacementError
from policies.placement.evaluate import Optima, build_policy, evaluate_policy, evaluation_slots
from policies.placement.graph import GraphError, named_graph
from policies.placement.tables import TableError, read_table
from policies.placement.workload import Load, draw_slots

app = typer.Typer(
    no_args_is_help=True,
    help="Placement (Huang): which configuration, variant and node serve each request of a window.\n\n"
    "Start with: tidegate placement evaluate --policy all --agents 8 --slots 20 --seeds 1",
)
errors = Console(stderr=True)
OPTIMA = Path("results/placement_optima.json")
WRONG = (GraphError, TableError, PlacementError, ArtifactError, ValueError)

Graph = Annotated[
    str,
    typer.Option(
        help="eua16[-bandwidths]:SEED, geometric:SEED, FILE.csv:SEED in the EUA format, or a deployment's FILE.toml"
    ),
]
Tables = Annotated[list[Path] | None, typer.Option("--table", help="service tables instead of the shipped two")]


def _network(graph: str, tables: list[Path] | None) -> EdgeNetwork:
    return EdgeNetwork(named_graph(graph), [read_table(path) for path in tables]) if tables else experiment(graph, 1)[0]


def _fail(error: Exception) -> typer.Exit:
    errors.print(f"[red]error:[/red] {error}", highlight=False)
    return typer.Exit(2)


def _policies(names: list[str], network: EdgeNetwork, load: Load, lenient: bool) -> list[PlacementPolicy]:
    """The named policies; if `lenient`, those without a fitting artifact are left out with a word."""
    policies = []
    for name in names:
        try:
            policies.append(build_policy(name, network, load))
        except ArtifactError as error:
            if not lenient:
                raise
            errors.print(f"[yellow]left out:[/yellow] {name}: {error}", highlight=False)
    return policies


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=errors, transient=True)


@app.command()
def evaluate(
    policy: Annotated[str, typer.Option(help=f"{', '.join(ALL)}, a comma list, all, or an artifact's path")] = "all",
    agents: Annotated[int, typer.Option(help="requests per slot over all services (8 or 10 in the paper)")] = 8,
    slots: Annotated[int, typer.Option(help="slots per seed")] = 100,
    seeds: Annotated[int, typer.Option(help="seeds, each with slots of its own")] = 10,
    graph: Graph = "eua16",
    table: Tables = None,
    json_output: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    gap: Annotated[bool, typer.Option(help="solve every slot exactly and report the gap to the optimum")] = True,
    exact_limit_s: Annotated[float, typer.Option(help="time limit of the exact solver per slot")] = 60.0,
    cache: Annotated[Path, typer.Option(help="where exact optima are remembered")] = Path(
        "results/placement_optima.json"
    ),
    mixed: Annotated[bool, typer.Option(help="requests of the services arrive in mixed order")] = False,
    present: Annotated[float, typer.Option(help="probability that a request position is taken")] = 1.0,
) -> None:
    """Score policies on the same slots: sums over the slots of a seed, means over seeds."""
    try:
        network = _network(graph, table)
        services = len(network.tables)
        if agents < services or agents % services:
            raise ValueError(f"--agents is {agents}; it must be a multiple of the {services} services")
        load = replace(experiment(graph, agents // services)[1], mixed=mixed, present=present)
        policies = _policies(list(ALL) if policy == "all" else policy.split(","), network, load, policy == "all")
        batches = evaluation_slots(network, load, slots, seeds)
        optima = None
        proved = None
        with _progress() as progress:
            if gap:
                task = progress.add_task("exact optimum", total=slots * seeds)
                store = Optima(network, cache, exact_limit_s)
                store.open()
                solved = np.stack([store.rewards(batch, lambda: progress.advance(task)) for batch in batches])
                optima, bounds = solved[..., 0], solved[..., 1]
                proved = float(np.mean(bounds - optima <= 1e-4))
            results: dict[str, Any] = {}
            task = progress.add_task("policies", total=len(policies))
            for one in policies:
                progress.update(task, description=one.name)
                results[one.name] = evaluate_policy(network, one, batches, optima)
                progress.advance(task)
    except WRONG as error:
        raise _fail(error) from error
    setting = {
        "graph": graph,
        "agents": agents,
        "slots": slots,
        "seeds": seeds,
        "optima_proved": proved,
        "mean_bound_excess": float(np.mean(bounds - optima)) if optima is not None else None,
        "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if json_output:
        typer.echo(json.dumps({"results": results, "setting": setting}, indent=1))
        return
    _show(results, setting)


def _show(results: dict[str, Any], setting: dict[str, Any]) -> None:
    shown = Table(title=f"{setting['agents']} agents on {setting['graph']}: sums over {setting['slots']} slots")
    for column in (
        "policy",
        "reward",
        "std",
        "accuracy",
        "delay s",
        "cost USD",
        "failed",
        "ms p50",
        "ms p99",
        "gap/slot",
    ):
        shown.add_column(column, justify="left" if column == "policy" else "right")
    for name, r in sorted(results.items(), key=lambda item: -item[1]["reward"]["mean"]):
        shown.add_row(
            name,
            f"{r['reward']['mean']:.1f}",
            f"{r['reward']['std']:.1f}",
            f"{r['accuracy']:.1f}",
            f"{r['delay_s']:.1f}",
            f"{r['cost_usd']:.2f}",
            f"{r['failure_ratio']:.3%}",
            f"{r['decide_ms']['p50']:.2f}",
            f"{r['decide_ms']['p99']:.2f}",
            "-" if r["gap_per_slot"] is None else f"{r['gap_per_slot']:.4f}",
        )
    Console().print(shown)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="the run's folder: artifact, curve, checkpoint, TensorBoard events")],
    preset: Annotated[str, typer.Option(help="hisper, hisper-sequential, hisper-paper, hasac, happo, ...")] = "hisper",
    override: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, repeatable")] = None,
    resume: Annotated[bool, typer.Option(help="go on from the folder's checkpoint")] = False,
    threads: Annotated[int, typer.Option(help="torch threads")] = 1,
) -> None:
    """Train a policy: progress with time left on stderr, Ctrl-C keeps the last checkpoint."""
    try:
        import torch

        from policies.placement.train import preset as find_preset
        from policies.placement.train import train as run_training
        from policies.placement.training import with_overrides
    except ImportError as error:
        raise _fail(ImportError(f"{error}; training needs the extra: pip install -e '.[train]'")) from error
    torch.set_num_threads(threads)
    try:
        for item in override or []:
            if "=" not in item:
                raise ValueError(f"--set {item!r} is not KEY=VALUE")
        settings = with_overrides(find_preset(preset), dict(item.split("=", 1) for item in override or []))
        run_training(settings, out, resume)
    except (*WRONG, FileNotFoundError) as error:
        raise _fail(error) from error
    except KeyboardInterrupt:
        errors.print(f"stopped; go on with: tidegate placement train --preset {preset} --out {out} --resume")
        raise typer.Exit(130) from None
    typer.echo(f"{out}/actors.safetensors; score it with: tidegate placement evaluate --policy {out}/actors")


@app.command()
def bench(
    agents: Annotated[int, typer.Option(help="requests per slot over all services")] = 8,
    slots: Annotated[int, typer.Option(help="slots that every decider is timed on")] = 100,
    graph: Graph = "eua16",
    policy: Annotated[str, typer.Option(help="a comma list, or all")] = "all",
    json_output: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Time the environment (slots per second on one core) and one decision of every policy."""
    try:
        network = _network(graph, None)
        load = experiment(graph, agents // len(network.tables))[1]
        figures: dict[str, Any] = {"environment_slots_per_s": {}}
        rng = np.random.default_rng(0)
        rule = build_policy("random", network, load)
        for count in (20, 1000):
            done, began = 0, time.perf_counter()
            while time.perf_counter() - began < 1.0:
                drawn = draw_slots(network, load, count, rng)
                network.evaluate(drawn, rule.decide(drawn, rng))
                done += count
            figures["environment_slots_per_s"][str(count)] = done / (time.perf_counter() - began)
        drawn = draw_slots(network, load, slots, rng)
        figures["decide_ms"] = {}
        with _progress() as progress:
            names = list(ALL) if policy == "all" else policy.split(",")
            task = progress.add_task("policies", total=len(names) * slots)
            for name in names:
                progress.update(task, description=name)
                decider = build_policy(name, network, load)
                spent = []
                for e in range(slots):
                    began = time.perf_counter()
                    decider.decide(drawn.take(slice(e, e + 1)), rng)
                    spent.append((time.perf_counter() - began) * 1e3)
                    progress.advance(task)
                quantiles = np.quantile(spent, [0.5, 0.99, 1.0])
                figures["decide_ms"][name] = dict(zip(("p50", "p99", "max"), map(float, quantiles), strict=True))
    except WRONG as error:
        raise _fail(error) from error
    if json_output:
        typer.echo(json.dumps(figures, indent=1))
        return
    for count, speed in figures["environment_slots_per_s"].items():
        typer.echo(f"environment, {count} at once, {agents} agents: {speed:,.0f} slots/s (drawn, decided and scored)")
    for name, times in figures["decide_ms"].items():
        typer.echo(f"{name:<20} {times['p50']:8.2f} ms median {times['p99']:8.2f} ms p99 {times['max']:8.2f} ms max")


@app.command()
def figures(
    results: Annotated[Path | None, typer.Argument(help="a file of `evaluate --json`; without one, evaluates")] = None,
    agents: Annotated[int, typer.Option(help="requests per slot, where it evaluates")] = 8,
    slots: Annotated[int, typer.Option(help="slots per seed, where it evaluates")] = 100,
    seeds: Annotated[int, typer.Option(help="seeds, where it evaluates")] = 10,
    out: Annotated[Path, typer.Option(help="folder for the page and its plotly.min.js")] = Path("results/figures"),
    artifacts: Annotated[Path, typer.Option(help="artifacts whose training curves are drawn")] = PRETRAINED
    / "placement",
) -> None:
    """Draw Huang's Figs. 7 to 10 (training curves, failures, execution time, per-agent sub-rewards) as page and tables.

    Without a file it evaluates every policy but the exact solvers first: tidegate placement figures --agents 8
    """
    from tidegate.placement_figures import write_figures

    if results is not None:
        try:
            text = json.loads(results.read_text())
            path = write_figures(text["results"], int(text["setting"]["agents"]), artifacts, out)
        except (OSError, ValueError, KeyError) as error:
            message = f"{results}: not what `tidegate placement evaluate --json` writes: {error}"
            raise _fail(ValueError(message)) from error
    else:
        try:
            network = _network("eua16", None)
            load = Load(per_service=agents // len(network.tables))
            batches, found = evaluation_slots(network, load, slots, seeds), {}
            policies = _policies([*RULES, *LEARNED], network, load, lenient=True)
            with _progress() as progress:
                task = progress.add_task("policies", total=len(policies))
                for one in policies:
                    progress.update(task, description=one.name)
                    found[one.name] = evaluate_policy(network, one, batches)
                    progress.advance(task)
        except WRONG as error:
            raise _fail(error) from error
        path = write_figures(found, agents, artifacts, out)
    typer.echo(f"{path} and {path.with_suffix('.md')}")


@app.command()
def show(
    graph: Graph = "eua16",
    table: Tables = None,
) -> None:
    """Print the network (nodes, capacities, links) and the services' ranges."""
    try:
        network = _network(graph, table)
    except WRONG as error:
        raise _fail(error) from error
    shown = Table(title=f"{graph}: {network.nodes} nodes, {len(network.graph.links)} links")
    for column in ("node", "site", "TFLOP/s", "memory MB", "uplink Mbps", "links to (Mbps)"):
        shown.add_column(column)
    widths = network.graph.bandwidth_matrix()
    for k, name in enumerate(network.graph.names):
        links = ", ".join(f"{other} ({widths[k, other]:.0f})" for other in np.flatnonzero(widths[k]))
        g = network.graph
        shown.add_row(str(k), name, f"{g.tflops[k]:g}", f"{g.memory_mb[k]:g}", f"{g.uplink_mbps[k]:g}", links)
    Console().print(shown)
    for one in network.tables:
        typer.echo(
            f"{one.name}: {len(one.configurations)} configurations x {len(one.variants)} variants, accuracy "
            f"{one.accuracy.min():.3f} to {one.accuracy.max():.3f}, requests of {one.data_mb[0]:g} to "
            f"{one.data_mb[1]:g} MB, deadlines {', '.join(f'{d:g}' for d in one.deadlines_s)} s"
        )
