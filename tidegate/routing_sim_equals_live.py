"""`tidegate routing sim-equals-live`: one seeded trace through real processes and through the simulator, and the gap.

Goodput is expected on both sides (accuracy summed over the requests in time, no sampling of labels). The simulator runs
the same arrivals, at the times at which they left, many times over other draws and service times, with slots where the
live scheduler's were: its mean is compared, and its spread says how much of a gap one live run may owe to chance.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from loadgen.answers import Outcome
from loadgen.console import live_progress
from loadgen.payloads import PayloadError, PayloadSet, parse_payloads
from loadgen.record import RunRecord
from loadgen.score import details
from loadgen.sender import LEAD_S, Progress, SendOptions, run_on_uvloop
from loadgen.traces import Trace, parse_workload
from models.catalog import VariantError
from policies.routing.contract import RoutingError
from protocol.deployment import DeploymentError, DeploymentFile, read_deployment
from tidegate.deployed_service import deployed_service, the_service
from tidegate.replay_commands import DIGITS_SPLIT, stop_on_interrupt, usual_payload
from tidegate.routing_inputs import WRONG, AsJson, Seed, fail
from tidegate.running import GatewayError, RunningGateway
from tidegate.supervisor import Supervisor, free_port
from tidegate.up_command import StartFailed, until_ready, with_address

if TYPE_CHECKING:
    from policies.routing.queueing_model import ServiceModel

PAPER_T4: Final = Path(__file__).parent.parent / "deploy" / "paper-t4.toml"


@dataclass(frozen=True, slots=True)
class Figures:
    """Fractions of the requests that count."""

    goodput_ratio: float
    violation_ratio: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One router: live, simulated (mean and standard deviation over the repetitions), by phase too.

    sent_late: requests that left over 10 ms late; shift_s: how long after a slot's start the trace began.
    """

    router: str
    requests: int
    sent_late: int
    shift_s: float
    live: dict[str, Figures]
    simulated: dict[str, Figures]
    spread: dict[str, Figures]

    @property
    def goodput_gap(self) -> float:
        """Live less simulated, overall, as a fraction."""
        return self.live["overall"].goodput_ratio - self.simulated["overall"].goodput_ratio

    @property
    def violation_gap(self) -> float:
        """Live less simulated, overall, as a fraction."""
        return self.live["overall"].violation_ratio - self.simulated["overall"].violation_ratio


def sim_equals_live(
    file: Annotated[
        Path, typer.Option("-f", "--file", help="Deployment of emulated instances, or of profiled ones.")
    ] = PAPER_T4,
    routers: Annotated[str, typer.Option(help="Comma-separated.")] = "uniform,deadline,learned-po",
    workload: Annotated[str, typer.Option(help="paper, periodic, poisson:RATE, or a trace as CSV.")] = "paper",
    duration_s: Annotated[float, typer.Option(help="Length of the trace; each router takes as long.")] = 600.0,
    time_scale: Annotated[float, typer.Option(help="Multiplies the workload's holding times.")] = 0.1,
    service: Annotated[str, typer.Option(help="Service of the file; the only one if there is only one.")] = "",
    payload: Annotated[str, typer.Option(help="What is sent, as in tidegate replay.")] = "",
    profile: Annotated[Path | None, typer.Option(help="Profile file, for variants that are not emulated.")] = None,
    repetitions: Annotated[int, typer.Option(min=2, help="Runs of the simulator.")] = 40,
    seed: Seed = 1,
    json_output: AsJson = False,
) -> None:
    """Replay a seeded trace on real processes, router by router, simulate the same trace, and print the gap.

    Example: tidegate routing sim-equals-live --duration-s 60 --routers deadline
    """
    try:
        deployment = read_deployment(file)
        name = the_service(deployment, service)
        model = deployed_service(deployment, name, profile)
        payloads = parse_payloads(payload or usual_payload(name), DIGITS_SPLIT, seed)
        trace = parse_workload(workload, seed=seed, duration_s=duration_s, time_scale=time_scale)
        found = []
        for router in routers.split(","):
            record, started_s = run_on_uvloop(_live(deployment, name, router, trace, payloads))
            shift_s = started_s % deployment.scheduler.slot_s
            found.append(_compared(model, router, trace, record, shift_s, repetitions, seed))
    except (*WRONG, DeploymentError, VariantError, PayloadError, GatewayError, StartFailed, OSError) as error:
        raise fail(error) from error
    if json_output:
        rows = [{**asdict(one), "goodput_gap": one.goodput_gap, "violation_gap": one.violation_gap} for one in found]
        about = {"file": str(file), "workload": trace.description, "duration_s": duration_s, "seed": seed}
        print(json.dumps({**about, "routers": rows}))
        return
    _show(found, f"{deployment.name}, {trace.description}, {duration_s:g} s, seed {seed}; percent")


