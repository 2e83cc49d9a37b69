"""`tidegate routing evaluate`, `limit`, `bench` and `robustness`: what routers are worth in the simulator."""

import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from loadgen.traces import parse_workload
from policies.routing.contract import RoutingError
from tidegate.routing_inputs import (
    WRONG,
    AsJson,
    RequirementMs,
    Seed,
    Threads,
    Workload,
    arrivals_of,
    errors,
    fail,
    progress_bar,
    score_lines,
)


def evaluate(
    policy: Annotated[str, typer.Option(help="router names, a comma list, or all (Table 2 of the paper)")] = "all",
    workload: Workload = "paper",
    slots: Annotated[int, typer.Option(help="slots of 1 s (a trace is run to its end)")] = 600_000,
    seed: Seed = 1,
    requirement_ms: RequirementMs = 300.0,
    size: Annotated[
        str,
        typer.Option(
            help="of the service: 2xN or 3xN (N instances of each of two or three variants, rates in proportion), or "
            "HEAVY+LIGHT instances at the paper's rates; @0.7 after it for 0.7 times the rates"
        ),
    ] = "2x2",
    artifact: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH: use this trained policy instead of the pretrained one")
    ] = None,
    threads: Threads = 1,
    json_output: AsJson = False,
) -> None:
    """Score routers in the simulator: goodput, violations, heavy share, per phase of the workload."""
    from policies.routing.advise import at_load
    from policies.routing.evaluate import LEARNED, ROUTERS, as_json, paper_evaluation
    from policies.routing.set_sizes import PAPER_SIZE, sized

    try:
        service, load = sized(size, requirement_ms / 1000.0)
        arrivals = arrivals_of(workload) if load == 1.0 else at_load(arrivals_of(workload), load)
        artifacts = {a.split("=", 1)[0]: Path(a.split("=", 1)[1]) for a in artifact or []}
        if policy == "all":
            fits = {r for r in LEARNED if _shipped(r, workload) and (size == PAPER_SIZE or r == "learned-set")}
            names = [r for r in ROUTERS if r not in LEARNED or r in artifacts or r in fits]
        else:
            names = policy.split(",")
        for name in names:
            where = _shipped(name, workload)
            if name in LEARNED and name not in artifacts and where is not None:
                artifacts[name] = where
        with progress_bar() as bar:
            task = bar.add_task("compiling", total=len(names))

            def tell(router: str, share: float) -> None:
                bar.update(task, description=router, completed=names.index(router) + share)

            began = time.perf_counter()
            results = paper_evaluation(
                names, arrivals, slots=slots, seed=seed, service=service, artifacts=artifacts, threads=threads,
                progress=tell,
            )  # fmt: skip
    except WRONG as error:
        raise fail(error) from error
    if json_output:
        about = {
            "workload": workload,
            "size": size,
            "slots": slots,
            "seed": seed,
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(json.dumps(as_json(results, **about)))
        return
    print(f"{size} instances, {workload}, {slots} slots, seed {seed}; percent, the paper's figure in brackets")
    for line in score_lines(workload if (size, requirement_ms) == (PAPER_SIZE, 300.0) else "", results):
        print(line)


def _shipped(router: str, workload: str) -> Path | None:
    """The pretrained artifact for a learned router on a workload, if there is one."""
    from policies.routing.artifact import PRETRAINED

    suffix = "-periodic" if workload == "periodic" else ""
    path = PRETRAINED / f"routing-{router}{suffix}.json"
    return path if path.exists() else None


def bench(
    seconds: Annotated[float, typer.Option(help="CPU time per measurement")] = 2.0,
    training: Annotated[
        int, typer.Option(help="measure the training of learned-po with this many threads instead", min=0)
    ] = 0,
    json_output: AsJson = False,
) -> None:
    """Measure the simulator (arrivals per second of one core) and the cost of a routing decision in plain Python."""
    from policies.routing.benchmark import measure, training_speed

    with errors.status("measuring"):
        figures = training_speed("learned-po", training, 8) if training else measure(seconds)
        found: dict[str, Any] = {"machine": platform.processor() or platform.machine(), **figures}
    if json_output:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key:40s} {value:,.1f}" if isinstance(value, float) else f"{key:40s} {value}")


def limit(
    workload: Workload = "paper",
    duration_s: Annotated[float, typer.Option(help="length of the trace drawn from a process")] = 20_000.0,
    seed: Seed = 1,
    requirement_ms: RequirementMs = 300.0,
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
        raise fail(error) from error
    if json_output:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key:24s} {value}")


