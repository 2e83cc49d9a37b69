"""`tidegate routing learn`: from a workload and a system, running or described, to the router that is best for it."""

import asyncio
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loadgen.payloads import PayloadError, parse_payloads
from loadgen.traces import write_trace
from models.catalog import VariantError
from models.profiles import write_profiles
from policies.routing.contract import RoutingError
from protocol.deployment import DeploymentError, read_deployment
from protocol.records import RouterChoice
from tidegate.deployed_service import deployed_service, service_model
from tidegate.live_measuring import measure_instances, recorded_arrivals
from tidegate.record_command import RecordError
from tidegate.replay_commands import DIGITS_SPLIT, usual_payload
from tidegate.routing_inputs import (
    WRONG,
    Instances,
    ProfileFile,
    RequirementMs,
    Seed,
    Threads,
    arrivals_of,
    errors,
    fail,
    progress_bar,
    score_lines,
    service_of,
)
from tidegate.routing_live import Operator
from tidegate.running import GatewayError

if TYPE_CHECKING:
    from policies.routing.learn import Learned
    from policies.routing.queueing_model import ArrivalModel, ServiceModel

PATIENCE_S = 10.0
NEEDED_ARRIVALS = 500
"""Fewer recorded arrivals than this say too little about a workload."""


@dataclass(frozen=True, slots=True)
class Live:
    """A running system to learn from: its gateway, and how it is measured. `catalog` knows its variants' accuracies."""

    url: str
    service: str
    admin_token: str
    record_s: float
    measure_s: float
    payload: str
    catalog: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is learned for: the service, its workload, the promised share of violations, and both in words."""

    service: "ServiceModel"
    arrivals: "ArrivalModel"
    promise: float
    about: dict[str, Any]


def learn(
    source: Annotated[
        str, typer.Option("--from", help="A running gateway: measure it, learn for it, install the winner.")
    ] = "",
    file: Annotated[Path | None, typer.Option("-f", "--file", help="A deployment file instead of a gateway.")] = None,
    workload: Annotated[
        str,
        typer.Option(
            help="paper, periodic, poisson:RATE, or a trace (CSV); with --from and without this: the gateway's arrivals"
        ),
    ] = "",
    minutes: Annotated[float, typer.Option(help="Time for training.")] = 6.0,
    survivors: Annotated[
        bool, typer.Option("--survivors", help="Also train for each set with one instance fewer, in the same time.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, learn and score, but install nothing.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for profile, trace, artifact and ranking.json.")] = Path("learned"),
    service: Annotated[str, typer.Option(help="Service; the only one if there is only one.")] = "",
    record_s: Annotated[float, typer.Option(help="Record arrivals for so long, beside those remembered.")] = 30.0,
    measure_s: Annotated[float, typer.Option(help="Keep all instances busy for so long to measure them.")] = 10.0,
    payload: Annotated[str, typer.Option(help="What measuring sends, as in tidegate replay.")] = "",
    catalog: Annotated[
        list[Path], typer.Option("--catalog", "-c", envvar="TIDEGATE_CATALOG", help="Folder with your own variants.")
    ] = [],  # noqa: B006 - typer copies it
    without: Annotated[list[str], typer.Option(help="With -f: leave this instance out, by id.")] = [],  # noqa: B006
    profile: ProfileFile = None,
    instances: Instances = "",
    requirement_ms: RequirementMs = 300.0,
    seed: Seed = 1,
    threads: Threads = 2,
    admin_token: Annotated[str, typer.Option(envvar="TIDEGATE_ADMIN_TOKEN", help="Admin token, if needed.")] = "",
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Train a router for this workload, score it against every rule, and name the winner; with --from, install it.

    Without --from or -f the paper's service is learned for. Example: tidegate routing learn --from
    http://127.0.0.1:8700 --minutes 5 (then: tidegate routing rollback takes the change back)
    """
    from policies.routing.learn import learn as learn_router

    try:
        out.mkdir(parents=True, exist_ok=True)
        with progress_bar() as bar:
            task = bar.add_task("preparing", total=1.0)

            def tell(what: str, share: float) -> None:
                bar.update(task, description=what, completed=share)

            if source:
                live = Live(source, service, admin_token, record_s, measure_s, payload, tuple(catalog))
                subject = asyncio.run(_measured(live, workload, out, tell))
            else:
                model = (
                    deployed_service(read_deployment(file), service, profile, without)
                    if file is not None
                    else service_of(profile, instances, requirement_ms / 1000.0)
                )
                subject = Subject(model, arrivals_of(workload or "paper"), 0.02, {"workload": workload or "paper"})
            found = learn_router(
                subject.service, subject.arrivals, out, minutes=minutes, promise=subject.promise, seed=seed,
                threads=threads, with_survivors=survivors, command=shlex.join(["tidegate", *sys.argv[1:]]), report=tell,
            )  # fmt: skip
        installed = ""
        if source and not dry_run:
            installed = asyncio.run(_install(source, admin_token, str(subject.about["service"]), found))
    except (*WRONG, DeploymentError, VariantError, PayloadError, GatewayError, RecordError, OSError) as error:
        raise fail(error) from error
    if json_output:
        ranking = json.loads((out / "ranking.json").read_text())
        print(json.dumps({**subject.about, "installed": installed or None, **ranking}))
        return
    print(f"winner: {found.winner} (trained {found.slots / 1e6:.2f} M slots; all scores in {out / 'ranking.json'})")
    for line in score_lines("", {r.router: r for r in found.results}):
        print(line)
    if source:
        done = f"{subject.about['service']} is routed by {installed} (tidegate routing rollback takes a change back)"
        print(done if installed else "nothing was installed")


