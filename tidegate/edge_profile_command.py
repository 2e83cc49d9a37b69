"""`tidegate models profile --service detection|tracking`: measure a service into a placement table, with heat maps."""

import contextlib
import datetime
import platform
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from models.catalog import VariantError
from models.edge_catalog import EdgeVariant, load_edge_catalog

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from models.edge_items import Clips, Stills
    from models.edge_profile import ServiceFigures

_notes = Console(stderr=True)
_RESOLUTIONS = (1.0, 0.75, 0.5, 0.25)
_QUALITIES = (100, 90, 80, 70)  # the paper's
_SCENE_QUALITIES = (95, 75, 50, 30)
_FRAME_RATES = (1.0, 1 / 2, 1 / 3, 1 / 6)  # of the clips': the paper's 30, 15, 10, 5
_SCENE_FRAME_RATES = (15.0, 10.0, 5.0, 3.0)
_SCENES = {"detection": 400, "tracking": 60}
_DEADLINES_S = {"detection": (0.5, 1.0, 1.5, 2.0), "tracking": (1.0, 5.0, 10.0, 15.0, 20.0, 25.0)}  # the paper's


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line asked for; empty lists and 0 stand for the data set's defaults."""

    service: str
    names: Sequence[str]
    catalog: Sequence[Path]
    data: Path | None
    most: int
    resolutions: Sequence[float]
    qualities: Sequence[int]
    frame_rates: Sequence[float]
    device: str
    threads: int
    out: Path


def profile_service(asked: Asked, as_json: bool) -> None:
    """Measure, write the table and its heat maps, and print a summary."""
    with _explained():
        figures, source = _measure(asked)
        text = _table(asked, figures, source)
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(text)
        _check(asked.out)
        page = _write_heat_maps(asked.out.with_suffix(".html"), figures)
    if as_json:
        print(msgspec.json.encode({"file": str(asked.out), "figures": figures}).decode())
    else:
        Console().print(_summary(figures))
    _notes.print(f"written: {asked.out}, heat maps: {page}", highlight=False, soft_wrap=True)


def _measure(asked: Asked) -> "tuple[ServiceFigures, str]":
    from models.detection import open_detector
    from models.edge_profile import detection_settings, profile_detection, profile_tracking, tracking_settings
    from models.edge_runtime import DetectorRuntime
    from models.tracking import open_tracker

    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    resolutions = asked.resolutions or _RESOLUTIONS
    with contextlib.ExitStack() as stack:
        if asked.service == "detection":
            stills = _stills(asked)
            chosen = _choose(asked, stills.labels)
            qualities = asked.qualities or (_QUALITIES if asked.data else _SCENE_QUALITIES)
            opened = [open_detector(one, device=asked.device, threads=asked.threads) for one in chosen]
            for detector in opened:
                stack.callback(detector.close)
                detector.warm_up()
            progress = stack.enter_context(Progress(*columns, console=_notes))
            task = progress.add_task("", total=stills.count)
            settings = detection_settings(resolutions, qualities)
            runtimes = [DetectorRuntime(detector) for detector in opened]
            figures = profile_detection(
                runtimes, stills, settings, stills.labels, lambda done: progress.update(task, completed=done)
            )
            return figures, stills.source
        clips = _clips(asked)
        chosen = _choose(asked, None if asked.data else _scene_labels())
        rates = asked.frame_rates or (
            tuple(clips.fps * share for share in _FRAME_RATES) if asked.data else _SCENE_FRAME_RATES
        )
        trackers = [open_tracker(one, device=asked.device, threads=asked.threads) for one in chosen]
        for tracker in trackers:
            stack.callback(tracker.close)
            tracker.warm_up()
        progress = stack.enter_context(Progress(*columns, console=_notes))
        task = progress.add_task("", total=clips.count)
        settings = tracking_settings(resolutions, rates)
        figures = profile_tracking(trackers, clips, settings, lambda done: progress.update(task, completed=done))
        return figures, clips.source


def _scene_labels() -> tuple[str, ...]:
    from models.datasets.scenes import LABELS

    return LABELS


def _stills(asked: Asked) -> "Stills":
    from models.edge_items import coco_stills, scene_stills

    if asked.data is None:
        return scene_stills(asked.most or _SCENES["detection"])
    return coco_stills(asked.data, most=asked.most)


def _clips(asked: Asked) -> "Clips":
    from models.edge_items import mot_clips, scene_clips

    if asked.data is None:
        return scene_clips(asked.most or _SCENES["tracking"])
    return mot_clips(asked.data, most=asked.most)


