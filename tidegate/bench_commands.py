"""`tidegate bench gateway` and `tidegate bench overload`: what the serving system itself costs, and what it saves."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import aiohttp
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from loadgen.answers import Outcome
from loadgen.console import live_progress
from loadgen.payloads import emulated
from loadgen.score import details
from loadgen.sender import SendOptions, run_on_uvloop
from loadgen.traces import Trace
from policies.routing.workload import Constant
from protocol.deployment import read_deployment
from tidegate import bench_live, bench_servers, bench_tables
from tidegate.replay_commands import stop_on_interrupt
from tidegate.running import RunningGateway
from tidegate.supervisor import Supervisor, free_port
from tidegate.up_command import StartFailed, until_ready, with_address

app = typer.Typer(help="Measure the serving system itself.", no_args_is_help=True)

ROOT: Final = Path(__file__).parent.parent
MOSEC: Final = "mosec==0.9.8"
MOSEC_ENVIRONMENT: Final = ROOT / ".venv-mosec"
BODY_BYTES: Final = 40_000
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


class BenchError(RuntimeError):
    """Something that the measurement needs is missing: says what and how to get it."""


@app.command("gateway")
def bench_gateway(
    repeats: Annotated[int, typer.Option(help="Rounds; medians over rounds are reported.")] = 5,
    seconds: Annotated[int, typer.Option(help="Length of one measurement.", min=1)] = 4,
    as_json: AsJson = False,
) -> None:
    """Requests/s and latency of the whole path with an instance that answers at once, beside MOSEC and a bare app.

    All three run at the same time and are measured in turn, round by round, by wrk with 40 kB bodies.

    Example: tidegate bench gateway --repeats 5 --seconds 2
    """
    console = Console(stderr=True, highlight=False)
    try:
        result = asyncio.run(_bench_gateway(repeats, seconds, console))
    except (BenchError, StartFailed, OSError) as error:
        console.print(f"tidegate bench gateway: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(result))
        return
    table = Table("connections", "system", "requests/s", "P50 ms", "P99 ms", title=f"medians of {repeats} rounds")
    for name in ("c1", "c16"):
        for system, row in result[name].items():
            table.add_row(name[1:], system, f"{row['rps']:,.0f}", f"{row['p50_ms']:.3f}", f"{row['p99_ms']:.3f}")
    Console().print(table)
    ours, mosec = result["c16"]["ours"], result["c16"]["mosec"]
    ours1, mosec1 = result["c1"]["ours"], result["c1"]["mosec"]
    print(
        f"16 connections: {ours['rps'] / mosec['rps']:.2f}x MOSEC's requests/s, P99 {ours['p99_ms']:.2f} against"
        f" {mosec['p99_ms']:.2f} ms; 1 connection: median {ours1['p50_ms'] / mosec1['p50_ms']:.2f}x MOSEC's"
    )


async def _bench_gateway(repeats: int, seconds: int, console: Console) -> dict[str, Any]:
    wrk = shutil.which("wrk")
    if wrk is None:
        raise BenchError("wrk is not installed: apt-get install wrk (or your system's package)")
    python = _mosec_python(console)
    file = with_address(read_deployment(ROOT / "deploy" / "null.toml"), None, free_port())
    mosec_port, raw_port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "post.lua"
        script.write_text(
            'wrk.method = "POST"\n'
            f'wrk.body = string.rep("x", {BODY_BYTES})\n'
            'wrk.headers["Content-Type"] = "application/octet-stream"\n'
        )
        raw = [sys.executable, "-m", "uvicorn", "bench.raw_app:app", "--port", str(raw_port), "--loop", "uvloop"]
        raw += ["--http", "httptools", "--no-access-log", "--log-level", "warning", "--no-server-header"]
        mosec = [str(python), str(ROOT / "bench" / "mosec_app.py"), "--port", str(mosec_port), "--address", "127.0.0.1"]
        supervisor = Supervisor(file)
        async with supervisor, _process(raw), _process([*mosec, "--log-level", "warning"]):
            await until_ready(supervisor)
            urls = {
                "ours": f"{supervisor.url}/v1/null",
                "mosec": f"http://127.0.0.1:{mosec_port}/inference",
                "raw": f"http://127.0.0.1:{raw_port}/",
            }
            for url in urls.values():
                await _until_posts(url)
            rows: dict[str, dict[str, list[dict[str, float]]]] = {
                name: {system: [] for system in urls} for name in ("c1", "c16")
            }
            with console.status("") as status:
                for number in range(repeats):
                    for name, connections in (("c1", 1), ("c16", 16)):
                        for system, url in urls.items():
                            status.update(f"round {number + 1} of {repeats}: {system}, {connections} connections")
                            rows[name][system].append(await _wrk(wrk, script, url, connections, seconds))
    result: dict[str, Any] = {
        name: {
            system: {key: statistics.median(one[key] for one in measured) for key in measured[0]}
            for system, measured in systems.items()
        }
        for name, systems in rows.items()
    }
    return {**result, "repeats": repeats}


async def _wrk(wrk: str, script: Path, url: str, connections: int, seconds: int) -> dict[str, float]:
    process = await asyncio.create_subprocess_exec(
        wrk, "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(script), url,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output = (await process.communicate())[0].decode()
    if (wrong := re.search(r"Non-2xx or 3xx responses: (\d+)", output)) is not None:
        raise BenchError(f"{url}: {wrong[1]} requests were refused or failed")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    if rate is None:
        raise BenchError(f"wrk said nothing about {url}: {output[-200:]}")
    return {"rps": float(rate[1]), "p50_ms": _percentile_ms(output, 50), "p99_ms": _percentile_ms(output, 99)}


def _percentile_ms(output: str, percent: int) -> float:
    found = re.search(rf"\s{percent}%\s+([\d.]+)(us|ms|s)\s", output)
    if found is None:
        raise BenchError(f"wrk printed no {percent}th percentile")
    return float(found[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[found[2]]


def _mosec_python(console: Console) -> Path:
    python = MOSEC_ENVIRONMENT / "bin" / "python"
    if not python.exists():
        console.print(f"installing {MOSEC} into {MOSEC_ENVIRONMENT.name} …")
        subprocess.run([sys.executable, "-m", "venv", str(MOSEC_ENVIRONMENT)], check=True)
    installed = subprocess.run([str(python), "-c", "import mosec"], check=False, capture_output=True)
    if installed.returncode:
        installed = subprocess.run([str(python), "-m", "pip", "install", "-q", MOSEC], check=False, capture_output=True)
    if installed.returncode:
        raise BenchError(f"{MOSEC} could not be installed: {installed.stderr.decode()[-300:]}")
    return python


@contextlib.asynccontextmanager
async def _process(command: Sequence[str]) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        await process.wait()


async def _until_posts(url: str) -> None:
    ends_s = time.monotonic() + 30.0
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < ends_s:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.post(url, data=b"x") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.1)
    raise BenchError(f"{url} did not answer within 30 s")


@app.command("overload")
def bench_overload(
    rate: Annotated[float, typer.Option(help="Requests per second; the instance can serve 20.")] = 60.0,
    seconds: Annotated[float, typer.Option(help="How long.")] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Three times the load that one instance of 50 ms can serve, from clients that give up after 1 s.

    What counts is how many useful answers come, how fast the rest is refused, and that nothing is computed for
    clients that have gone.

    Example: tidegate bench overload --json
    """
    console = Console(stderr=True, highlight=False)
    try:
        result = run_on_uvloop(_bench_overload(rate, seconds))
    except (StartFailed, OSError) as error:
        console.print(f"tidegate bench overload: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:>20}  {value:.2f}" if isinstance(value, float) else f"{key:>20}  {value}")


