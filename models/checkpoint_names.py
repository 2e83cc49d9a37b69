"""Public detection checkpoints under the names of `models/architectures/faster_rcnn.py`.

Two sources: mmdetection's Faster R-CNN files (2.0 and later) and torchvision's. Beside the names, they differ in the
order of classes: mmdetection puts the background last and leaves it out of the boxes; torchvision puts it first, and
numbers COCO's 80 classes with gaps up to 90. Nothing here reads files.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Source = Literal["mmdetection", "torchvision"]

_SCORES = "roi_heads.box_predictor.cls_score"
_BOXES = "roi_heads.box_predictor.bbox_pred"

# Beginnings of names, theirs and ours; "{}" stands for a number.
_MMDETECTION = (
    ("backbone.", "backbone.body."),
    ("neck.lateral_convs.{}.conv.", "backbone.fpn.inner_blocks.{}.0."),
    ("neck.fpn_convs.{}.conv.", "backbone.fpn.layer_blocks.{}.0."),
    ("rpn_head.rpn_conv.", "rpn.head.conv.0.0."),
    ("rpn_head.rpn_cls.", "rpn.head.cls_logits."),
    ("rpn_head.rpn_reg.", "rpn.head.bbox_pred."),
    ("roi_head.shared_head.layer4.", "roi_heads.box_roi_pool.layer4."),
    ("roi_head.bbox_head.shared_fcs.0.", "roi_heads.box_head.fc6."),
    ("roi_head.bbox_head.shared_fcs.1.", "roi_heads.box_head.fc7."),
    ("roi_head.bbox_head.fc_cls.", f"{_SCORES}."),
    ("roi_head.bbox_head.fc_reg.", f"{_BOXES}."),
)
_LEVELS = 4  # of the pyramid
_COUNTERS = "num_batches_tracked"  # of training only; some files have them, some do not

_COCO_GAPS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
COCO_NUMBERS = tuple(number for number in range(1, 91) if number not in _COCO_GAPS)
"""COCO's own numbers of the 80 classes, in the order of `catalog/edge/coco.txt`."""


class CheckpointError(ValueError):
    """A checkpoint whose names or shapes do not fit; says which."""


def source_of(state: State) -> Source:
    """Which code wrote it, by its names. Raises `CheckpointError`."""
    if any(name.startswith("roi_head.") for name in state):
        return "mmdetection"
    if any(name.startswith("roi_heads.") for name in state):
        return "torchvision"
    if any(name.startswith("bbox_head.") for name in state):
        raise CheckpointError("written by mmdetection 1.x, whose boxes count otherwise: take a file of 2.0 or later")
    shown = ", ".join(list(state)[:3]) or "no weights"
    raise CheckpointError(f"neither mmdetection's nor torchvision's Faster R-CNN: it holds {shown}")


def from_mmdetection(state: State) -> dict[str, Tensor]:
    """mmdetection's weights as torchvision orders and names them. Raises `CheckpointError` for unknown names."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        result[_renamed(name)] = value
    for kind in ("weight", "bias"):
        scores, boxes = result.get(f"{_SCORES}.{kind}"), result.get(f"{_BOXES}.{kind}")
        if scores is None or boxes is None:
            raise CheckpointError(f"has no roi_head.bbox_head.fc_cls.{kind} or fc_reg.{kind}")
        if len(boxes) != 4 * (len(scores) - 1):
            raise CheckpointError(
                f"has {len(boxes)} box rows for {len(scores)} classes with the background, not four each"
            )
        result[f"{_SCORES}.{kind}"] = torch.cat([scores[-1:], scores[:-1]])
        # The background's boxes are never read.
        result[f"{_BOXES}.{kind}"] = torch.cat([torch.zeros_like(boxes[:4]), boxes])
    return result


def from_torchvision(state: State) -> dict[str, Tensor]:
    """torchvision's weights with COCO's 80 classes (91 rows become 81); others as they are.

    The rows left out belong to numbers without a class; their probability, next to nothing, falls to the others.
    """
    result = dict(state)
    rows = torch.tensor([0, *COCO_NUMBERS])
    for kind in ("weight", "bias"):
        scores = result.get(f"{_SCORES}.{kind}")
        if scores is not None and len(scores) == 91:
            result[f"{_SCORES}.{kind}"] = scores[rows]
            boxes = result[f"{_BOXES}.{kind}"]
            result[f"{_BOXES}.{kind}"] = boxes.reshape(91, 4, *boxes.shape[1:])[rows].flatten(0, 1)
    return result


def load(network: Any, state: State) -> None:
    """Put converted weights into `network`. Raises `CheckpointError` if any is missing, unknown or of another shape."""
    try:
        outcome = network.load_state_dict(
            {name: value for name, value in state.items() if not name.endswith(_COUNTERS)}, strict=False
        )
    except RuntimeError as error:
        raise CheckpointError(f"is of another network: {' '.join(str(error).split())[:300]}") from error
    missing = [name for name in outcome.missing_keys if not name.endswith(_COUNTERS)]
    for kind, names in (("lacks", missing), ("has besides", outcome.unexpected_keys)):
        if names:
            raise CheckpointError(f"is of another network: it {kind} {len(names)} weights, {', '.join(names[:3])} …")


def _renamed(name: str) -> str:
    for theirs, ours in _MMDETECTION:
        for level in range(_LEVELS if "{}" in theirs else 1):
            if name.startswith(theirs.format(level)):
                return ours.format(level) + name[len(theirs.format(level)) :]
    raise CheckpointError(f"has a weight {name} that mmdetection's Faster R-CNN has not")
