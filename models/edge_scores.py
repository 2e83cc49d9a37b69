"""How good detections and tracks are: mAP as COCO defines it, MOTA, HOTA and IDF1 as MOTChallenge does.

The definitions are other people's code, kept up and checked by many: pycocotools and trackeval. This module brings our
arrays to them and back, and nothing touches the disk. Both come with the extra `edge`.
"""

import contextlib
import io
import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from models.detection import Detections
from models.quasi_dense import iou

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

PEDESTRIAN = 1  # the one class that MOT17 counts
_DISTRACTORS = (2, 7, 8, 12)  # MOT17: on a vehicle, standing still, distractor, reflection
_MATCH = 0.5  # least overlap of a match


class StillTruth(msgspec.Struct, frozen=True, eq=False):
    """What is in one picture."""

    boxes: FloatArray  # [n, 4] corners, pixels
    classes: IntArray  # [n], index into the labels that scores are asked for
    areas: FloatArray  # [n] square pixels, for COCO's sizes
    crowd: npt.NDArray[np.bool_]  # [n]: neither asked for nor held against a detector


class ClipTruth(msgspec.Struct, frozen=True, eq=False):
    """What is in one clip: MOTChallenge's rows."""

    rows: FloatArray  # [m, 9]: frame (from 1), track, left, top, width, height, counts (0, 1), class, visibility
    frame_count: int


class DetectionScores(msgspec.Struct, frozen=True):
    """Fractions. `m_ap` is the mean over IoU 0.50, 0.55, ... 0.95 and over all classes that occur."""

    m_ap: float
    ap50: float
    ap75: float


class TrackingScores(msgspec.Struct, frozen=True):
    """Fractions over all clips together; MOTA may be negative. Counts beside them."""

    mota: float
    hota: float
    idf1: float
    wrong: int  # boxes that match nothing
    missed: int
    switches: int  # changes of identity


