"""From detections or tracks of adapted frames to the JSON of an answer, in the original's pixels and frames. Pure.

    {"detections": [{"label": "car", "class": 2, "score": 0.91, "box": [x, y, w, h]}, ...]}         COCO's way
    {"tracks": [[frame, id, x, y, w, h, score, class], ...], "labels": ["person", ...]}             MOTChallenge's

The gateway splices it in without decoding.
"""

import msgspec
import numpy as np
import numpy.typing as npt

from models.detection import Detections
from models.tracking import Tracks, in_the_original
from protocol.edge_records import EdgeRun

Row = tuple[int, int, float, float, float, float, float, int]


class Found(msgspec.Struct, frozen=True):
    """One object of an image. `box`: left, top, width, height in pixels of the original."""

    label: str
    class_: int = msgspec.field(name="class")
    score: float
    box: tuple[float, float, float, float]


class DetectionAnswer(msgspec.Struct, frozen=True):
    """What a detector found, best first."""

    detections: list[Found]


class TrackAnswer(msgspec.Struct, frozen=True):
    """What a tracker found; a row is frame, id, left, top, width, height, score, class."""

    tracks: list[Row]
    labels: tuple[str, ...]


_encode = msgspec.json.Encoder().encode
_PLACES = 3  # of a coordinate in pixels


def encode_found(found: Detections | Tracks, labels: tuple[str, ...], run: EdgeRun) -> bytes:
    """The answer in the coordinates (and frame numbers) of what the client sent."""
    if isinstance(found, Detections):
        return _encode(DetectionAnswer(_detections(found, labels, run)))
    return _encode(TrackAnswer(_tracks(found, run), labels))


def _detections(found: Detections, labels: tuple[str, ...], run: EdgeRun) -> list[Found]:
    boxes = found.boxes.astype(np.float64) / run.scale
    boxes[:, 2:] -= boxes[:, :2]
    whole = _inside(boxes, run)
    return [
        Found(labels[number], number, round(score, 6), (left, top, width, height))
        for number, score, (left, top, width, height) in zip(
            found.classes.tolist(), found.scores.tolist(), whole.tolist(), strict=True
        )
    ]


def _tracks(found: Tracks, run: EdgeRun) -> list[Row]:
    rows = in_the_original(found, run.scale, run.frame_numbers).rows
    boxes = _inside(rows[:, 2:6], run)
    return [
        (int(frame), int(track), left, top, width, height, round(score, 6), number)
        for (frame, track, *_, score), (left, top, width, height), number in zip(
            rows.tolist(), boxes.tolist(), found.classes.tolist(), strict=True
        )
    ]


def _inside(boxes: npt.NDArray[np.float64], run: EdgeRun) -> npt.NDArray[np.float64]:
    """Boxes [n, 4] (left, top, width, height) cut to the original: dividing by a rounded scale may lead beyond."""
    size = np.array([run.width, run.height], dtype=np.float64)
    first = np.clip(boxes[:, :2], 0.0, size)
    last = np.clip(boxes[:, :2] + boxes[:, 2:], 0.0, size)
    rounded: npt.NDArray[np.float64] = np.round(np.concatenate([first, last - first], axis=1), _PLACES)
    return rounded
