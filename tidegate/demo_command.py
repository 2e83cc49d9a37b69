"""`tidegate demo`: the main job on real images, in under three minutes.

Starts a whole system with the digits models, measures its instances together, scales Tan's bursty workload to what
this machine can do, replays one trace through four routers, and reports.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import aiohttp
import msgspec
import numpy as np
import typer
from rich.console import Console

from loadgen.console import live_progress
from loadgen.figures import RouterRun
from loadgen.payloads import PayloadSet, digits
from loadgen.report import check_place
from loadgen.score import changed_speed, not_comparable
from loadgen.sender import SendOptions, run_on_uvloop
from loadgen.traces import Trace
from policies.routing.workload import MarkovianArrivalProcess
from protocol.deployment import DeploymentFile, read_deployment
from protocol.records import Deployment
from tidegate.replay_commands import DIGITS_SPLIT, INTERRUPTED_EXIT, stop_on_interrupt, tell
from tidegate.running import GatewayError, RunningGateway
from tidegate.supervisor import Supervisor, free_port
from tidegate.up_command import StartFailed, until_ready, with_address

T = TypeVar("T")
DEPLOY: Final = Path(__file__).parent.parent / "deploy"
HEAVY, LIGHT = "digits_heavy", "digits_light"
ROUTERS: Final = {
    "light-only": "digits-light",
    "heavy-only": "digits-heavy",
    "single-queue": "digits",
    "deadline": "digits",
}
"""Each router with its deployment: the first two have two instances of one model, the others one of each."""

PAPER_HEAVY_S, PAPER_LIGHT_S = 0.043, 0.0115
PAPER_REQUIREMENT_S: Final = 0.3
PAPER_PLACES: Final = 15
PAPER_BURST_LOAD: Final = 180.0 / (2 / PAPER_HEAVY_S + 2 / PAPER_LIGHT_S)
PAPER_NORMAL_LOAD: Final = 10.0 / (2 / PAPER_HEAVY_S + 2 / PAPER_LIGHT_S)
"""Tan's arrival rates over the capacity of two heavy and two light instances."""

BURST_S, CALM_S = 1.5, 9.0
"""Mean holding times here (Tan: 27.8 and 500 s): several bursts have to fit into half a minute."""


