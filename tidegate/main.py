"""The `tidegate` command: one typer application, one file per group of commands."""

import importlib.metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tidegate import (
    bench_commands,
    demo_command,
    doctor_command,
    edge_commands,
    models_commands,
    placement_commands,
    post_command,
    record_command,
    replay_commands,
    routing_commands,
    up_command,
    workload_commands,
)

INTERRUPTED_EXIT = 130
EXTRAS = {
    "numba": "train",
    "torch": "train",
    "onnx": "train",
    "timm": "train",
    "tensorboard": "train",
    "gymnasium": "train",
    "ortools": "place",
    "sklearn": "demo",
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "av": "edge",
    "pycocotools": "edge",
    "trackeval": "edge",
    "trackers": "edge",
}


class Commands(TyperGroup):
    """All commands. Ctrl-C, and packages that are not installed, are told in words instead of by a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("tidegate: interrupted", err=True)
            raise typer.Exit(INTERRUPTED_EXIT) from None
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in EXTRAS:
                raise
            typer.echo(
                f"tidegate: this command needs {package}, which is not installed: make train-env installs everything,"
                f" pip install -e '.[{EXTRAS[package]}]' just this",
                err=True,
            )
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tidegate {importlib.metadata.version('tidegate')}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """An edge inference server that keeps its latency promise through bursts by choosing which model answers.

    Start with: tidegate demo, then tidegate up -f deploy/digits.toml
    """


app.command("up")(up_command.up)
app.command("demo")(demo_command.demo)
app.command("replay")(replay_commands.replay)
app.command("compare")(replay_commands.compare)
app.command("record")(record_command.record)
app.command("post")(post_command.post)
app.command("doctor")(doctor_command.doctor)
app.add_typer(models_commands.app, name="models")
app.add_typer(bench_commands.app, name="bench")
app.add_typer(routing_commands.app, name="routing")
app.add_typer(workload_commands.app, name="workload")
app.add_typer(placement_commands.app, name="placement")
app.add_typer(edge_commands.app, name="edge")

if __name__ == "__main__":
    app()
