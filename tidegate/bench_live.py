"""`tidegate bench live`, `memory` and `router`: the running system against arithmetic, its size, and its decisions."""

import asyncio
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, Any, Final

import numpy as np
import typer
from rich.console import Console

from gateway.router import ServiceRouter
from loadgen.console import live_progress
from loadgen.payloads import digits, emulated
from loadgen.record import RunRecord
from loadgen.score import details, score
from loadgen.sender import SendOptions, run_on_uvloop
from loadgen.traces import Trace
from policies.routing.draw import by_alias, by_bisection
from policies.routing.workload import Constant, PeriodicProcess, Poisson
from protocol.deployment import read_deployment
from protocol.records import InstanceRecord, InstanceState, ServiceSpec
from tidegate.replay_commands import DIGITS_SPLIT, stop_on_interrupt
from tidegate.running import GatewayError, RunningGateway
from tidegate.supervisor import Child, Supervisor, free_port
from tidegate.up_command import StartFailed, until_ready, with_address

ROOT: Final = Path(__file__).parent.parent
SETTLING_S: Final = 5.0
"""Left out at the start of the heavy run: a queue of 15 takes some seconds to be full for good."""
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def bench_live(
    seconds: Annotated[float, typer.Option(help="Length of each of the three runs.")] = 60.0, as_json: AsJson = False
) -> None:
    """Tan's three deployments (emulated instances), live, beside what arithmetic says.

    light: Poisson 100/s, all within 300 ms. heavy: 180/s on a capacity of 4/0.043 = 93/s, 46 to 50% refused, at once.
    deadline: 10 s of 10/s and 10 s of 180/s in turn, under 0.5% violations and 23% or more heavy in bursts.

    Example: tidegate bench live --seconds 60
    """
    print_figures(ended(_bench_live(seconds)), as_json)


async def _bench_live(seconds: float) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    bursts = PeriodicProcess(normal_s=10.0, bursty_s=10.0)
    light = await _replay("paper-t4-light", Trace("Poisson 100/s", Poisson(100.0).generate(rng, seconds)))
    heavy = await _replay("paper-t4-heavy", Trace("Poisson 180/s", Poisson(180.0).generate(rng, seconds)))
    both = await _replay("paper-t4", Trace("10 s of 10/s, 10 s of 180/s", bursts.generate(rng, seconds)))
    steady = heavy.intended_s >= SETTLING_S
    refused = steady & (heavy.outcome == 2)
    scored = score(both)
    return {
        "light": {
            **_head(light),
            "violation_ratio": score(light)["overall"]["violation_ratio"],
            "longest_ms": float(np.max(light.latency_s[light.answered]) * 1e3),
        },
        "heavy": {
            **_head(heavy),
            "refused_ratio": float(refused.sum() / max(1, steady.sum())),
            "refusal_p99_ms": details(heavy)["refusal_p99_ms"],
        },
        "deadline": {
            **_head(both),
            "violation_ratio": scored["overall"]["violation_ratio"],
            "bursty_heavy_ratio": scored["bursty"]["heavy_ratio"],
            "bursty_violation_ratio": scored["bursty"]["violation_ratio"],
        },
    }


def _head(record: RunRecord) -> dict[str, Any]:
    sending = details(record)["sending"]
    return {"requests": len(record), "sent_late": sending["late"]}


async def _replay(deployment: str, trace: Trace) -> RunRecord:
    file = with_address(read_deployment(ROOT / "deploy" / f"{deployment}.toml"), None, free_port())
    supervisor = Supervisor(file)
    async with supervisor, RunningGateway(supervisor.url) as gateway:
        await until_ready(supervisor)
        with live_progress(deployment) as show:
            run = await gateway.replay("imagenet", "", trace, emulated(), SendOptions(), show, stop_on_interrupt())
    if run.record.interrupted:
        raise KeyboardInterrupt
    return run.record


def bench_memory(
    seconds: Annotated[float, typer.Option(help="How long.")] = 300.0,
    rate: Annotated[float, typer.Option(help="Requests per second.")] = 40.0,
    as_json: AsJson = False,
) -> None:
    """Resident memory of gateway and digits workers under load: after 30 s, at the end, and the growth between.

    Example: tidegate bench memory --seconds 60
    """
    print_figures(ended(_bench_memory(seconds, rate)), as_json)