def _compared(
    service: "ServiceModel", router: str, trace: Trace, record: RunRecord, shift_s: float, repetitions: int, seed: int
) -> Comparison:
    """The run beside the simulator's; the trace began `shift_s` after a slot's start."""
    accuracy = {kind.variant: kind.accuracy for kind in service.kinds}
    simulated = _simulated(service, router, trace, record.sent_s, shift_s, repetitions, seed)
    phases = ("overall", *trace.arrivals.phase_names)
    return Comparison(
        router=router,
        requests=len(record),
        sent_late=details(record)["sending"]["late"],
        shift_s=shift_s,
        live={phase: live_figures(record, accuracy, phase) for phase in phases},
        simulated={phase: _over(simulated[phase], np.mean) for phase in phases},
        spread={phase: _over(simulated[phase], np.std) for phase in phases},
    )


async def _live(
    file: DeploymentFile, name: str, router: str, trace: Trace, payloads: PayloadSet
) -> tuple[RunRecord, float]:
    """The run, and when its time zero was on the monotonic clock."""
    services = {**file.services, name: msgspec.structs.replace(file.services[name], router=router)}
    own = with_address(msgspec.structs.replace(file, services=services), None, free_port())
    supervisor = Supervisor(own)
    started_s = 0.0
    async with supervisor, RunningGateway(supervisor.url) as gateway:
        await until_ready(supervisor)
        while (state := await gateway.service(name))["routing_by"] != router:
            if "trained for" in state["reason"]:
                raise GatewayError(f"{router} cannot route {name}: {state['reason']}")
            await asyncio.sleep(0.05)
        # At a slot's start, so that the same seed meets the same slots in every run; what is left is measured.
        slot_s = file.scheduler.slot_s
        await asyncio.sleep(2.0 * slot_s - (time.monotonic() + LEAD_S) % slot_s)
        with live_progress(router) as show:

            def tell(progress: Progress) -> None:
                nonlocal started_s
                if progress.now_s > 0.0:
                    started_s = time.monotonic() - progress.now_s
                show(progress)

            run = await gateway.replay(name, router, trace, payloads, SendOptions(), tell, stop_on_interrupt())
    if run.record.interrupted:
        raise RoutingError("interrupted")
    return run.record, started_s


def live_figures(record: RunRecord, accuracy: dict[str, float], phase: str) -> Figures:
    """What a run was worth in expectation: `phase` is a phase's name or "overall"."""
    part = record.counted.copy()
    if phase != "overall" and record.phase is not None:
        part &= record.phase == record.phase_names.index(phase)
    in_time = part & (record.outcome == Outcome.OK)
    gain = np.array([accuracy.get(variant, 0.0) for variant in record.variants] + [0.0])
    count = max(int(part.sum()), 1)
    return Figures(
        goodput_ratio=float(gain[record.variant[in_time]].sum()) / count,
        violation_ratio=1.0 - float(in_time.sum()) / count,
    )


def _simulated(
    service: "ServiceModel",
    router: str,
    trace: Trace,
    sent_s: NDArray[np.float64],
    shift_s: float,
    repetitions: int,
    seed: int,
) -> dict[str, list[Figures]]:
    from policies.routing.evaluate import LEARNED, evaluate, trained
    from policies.routing.queueing_model import trace_arrivals

    # As they left: a generator on a busy machine sends late and in clumps, which is no fault of the system.
    # In the simulator a slot starts at 0: the trace starts as long after that as it did live.
    drawn = trace.arrivals
    phase = None if drawn.phase is None else drawn.phase[: len(sent_s)].astype(np.int64)
    arrivals = trace_arrivals(sent_s + shift_s, phase, drawn.phase_names or ("all",))
    policy = trained(router, router, service.kinds) if router in LEARNED else None
    found: dict[str, list[Figures]] = {}
    for number in range(repetitions):
        scores = evaluate(router, service, arrivals, slots=1, seed=seed + number, policy=policy).scores
        for name, s in scores.items():
            found.setdefault(name, []).append(Figures(s.goodput_ratio, s.violation_ratio))
    return found


def _over(figures: Sequence[Figures], of: Any) -> Figures:
    rows = np.array([[one.goodput_ratio, one.violation_ratio] for one in figures])
    return Figures(*(float(value) for value in of(rows, axis=0)))


def _show(found: Sequence[Comparison], title: str) -> None:
    headings = ("router", "phase", "goodput live", "simulated", "gap", "violations live", "simulated", "gap", "late")
    table = Table(*headings, title=title)
    for one in found:
        for phase in one.live:
            live, simulated, spread = one.live[phase], one.simulated[phase], one.spread[phase]
            cells = []
            for key in ("goodput_ratio", "violation_ratio"):
                a, b, s = (100 * getattr(figures, key) for figures in (live, simulated, spread))
                cells += [f"{a:.2f}", f"{b:.2f} ± {s:.2f}", f"{a - b:+.2f}"]
            first = phase == "overall"
            table.add_row(one.router if first else "", phase, *cells, str(one.sent_late) if first else "")
    Console().print(table)