async def _bench_overload(rate: float, seconds: float) -> dict[str, Any]:
    file = with_address(read_deployment(ROOT / "deploy" / "overload.toml"), None, free_port())
    supervisor = Supervisor(file)
    trace = Trace(f"{rate:g} requests/s", Constant(rate).generate(np.random.default_rng(0), seconds))
    async with supervisor, RunningGateway(supervisor.url) as gateway:
        await until_ready(supervisor)
        options = SendOptions(timeout_s=1.0)
        with live_progress("overload") as show:
            stop = stop_on_interrupt()
            run = await gateway.replay("slow", "overload", trace, emulated(classes=2), options, show, stop)
        if stop.is_set():
            raise KeyboardInterrupt
        # The replay ends when its last request has: a little after the load's end. What is computed from
        # here on is computed for nobody.
        at_end = _computed(await gateway.state())
        await asyncio.sleep(1.0)
        after = _computed(await gateway.state())
        idle = all(view["length"] == 0 for view in (await gateway.service("slow"))["instances"])
    found = details(run.record)
    outcomes = found["outcomes"]
    return {
        "offered": len(run.record),
        "ok": outcomes.get(Outcome.OK.name, 0),
        "refused": outcomes.get(Outcome.QUEUE_FULL.name, 0) + outcomes.get(Outcome.EXPIRED.name, 0),
        "timeout": outcomes.get(Outcome.TIMEOUT.name, 0),
        "refusal_p99_ms": found["refusal_p99_ms"],
        "computed": after,
        "computed_after_end": after - at_end,
        "idle_within_1_s": idle,
    }


def _computed(state: dict[str, Any]) -> int:
    ends = state["dispatch"]["attempts"].values()
    return sum(one.get("OK", 0) + one.get("LATE", 0) for one in ends)


app.command("live")(bench_live.bench_live)
app.command("memory")(bench_live.bench_memory)
app.command("router")(bench_live.bench_router)
app.command("servers")(bench_servers.bench_servers)
app.command("tables")(bench_tables.bench_tables)
