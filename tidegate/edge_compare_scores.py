"""What was really answered, held against the scenes' truth: mAP of detections, MOTA of tracks.

The definitions are pycocotools' and trackeval's (`models/edge_scores.py`). Only answered requests are scored: those
without an answer are counted as failures, and would mix two figures here. Tracks of frames that a configuration leaves
out are interpolated, as in the profile.
"""

import importlib
from collections.abc import Sequence
from typing import Any, Final, cast

import msgspec
import numpy as np

from models.adapt import keeps
from models.datasets.scenes import LABELS
from models.detection import Detections
from models.edge_scores import ClipTruth, StillTruth, detection_scores, interpolated, tracking_scores
from tidegate.edge_compare_workload import Item

NEEDED: Final = ("pycocotools", "trackeval")
_REMEDY: Final = "pip install -e '.[edge]' && pip install --no-deps trackeval==1.3.0 (make train-env does both)"


class ScoresMissing(RuntimeError):
    """A package that scores is not installed; says which, and how to get it."""


class MeasuredScore(msgspec.Struct, frozen=True):
    """A score over all answered items of a service. `further`: other scores, by name."""

    name: str
    value: float
    further: dict[str, float]


class _Found(msgspec.Struct):
    label: str
    score: float
    box: tuple[float, float, float, float]


class _Configuration(msgspec.Struct):
    settings: dict[str, float]


class _Decision(msgspec.Struct):
    configuration: _Configuration


class _Answer(msgspec.Struct):
    decision: _Decision
    detections: list[_Found] = []
    tracks: list[tuple[float, ...]] = []


_decode: Final = msgspec.json.Decoder(_Answer).decode


def need_scores() -> None:
    """Raises `ScoresMissing` where answers could not be scored: to be asked before anything is sent."""
    for package in NEEDED:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ScoresMissing(f"{error.name or package} is missing, which scores the answers: {_REMEDY}") from error


def measured_detection(answered: Sequence[tuple[Item, bytes]]) -> MeasuredScore | None:
    """COCO's mAP over (what was sent, the answer's JSON) of images; None if no answer knows a class of the scenes."""
    answers = [_decode(body) for _, body in answered]
    found = [_detections(one.detections) for one in answers]
    if any(one.detections for one in answers) and not any(len(one.classes) for one in found):
        return None
    scores = detection_scores([cast(StillTruth, item.truth) for item, _ in answered], found, LABELS)
    return MeasuredScore("mAP", scores.m_ap, {"ap50": scores.ap50, "ap75": scores.ap75})


def measured_tracking(answered: Sequence[tuple[Item, bytes]]) -> MeasuredScore:
    """MOTChallenge's MOTA (HOTA and IDF1 beside it) over (what was sent, the answer's JSON) of clips."""
    truth = [cast(ClipTruth, item.truth) for item, _ in answered]
    rows = [_tracks(_decode(body), item, one.frame_count) for (item, body), one in zip(answered, truth, strict=True)]
    scores = tracking_scores(truth, rows)
    return MeasuredScore("MOTA", scores.mota, {"hota": scores.hota, "idf1": scores.idf1})


def _detections(found: Sequence[_Found]) -> Detections:
    known = [one for one in found if one.label in LABELS]
    boxes = np.array([one.box for one in known], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Detections(
        boxes=boxes,
        scores=np.array([one.score for one in known], dtype=np.float32),
        classes=np.array([LABELS.index(one.label) for one in known], dtype=np.int64),
    )


def _tracks(answer: _Answer, item: Item, frame_count: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    rows = np.array([row[:7] for row in answer.tracks], dtype=np.float64).reshape(-1, 7)
    frame_rate = answer.decision.configuration.settings.get("frame_rate", 0.0)
    kept = [index + 1 for index in range(frame_count) if keeps(index, item.fps, frame_rate)]
    return interpolated(rows, kept, frame_count)
