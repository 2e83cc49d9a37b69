"""`tidegate bench tables`: how long after a slot's start a gateway routes by that slot's table, on both boards.

Slots start at whole multiples of their length on the monotonic clock, which is one clock for all processes of a
machine; the gateway's `/state` is asked every few milliseconds until it names the next version. The figure therefore
holds everything: looking at the workers, deciding, the board, the subscription, and at most one more question.
"""

import asyncio
import math
import time
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import typer

from loadgen.console import live_progress
from loadgen.payloads import emulated
from loadgen.sender import SendOptions
from loadgen.traces import Trace
from policies.routing.workload import Poisson
from protocol.deployment import read_deployment
from tidegate.bench_live import ended, print_figures
from tidegate.replay_commands import stop_on_interrupt
from tidegate.running import GatewayError, RunningGateway
from tidegate.supervisor import Supervisor, free_port
from tidegate.up_command import until_ready, with_address

PAPER_T4: Final = Path(__file__).parent.parent / "deploy" / "paper-t4.toml"
ASK_EVERY_S: Final = 0.002
ALLOWED_MS: Final = {"redis-server": 50.0, "embedded": 100.0}


def bench_tables(
    seconds: Annotated[float, typer.Option(help="Length of the run on each board.")] = 60.0,
    router: Annotated[str, typer.Option(help="A router that sets tables.")] = "learned-po",
    rate: Annotated[float, typer.Option(help="Requests per second meanwhile.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Milliseconds from a slot's start until the gateway has its table: P50, P99 and the longest, on both boards.

    At most 50 ms on a real Redis and 100 ms on the embedded board are aimed for.
    """
    print_figures(ended(_bench_tables(seconds, router, rate)), as_json)


async def _bench_tables(seconds: float, router: str, rate: float) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for embedded_board in (False, True):
        board, delays_ms, slots = await _measure(embedded_board, seconds, router, rate)
        if not delays_ms:
            raise GatewayError(f"no table of {router} came in {seconds:g} s: does it set tables for paper-t4.toml?")
        p50, p99 = (float(one) for one in np.percentile(delays_ms, (50, 99)))
        result[board] = {
            "slots": slots,
            "seen": len(delays_ms),
            "p50_ms": round(p50, 2),
            "p99_ms": round(p99, 2),
            "max_ms": round(max(delays_ms), 2),
            "within": sum(one <= ALLOWED_MS.get(board, 50.0) for one in delays_ms),
        }
    return result


async def _measure(embedded_board: bool, seconds: float, router: str, rate: float) -> tuple[str, list[float], int]:
    file = read_deployment(PAPER_T4)
    services = {name: msgspec.structs.replace(spec, router=router) for name, spec in file.services.items()}
    (name,) = services
    own = with_address(msgspec.structs.replace(file, services=services), None, free_port())
    supervisor = Supervisor(own, embedded=embedded_board)
    trace = Trace(f"Poisson {rate:g}/s", Poisson(rate).generate(np.random.default_rng(1), seconds))
    delays_ms: list[float] = []
    slots = 0
    async with supervisor, RunningGateway(supervisor.url) as gateway:
        await until_ready(supervisor)
        await asyncio.sleep(3.0 * file.scheduler.slot_s)
        with live_progress(f"tables on {supervisor.board_kind}") as show:
            loaded = asyncio.create_task(
                gateway.replay(name, "", trace, emulated(), SendOptions(), show, stop_on_interrupt())
            )
            while not loaded.done():
                slots += 1
                if (delay_s := await next_table_s(gateway, name, file.scheduler.slot_s)) is not None:
                    delays_ms.append(1e3 * delay_s)
            await loaded
    return supervisor.board_kind, delays_ms, slots


async def next_table_s(gateway: RunningGateway, service: str, slot_s: float) -> float | None:
    """Seconds from the next slot's start until the gateway has another table than just before it; None: not in it."""
    start_s = (math.floor(time.monotonic() / slot_s) + 1) * slot_s
    await asyncio.sleep(start_s - 0.02 - time.monotonic())
    before = (await gateway.service(service))["table_version"]
    await asyncio.sleep(start_s - time.monotonic())
    while time.monotonic() < start_s + 0.8 * slot_s:
        if (await gateway.service(service))["table_version"] > before:
            return time.monotonic() - start_s
        await asyncio.sleep(ASK_EVERY_S)
    return None