async def _measured(live: Live, workload: str, out: Path, tell: Any) -> Subject:
    """Arrivals first: measuring makes some of its own."""
    async with Operator(live.url, live.admin_token) as gateway:
        name = await gateway.name_of(live.service)
        state = await gateway.service(name)
        spec = (await gateway.deployment()).services[name]
        if not workload:

            def told(count: int, passed_s: float) -> None:
                tell(f"recording, {count} arrivals", min(passed_s / max(live.record_s, 0.1), 1.0))

            trace = await recorded_arrivals(gateway.url, name, live.record_s, told)
            if len(trace) < NEEDED_ARRIVALS:
                raise RoutingError(
                    f"{len(trace)} arrivals of {name} are known, at least {NEEDED_ARRIVALS} are needed:"
                    " record longer with --record-s, or name a workload with --workload"
                )
            workload = str(out / "trace.csv")
            write_trace(out / "trace.csv", trace)
        payloads = parse_payloads(live.payload or usual_payload(name), DIGITS_SPLIT, seed=1)
        tell("measuring", 0.0)
        found = await measure_instances(
            gateway.url, state, live.measure_s, payloads, live.catalog,
            lambda samples: tell(f"measuring, {samples} answers", 0.5),
        )  # fmt: skip
        await gateway.until_idle(name)
    profiles = {one.variant: one for one, _, _ in found.instances}
    write_profiles(out / "profiles.json", profiles.values())
    service = service_model(found.instances, spec.requirement_ms / 1e3, expire=spec.expire)
    errors.print(
        "measured: " + ", ".join(f"{name} {1e3 * one.mean_s(1):.2f} ms" for name, one in profiles.items()),
        highlight=False,
    )
    about = {
        "gateway": live.url,
        "service": name,
        "workload": workload,
        "instances": list(found.ids),
        "service_ms": {name: round(1e3 * one.mean_s(1), 3) for name, one in profiles.items()},
    }
    return Subject(service, arrivals_of(workload), round(1.0 - spec.percentile, 9), about)


async def _install(url: str, admin_token: str, service: str, found: "Learned") -> str:
    """The best router that the system takes: one that it refuses (a single queue with several gateways) is passed."""
    async with Operator(url, admin_token) as gateway:
        refused = ""
        for router in (result.router for result in found.results):
            file = str(found.artifact.resolve()) if router == "learned-po" else ""
            try:
                await gateway.use(service, RouterChoice(router=router, policy_file=file), PATIENCE_S)
                return router
            except GatewayError as error:
                refused = str(error)
                errors.print(f"{router} was not installed: {refused}", style="yellow", highlight=False, markup=False)
    raise GatewayError(f"no router could be installed: {refused}")
