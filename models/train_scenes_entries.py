"""Write the catalog entries of the scene variants, every figure in them measured on the exported files.

    python -m models.train_scenes_entries

Accuracy goes through the serving path (mAP of detectors, MOTA of trackers, on held-out scenes), memory is the growth
of a fresh process that has its packages loaded already, operations are multiply-adds counted in one run.
"""

import argparse
import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from models.architectures.small_detectors import HEIGHT, MEAN, STD, WIDTH
from models.associations import associate
from models.catalog import BUILT_IN_FOLDER
from models.count_operations import multiply_adds
from models.datasets.scenes import LABELS, plan_scene, render
from models.detection import fit, open_detector
from models.edge_catalog import SUBFOLDER, EdgeVariant, edge_variant_from
from models.edge_items import scene_clips, scene_stills
from models.edge_runtime import open_edge_runtime
from models.edge_scores import detection_scores, tracking_scores
from models.tracking import open_tracker

_notes = Console(stderr=True)


@dataclass(frozen=True)
class Entry:
    """One variant: which exported network, and what is done with its boxes over time ("": nothing)."""

    network: str
    tracker: str
    description: str
    scores: tuple[float, float, float] | None = None  # a tracker's: least reported, to begin a track, to be sure


# The scores of trackers were chosen on 24 scenes from seed 2,000,000 on, which are not held out.
ENTRIES = {
    "scenes_detector_large": Entry("scenes_detector_large", "", "Faster R-CNN, small residual pyramid from stride 4"),
    "scenes_detector_small": Entry("scenes_detector_small", "", "Faster R-CNN, smaller residual pyramid from stride 8"),
    "scenes_detector_yolox": Entry("scenes_yolox", "", "YOLOX of nano width, whole convolutions"),
    "scenes_bytetrack": Entry("scenes_yolox", "bytetrack", "ByteTrack over the scenes' YOLOX", (0.3, 0.5, 0.5)),
    "scenes_sort": Entry("scenes_detector_large", "sort", "SORT over the scenes' large detector", (0.5, 0.7, 0.5)),
    "scenes_qdtrack": Entry(
        "scenes_qdtrack", "qdtrack", "the large detector with QDTrack's embeddings and association", (0.05, 0.7, 0.4)
    ),
}


def values_of(name: str) -> dict[str, Any]:
    """The entry of a variant, its figures still 0."""
    entry = ENTRIES[name]
    return {
        "name": name,
        "service": "tracking" if entry.tracker else "detection",
        **({"tracker": entry.tracker} if entry.tracker else {}),
        "path": f"../../pretrained/{entry.network}/1/model.onnx",
        "labels": list(LABELS),
        "short_side": HEIGHT,
        "long_side": WIDTH,
        "pad_to": 32,
        "pad_value": 255 * MEAN[0],
        "mean": [255 * level for level in MEAN],
        "std": [255 * level for level in STD],
        **(
            dict(zip(("score_threshold", "begin_score", "sure_score"), entry.scores, strict=True))
            if entry.scores
            else {}
        ),
        "memory_mb": 0.0,
        "tflop": 0.0,
        "weights": "trained",
        "description": entry.description,
    }


def measured(name: str, folder: Path, stills: int, clips: int) -> str:
    """The entry as TOML for `folder`, with its figures."""
    values = values_of(name)
    variant = edge_variant_from(values, name, folder)
    frame = render(plan_scene(0), [0]).frames[0]
    values["tflop"] = round(multiply_adds(Path(variant.path), fit(frame, variant).tensor) / 1e12, 8)
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        values["memory_mb"] = round(fresh.apply(growth_mb, (variant,)), 1)
    value, note = _mota(variant, clips) if variant.tracker else _m_ap(variant, stills)
    lines = ["# Trained by this project (models/train_scenes.py); written by: python -m models.train_scenes_entries"]
    lines += [f"{key} = {json.dumps(entry)}" for key, entry in values.items()]
    lines += ["", "[accuracy]", f"value = {value:.4f}", 'source = "measured"', f'note = "{note}"']
    return "\n".join(lines) + "\n"


def growth_mb(variant: EdgeVariant) -> float:
    """By how many MB this process grows when it opens the variant and runs it on three frames."""
    if variant.tracker:
        associate(variant.tracker)
    import onnxruntime  # noqa: F401 - every variant of a node shares it

    before = _resident_mb()
    runtime = open_edge_runtime(variant)
    runtime.warm_up()
    for frame in render(plan_scene(0), range(3)).frames:
        runtime.run([frame])
    return _resident_mb() - before


def _resident_mb() -> float:
    """What this process holds in memory (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmRSS: measure on Linux")


def _m_ap(variant: EdgeVariant, count: int) -> tuple[float, str]:
    detector = open_detector(variant)
    pairs = [(still.truth, detector.detect(still.media.frames[0])) for still in _seen(scene_stills(count), count)]
    scores = detection_scores([truth for truth, _ in pairs], [found for _, found in pairs], LABELS)
    return scores.m_ap, f"COCO mAP on {count} held-out scenes as JPEG of quality 95 (models/datasets/scenes.py)"


def _mota(variant: EdgeVariant, count: int) -> tuple[float, str]:
    tracker = open_tracker(variant)
    pairs = [(clip.truth, tracker.track(clip.media.frames).rows) for clip in _seen(scene_clips(count), count)]
    scores = tracking_scores([truth for truth, _ in pairs], [rows for _, rows in pairs])
    further = f"HOTA {scores.hota:.4f}, IDF1 {scores.idf1:.4f}"
    return max(0.0, scores.mota), f"MOTA on {count} held-out scenes of 45 frames as JPEG of quality 95; {further}"


def _seen(items: Any, count: int) -> Any:
    return track(items, "running", total=count, console=_notes, transient=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: measure and write the entries of some variants or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ENTRIES)}; none: all")
    parser.add_argument("--folder", type=Path, default=BUILT_IN_FOLDER / SUBFOLDER, help="where the entries go")
    parser.add_argument("--stills", type=int, default=400, help="held-out scenes for detectors")
    parser.add_argument("--clips", type=int, default=40, help="held-out scenes for trackers")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in ENTRIES]
    if unknown:
        parser.error(f"{unknown[0]} is no scene variant; choose from {', '.join(ENTRIES)}")
    for name in options.names or ENTRIES:
        text = measured(name, options.folder, options.stills, options.clips)
        (options.folder / f"{name}.toml").write_text(text)
        _notes.print(f"written: {name}", highlight=False)


if __name__ == "__main__":
    main()