def _choose(asked: Asked, labels: Sequence[str] | None) -> list[EdgeVariant]:
    """The variants named, or all of the service that have a file and a class of the data set. Raises `VariantError`."""
    catalog = load_edge_catalog(asked.catalog)
    of_service = {name: one for name, one in catalog.items() if one.service == asked.service}
    for name in asked.names:
        if name not in of_service:
            remedy = f"not a {asked.service} variant; choose from {', '.join(of_service) or 'none'}, or add --catalog"
            raise VariantError("command line", "variant", name, remedy)
    if asked.names:
        return [of_service[name] for name in asked.names]
    ready = [one for one in of_service.values() if one.path and Path(one.path).is_file()]
    found = [one for one in ready if labels is None or set(one.labels) & set(labels)]
    if not found:
        remedy = (
            f"no {asked.service} variant with a file fits the data: `tidegate models export NAME`, or add --catalog"
        )
        raise VariantError("command line", "service", asked.service, remedy)
    return found


def _table(asked: Asked, figures: "ServiceFigures", source: str) -> str:
    from models.edge_profile import table_of

    what = "mAP" if figures.service == "detection" else "MOTA"
    date = datetime.datetime.now(tz=datetime.UTC).date()
    given = (f" --data {asked.data.name}" if asked.data else "") + (f" --limit {asked.most}" if asked.most else "")
    notes = [
        f"{figures.service.capitalize()}, measured ({what}, bytes, times) on {source}: {figures.requests} requests.",
        f"Written by `tidegate models profile --service {figures.service}{given}` on {date}, {platform.machine()},",
        f"device {asked.device}, {asked.threads} thread(s). memory_mb and tflop are those of the catalog's entries.",
    ]
    return table_of(figures, name=figures.service, notes=notes, deadlines_s=_DEADLINES_S[figures.service])


def _check(file: Path) -> None:
    """The table must be one that placement reads. Raises TableError, which is a ValueError."""
    from policies.placement.tables import read_table

    read_table(file)


def _summary(figures: "ServiceFigures") -> Table:
    """Accuracy by configuration and variant, and how long a forward pass takes."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("configuration", no_wrap=True)
    table.add_column("bytes", no_wrap=True)
    for variant in figures.variants:
        table.add_column(variant.name, overflow="fold")
    for place, setting in enumerate(figures.settings):
        cells = (f"{variant.accuracy[place]:.3f}" for variant in figures.variants)
        table.add_row(setting.name, f"{figures.size_factor[place]:.3f}", *cells)
    times = (f"{statistics.median(variant.service_ms):.1f}" for variant in figures.variants)
    table.add_section()
    table.add_row("a forward pass, ms", "", *times)
    return table


def _write_heat_maps(out: Path, figures: "ServiceFigures") -> Path:
    """Accuracy of each variant and the size factor over both settings (Huang, Figs. 4 to 6), on one page."""
    every = [value for variant in figures.variants for value in variant.accuracy]
    scale = (min(every), max(every))  # one for all variants: darker is more accurate, whoever it is
    maps = [_heat_map(figures, variant.name, variant.accuracy, "accuracy", scale) for variant in figures.variants]
    maps.append(_heat_map(figures, "bytes, of the highest configuration's", figures.size_factor, "share", (0.0, 1.0)))
    parts = [one.to_html(full_html=False, include_plotlyjs=place == 0) for place, one in enumerate(maps)]
    title = f"{figures.service}: accuracy and size over {figures.requests} requests"
    out.write_text(f"<!doctype html><meta charset=utf-8><title>{title}</title><h1>{title}</h1>\n" + "\n".join(parts))
    return out


def _heat_map(
    figures: "ServiceFigures", title: str, values: Sequence[float], meaning: str, scale: tuple[float, float]
) -> "go.Figure":
    import plotly.graph_objects as go

    first, second = figures.settings[0].varied
    rows, columns = (
        sorted({getattr(one.configuration, key) for one in figures.settings}, reverse=True) for key in (first, second)
    )
    given = {
        (getattr(one.configuration, first), getattr(one.configuration, second)): value
        for one, value in zip(figures.settings, values, strict=True)
    }
    cells = [[given[row, column] for column in columns] for row in rows]
    figure = go.Figure(
        go.Heatmap(
            z=cells,
            x=[f"{column:g}" for column in columns],
            y=[f"{row:g}" for row in rows],
            text=[[f"{value:.3f}" for value in row] for row in cells],
            texttemplate="%{text}",
            colorscale="Blues",
            zmin=scale[0],
            zmax=scale[1],
            colorbar={"title": meaning},
        )
    )
    figure.update_layout(title=title, xaxis_title=second, yaxis_title=first, width=640, height=460)
    figure.update_yaxes(autorange="reversed")
    return figure


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn what a person can put right into one line on stderr and exit status 2."""
    try:
        yield
    except ImportError as error:
        _notes.print(f'error: {error.name} is missing: pip install -e ".[cpu,edge]"', style="red", markup=False)
        raise typer.Exit(2) from error
    except (ValueError, OSError) as error:  # VariantError, DatasetError and TableError among them
        _notes.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
