"""`tidegate replay` and `tidegate compare`: a workload against any running gateway, once or router by router."""

import asyncio
import html
import json
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gateway.router import PHASE_ROUTERS, ROUTERS
from loadgen.console import live_progress, print_results
from loadgen.figures import RouterRun
from loadgen.payloads import PayloadError, PayloadSet, parse_payloads
from loadgen.report import check_place, finding, write_report
from loadgen.score import changed_speed, details, not_comparable
from loadgen.sender import SendOptions, run_on_uvloop
from loadgen.traces import Trace, TraceError, parse_workload
from protocol.deployment import did_you_mean
from tidegate.running import GatewayError, PhaseHint, RouterUnusable, RunningGateway

DIGITS_SPLIT = Path(__file__).parent.parent / "models" / "pretrained" / "digits_split.json"
INTERRUPTED_EXIT = 130

Url = Annotated[str, typer.Option(help="The gateway, as http://host:port or host:port.")]
Service = Annotated[str, typer.Option(help="Service to call; the only one if there is only one.")]
Workload = Annotated[str, typer.Option(help="paper, periodic, poisson:RATE, constant:RATE, or a trace as CSV.")]
PayloadSpec = Annotated[
    str, typer.Option(help="digits, digits:png, emulated:BYTES, raw:BYTES, a folder of images or a file.")
]
Duration = Annotated[float | None, typer.Option(help="Seconds; 60, or the trace's own length.")]
RateScale = Annotated[float, typer.Option(help="Multiplies the requests per second.")]
TimeScale = Annotated[float, typer.Option(help="Multiplies holding times, or a trace's length.")]
Seed = Annotated[int, typer.Option(help="Same seed, same requests.")]
Report = Annotated[Path | None, typer.Option(help="Write an HTML report here.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; progress stays on stderr.")]
Token = Annotated[str, typer.Option(envvar="TIDEGATE_ADMIN_TOKEN", help="Admin token, if the gateway has one.")]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to replay, where. Without `routers` the service keeps its own."""

    url: str
    service: str
    workload: str
    payload: str
    duration_s: float | None
    rate_scale: float
    time_scale: float
    seed: int
    timeout_s: float
    report: Path | None
    as_json: bool
    routers: tuple[str, ...] = ()
    admin_token: str = ""


def replay(
    url: Url = "http://127.0.0.1:8700",
    service: Service = "",
    workload: Workload = "poisson:20",
    payload: PayloadSpec = "",
    duration_s: Duration = None,
    rate_scale: RateScale = 1.0,
    time_scale: TimeScale = 1.0,
    seed: Seed = 0,
    timeout_s: Annotated[float, typer.Option(help="The client gives up after this long.")] = 30.0,
    report: Report = None,
    as_json: AsJson = False,
) -> None:
    """Replay a workload against a running gateway, with whatever router it has.

    Example: tidegate replay --workload poisson:50 --duration-s 20
    """
    _run(
        Plan(
            url=url,
            service=service,
            workload=workload,
            payload=payload,
            duration_s=duration_s,
            rate_scale=rate_scale,
            time_scale=time_scale,
            seed=seed,
            timeout_s=timeout_s,
            report=report,
            as_json=as_json,
        )
    )


def compare(
    routers: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(ROUTERS)}.")] = (
        "light-only,heavy-only,single-queue,deadline"
    ),
    url: Url = "http://127.0.0.1:8700",
    service: Service = "",
    workload: Workload = "poisson:20",
    payload: PayloadSpec = "",
    duration_s: Duration = None,
    rate_scale: RateScale = 1.0,
    time_scale: TimeScale = 1.0,
    seed: Seed = 0,
    timeout_s: Annotated[float, typer.Option(help="The client gives up after this long.")] = 30.0,
    report: Report = None,
    as_json: AsJson = False,
    admin_token: Token = "",
) -> None:
    """Replay the same workload through one router after the other on a running gateway; its own is restored.

    A router that cannot be used there is named with the reason and left out; the exit status is then 1.

    Example: tidegate compare --routers deadline,uniform --workload paper --time-scale 0.1 --report report.html
    """
    names = tuple(name.strip() for name in routers.split(",") if name.strip())
    unknown = next((name for name in names if name not in ROUTERS), "")
    if unknown or not names:
        told = f"{unknown!r} is no router" if unknown else "none given"
        raise typer.BadParameter(
            f"{told}: choose from {', '.join(ROUTERS)}{did_you_mean(unknown, ROUTERS)}", param_hint="--routers"
        )
    _run(
        Plan(
            url=url,
            admin_token=admin_token,
            routers=names,
            service=service,
            workload=workload,
            payload=payload,
            duration_s=duration_s,
            rate_scale=rate_scale,
            time_scale=time_scale,
            seed=seed,
            timeout_s=timeout_s,
            report=report,
            as_json=as_json,
        )
    )


def _run(plan: Plan) -> None:
    try:
        check_place(plan.report)
        interrupted, left_out = run_on_uvloop(_compare(plan))
    except (GatewayError, TraceError, PayloadError, ValueError, OSError) as error:
        Console(stderr=True).print(f"tidegate: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if interrupted or left_out:
        raise typer.Exit(INTERRUPTED_EXIT if interrupted else 1)


async def _compare(plan: Plan) -> tuple[bool, dict[str, str]]:
    """Whether it was interrupted (what was done until then is reported all the same); routers left out, and why."""
    trace = parse_workload(
        plan.workload,
        seed=plan.seed,
        duration_s=plan.duration_s,
        rate_scale=plan.rate_scale,
        time_scale=plan.time_scale,
    )
    stop = stop_on_interrupt()
    async with RunningGateway(plan.url, plan.admin_token) as gateway:
        service = plan.service or await _only_service(gateway)
        before = await gateway.service(service)
        payloads = parse_payloads(plan.payload or usual_payload(service), DIGITS_SPLIT, plan.seed)
        requirement_ms = await _requirement_ms(gateway, service)
        options = SendOptions(timeout_s=plan.timeout_s, seed=plan.seed, report_phase=True)
        runs: list[RouterRun] = []
        left_out: dict[str, str] = {}
        try:
            for router in plan.routers or (before["router"],):
                try:
                    if plan.routers:
                        await gateway.set_router(service, router, _phase_hint(router, trace, payloads))
                        await gateway.until_idle(service)
                except RouterUnusable as error:
                    left_out[router] = str(error)
                    _warn(f"{router} is left out: {error}")
                    continue
                with live_progress(router) as show:
                    runs.append(await gateway.replay(service, router, trace, payloads, options, show, stop))
                if stop.is_set():
                    break
        finally:
            if plan.routers:
                await gateway.ask_for_router(service, before["router"])
    facts = {
        "Gateway": f"{plan.url}, service {service}",
        "Workload": trace.description,
        "Payload": payloads.description,
        "Seed": str(plan.seed),
    }
    records = {run.name: run.record for run in runs}
    warning = not_comparable(records)
    further = {"left_out": left_out} if plan.routers else {}
    title = f"{service} under {plan.workload}"
    tell(runs, trace, facts, requirement_ms, plan.report, plan.as_json, title, warning, further)
    if changed := changed_speed(records):
        _warn(f"note: {changed}: batches, instances that slow each other, or other programs on this machine")
    for router, why in left_out.items():
        _warn(f"{router} was left out: {why}")
    return stop.is_set(), left_out


def _phase_hint(router: str, trace: Trace, payloads: PayloadSet) -> PhaseHint | None:
    """For a router that must know the hidden phase: the one in which the trace begins."""
    arrivals = trace.arrivals
    if router not in PHASE_ROUTERS or arrivals.phase is None or not len(arrivals):
        return None
    return PhaseHint(payloads.payloads[0], arrivals.phase_names[int(arrivals.phase[0])])


def _warn(text: str) -> None:
    Console(stderr=True).print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


def tell(
    runs: Sequence[RouterRun],
    trace: Trace,
    facts: dict[str, str],
    requirement_ms: float | None,
    report: Path | None,
    as_json: bool,
    title: str,
    warning: str,
    further: dict[str, Any],
) -> None:
    """The results as a table or one JSON object on stdout, and as a report where asked.

    `warning` says why the runs cannot be compared, if so; `further` are more fields of the JSON object.
    """
    if report is not None and runs:
        write_report(
            report,
            title=title,
            facts=facts,
            trace=trace,
            runs=runs,
            requirement_ms=requirement_ms,
            warning=warning,
        )
    if as_json:
        results = {run.name: run.scores for run in runs}
        found = {run.name: details(run.record, requirement_ms) for run in runs}
        told = {"results": results, "comparable": not warning, "warning": warning, "details": found, **further}
        print(json.dumps(told))
        return
    if not runs:
        return
    print_results(runs, title, warning)
    if len(runs) > 1 and not warning:
        print(html.unescape(re.sub(r"<[^>]+>", "", finding(runs))))
    for run in runs:
        sending = details(run.record)["sending"]
        if sending["late"]:
            print(f"{run.name}: {sending['late']} requests left over {sending['late_means_over_ms']:g} ms late")
    if report is not None and runs:
        print(f"report: {report.resolve()}")


def stop_on_interrupt() -> asyncio.Event:
    """An event that Ctrl-C sets, instead of ending the process."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


async def _only_service(gateway: RunningGateway) -> str:
    names = sorted((await gateway.state())["services"])
    if len(names) != 1:
        raise GatewayError(f"name the service with --service: the gateway has {', '.join(names) or 'none'}")
    return str(names[0])


async def _requirement_ms(gateway: RunningGateway, service: str) -> float | None:
    try:
        return (await gateway.deployment()).services[service].requirement_ms
    except GatewayError:  # no admin token: the report goes without the line
        return None


def usual_payload(service: str) -> str:
    """What is sent to a service when nothing else is asked for."""
    return "digits" if service == "digits" else "emulated:1000"
