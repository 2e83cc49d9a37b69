"""`tidegate routing train`, `learn` and `advise`: from a workload to a router, and to what a deployment can keep."""

import json
from pathlib import Path
from typing import Annotated

import typer

from tidegate.routing_inputs import (
    WRONG,
    AsJson,
    Instances,
    ProfileFile,
    RequirementMs,
    Seed,
    Threads,
    Workload,
    arrivals_of,
    errors,
    fail,
    progress_bar,
    score_lines,
    service_of,
)


def train(
    policy: Annotated[str, typer.Option(help="learned-po, learned-fo, learned-po-batch or learned-fo-batch")],
    out: Annotated[Path, typer.Option(help="folder for checkpoint, curve, TensorBoard files and the artifact")],
    preset: Annotated[str, typer.Option(help="paper (250 million slots) or quick")] = "quick",
    workload: Annotated[str, typer.Option(help="paper or periodic")] = "paper",
    slots: Annotated[int | None, typer.Option(help="length of the run instead of the preset's")] = None,
    requirement_ms: RequirementMs = 300.0,
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
        raise fail(error) from error
    raise typer.Exit(status)


def learn(
    out: Annotated[Path, typer.Option(help="folder for the artifact and ranking.json")],
    workload: Workload = "paper",
    minutes: Annotated[float, typer.Option(help="time for training")] = 6.0,
    profile: ProfileFile = None,
    instances: Instances = "",
    requirement_ms: RequirementMs = 300.0,
    seed: Seed = 1,
    threads: Threads = 2,
    json_output: AsJson = False,
) -> None:
    """Train a router for this workload, score it against every rule, and name the winner."""
    from policies.routing.learn import learn as learn_router

    try:
        service = service_of(profile, instances, requirement_ms / 1000.0)
        with progress_bar() as bar:
            task = bar.add_task("preparing", total=1.0)

            def tell(what: str, share: float) -> None:
                bar.update(task, description=what, completed=share)

            found = learn_router(
                service, arrivals_of(workload), out, minutes=minutes, seed=seed, threads=threads, report=tell
            )
    except WRONG as error:
        raise fail(error) from error
    if json_output:
        print((out / "ranking.json").read_text())
        return
    print(f"winner: {found.winner} (trained {found.slots / 1e6:.2f} M slots; all scores in {out / 'ranking.json'})")
    for line in score_lines("", {r.router: r for r in found.results}):
        print(line)


def advise(
    workload: Workload = "paper",
    profile: ProfileFile = None,
    instances: Instances = "",
    requirement_ms: RequirementMs = 300.0,
    promise: Annotated[float, typer.Option(help="share of violations that is promised")] = 0.02,
    router: Annotated[str, typer.Option(help="router to simulate")] = "deadline",
    slots: Annotated[int, typer.Option(help="slots per simulation")] = 20_000,
    seed: Seed = 1,
    json_output: AsJson = False,
) -> None:
    """Whether a deployment will keep its promise, at what load it breaks, and what would change that."""
    from policies.routing.advise import advise as advise_on

    try:
        service = service_of(profile, instances, requirement_ms / 1000.0)
        with errors.status("simulating"):
            found = advise_on(service, arrivals_of(workload), promise=promise, router=router, slots=slots, seed=seed)
    except WRONG as error:
        raise fail(error) from error
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
