"""`tidegate edge ...`: what is done with a running edge network."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loadgen.report import check_place
from loadgen.sender import run_on_uvloop
from policies.placement.contract import ALL as POLICIES
from protocol.deployment import did_you_mean
from tidegate.replay_commands import INTERRUPTED_EXIT, stop_on_interrupt

app = typer.Typer(no_args_is_help=True, help="Edge networks: detection and tracking on nodes.", add_completion=False)
DEFAULT_POLICIES = "hisper-sequential,beam,sequential,heuristic,random"


@app.callback()
def _edge() -> None:
    """Edge networks: detection and tracking on nodes."""


@app.command()
def compare(
    url: Annotated[
        str, typer.Argument(help="The gateway, as http://host:port or host:port.")
    ] = "http://127.0.0.1:8700",
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="Start this deployment instead, as deploy/edge4.toml.")
    ] = None,
    policies: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(POLICIES)}, or a trained one's path.")] = (
        DEFAULT_POLICIES
    ),
    requests: Annotated[int, typer.Option(min=1, help="How many each policy gets, images and clips together.")] = 48,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same requests.")] = 0,
    every_s: Annotated[float, typer.Option(help="Seconds from one window's worth of requests to the next.")] = 2.0,
    rehearse: Annotated[
        int, typer.Option(min=0, help="Requests before each policy's run that do not count: nodes load variants.")
    ] = 16,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page here.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout; progress stays on stderr.")
    ] = False,
    admin_token: Annotated[
        str, typer.Option(envvar="TIDEGATE_ADMIN_TOKEN", help="Admin token, if the gateway has one.")
    ] = "",
) -> None:
    """Send one workload of rendered images and clips through one placement policy after the other, and compare.

    Reward, accuracy, delay, cost and failures as Huang compares them, with mAP and MOTA of what was really answered.
    The gateway's policy is changed meanwhile; before each one nodes unload their variants and refuse for a second; the
    deployment is put back at the end.
    A policy that cannot place there is named with the reason and left out; the exit status is then 1.

    Example: tidegate edge compare -f deploy/edge4.toml --policies beam,heuristic,random --requests 32
    """
    from tidegate.edge_compare import Comparison, Plan
    from tidegate.edge_compare import compare as run

    names = tuple(dict.fromkeys(name.strip() for name in policies.split(",") if name.strip()))
    unknown = next((name for name in names if name not in POLICIES and "/" not in name), "")
    if unknown or not names:
        told = f"{unknown!r} is no policy" if unknown else "none given"
        raise typer.BadParameter(
            f"{told}: choose from {', '.join(POLICIES)}{did_you_mean(unknown, POLICIES)}", param_hint="--policies"
        )
    console = Console(stderr=True)
    plan = Plan(
        url=url,
        file=file,
        policies=names,
        requests=requests,
        seed=seed,
        every_s=every_s,
        rehearse=rehearse,
        report=report,
        as_json=as_json,
        admin_token=admin_token,
    )

    async def whole() -> tuple[Comparison, bool]:
        stop = stop_on_interrupt()
        return await run(plan, stop, console), stop.is_set()

    try:
        check_place(report)
        comparison, interrupted = run_on_uvloop(whole())
    except (ValueError, OSError, RuntimeError) as error:  # of ours, each says what to do
        console.print(f"tidegate edge compare: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if interrupted or comparison.left_out:
        raise typer.Exit(INTERRUPTED_EXIT if interrupted else 1)
