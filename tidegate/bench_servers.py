"""`tidegate bench servers`: the same burst at Tidegate, NVIDIA Triton and Ray Serve, over the same emulated devices."""

import asyncio
import contextlib
import json
import os
import resource
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Final

import aiohttp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from loadgen.console import live_progress
from loadgen.payloads import PayloadSet, emulated
from loadgen.score import LATE_RUN_RATIO, late_ratio
from loadgen.sender import replay, run_on_uvloop
from loadgen.traces import Trace, parse_workload
from policies.routing.workload import Constant
from protocol.deployment import did_you_mean
from tidegate.bench_servers_footprint import cpu_s, descendants, memory_mb
from tidegate.bench_servers_lineups import LINEUPS, ROOT, TIMEOUT_S, Lineup, Target, environment_python, started
from tidegate.bench_servers_scores import MEANS, server_score
from tidegate.replay_commands import stop_on_interrupt
from tidegate.running import GatewayError, in_words
from tidegate.up_command import StartFailed

REQUIREMENT_S: Final = 0.3
BODY_BYTES: Final = 40_000
WARM_UP: Final = Trace("warm-up", Constant(10.0).generate(np.random.default_rng(0), 2.0))
"""Not scored: first requests open connections and, in Ray Serve, make routers."""
SETTLING_S: Final = 2.0
SAMPLE_S: Final = 0.5
READY_PATIENCE_S: Final = 120.0
WIDTH: Final = 140
"""Columns of the tables, also where standard output is a file."""