def detection_scores(
    truth: Sequence[StillTruth], found: Sequence[Detections], labels: Sequence[str]
) -> DetectionScores:
    """COCO's box average precision over pictures, one `Detections` each. Raises ImportError without pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    wanted: list[dict[str, Any]] = []
    answered: list[dict[str, Any]] = []
    for image, (true, detections) in enumerate(zip(truth, found, strict=True), 1):
        for box, label, area, crowd in zip(true.boxes, true.classes, true.areas, true.crowd, strict=True):
            row = _coco_row(image, box, int(label))
            wanted.append(row | {"id": len(wanted) + 1, "area": float(area), "iscrowd": int(crowd)})
        for box, score, label in zip(detections.boxes, detections.scores, detections.classes, strict=True):
            answered.append(_coco_row(image, box, int(label)) | {"score": float(score)})
    if not answered or not wanted:
        return DetectionScores(0.0, 0.0, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # it reports every step
        reference = COCO()
        reference.dataset = {
            "images": [{"id": image} for image in range(1, len(truth) + 1)],
            "annotations": wanted,
            "categories": [{"id": number, "name": name} for number, name in enumerate(labels)],
        }
        reference.createIndex()
        scored = COCOeval(reference, reference.loadRes(answered), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return DetectionScores(*(max(0.0, float(value)) for value in scored.stats[:3]))


def tracking_scores(truth: Sequence[ClipTruth], found: Sequence[FloatArray]) -> TrackingScores:
    """MOTChallenge's scores over clips. `found`: rows as `Tracks.rows`, [m, 7], of each clip in its own frames.

    Boxes on MOT17's distractors are neither asked for nor held against a tracker; truth that does not count, or is of
    another class than pedestrians, is left out. Raises ImportError without trackeval.
    """
    from trackeval.metrics import CLEAR, HOTA, Identity

    clips = [_trackeval_clip(true, rows) for true, rows in zip(truth, found, strict=True)]
    quiet = {"PRINT_CONFIG": False}
    together: dict[str, Any] = {}
    for metric in (CLEAR(quiet), Identity(quiet), HOTA()):
        each = {str(number): metric.eval_sequence(clip) for number, clip in enumerate(clips)}
        together |= metric.combine_sequences(each)
    return TrackingScores(
        mota=float(together["MOTA"]),
        hota=float(np.mean(together["HOTA"])),  # over its 19 overlap thresholds
        idf1=float(together["IDF1"]),
        wrong=int(together["CLR_FP"]),
        missed=int(together["CLR_FN"]),
        switches=int(together["IDSW"]),
    )


def interpolated(rows: FloatArray, kept: Sequence[int], frame_count: int) -> FloatArray:
    """Tracks found in the `kept` frames (numbers from 1, rising) filled in for the frames left out between them.

    A box between two kept neighbours lies on the straight line between the track's boxes there; after the last kept
    frame it stays. A track that lacks in a kept frame is not filled in across it. [m, 7] to [more, 7], by frame.
    """
    place = {number: index for index, number in enumerate(kept)}
    filled: list[FloatArray] = list(rows)
    for track in np.unique(rows[:, 1]):
        mine = rows[rows[:, 1] == track]
        mine = mine[np.argsort(mine[:, 0], kind="stable")]
        for before, after in itertools.pairwise(mine):
            if place[int(after[0])] != place[int(before[0])] + 1:
                continue
            for frame in range(int(before[0]) + 1, int(after[0])):
                share = (frame - before[0]) / (after[0] - before[0])
                row = before + share * (after - before)
                row[0] = frame
                filled.append(row)
        if int(mine[-1, 0]) == kept[-1]:
            for frame in range(kept[-1] + 1, frame_count + 1):
                row = mine[-1].copy()
                row[0] = frame
                filled.append(row)
    every = np.array(filled).reshape(-1, rows.shape[1])
    return every[np.lexsort((every[:, 1], every[:, 0]))]


def _coco_row(image: int, box: npt.NDArray[Any], label: int) -> dict[str, Any]:
    left, top, right, bottom = (float(edge) for edge in box)
    width, height = right - left, bottom - top
    return {"image_id": image, "category_id": label, "bbox": [left, top, width, height], "area": width * height}


def _trackeval_clip(truth: ClipTruth, found: FloatArray) -> dict[str, Any]:
    """One clip as trackeval's metrics take it: identities from 0, and overlaps, frame by frame."""
    ours, theirs, overlaps = [], [], []
    for frame in range(1, truth.frame_count + 1):
        true = truth.rows[truth.rows[:, 0] == frame]
        mine = found[found[:, 0] == frame]
        likeness = iou(_corners(true), _corners(mine))
        mine_kept = np.setdiff1d(np.arange(len(mine)), _on_distractors(true, likeness))
        counts = (true[:, 6] != 0) & (true[:, 7] == PEDESTRIAN)
        ours.append(true[counts, 1])
        theirs.append(mine[mine_kept, 1])
        overlaps.append(likeness[counts][:, mine_kept])
    our_ids, their_ids = (np.unique(np.concatenate([*rows, np.empty(0)])) for rows in (ours, theirs))
    return {
        "num_timesteps": truth.frame_count,
        "num_gt_ids": len(our_ids),
        "num_tracker_ids": len(their_ids),
        "num_gt_dets": sum(len(rows) for rows in ours),
        "num_tracker_dets": sum(len(rows) for rows in theirs),
        "gt_ids": [np.searchsorted(our_ids, rows) for rows in ours],
        "tracker_ids": [np.searchsorted(their_ids, rows) for rows in theirs],
        "similarity_scores": overlaps,
    }


def _on_distractors(true: FloatArray, likeness: FloatArray) -> IntArray:
    """Found boxes that match a distractor best when each may match one true box of any class only."""
    if likeness.size == 0:
        return np.empty(0, dtype=np.int64)
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(np.where(likeness >= _MATCH, -likeness, 0.0))
    right = (likeness[rows, columns] >= _MATCH) & np.isin(true[rows, 7], _DISTRACTORS)
    chosen: IntArray = columns[right].astype(np.int64)
    return chosen


def _corners(rows: FloatArray) -> FloatArray:
    return np.concatenate([rows[:, 2:4], rows[:, 2:4] + rows[:, 4:6]], axis=1)