async def _bench_memory(seconds: float, rate: float) -> dict[str, Any]:
    file = with_address(read_deployment(ROOT / "deploy" / "digits.toml"), None, free_port())
    supervisor = Supervisor(file)
    trace = Trace(f"{rate:g} requests/s", Constant(rate).generate(np.random.default_rng(0), seconds))
    started_s = time.monotonic()
    early: dict[str, float] = {}
    async with supervisor, RunningGateway(supervisor.url) as gateway:
        await until_ready(supervisor)
        ready_s = time.monotonic() - started_s
        children = [*supervisor.gateways, *supervisor.workers]

        async def look() -> None:
            await asyncio.sleep(min(30.0, seconds / 2))
            early.update({child.name: _resident_mb(child) for child in children})

        looking = asyncio.create_task(look())
        with live_progress("memory") as show:
            stop = stop_on_interrupt()
            await gateway.replay("digits", "", trace, digits(DIGITS_SPLIT), SendOptions(), show, stop)
        if stop.is_set():
            looking.cancel()
            raise KeyboardInterrupt
        await looking
        late = {child.name: _resident_mb(child) for child in children}
    return {
        "ready_s": ready_s,
        **{
            name: {"early_mb": early[name], "late_mb": late[name], "growth_ratio": late[name] / early[name] - 1.0}
            for name in late
        },
    }


def _resident_mb(child: Child) -> float:
    pid = child.statistics().pid
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise GatewayError(f"{child.name} has no resident size: it is not running")


def bench_router(as_json: AsJson = False) -> None:
    """Microseconds of one routing decision (`deadline`, 4 and 256 instances) and of one draw from a table.

    Example: tidegate bench router --json
    """
    random = Random(0).random
    result: dict[str, Any] = {}
    for number in (4, 256):
        router = _router(number)
        weights = [random() for _ in range(number)]
        by_sums, by_names = by_bisection(weights), by_alias(weights)
        now_s = time.monotonic()
        result[f"n{number}"] = {
            "deadline_us": _microseconds(partial(router.route, now_s, 0.3, 0.5)),
            "draw_us": _microseconds(partial(by_sums, 0.5)),
            "draw_alias_us": _microseconds(partial(by_names, 0.5)),
        }
    print_figures(result, as_json)


def _router(instances: int) -> ServiceRouter:
    router = ServiceRouter("imagenet", ServiceSpec(variants=("heavy", "light"), requirement_ms=300.0))
    records = [
        InstanceRecord(
            id=f"{number:03d}/x",
            worker=f"{number:03d}",
            address="unix:x",
            service="imagenet",
            variant="heavy" if number % 2 else "light",
            capacity=15,
            state=InstanceState.READY,
            epoch="1",
            service_s=0.04 if number % 2 else 0.01,
        )
        for number in range(instances)
    ]
    router.set_instances(records, {"unix:x"})
    return router


def _microseconds(call: Callable[[], object], calls: int = 20_000) -> float:
    """Median over 9 rounds of the mean time of a call, the loop around it included."""

    def round_s(function: Callable[[], object]) -> float:
        started_s = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - started_s) / calls

    return 1e6 * statistics.median(round_s(call) for _ in range(9))


def ended(main: Any) -> dict[str, Any]:
    """What a measurement gives back; its errors as one line and exit code 1."""
    try:
        return dict(run_on_uvloop(main))
    except (GatewayError, StartFailed, OSError) as error:
        Console(stderr=True).print(
            f"tidegate bench: {error}", style="red", highlight=False, markup=False, soft_wrap=True
        )
        raise typer.Exit(1) from None


def print_figures(result: dict[str, Any], as_json: bool) -> None:
    """One line per measured thing, or one JSON object."""
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        if isinstance(value, dict):
            shown = ", ".join(
                f"{key} {one:.4g}" if isinstance(one, float) else f"{key} {one}" for key, one in value.items()
            )
            print(f"{name}: {shown}")
        else:
            print(f"{name}: {value:.3g}")