def robustness(
    slots: Annotated[int, typer.Option(help="slots per setting")] = 100_000,
    seed: Seed = 1,
    services: Annotated[
        bool,
        typer.Option("--services", help="Instead: services unlike the paper's, each against its best fixed margin."),
    ] = False,
    json_output: AsJson = False,
) -> None:
    """How `deadline` holds with random service times, several gateways with stale views, drift; or on other services.

    Example: tidegate routing robustness --services --slots 10000
    """
    from policies.routing import robustness as measure

    if services:
        _other_services(slots, seed, json_output)
        return
    rows: list[dict[str, Any]] = []
    with errors.status("simulating"):
        for law in ("gamma", "lognormal"):
            for cv in (0.0, 0.1, 0.3, 0.5, 1.0):
                r = measure.variable_service(law, cv, slots=slots, seed=seed)
                best = None if r.best is None else r.best.goodput_ratio
                about = {"law": law, "cv": cv, "gateways": 1, "best_margin": r.best_margin, "best_goodput": best}
                rows.append({**about, **r.learned.as_dict()})
        for law, variations in (("gamma", (0.0, 0.1, 0.3, 0.5, 1.0)), ("lognormal", (0.5, 1.0))):
            for cv in variations:
                for gateways in (2, 4, 8):
                    for bounce in (False, True):
                        r = measure.several_gateways(law, cv, gateways, bounce, slots=slots, seed=seed)
                        about = {"law": law, "cv": cv, "gateways": gateways, "bounce": bounce}
                        rows.append({**about, **r.learned.as_dict()})
        batches: list[dict[str, Any]] = []
        for scale in (1.0, 1.25, 1.5):
            for cv in (0.0, 0.1, 0.3, 0.5, 1.0):
                plain, batched = measure.batches(scale, cv, slots=slots, seed=seed)
                batches.append({"rate_scale": scale, "cv": cv, "plain": plain.as_dict(), "batches": batched.as_dict()})
        drift = {str(cv): measure.recovery(cv, seed=seed) for cv in (0.0, 0.3)}
    if json_output:
        print(json.dumps({"rows": rows, "batches": batches, "recovery": drift}))
        return
    print(f"{'law':10s}{'cv':>5s}{'gateways':>10s}{'bounce':>8s}{'goodput':>9s}{'violations':>12s}   best fixed margin")
    for row in rows:
        line = f"{row['law']:10s}{row['cv']:5.1f}{row['gateways']:10d}{'yes' if row.get('bounce') else 'no':>8s}"
        line += f"{100 * row['goodput_ratio']:9.2f}{100 * row['violation_ratio']:12.3f}"
        if row.get("best_margin") is not None:
            line += f"   {100 * row['best_goodput']:.2f} at {row['best_margin']}"
        print(line)
    print("with batches (0.4 + 0.6 b, modelled): rates, cv, goodput (violations) without and with")
    for row in batches:
        line = f"x{row['rate_scale']:<6}{row['cv']:5.1f}"
        for how in ("plain", "batches"):
            line += f"{100 * row[how]['goodput_ratio']:9.2f} ({100 * row[how]['violation_ratio']:.2f})"
        print(line)
    for variation, points in drift.items():
        text = ", ".join(f"{t:.0f} s: {100 * v:.2f}%" for t, v in points)
        print(f"heavy service 1.5 times as slow, cv {variation}: violations by time since: {text}")


def _other_services(slots: int, seed: int, json_output: bool) -> None:
    """Prints `deadline` on services unlike the paper's, as many requests each as `slots` of the paper's workload."""
    from policies.routing import robustness as measure

    rows: list[dict[str, Any]] = []
    settings = [
        (other, load, law, cv)
        for other in measure.OTHER_SERVICES
        for law, cv in (("gamma", 0.1), ("gamma", 0.3), ("gamma", 0.5), ("gamma", 1.0), ("lognormal", 1.0))
        for load in (0.6, 0.8, 0.9)
    ]
    if not json_output:
        print(
            "times of requirement, instances, load, law, variation   learned          best fixed margin that keeps 2%"
        )
    with errors.status("simulating") as status:
        for done, (other, load, law, cv) in enumerate(settings):
            status.update(f"simulating {done} of {len(settings)}")
            learned, margin, best = measure.other_service(other, load, law, cv, requests=20 * slots, seed=seed)
            about = {**asdict(other), "load": load, "law": law, "cv": cv, "best_margin": margin}
            rows.append({**about, "learned": learned.as_dict(), "best_fixed": best.as_dict()})
            if not json_output:
                times = "/".join(f"{one:g}" for one in other.times_ms)
                counts = "+".join(str(one) for one in other.counts)
                line = f"{times:>13s} of {other.requirement_ms:4g} {counts:>5s} {other.accuracies[0]:.2f}"
                line += f" {load:4.1f} {law:>9s} {cv:3.1f}"
                for one in (learned, best):
                    line += f"   {100 * one.goodput_ratio:6.2f} ({100 * one.violation_ratio:5.2f})"
                print(f"{line} at {margin:g}", flush=True)
    if json_output:
        print(json.dumps({"rows": rows}))
