"""`tidegate routing train` and `advise`: a learned router of the paper's, and what a deployment can keep."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from models.catalog import VariantError
from protocol.deployment import DeploymentError, read_deployment
from tidegate.deployed_service import deployed_service, the_service
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
    service_of,
)

if TYPE_CHECKING:
    from policies.routing.queueing_model import ServiceModel


def train(
    policy: Annotated[str, typer.Option(help="learned-po, learned-fo, learned-po-batch or learned-fo-batch")],
    out: Annotated[Path, typer.Option(help="folder for checkpoint, curve, TensorBoard files and the artifact")],
    preset: Annotated[str, typer.Option(help="paper (250 million slots) or quick")] = "quick",
    workload: Annotated[str, typer.Option(help="paper or periodic")] = "paper",
    slots: Annotated[int | None, typer.Option(help="length of the run instead of the preset's")] = None,
    requirement_ms: RequirementMs = 300.0,
    seed: Seed = 1,
    threads: Threads = 2,
    start: Annotated[Path | None, typer.Option(help="begin as this trained policy (its .json)")] = None,
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
    if start is not None:
        arguments += ["--start", str(start)]
    if resume:
        arguments.append("--resume")
    try:
        status = main(arguments)
    except WRONG as error:
        raise fail(error) from error
    raise typer.Exit(status)


def advise(
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="deployment file; its emulated variants need no profile")
    ] = None,
    workload: Workload = "paper",
    profile: ProfileFile = None,
    instances: Instances = "",
    requirement_ms: Annotated[
        float | None, typer.Option(help="latency requirement, instead of the file's (300 without a file)")
    ] = None,
    promise: Annotated[
        float | None, typer.Option(help="share of violations that is promised, instead of the file's (0.02 without)")
    ] = None,
    router: Annotated[str, typer.Option(help="router to simulate, instead of the file's (deadline without)")] = "",
    service: Annotated[str, typer.Option(help="service of the file; the only one if there is only one")] = "",
    slots: Annotated[int, typer.Option(help="slots per simulation")] = 20_000,
    seed: Seed = 1,
    json_output: AsJson = False,
) -> None:
    """Whether a deployment will keep its promise, at what load it breaks, and what would change that: by simulation.

    Example: tidegate routing advise -f deploy/paper-t4.toml --workload monday.csv
    """
    from policies.routing.advise import advise as advise_on

    try:
        model, kept, by = _deployed(file, service, profile, instances, requirement_ms)
        promise, router = promise if promise is not None else kept, router or by
        with errors.status("simulating"):
            found = advise_on(model, arrivals_of(workload), promise=promise, router=router, slots=slots, seed=seed)
    except (*WRONG, DeploymentError, VariantError) as error:
        raise fail(error) from error
    if json_output:
        changes = [{"what": c.what, "breaks_at": c.breaks_at, **c.now.as_dict()} for c in found.changes]
        print(json.dumps({"keeps": found.keeps, "promise": promise, "router": router, "changes": changes}))
        return
    verdict = "keeps" if found.keeps else "breaks"
    print(f"{router} on {workload}: {verdict} its promise of at most {100 * promise:g}% violations")
    print(f"{'deployment':48s}{'goodput':>9s}{'violations':>12s}   breaks at")
    for c in found.changes:
        goodput, violations = 100 * c.now.goodput_ratio, 100 * c.now.violation_ratio
        print(f"{c.what:48s}{goodput:8.2f}%{violations:11.3f}%   {c.breaks_at:.2f} x today's rates")


def _deployed(
    file: Path | None, service: str, profile: Path | None, instances: str, requirement_ms: float | None
) -> "tuple[ServiceModel, float, str]":
    """The service to simulate, the share of violations that it promises, and its router."""
    if file is None:
        return service_of(profile, instances, (requirement_ms or 300.0) / 1e3), 0.02, "deadline"
    deployment = read_deployment(file)
    spec = deployment.services[the_service(deployment, service)]
    model = deployed_service(deployment, service, profile)
    if requirement_ms is not None:
        model = replace(model, requirement_s=requirement_ms / 1e3)
    return model, round(1.0 - spec.percentile, 9), spec.router