def bench_servers(
    environment: Annotated[
        Path,
        typer.Option(
            help="A virtual environment with ray\\[serve]==2.60.0 and nvidia-pytriton==0.7.0.",
            show_default=".venv-servers",
        ),
    ] = ROOT / ".venv-servers",
    only: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(LINEUPS)}. All without it.")] = "",
    workload: Annotated[str, typer.Option(help="As for tidegate replay; paper is Tan's bursts.")] = "paper",
    seconds: Annotated[float, typer.Option(help="Length of each run.", min=1.0)] = 40.0,
    time_scale: Annotated[float, typer.Option(help="Multiplies holding times.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Same seed, same requests.")] = 1,
    slower: Annotated[
        float, typer.Option(help="Services take so many times longer than the others' queues are set up for.", min=0.1)
    ] = 1.0,
    into: Annotated[
        Path | None, typer.Option(help="A JSON file to add the figures to; the table shows all of it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Tan's bursts at Tidegate, NVIDIA Triton Inference Server and Ray Serve, one after the other, scored alike.

    Real: HTTP, processes, queues, 40 kB bodies, an open loop. Emulated: the devices, which wait instead of computing
    (two heavy of 43 ms, two light of 11.5 ms, or four of one kind). In time is what the client has within 300 ms.

    Triton and Ray Serve are no part of this project and come from an environment of their own:

    python3.11 -m venv .venv-servers && .venv-servers/bin/pip install 'ray\\[serve]==2.60.0' nvidia-pytriton==0.7.0

    Example: tidegate bench servers --only tidegate-deadline,triton-first-idle,ray-ingress
    """
    console = Console(stderr=True, highlight=False)
    names = [name.strip() for name in only.split(",") if name.strip()] or list(LINEUPS)
    for name in names:
        if name not in LINEUPS:
            raise typer.BadParameter(
                f"{name!r} is none of {', '.join(LINEUPS)}{did_you_mean(name, LINEUPS)}", param_hint="--only"
            )
    try:
        python = Path()
        if any(LINEUPS[name].server != "tidegate" for name in names):
            python = environment_python(environment)
        trace = parse_workload(workload, seed=seed, duration_s=seconds, time_scale=time_scale)
        figures: dict[str, Any] = {}
        if into is not None and into.exists():
            figures = json.loads(into.read_text())
        for name in names:
            key = name if slower == 1.0 else f"{name}, x{slower:g}"
            figures[key] = run_on_uvloop(_measure(LINEUPS[name], python, trace, slower, seed))
            if into is not None:
                into.write_text(json.dumps(figures, indent=1))
    except (StartFailed, GatewayError, OSError, ValueError) as error:
        console.print(f"tidegate bench servers: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(figures))
        return
    _print(figures)


async def _measure(lineup: Lineup, python: Path, trace: Trace, slower: float, seed: int) -> dict[str, Any]:
    """All figures of one server: started, left idle, warmed, loaded, ended."""
    stop = stop_on_interrupt()
    payloads = emulated(BODY_BYTES)
    started_s = time.monotonic()
    async with started(lineup, python, slower, seed) as target:
        await _until_answered(target, payloads)
        ready_s = time.monotonic() - started_s
        async with _watched() as idle:
            await asyncio.sleep(SETTLING_S)
        idle_pss_mb, idle_rss_mb = memory_mb(descendants(os.getpid()))
        await replay(target.url, WARM_UP, payloads, target.options)
        sender_s = _own_cpu_s()
        async with _watched() as usage:
            with live_progress(lineup.name) as show:
                record = await replay(target.url, trace, payloads, target.options, show, stop)
        sender_s = _own_cpu_s() - sender_s
        loaded_pss_mb, _ = memory_mb(descendants(os.getpid()))
    if record.interrupted:
        raise KeyboardInterrupt
    return {
        "server": lineup.server,
        "chooses": lineup.chooses,
        "workload": trace.description,
        "ready_s": ready_s,
        "processes": usage["processes"],
        "idle_pss_mb": idle_pss_mb,
        "idle_rss_mb": idle_rss_mb,
        "loaded_pss_mb": loaded_pss_mb,
        "idle_cores": idle["cpu_s"] / SETTLING_S,
        "cpu_s_per_1000": 1e3 * usage["cpu_s"] / len(record),
        "cores_at_most": usage["cores_at_most"],
        "sender_cpu_s": sender_s,
        "sent_late_ratio": late_ratio(record),
        "phases": server_score(record, REQUIREMENT_S),
    }


@contextlib.asynccontextmanager
async def _watched() -> AsyncIterator[dict[str, Any]]:
    """Fills what the server's processes use meanwhile: cpu_s, cores_at_most (over half a second), processes."""
    pids = descendants(os.getpid())
    usage: dict[str, Any] = {"processes": len(pids), "cores_at_most": 0.0}

    async def sample() -> None:
        at_s, used_s = time.monotonic(), cpu_s(pids)
        while True:
            await asyncio.sleep(SAMPLE_S)
            now_s, now_used_s = time.monotonic(), cpu_s(pids)
            usage["cores_at_most"] = max(usage["cores_at_most"], (now_used_s - used_s) / (now_s - at_s))
            at_s, used_s = now_s, now_used_s

    before_s = cpu_s(pids)
    sampling = asyncio.create_task(sample())
    try:
        yield usage
    finally:
        sampling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampling
        usage["cpu_s"] = cpu_s(pids) - before_s


async def _until_answered(target: Target, payloads: PayloadSet) -> None:
    """Returns at the first 200."""
    ends_s = time.monotonic() + READY_PATIENCE_S
    headers = {"Content-Type": "application/octet-stream", **target.options.headers}
    said = "nothing"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:
        while time.monotonic() < ends_s:
            try:
                async with session.post(target.url, data=payloads.payloads[0].body, headers=headers) as response:
                    if response.status == 200:
                        return
                    said = f"{response.status}: {(await response.text(errors='replace'))[:200]}"
            except (aiohttp.ClientError, TimeoutError) as error:
                said = in_words(error)
            if words := target.last_words():
                raise StartFailed(f"the server ended by itself: {words}")
            await asyncio.sleep(0.1)
    raise StartFailed(f"{target.url} did not answer within {READY_PATIENCE_S:g} s; last: {said}")


def _own_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _print(figures: dict[str, Any]) -> None:
    phases = Table(
        "server", "phase", "requests", "goodput", "violations", "late", "refused", "other", "heavy", "P50 ms", "P99 ms"
    )
    costs = Table(
        "server",
        "ready s",
        "processes",
        "idle MB",
        "loaded MB",
        "idle cores",
        "CPU s/1,000",
        "cores at most",
        "sent late",
    )
    for name, one in figures.items():
        for phase, row in one["phases"].items():
            if phase != "overall" or len(one["phases"]) == 1:
                ratios = [_percent(row[key]) for key in (*MEANS[:5], "heavy_ratio")]
                times = [_number(row.get(key)) for key in ("p50_ms", "p99_ms")]
                phases.add_row(name, phase, str(row.get("requests", "")), *ratios, *times)
        costs.add_row(
            name,
            f"{one['ready_s']:.1f}",
            str(one["processes"]),
            f"{one['idle_pss_mb']:,.0f}",
            f"{one['loaded_pss_mb']:,.0f}",
            f"{one['idle_cores']:.2f}",
            f"{one['cpu_s_per_1000']:.2f}",
            f"{one['cores_at_most']:.2f}",
            _percent(one["sent_late_ratio"]),
        )
    console = Console(width=max(WIDTH, Console().width))
    console.print(phases)
    console.print(costs)
    behind = [name for name, one in figures.items() if one["sent_late_ratio"] > LATE_RUN_RATIO]
    if behind:
        print(f"not comparable: requests left late with {', '.join(behind)}: end other programs on this machine")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}%"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
