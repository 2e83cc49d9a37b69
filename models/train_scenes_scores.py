"""Average precision of a detector's answers on held-out scenes, by pycocotools."""

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from models.datasets.scenes import HELD_OUT_SEEDS, LABELS, FrameTruth, SceneSettings, plan_scene, render
from models.train_scenes_data import LEAST_VISIBLE, Picture

Found = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]
"""Boxes [n, 4], scores [n], classes [n]."""


def held_out_stills(count: int, first_seed: int = 0) -> tuple[list[Picture], list[FrameTruth]]:
    """`count` pictures, one from each scene from `first_seed` on: the middle frame of three."""
    if first_seed + count > HELD_OUT_SEEDS:
        raise ValueError(f"seeds {first_seed} to {first_seed + count}: those from {HELD_OUT_SEEDS} on are trained on")
    settings = SceneSettings(frames=3)
    clips = [render(plan_scene(first_seed + number, settings), [1]) for number in range(count)]
    return [clip.frames[0] for clip in clips], [clip.truth[0] for clip in clips]


def average_precision(
    detect: Callable[[Picture], Found], pictures: Sequence[Picture], truth: Sequence[FrameTruth]
) -> dict[str, float]:
    """COCO's mAP (IoU 0.5 to 0.95), AP at IoU 0.5 and 0.75, and mAP per class.

    Objects that are less than `LEAST_VISIBLE` visible count as crowds: neither asked for nor held against.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = [{"id": i, "width": p.shape[1], "height": p.shape[0]} for i, p in enumerate(pictures)]
    wanted: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image, (picture, one) in enumerate(zip(pictures, truth, strict=True)):
        for box, label, seen in zip(one.boxes, one.classes, one.visibility, strict=True):
            wanted.append(_row(image, box, label) | {"id": len(wanted) + 1, "iscrowd": int(seen < LEAST_VISIBLE)})
        for box, score, label in zip(*detect(picture), strict=True):
            found.append(_row(image, box, label) | {"score": float(score)})
    if not found:
        return {"mAP": 0.0, "AP50": 0.0, "AP75": 0.0}
    categories = [{"id": i, "name": name} for i, name in enumerate(LABELS)]
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = {"images": images, "annotations": wanted, "categories": categories}
        reference.createIndex()
        scored = COCOeval(reference, reference.loadRes(found), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    precision = scored.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class] for all areas and 100 boxes
    by_class = {name: round(float(precision[:, :, i].mean()), 4) for i, name in enumerate(LABELS)}
    names = ("mAP", "AP50", "AP75")
    return {name: round(float(value), 4) for name, value in zip(names, scored.stats[:3], strict=True)} | by_class


def _row(image: int, box: npt.NDArray[Any], label: int) -> dict[str, Any]:
    x1, y1, x2, y2 = (float(edge) for edge in box)
    area = (x2 - x1) * (y2 - y1)
    return {"image_id": image, "category_id": int(label), "bbox": [x1, y1, x2 - x1, y2 - y1], "area": area}
