"""`tidegate edge compare`: one workload of images and clips through one placement policy after the other, live.

render ─► for each policy: nodes unload ─► policy in force, nodes idle ─► send in open loop ─► figures ─► tell
                                                                                   and the deployment as it was
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.edge_catalog import load_edge_catalog
from policies.placement.deployed import network_of
from protocol.deployment import read_deployment
from protocol.records import Deployment
from tidegate.edge_compare_figures import PolicyFigures, not_comparable, policy_figures
from tidegate.edge_compare_report import print_figures, write_page
from tidegate.edge_compare_scores import need_scores
from tidegate.edge_compare_send import EdgeOperator, PolicyUnusable
from tidegate.edge_compare_workload import EdgeWorkload, draw_arrivals, kinds_of, render_workload
from tidegate.running import GatewayError
from tidegate.supervisor import Supervisor
from tidegate.up_command import until_ready, with_address

PLAIN_EVERY_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was asked for. `file`: a deployment to start here, instead of the gateway at `url`."""

    url: str
    file: Path | None
    policies: tuple[str, ...]
    requests: int
    seed: int
    every_s: float
    rehearse: int
    report: Path | None
    as_json: bool
    admin_token: str = ""


class Comparison(msgspec.Struct, frozen=True):
    """What `--json` prints. `left_out`: policies that could not place here, and why."""

    workload: str
    policies: list[PolicyFigures]
    comparable: bool
    warning: str
    left_out: dict[str, str]


async def compare(plan: Plan, stop: asyncio.Event, console: Console) -> Comparison:
    """Runs it, and tells on stdout (and in the report) what was done until the end or `stop`; restores the deployment.

    Raises GatewayError, WorkloadError, ScoresMissing, TableError, StartFailed: all say what to do.
    """
    need_scores()
    left_out: dict[str, str] = {}
    done: list[PolicyFigures] = []
    async with _served(plan, console) as url, EdgeOperator(url, plan.admin_token) as gateway:
        await gateway.edge()
        deployment = await gateway.deployment()
        assert deployment.edge is not None, "edge() has found one"
        network = network_of(deployment.edge)
        arrivals = draw_arrivals(
            network,
            plan.requests,
            deployment.edge.per_service,
            plan.every_s,
            deployment.edge.window_ms / 1e3,
            plan.seed,
        )
        with _progress(console, "rendering scenes", len(arrivals)) as rendered:
            kinds = kinds_of(network, load_edge_catalog())
            workload = await asyncio.to_thread(render_workload, arrivals, kinds, plan.seed, lambda n: rendered(n, ""))
        console.print(f"{workload.description}; {len(plan.policies)} policies", highlight=False, markup=False)
        try:
            for policy in plan.policies:
                if stop.is_set():
                    break
                await gateway.forget(deployment, network)
                try:
                    await gateway.use(_whole(policy), deployment)
                except PolicyUnusable as error:
                    left_out[policy] = str(error)
                    console.print(f"{policy} is left out: {error}", style="yellow", highlight=False, markup=False)
                    continue
                if plan.rehearse:
                    await gateway.send(workload.rehearsal(plan.rehearse), network, lambda n, ends: None, stop)
                if stop.is_set():
                    break
                loads = await gateway.until_idle_again()
                with _progress(console, policy, len(workload.arrivals)) as show:
                    sent = await gateway.send(workload, network, lambda n, ends: show(n, _ends(ends)), stop)
                loads = await gateway.until_idle_again() - loads
                emulate = deployment.edge.emulate
                done.append(await asyncio.to_thread(policy_figures, policy, sent, workload, network, emulate, loads))
        finally:
            with contextlib.suppress(GatewayError):  # it has gone: there is nothing to restore
                await gateway.put(deployment)
    return _told(plan, workload, deployment, url, done, left_out)


def _whole(policy: str) -> str:
    """A trained policy's path from the root on: the scheduler may have another working directory."""
    return str(Path(policy).resolve()) if "/" in policy else policy


def _told(
    plan: Plan,
    workload: EdgeWorkload,
    deployment: Deployment,
    url: str,
    done: Sequence[PolicyFigures],
    left_out: dict[str, str],
) -> Comparison:
    warning = not_comparable(done)
    result = Comparison(workload.description, list(done), not warning, warning, left_out)
    title = f"Placement policies on {deployment.name}: {workload.description}"
    if plan.report is not None and done:
        variants = f"unloaded before each policy, which then places {plan.rehearse} requests that do not count"
        facts = {
            "Deployment": f"{deployment.name} at {url}",
            "Workload": f"{workload.description}; a window's worth every {plan.every_s:g} s",
            "Variants": variants,
        }
        facts |= {f"Left out: {policy}": why for policy, why in left_out.items()}
        write_page(plan.report, done, title, facts, warning)
    if plan.as_json:
        print(msgspec.json.encode(result).decode())
    elif done:
        print_figures(done, title, warning)
        if plan.report is not None:
            print(f"report: {plan.report.resolve()}")
    return result


@contextlib.asynccontextmanager
async def _served(plan: Plan, console: Console) -> AsyncIterator[str]:
    """The gateway's address; with a file, of a system that lives as long as this."""
    if plan.file is None:
        yield plan.url
        return
    supervisor = Supervisor(
        with_address(read_deployment(plan.file), None, 0),
        on_event=lambda text: console.print(text, style="yellow", markup=False, soft_wrap=True),
    )
    console.print(f"starting {plan.file} …", highlight=False, markup=False)
    async with supervisor:
        await until_ready(supervisor)
        yield supervisor.url
        console.print("draining …")


@contextlib.contextmanager
def _progress(console: Console, name: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A function that shows how far it is: a live line at a terminal, else a plain one every two seconds."""
    if not console.is_terminal:
        due_s = time.monotonic() + PLAIN_EVERY_S

        def say(done: int, text: str) -> None:
            nonlocal due_s
            if time.monotonic() >= due_s or (done == total and not text):
                due_s = time.monotonic() + PLAIN_EVERY_S
                console.print(f"{name}: {done}/{total} {text}".rstrip(), highlight=False, markup=False)

        yield say
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[text]}"), console=console) as bar:
        task = bar.add_task(name, total=total, text="")
        yield lambda done, text: bar.update(task, completed=done, text=text)


def _ends(ends: Counter[str]) -> str:
    return " · ".join(f"{count} {outcome}" for outcome, count in sorted(ends.items()))
