"""`tidegate models`: list the catalog, measure profiles, export the built-in ImageNet models, render scenes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from models.catalog import Variant, VariantError, load_catalog
from models.edge_catalog import EdgeVariant, load_edge_catalog
from models.profiles import Profile, write_profiles
from tidegate.scenes_command import scenes

app = typer.Typer(no_args_is_help=True, help="The variants that can be served: list, measure, export.")

WIDE_TERMINAL = 100
_PIPE_WIDTH = 160
_notes = Console(stderr=True)

Folders = Annotated[
    list[Path],
    typer.Option("--catalog", "-c", envvar="TIDEGATE_CATALOG", help="Folder with your own variants (*.toml)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command("list")
def list_variants(catalog: Folders = [], as_json: AsJson = False) -> None:  # noqa: B006 - typer copies it
    """Every variant of the catalog, with its accuracy and where that figure comes from.

    Example: tidegate models list --catalog my_models
    """
    with _explained():
        summaries = [_summary(variant) for variant in load_catalog(catalog).values()]
        summaries += [_edge_summary(variant) for variant in load_edge_catalog(catalog).values()]
    if as_json:
        print(msgspec.json.encode({"variants": summaries}).decode())
        return
    console = Console()
    wide = console.width >= WIDE_TERMINAL or not console.is_terminal
    names = ("variant", "service", "accuracy", *(("runtime", "input") if wide else ()))
    columns = [Column(name, no_wrap=True) for name in names]
    table = Table(*columns, Column("file", overflow="fold"), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for summary in summaries:
        known = summary["accuracy"] is not None
        accuracy = f"{summary['accuracy']:.4f} {summary['accuracy_source']}" if known else "unknown"
        shape = "x".join(str(length) for length in summary["input_shape"])
        found = _shown_file(summary["file"]) if summary["available"] else "not exported yet"
        further = (summary["runtime"], shape) if wide else ()
        table.add_row(summary["name"], summary["service"], accuracy, *further, found)
    if not console.is_terminal:
        console.width = max(console.width, _PIPE_WIDTH)
    console.print(table)


@app.command()
def profile(
    names: Annotated[list[str], typer.Argument(help="Variants to run at once; name one twice for two instances.")] = [],  # noqa: B006
    catalog: Folders = [],  # noqa: B006
    device: Annotated[str, typer.Option(help="cpu, cuda or tensorrt.")] = "cpu",
    batch: Annotated[list[int], typer.Option(help="Batch size; repeat for several.")] = [1, 3, 5],  # noqa: B006
    seconds: Annotated[float, typer.Option(min=0.05, help="Window per batch size.")] = 3.0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads inside one inference.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file to write: profiles.json, or SERVICE-table.toml.")
    ] = None,
    service: Annotated[
        Literal["detection", "tracking"] | None,
        typer.Option(help="Measure this edge service's placement table instead: accuracy, bytes and time."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --service: a folder of COCO or MOT17; without, rendered scenes.")
    ] = None,
    limit: Annotated[
        int, typer.Option(min=0, help="With --service: pictures or clips at most; 0: all (scenes: 400, 60).")
    ] = 0,
    resolution: Annotated[list[float], typer.Option(help="With --service: factor; repeat.")] = [],  # noqa: B006
    quality: Annotated[list[int], typer.Option(help="With --service detection: JPEG quality; repeat.")] = [],  # noqa: B006
    frame_rate: Annotated[list[float], typer.Option(help="With --service tracking: per second; repeat.")] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Measure service times of instances that run at once, or a whole edge service into a placement table.

    Examples:
    tidegate models profile digits_light digits_light digits_heavy digits_heavy -o profiles.json
    tidegate models profile --service detection --data coco --limit 500 -o detection.toml
    """
    if service is not None:
        from tidegate.edge_profile_command import Asked, profile_service

        asked = Asked(
            service=service,
            names=names,
            catalog=catalog,
            data=data,
            most=limit,
            resolutions=resolution,
            qualities=quality,
            frame_rates=frame_rate,
            device=device,
            threads=threads,
            out=out or Path(f"{service}-table.toml"),
        )
        profile_service(asked, as_json)
        return
    if not names:
        raise typer.BadParameter("name the variants to measure, or give --service detection or tracking")
    out = out or Path("profiles.json")
    from models.profile import measure  # multiprocessing and numpy: not needed for `list`

    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with _explained(), Progress(*columns, console=_notes) as progress:
        variants = _choose(names, catalog)
        task = progress.add_task("", total=None)
        profiles = measure(
            variants,
            device=device,
            batch_sizes=batch,
            window_s=seconds,
            threads=threads,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
        write_profiles(out, profiles)
    if as_json:
        rows = [row for found in profiles for row in _profile_rows(found)]
        print(msgspec.json.encode({"file": str(out), "profiles": rows}).decode())
        return
    table = Table(
        Column("variant", no_wrap=True), "batch", "samples", "p50 ms", "p98 ms", "mean ms", "times", "beside it"
    )
    for found in profiles:
        for row in _profile_rows(found):
            cells = (f"{row[key]:.2f}" for key in ("p50_ms", "p98_ms", "mean_ms"))
            beside = ", ".join(found.co_located) or "nothing"
            table.add_row(found.variant, str(row["batch_size"]), str(row["samples"]), *cells, found.source, beside)
    Console().print(table)
    _notes.print(f"written: {out}")


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="efficientnet_b0, pnasnet5large[_224], faster_rcnn_r50_fpn, ...")],
    weights: Annotated[
        str,
        typer.Option(help="timm or torchvision (they download), random, or a checkpoint's path.", show_default=False),
    ] = "",
    runtime: Annotated[str, typer.Option(help="onnxruntime; for classes also openvino, torch.")] = "onnxruntime",
    precision: Annotated[
        str, typer.Option(help="float32, or float16 where a GPU can; else the variant's own.", show_default=False)
    ] = "",
    out: Annotated[Path, typer.Option("--out", "-o", help="The model repository.")] = Path("model_repository"),
    seed: Annotated[int, typer.Option(help="For random weights.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Export a model to ONNX with a catalog entry beside it, and check it against torch.

    Weights are timm's, for detectors torchvision's (R-50-FPN) or a file of mmdetection's.

    Example: tidegate models export efficientnet_b0 && tidegate models list --catalog model_repository

    Example: tidegate models export faster_rcnn_r101_fpn --weights faster_rcnn_r101_fpn_1x_coco_20200130-f513f705.pth
    """
    with _explained(), _notes.status("starting") as status:
        detector = name in load_edge_catalog()
        try:
            # torch, timm, torchvision: for this command only
            if detector:
                from models.edge_export import export_edge
            else:
                from models.export import SOURCES
                from models.export import export as export_model
        except ImportError as error:
            _notes.print(f'error: {error.name} is missing: pip install -e ".[train]"', style="red", markup=False)
            raise typer.Exit(2) from error
        if detector:
            if runtime != "onnxruntime":
                raise VariantError("export", "runtime", runtime, "detectors run in onnxruntime: leave it out")
            found = export_edge(
                name, out, weights=weights or "torchvision", precision=precision, seed=seed, on_step=status.update
            )
            summary = _edge_summary(found)
        elif name not in SOURCES:
            remedy = f"choose one of {', '.join([*SOURCES, *load_edge_catalog()])}"
            raise VariantError("export", "name", name, remedy)
        else:
            variant = export_model(
                name,
                out,
                weights=weights or "timm",
                runtime=runtime,
                precision=precision or "float32",
                seed=seed,
                on_step=status.update,
            )
            summary = _summary(variant)
    if as_json:
        print(msgspec.json.encode(summary | {"path": summary["file"]}).decode())
        return
    _notes.print(f"written: {summary['file']}; serve it with --catalog {out}", soft_wrap=True, highlight=False)


def _shown_file(file: str) -> str:
    """A variant's file as a person would type it, from where they are; an emulated one has none."""
    if not file:
        return "–"
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _profile_rows(found: Profile) -> list[dict[str, object]]:
    return [
        {
            "variant": found.variant,
            "device": found.device,
            "source": found.source,
            "co_located": list(found.co_located),
            "batch_size": times.batch_size,
            "samples": times.samples,
            "p50_ms": 1000 * found.quantile_s(times.batch_size, 0.5),
            "p98_ms": 1000 * found.quantile_s(times.batch_size, 0.98),
            "mean_ms": 1000 * found.mean_s(times.batch_size),
        }
        for times in found.times
    ]


def _choose(names: list[str], folders: list[Path]) -> list[Variant]:
    variants = load_catalog(folders)
    for name in names:
        if name not in variants:
            remedy = f"not in the catalog; choose from {', '.join(variants)} or add a folder with --catalog"
            raise VariantError("command line", "variant", name, remedy)
    return [variants[name] for name in names]


def _summary(variant: Variant) -> dict[str, Any]:
    """What a person wants to see of a variant; `available` is false where its file has still to be made."""
    return {
        "name": variant.name,
        "service": variant.service,
        "runtime": variant.runtime,
        "input_shape": list(variant.input.shape),
        "classes": variant.classes,
        "accuracy": variant.accuracy.value,
        "accuracy_source": variant.accuracy.source,
        "available": variant.runtime == "emulated" or Path(variant.path).is_file(),
        "file": "" if variant.runtime == "emulated" else variant.path,
        "description": variant.description,
    }


def _edge_summary(variant: EdgeVariant) -> dict[str, Any]:
    """The same of a detector or tracker; an image is resized to these sides at most, the shorter first."""
    return {
        "name": variant.name,
        "service": variant.service,
        "runtime": "onnxruntime",
        "input_shape": [3, variant.short_side, variant.long_side],
        "classes": len(variant.labels),
        "accuracy": variant.accuracy.value,
        "accuracy_source": variant.accuracy.source,
        "available": bool(variant.path) and Path(variant.path).is_file(),
        "file": variant.path,
        "description": variant.description,
    }


app.command()(scenes)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn a `VariantError` into one line on stderr and exit status 2."""
    try:
        yield
    except VariantError as error:
        _notes.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
