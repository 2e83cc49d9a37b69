"""What the embedding head learns from: pairs of frames, and how it is told whose boxes belong together.

Source: Pang et al. 2021, "Quasi-Dense Similarity Learning", section 3.2. Many boxes stand for one object (its true one,
moved and resized a little). Each box of the first frame should be more like every box of the same object in the second
frame than like any other there: log(1 + sum over positives and negatives of exp(v.k- - v.k+)). An auxiliary loss holds
the cosine of positives to 1 and that of negatives to 0. Boxes of background take part as negatives.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from models.datasets.scenes import SceneSettings, plan_scene, render
from models.train_scenes_data import LEAST_VISIBLE, FrameStore, Labelled, Picture, minibatch_of_pairs

PER_OBJECT = 3  # boxes that stand for one object
BACKGROUND = 6  # boxes of background per frame
_EMBED_WEIGHT, _COSINE_WEIGHT = 0.25, 1.0  # as published
NOBODY = -1

Embed = Callable[[Sequence[Picture], Sequence[Tensor]], list[Tensor]]
"""Pictures and boxes [k, 4] of each to embeddings [k, length] of each."""


def embedding_losses(embed: Embed, store: FrameStore, seed: int, step: int, pairs: int) -> dict[str, Tensor]:
    """Losses of one step: "embed" and "cosine", each a mean over the pairs that show an object twice."""
    rng = np.random.default_rng([seed, step, 1])
    frames = [one for pair in minibatch_of_pairs(store, seed, step, pairs) for one in pair]
    boxes, tracks = zip(*(_boxes(one, rng) for one in frames), strict=True)
    embeddings = embed([one.picture for one in frames], boxes)
    found = [
        pair_losses(embeddings[first], tracks[first], embeddings[first + 1], tracks[first + 1])
        for first in range(0, len(frames), 2)
    ]
    shown = [losses for losses in found if losses is not None]
    if not shown:  # every pair lost its objects between its frames: nothing to learn, but something to differentiate
        nothing = torch.cat(embeddings).sum() * 0
        return {"embed": nothing, "cosine": nothing}
    embed_loss, cosine_loss = (torch.stack(part).mean() for part in zip(*shown, strict=True))
    return {"embed": _EMBED_WEIGHT * embed_loss, "cosine": _COSINE_WEIGHT * cosine_loss}


def pair_losses(ours: Tensor, our_tracks: Tensor, theirs: Tensor, their_tracks: Tensor) -> tuple[Tensor, Tensor] | None:
    """Contrastive and cosine loss of embeddings [n, d] and [m, d] with their objects [n], [m] (-1: background).

    None if no object is in both frames.
    """
    same = (our_tracks[:, None] == their_tracks[None]) & (our_tracks[:, None] != NOBODY)
    asked = same.any(dim=1)
    if not asked.any():
        return None
    same, ours = same[asked], ours[asked]
    likeness = ours @ theirs.T
    # log(1 + (sum of exp(-positive)) * (sum of exp(negative))), by logarithms throughout.
    apart = torch.logsumexp(torch.where(same, -likeness, -torch.inf), dim=1)
    close = torch.logsumexp(torch.where(same, -torch.inf, likeness), dim=1)
    contrast = functional.softplus(apart + close).mean()
    cosine = functional.normalize(ours, dim=1) @ functional.normalize(theirs, dim=1).T
    off = (cosine - same.float()) ** 2
    return contrast, (off[same].mean() + off[~same].mean()) / 2


def matched_share(embed: Embed, scenes: int, apart: int, first_seed: int = 0) -> float:
    """Share of true boxes whose best match `apart` frames later (by bi-softmax) is the same object's box.

    Over held-out scenes, objects that are visible in both frames; everything in the second frame may be matched.
    """
    settings = SceneSettings(frames=apart + 1)
    right = asked = 0
    for seed in range(first_seed, first_seed + scenes):
        clip = render(plan_scene(seed, settings), [0, apart])
        shown = [truth.visibility >= LEAST_VISIBLE for truth in clip.truth]
        boxes = [
            torch.from_numpy(one.boxes[rows].astype(np.float32)) for one, rows in zip(clip.truth, shown, strict=True)
        ]
        before, after = (one.tracks[rows] for one, rows in zip(clip.truth, shown, strict=True))
        if not len(before) or not len(after):
            continue
        with torch.no_grad():
            ours, theirs = embed(list(clip.frames), boxes)
        likeness = ours @ theirs.T
        best = (likeness.softmax(dim=0) + likeness.softmax(dim=1)).argmax(dim=1).numpy()
        both = np.isin(before, after)
        asked += int(both.sum())
        right += int((after[best] == before)[both].sum())
    return right / asked


def _boxes(labelled: Labelled, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Boxes [k, 4] of a frame, several per object and some of background, and whose they are [k]."""
    height, width = labelled.picture.shape[:2]
    true = labelled.boxes.repeat(PER_OBJECT, axis=0)
    sides = np.tile(true[:, 2:] - true[:, :2], 2)
    moved = true + sides * rng.uniform(-0.12, 0.12, true.shape)
    corner = rng.uniform((0, 0), (width - 16, height - 16), (BACKGROUND, 2))
    background = np.concatenate([corner, corner + rng.uniform(14, 60, (BACKGROUND, 2))], axis=1)
    background = background[_overlap(background, labelled.boxes) < 0.3]
    boxes = np.concatenate([moved, background]).clip(0, [width, height] * 2).astype(np.float32)
    tracks = np.concatenate([labelled.tracks.repeat(PER_OBJECT), np.full(len(background), NOBODY)])
    return torch.from_numpy(boxes), torch.from_numpy(tracks)


def _overlap(boxes: npt.NDArray[np.float64], others: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Largest IoU of each box with any of the others; 0 if there are none."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    both = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(some[:, 2:] - some[:, :2], axis=1) for some in (boxes, others)]
    largest: npt.NDArray[np.float64] = (both / (areas[0][:, None] + areas[1][None] - both)).max(axis=1, initial=0.0)
    return largest
