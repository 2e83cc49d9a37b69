"""What YOLOX is trained with: which places answer for which box (SimOTA), and how far off they are.

Source: Ge et al. 2021, section 2.1: cost of a place for a box = its class loss + 3 x its overlap loss; a box is given
as many places as its ten best overlaps add up to, the cheapest ones; a place that two boxes want goes to the cheaper.
Losses: 5 x (1 - IoU squared) for the boxes, binary cross-entropy for object and class (whose target is the overlap),
all divided by the number of places that answer for a box.
"""

import torch
from torch import Tensor
from torch.nn import functional

from models.architectures.yolox import STRIDES, cells, corners, decoded

_RADIUS = 1.5  # strides around a box's centre within which places may answer for it
_CANDIDATES = 10  # best overlaps that decide how many places a box is given
_OVERLAP_WEIGHT = 3.0  # in the cost
_BOX_WEIGHT = 5.0  # in the loss
_NEVER = 1e6


def yolox_loss(levels: list[Tensor], boxes: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
    """Losses of one minibatch: "box", "object" and "class", to be added up.

    `levels`: what `Yolox` gives back; per image `boxes` [k, 4] (left, top, right, bottom in pixels of the input) and
    `labels` [k] from 0; k may be 0.
    """
    levels = [level.float() for level in levels]
    found = decoded(levels)
    centres, strides = places(levels)
    box = found.new_zeros(())
    of_class = found.new_zeros(())
    wanted = torch.zeros_like(found[..., 4])
    answering = 0
    for index, (truth, label) in enumerate(zip(boxes, labels, strict=True)):
        if len(truth) == 0:
            continue
        mine = corners(found[index, :, :4])
        with torch.no_grad():
            chosen, box_of, overlap = assign(
                mine, found[index, :, 4], found[index, :, 5:], truth, label, centres, strides
            )
        wanted[index, chosen] = 1.0
        answering += len(chosen)
        box = box + (1 - paired_iou(mine[chosen], truth[box_of]) ** 2).sum()
        target = functional.one_hot(label[box_of], found.shape[2] - 5) * overlap[:, None]
        logits = found[index, chosen, 5:]
        of_class = of_class + functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    of_object = functional.binary_cross_entropy_with_logits(found[..., 4], wanted, reduction="sum")
    share = 1.0 / max(answering, 1)
    return {"box": _BOX_WEIGHT * share * box, "object": share * of_object, "class": share * of_class}


def places(levels: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Centre [places, 2] in pixels and stride [places] of every cell of every level."""
    centres, strides = [], []
    for stride, level in zip(STRIDES, levels, strict=True):
        grid = cells(level.shape[2], level.shape[3]).to(level)
        centres.append((grid + 0.5) * stride)
        strides.append(torch.full((len(grid),), float(stride), device=level.device))
    return torch.cat(centres), torch.cat(strides)


def assign(
    mine: Tensor,
    object_logits: Tensor,
    class_logits: Tensor,
    truth: Tensor,
    label: Tensor,
    centres: Tensor,
    strides: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """SimOTA for one image: the chosen places, the box that each answers for, and their overlap (IoU).

    `mine` [places, 4] predicted and `truth` [k, 4] true corners; logits [places] and [places, classes].
    """
    middle = (truth[:, :2] + truth[:, 2:]) / 2
    near = (centres[None] - middle[:, None]).abs().amax(dim=2) < _RADIUS * strides[None]  # [k, places]
    candidates = near.any(dim=0).nonzero()[:, 0]
    if len(candidates) == 0:  # every box lies off the grid
        empty = candidates
        return empty, empty, mine.new_zeros(0)
    near, mine = near[:, candidates], mine[candidates]
    overlap = iou(truth, mine)  # [k, candidates]
    probability = (class_logits[candidates].sigmoid() * object_logits[candidates, None].sigmoid()).sqrt()
    expected = functional.one_hot(label, class_logits.shape[1]).to(probability)
    class_cost = functional.binary_cross_entropy(
        probability[None].expand(len(truth), -1, -1),
        expected[:, None].expand(-1, len(candidates), -1),
        reduction="none",
    ).sum(dim=2)
    cost = class_cost - _OVERLAP_WEIGHT * torch.log(overlap + 1e-8) + _NEVER * ~near
    counts = overlap.topk(min(_CANDIDATES, len(candidates)), dim=1).values.sum(dim=1).int().clamp(min=1)
    order = cost.argsort(dim=1).argsort(dim=1)  # rank of each candidate for each box
    taken = (order < counts[:, None]) & near
    cheapest = torch.where(taken, cost, torch.inf).argmin(dim=0)
    chosen = taken.any(dim=0).nonzero()[:, 0]
    box_of = cheapest[chosen]
    return candidates[chosen], box_of, overlap[box_of, chosen]


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of every box of [k, 4] with every one of [m, 4]: [k, m]."""
    return paired_iou(first[:, None], second[None])


def paired_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes one by one; [..., 4] corners each, broadcast."""
    sides = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    both = sides.clamp(min=0).prod(dim=-1)
    areas = (first[..., 2:] - first[..., :2]).prod(dim=-1) + (second[..., 2:] - second[..., :2]).prod(dim=-1)
    found: Tensor = both / (areas - both).clamp(min=1e-9)
    return found
