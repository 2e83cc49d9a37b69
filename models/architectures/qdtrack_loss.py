"""What QDTrack's embedding head is trained with: many boxes of two frames, told apart by whose they are.

Source: Pang et al. 2021, section 3.2. For every box of the first frame that shows an object, its inner products with
all boxes of the second: those with the same object should exceed all others (Eq. 5, a softmax loss with many positives,
log(1 + sum over negatives, positives of exp(negative - positive))); beside it the cosines are drawn to 1 and to 0
(Eq. 6), the negatives being the hardest, three for each positive.
"""

import torch
from torch import Tensor
from torch.nn import functional

_PRODUCT_WEIGHT = 0.25
_COSINE_WEIGHT = 1.0
_NEGATIVES = 3  # per positive, for the cosines
_NEGATIVE_MARGIN = 0.3  # cosines of different objects below it cost nothing
_MATCH = 0.7  # least overlap at which a shaken box still shows its object
_APART = 0.3  # most overlap at which a random box shows none

NOBODY = -1


def association_losses(first: Tensor, second: Tensor, first_owner: Tensor, second_owner: Tensor) -> dict[str, Tensor]:
    """Losses of one pair of frames: "product" and "cosine", to be added up; zeros where they share no object.

    Embeddings [n, d] and [m, d]; owners are object numbers, -1 for boxes that show none.
    """
    same = (first_owner[:, None] == second_owner[None]) & (first_owner[:, None] != NOBODY)
    asked = same.any(dim=1)
    if not bool(asked.any()):
        nothing = (first.sum() + second.sum()) * 0
        return {"product": nothing, "cosine": nothing}
    same, first = same[asked], first[asked]
    products = first @ second.T
    wrong = products.masked_fill(same, -torch.inf).logsumexp(dim=1)
    right = (-products).masked_fill(~same, -torch.inf).logsumexp(dim=1)
    product = functional.softplus(wrong + right).mean()
    cosines = functional.normalize(first, dim=1) @ functional.normalize(second, dim=1).T
    near = (1 - cosines[same]) ** 2
    far = (cosines[~same] - _NEGATIVE_MARGIN).clamp(min=0) ** 2
    hardest = far.topk(min(len(far), _NEGATIVES * len(near))).values
    cosine = torch.cat((near, hardest)).mean()
    return {"product": _PRODUCT_WEIGHT * product, "cosine": _COSINE_WEIGHT * cosine}


def sampled_boxes(
    boxes: Tensor, tracks: Tensor, width: int, height: int, *, shaken: int, elsewhere: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Boxes [k, 4] to embed and whose they are [k]: the true ones, `shaken` copies of each, some of nothing.

    Copies that left their object too far, and random boxes that touch one, are left out.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    shift = (torch.rand((shaken, len(boxes), 4), generator=generator) - 0.5) * 0.3
    copies = (boxes + shift * sides).reshape(-1, 4)
    owners = tracks.repeat(shaken)
    kept = _paired_iou(copies, boxes.repeat(shaken, 1)) >= _MATCH
    found, owner = [boxes, copies[kept]], [tracks, owners[kept]]
    corner = torch.rand((elsewhere, 2), generator=generator) * torch.tensor([width - 12.0, height - 12.0])
    extent = 12 + torch.rand((elsewhere, 2), generator=generator) * 50
    random = torch.cat((corner, corner + extent), dim=1)
    random = torch.minimum(random, torch.tensor([width, height, width, height], dtype=torch.float32))
    if len(boxes):
        overlap = _paired_iou(random[:, None], boxes[None]).amax(dim=1)
        random = random[overlap < _APART]
    found.append(random)
    owner.append(torch.full((len(random),), NOBODY))
    return torch.cat(found), torch.cat(owner)


def _paired_iou(first: Tensor, second: Tensor) -> Tensor:
    sides = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    both = sides.clamp(min=0).prod(dim=-1)
    areas = (first[..., 2:] - first[..., :2]).prod(dim=-1) + (second[..., 2:] - second[..., :2]).prod(dim=-1)
    found: Tensor = both / (areas - both).clamp(min=1e-9)
    return found