def demo(
    duration_s: Annotated[float, typer.Option(help="Length of the trace; it is replayed four times.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Same seed, same trace.")] = 1,
    report: Annotated[Path, typer.Option(help="Where to write the HTML report.")] = Path("report.html"),
    embedded: Annotated[bool, typer.Option(help="Use the embedded board even if redis-server is installed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Serve real images through bursts with four routers and compare them. Needs nothing but this checkout.

    About two and a half minutes; Ctrl-C reports what was done until then.

    Example: tidegate demo --report report.html
    """
    console = Console(stderr=True, highlight=False)
    if not 5.0 <= duration_s <= 3600.0:
        raise typer.BadParameter("must be from 5 to 3600 seconds", param_hint="--duration-s")
    try:
        check_place(report)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--report") from None
    try:
        interrupted = run_on_uvloop(_demo(duration_s, seed, report, embedded, as_json, console))
    except KeyboardInterrupt:
        console.print("tidegate demo: interrupted before the first replay")
        raise typer.Exit(INTERRUPTED_EXIT) from None
    except (GatewayError, StartFailed, OSError) as error:
        console.print(f"tidegate demo: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if interrupted:
        raise typer.Exit(INTERRUPTED_EXIT)


async def _demo(duration_s: float, seed: int, report: Path, embedded: bool, as_json: bool, console: Console) -> bool:
    started_s = time.monotonic()
    stop = stop_on_interrupt()
    payloads = digits(DIGITS_SPLIT)
    port = free_port()
    files = {name: with_address(read_deployment(DEPLOY / f"{name}.toml"), None, port) for name in ROUTERS.values()}
    supervisor = Supervisor(
        files["digits"], embedded=embedded, on_event=lambda text: console.print(text, style="yellow", markup=False)
    )
    console.print("starting board, scheduler, gateway and two workers …")
    async with supervisor, RunningGateway(supervisor.url) as gateway:
        await _unless(stop, until_ready(supervisor))
        console.print(f"ready at {supervisor.url} (board: {supervisor.board_kind})")
        console.print("measuring both instances together …")
        service_s = await _unless(stop, measure(f"{supervisor.url}/v1/digits", payloads, seconds=6.0))
        console.print(f"  {HEAVY} {service_s[HEAVY] * 1e3:.1f} ms, {LIGHT} {service_s[LIGHT] * 1e3:.1f} ms per image")
        trace, requirement_ms = scaled_workload(service_s, duration_s, seed)
        places = scaled_places(service_s, requirement_ms)
        console.print(f"  requirement {requirement_ms:.0f} ms; {trace.description}; {len(trace)} requests")
        runs: list[RouterRun] = []
        for router, name in ROUTERS.items():
            if stop.is_set():
                break
            await gateway.deploy(_desired(files[name], router, requirement_ms, places))
            await gateway.until_idle("digits")
            with live_progress(router, console) as show:
                runs.append(await gateway.replay("digits", router, trace, payloads, SendOptions(seed=seed), show, stop))
        console.print("draining …")
    facts = {
        "Service": f"scikit-learn's held-out digits as PNG and JPEG over HTTP; {payloads.description}",
        "Instances": "light-only: two light; heavy-only: two heavy; the others: one of each; one CPU thread each",
        "Service times": f"{HEAVY} {service_s[HEAVY] * 1e3:.1f} ms, {LIGHT} {service_s[LIGHT] * 1e3:.1f} ms per image,"
        " both busy, measured just before",
        "Places": f"{places[HEAVY]} with {HEAVY}, {places[LIGHT]} with {LIGHT}: full, they last for the same share of"
        " the requirement as in Tan's system",
        "Workload": trace.description,
        "Took": f"{time.monotonic() - started_s:.0f} s",
    }
    measured = {
        "service_s": service_s,
        "requirement_ms": requirement_ms,
        "places": places,
        "seconds": time.monotonic() - started_s,
    }
    records = {run.name: run.record for run in runs}
    warning = not_comparable(records)
    if not warning and (changed := changed_speed(records)):
        warning = f"not comparable: this machine changed its speed; {changed}. End other programs, and run again"
    title = "Tidegate demo: digits through bursts"
    tell(runs, trace, facts, requirement_ms, report, as_json, title, warning, measured)
    return stop.is_set()


def _desired(file: DeploymentFile, router: str, requirement_ms: float, places: Mapping[str, int]) -> Deployment:
    replace, state = msgspec.structs.replace, file.desired_state()
    spec = replace(state.services["digits"], router=router, requirement_ms=requirement_ms)
    workers = tuple(
        replace(worker, instances=tuple(replace(one, capacity=places[one.variant]) for one in worker.instances))
        for worker in state.workers
    )
    return replace(state, services={"digits": spec}, workers=workers)


async def _unless(stop: asyncio.Event, wanted: Coroutine[Any, Any, T]) -> T:
    """What `wanted` returns, unless Ctrl-C comes first."""
    working, stopping = asyncio.create_task(wanted), asyncio.create_task(stop.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    for task in (working, stopping):
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        return await working
    raise KeyboardInterrupt


async def measure(url: str, payloads: PayloadSet, seconds: float) -> dict[str, float]:
    """Seconds per image by variant, as one over its throughput while both instances are busy all the time.

    So everything that a request costs on this machine is in it: HTTP, decoding, the other instance, the clients.
    Four patient clients keep the heavy instance busy; two that have no time for its queue take the light one.
    """
    answers: Counter[str] = Counter()
    starts_s = time.monotonic() + 1.0
    ends_s = starts_s + seconds
    rng = np.random.default_rng(0)

    async def client(session: aiohttp.ClientSession, deadline_ms: str) -> None:
        while time.monotonic() < ends_s:
            payload = payloads.payloads[int(rng.integers(len(payloads.payloads)))]
            headers = {"Content-Type": payload.content_type, "X-Deadline-Ms": deadline_ms}
            async with session.post(url, data=payload.body, headers=headers) as response:
                answer: Mapping[str, Any] = msgspec.json.decode(await response.read())
            if response.status == 200 and starts_s <= time.monotonic() < ends_s:
                answers[str(answer["variant"])] += 1
            elif response.status >= 500:
                await asyncio.sleep(0.005)

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(client(session, deadline_ms) for deadline_ms in ["20000"] * 4 + ["80"] * 2))
    if not answers[HEAVY] or not answers[LIGHT]:
        raise GatewayError(f"too few answers while measuring ({dict(answers)}): see the workers' logs")
    return {variant: seconds / answers[variant] for variant in (HEAVY, LIGHT)}


def scaled_places(service_s: Mapping[str, float], requirement_ms: float) -> dict[str, int]:
    """Places of an instance by variant: a full queue lasts for the same share of the requirement as in Tan's system.

    There 15 places are 215% of it with the heavy model and 57.5% with the light one. A light model that is faster in
    proportion would otherwise refuse in a burst what it could still serve in time.
    """
    full_s = {variant: PAPER_PLACES * one_s for variant, one_s in ((HEAVY, PAPER_HEAVY_S), (LIGHT, PAPER_LIGHT_S))}
    return {
        variant: max(1, round(full_s[variant] / PAPER_REQUIREMENT_S * requirement_ms / 1e3 / service_s[variant]))
        for variant in (HEAVY, LIGHT)
    }


def scaled_workload(service_s: Mapping[str, float], duration_s: float, seed: int) -> tuple[Trace, float]:
    """Tan's two-phase workload (Eq. 12) at the same load-to-capacity ratios on one heavy and one light instance.

    Holding times are shortened. The first seed from `seed` on is taken whose trace has at least two bursts and is
    bursty for 10 to 20% of the time, so that a short trace shows both phases. Also the requirement in milliseconds,
    in Tan's proportion to the heavy model's service time.
    """
    capacity = 1 / service_s[HEAVY] + 1 / service_s[LIGHT]
    burst, calm = PAPER_BURST_LOAD * capacity, PAPER_NORMAL_LOAD * capacity
    process = MarkovianArrivalProcess(
        np.array([[-(burst + 1 / BURST_S), 1 / BURST_S], [1 / CALM_S, -(calm + 1 / CALM_S)]]),
        np.array([[burst, 0.0], [0.0, calm]]),
        phase_names=("bursty", "normal"),
    )
    while True:
        arrivals = process.generate(np.random.default_rng(seed), duration_s=duration_s)
        assert arrivals.phase is not None
        bursty = arrivals.phase == 0
        bursts = int(np.count_nonzero(bursty[1:] & ~bursty[:-1])) + int(bursty[0])
        share = np.count_nonzero(bursty) / burst / duration_s
        if bursts >= 2 and 0.1 <= share <= 0.2:
            break
        seed += 1
    description = (
        f"Tan's Eq. 12 at {burst:.0f} and {calm:.1f} requests/s (the paper's load-to-capacity ratios), mean holding"
        f" times {BURST_S:g} and {CALM_S:g} s, seed {seed}"
    )
    return Trace(description, arrivals), round(PAPER_REQUIREMENT_S / PAPER_HEAVY_S * service_s[HEAVY] * 1e3)
