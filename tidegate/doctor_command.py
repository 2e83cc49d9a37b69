"""`tidegate doctor`: looks at this machine, says what is wrong and what to do. The checks: `doctor_checks.py`."""

import asyncio
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from protocol.deployment import DeploymentError, DeploymentFile, read_deployment
from tidegate.doctor_checks import (
    OK,
    PROBLEM,
    WARNING,
    Finding,
    check_board,
    check_cpu,
    check_files,
    check_loading,
    check_models,
    check_packages,
    check_port,
    check_python,
    check_resizing,
    check_runtime,
    check_sockets,
    usable_cpus,
)

_MARKS = {OK: "[green]ok[/]     ", WARNING: "[yellow]warning[/]", PROBLEM: "[red]problem[/]"}


def doctor(
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="Deployment to check: its models, devices and port.")
    ] = None,
    board: Annotated[str, typer.Option(envvar="TIDEGATE_REDIS_URL", help="Redis that should answer.")] = "",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port instead of the deployment's.")] = None,
    catalog: Annotated[
        list[Path], typer.Option("--catalog", "-c", envvar="TIDEGATE_CATALOG", help="Folder with your own variants.")
    ] = [],  # noqa: B006 - typer copies it
    load: Annotated[bool, typer.Option(help="Load each of the deployment's models and run it once.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Check Python, CPU, packages, resizing, ports, Redis and models; exit status 1 if something will not work.

    Example: tidegate doctor -f deploy/digits.toml
    """
    console = Console(stderr=as_json)
    with Console(stderr=True).status("looking"):
        findings = examine(file, board, port, catalog, load)
    healthy = all(one.state != PROBLEM for one in findings)
    if as_json:
        print(msgspec.json.encode({"healthy": healthy, "findings": findings}).decode())
    else:
        for one in findings:
            console.print(_MARKS[one.state], end=" ")
            console.print(f"{one.check}: {one.what}", markup=False, highlight=False, soft_wrap=True)
            if one.remedy:
                console.print(f"          {one.remedy}", style="dim", markup=False, highlight=False, soft_wrap=True)
    if not healthy:
        raise typer.Exit(1)


def examine(file: Path | None, board: str, port: int | None, catalog: list[Path], load: bool) -> list[Finding]:
    """All findings, in the order in which a start would meet them."""
    deployment: DeploymentFile | None = None
    findings = [check_python(), check_packages()]
    if file is not None:
        try:
            deployment = read_deployment(file)
            findings.append(Finding("deployment", OK, f"{deployment.name} ({file})"))
        except DeploymentError as error:
            remedy = "correct that key in the file: docs/guide.md says what each key may be" if file.is_file() else ""
            findings.append(Finding("deployment", PROBLEM, str(error), remedy))
    devices = {worker.device for worker in deployment.workers} if deployment else set()
    host = deployment.gateway.host if deployment else "127.0.0.1"
    chosen = port or (deployment.gateway.port if deployment else 8700)
    findings += [check_cpu(usable_cpus(), deployment), check_files(), check_sockets(), *check_runtime(devices)]
    findings += [check_resizing(), check_port(host, chosen), asyncio.run(check_board(board))]
    found, loadable = check_models(deployment, catalog)
    findings += found
    for variant, device in loadable:
        findings.append(
            check_loading(variant, device)
            if load
            else Finding(f"model {variant.name}", OK, "its entry and file are there")
        )
    return findings


if __name__ == "__main__":
    typer.run(doctor)
