"""Clips with tracks in MOT17's folders: `NAME/img1/000001.jpg ...`, `gt/gt.txt`, `seqinfo.ini`, `det/det.txt`.

`read_mot` takes the folder of the real MOT17 (or one sequence of it), `write_sequence` makes one from frames with
truth. A row of truth is frame (from 1), track, left, top, width, height, whether it counts (0 or 1), class and
visibility. Scores of MOT17 count class 1 (pedestrians) only, so that is what every object is written as; which of our
classes a track has stands in `gt/labels.txt`, a file of ours that other tools pass over.
"""

import configparser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg

from models.datasets.coco import DatasetError
from models.datasets.scenes import FrameTruth

PEDESTRIAN = 1
LEAST_VISIBLE = 0.1  # a scene's object less visible than this is written as not counting
DETECTORS = ("DPM", "FRCNN", "SDP")  # MOT17 has every sequence three times, once for each public detector

Rows = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class MotSequence:
    """One clip on disk."""

    name: str
    frames: tuple[Path, ...]  # JPEG or PNG files in order
    fps: float
    width: int
    height: int
    truth: Rows  # [m, 9]: frame, track, left, top, width, height, counts, class, visibility; [0, 9] without gt
    detections: Rows  # [k, 7]: frame, -1, left, top, width, height, score; [0, 7] where there are none
    labels: dict[int, str]  # track -> class name, where gt/labels.txt says


def read_mot(path: Path, detector: str = "FRCNN") -> tuple[MotSequence, ...]:
    """Every sequence in `path`, `path/train` or `path/*`, sorted by name, or `path` itself if it is one.

    Of MOT17's three copies of a sequence, the one of `detector`; a `test` folder has no truth and is left out.
    Raises `DatasetError`.
    """
    if not path.is_dir():
        raise DatasetError(f"{path}: no such folder; give MOT17's, or one sequence with its seqinfo.ini")
    if (path / "seqinfo.ini").is_file():
        return (read_sequence(path),)
    found = {one.parent for pattern in ("*/seqinfo.ini", "train/*/seqinfo.ini") for one in path.glob(pattern)}
    others = tuple(f"-{name}" for name in DETECTORS if name != detector)
    chosen = sorted(folder for folder in found if not folder.name.endswith(others))
    if not chosen:
        raise DatasetError(f"{path}: no folder with a seqinfo.ini in it or in train/ (for detector {detector})")
    return tuple(read_sequence(folder) for folder in chosen)


def read_sequence(folder: Path) -> MotSequence:
    """One sequence. Raises `DatasetError` if a file is missing or broken, or frames and seqinfo.ini disagree."""
    file = folder / "seqinfo.ini"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(file.read_text())
        facts = parser["Sequence"]
        name, images, suffix = facts["name"], facts.get("imDir", "img1"), facts.get("imExt", ".jpg")
        length, width, height = (int(facts[key]) for key in ("seqLength", "imWidth", "imHeight"))
        fps = float(facts["frameRate"])
    except OSError as error:
        raise DatasetError(f"{file}: cannot be read: {error.strerror}") from error
    except (configparser.Error, KeyError, ValueError) as error:
        raise DatasetError(
            f"{file}: {error}; needs [Sequence] with name, frameRate, seqLength, imWidth, imHeight"
        ) from error
    frames = tuple(folder / images / f"{number:06d}{suffix}" for number in range(1, length + 1))
    missing = [frame for frame in frames if not frame.is_file()]
    if missing or not frames:
        raise DatasetError(
            f"{file}: seqLength is {length}, but {missing[0] if missing else folder / images} is missing"
        )
    truth = _rows(folder / "gt" / "gt.txt", 9, length)
    detections = _rows(folder / "det" / "det.txt", 7, length)
    return MotSequence(name, frames, fps, width, height, truth, detections, _labels(folder / "gt" / "labels.txt"))


def write_sequence(
    folder: Path,
    frames: Sequence[npt.NDArray[np.uint8]],
    truth: Sequence[FrameTruth],
    fps: float,
    labels: Sequence[str],
    *,
    quality: int = 95,
) -> Path:
    """Write frames [h, w, 3] with their truth as the sequence `folder`; gives `folder`.

    Boxes are written as they are, with pixel 0 at the left and top. Raises `DatasetError` if one is there already.
    """
    if not frames or len(frames) != len(truth):
        raise DatasetError(f"{folder}: {len(frames)} frames and truth of {len(truth)}; need as many, and one or more")
    if (folder / "seqinfo.ini").exists():
        raise DatasetError(f"{folder}: holds a sequence already; choose another folder or remove it")
    for part in ("img1", "gt"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(frames, start=1):
        jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB")
        (folder / "img1" / f"{number:06d}.jpg").write_bytes(jpeg)
    lines, named = [], {}
    for number, one in enumerate(truth, start=1):
        for track, label, box, visible in zip(one.tracks, one.classes, one.boxes, one.visibility, strict=True):
            x1, y1, x2, y2 = (float(edge) for edge in box)
            place = f"{x1:.2f},{y1:.2f},{x2 - x1:.2f},{y2 - y1:.2f}"
            lines.append(f"{number},{track},{place},{int(visible >= LEAST_VISIBLE)},{PEDESTRIAN},{visible:.3f}\n")
            named[int(track)] = labels[label]
    (folder / "gt" / "gt.txt").write_text("".join(lines))
    (folder / "gt" / "labels.txt").write_text("".join(f"{track},{named[track]}\n" for track in sorted(named)))
    height, width = frames[0].shape[:2]
    facts = {"name": folder.name, "imDir": "img1", "frameRate": f"{fps:g}", "seqLength": len(frames)}
    facts |= {"imWidth": width, "imHeight": height, "imExt": ".jpg"}
    text = "".join(f"{key}={value}\n" for key, value in facts.items())
    (folder / "seqinfo.ini").write_text(f"[Sequence]\n{text}")
    return folder


def _rows(file: Path, columns: int, frames: int) -> Rows:
    """The first `columns` numbers of every line, [m, columns]; [0, columns] if there is no such file."""
    if not file.is_file():
        return np.zeros((0, columns))
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = [float(value) for value in line.split(",")[:columns]]
        except ValueError as error:
            raise DatasetError(f"{file}: line {number} is {line!r}: {error}") from error
        if len(row) < columns or not np.isfinite(row).all():
            raise DatasetError(f"{file}: line {number} is {line!r}; needs {columns} numbers between commas")
        if not 1 <= row[0] <= frames:
            raise DatasetError(f"{file}: line {number} is of frame {row[0]:g}; seqinfo.ini promises 1 to {frames}")
        rows.append(row)
    return np.array(rows, np.float64).reshape(-1, columns)


def _labels(file: Path) -> dict[int, str]:
    """Class names by track, as `write_sequence` notes them."""
    if not file.is_file():
        return {}
    named = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        track, comma, label = line.partition(",")
        if not comma or not track.isdigit():
            raise DatasetError(f"{file}: line {number} is {line!r}; needs a track's number, a comma and its class")
        named[int(track)] = label
    return named
