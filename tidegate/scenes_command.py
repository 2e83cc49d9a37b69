"""`tidegate models scenes`: write rendered scenes with exact truth as COCO or MOT17 files."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_notes = Console(stderr=True)


def scenes(
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    layout: Annotated[Literal["coco", "mot"], typer.Option("--format", help="Stills (coco) or clips (mot).")] = "coco",
    count: Annotated[int, typer.Option(min=1, help="Stills, or clips.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Number of the first scene.")] = 0,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a clip.")] = 45,
    fps: Annotated[float, typer.Option(help="Frames per second of a clip.")] = 15.0,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels.")] = "320x192",
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of the JPEG files.")] = 95,
) -> None:
    """Render moving balls, boxes, triangles and stars, and write them with their boxes or tracks.

    The same seed gives the same scenes; the shipped variants were trained on none below number 1,000,000.

    Example: tidegate models scenes held_out --format mot --count 10
    """
    # Pillow and the like: for this command only.
    from models.datasets.coco import DatasetError, write_coco
    from models.datasets.mot import write_sequence
    from models.datasets.scenes import HELD_OUT_SEEDS, LABELS, SceneError, SceneSettings, plan_scene, render

    width, height = _size(size)
    columns = (TextColumn("rendering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        settings = SceneSettings(width=width, height=height, frames=frames if layout == "mot" else 3, fps=fps)
        with Progress(*columns, console=_notes) as progress:
            planned = (plan_scene(number, settings) for number in progress.track(range(seed, seed + count)))
            if layout == "coco":
                clips = (render(scene, [1]) for scene in planned)
                write_coco(out, ((clip.frames[0], clip.truth[0]) for clip in clips), LABELS, quality=quality)
            else:
                for scene in planned:
                    clip = render(scene)
                    folder = out / f"SCENE-{scene.seed:07d}"
                    write_sequence(folder, list(clip.frames), clip.truth, fps, LABELS, quality=quality)
    except (DatasetError, SceneError, OSError) as error:
        _notes.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    held_out = "held out from training" if seed + count <= HELD_OUT_SEEDS else "training may have seen some of them"
    _notes.print(f"written: {out}: {count} {layout} scenes, {held_out}", highlight=False, soft_wrap=True)


def _size(text: str) -> tuple[int, int]:
    """Width and height of a text such as 320x192. Raises `typer.BadParameter`."""
    width, cross, height = text.partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise typer.BadParameter(f"{text} is not WIDTHxHEIGHT in pixels, such as 320x192", param_hint="--size")
    return int(width), int(height)
