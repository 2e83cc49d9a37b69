"""What each scene training trains: the network, its loss on one step's pictures, what is served of it, its scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.architectures.small_detectors import MEAN, STD, EmbeddingDetector, ServedDetector, small_faster_rcnn
from models.architectures.yolox import ServedYolox, Yolox, yolox
from models.architectures.yolox_loss import yolox_loss
from models.datasets.scenes import HELD_OUT_SEEDS, LABELS
from models.detection import Detections
from models.edge_items import scene_stills
from models.edge_scores import detection_scores
from models.train_scenes_data import FrameStore, Labelled, Picture, minibatch
from models.train_scenes_embedding import embedding_losses, matched_share

Losses = dict[str, Tensor]
LARGE = "scenes_detector_large"
CHECKPOINT = "checkpoint.pt"
MATCHES_APART = (1, 5, 15)  # frames between which an embedding has to recognise objects


@dataclass(frozen=True)
class Task:
    """One training: `losses(network, store, seed, step)` are added up and followed downhill `steps` times.

    `build` is given the folder of the large detector's training, which only the embedding head needs.
    `scores(network, served, scenes)` are those on that many held-out scenes.
    """

    build: Callable[[Path | None], nn.Module]
    losses: Callable[[nn.Module, FrameStore, int, int], Losses]
    served: Callable[[nn.Module], nn.Module]
    scores: Callable[[nn.Module, nn.Module, int], dict[str, float]]
    outputs: tuple[str, ...]
    steps: int
    learning_rate: float


def detector_task(name: str, steps: int, size: int) -> Task:
    """A small Faster R-CNN on `size` pictures per step."""

    def losses(network: nn.Module, store: FrameStore, seed: int, step: int) -> Losses:
        batch = minibatch(store, seed, step, size)
        # bfloat16 in the backbone and heads: half the time on CPUs that have it; boxes stay whole.
        with torch.autocast("cpu", torch.bfloat16):
            found: Losses = network([as_tensor(one.picture) for one in batch], [_target(one) for one in batch])
        return found

    return Task(
        lambda _: small_faster_rcnn(name, len(LABELS)), losses, ServedDetector, still_scores, STILLS, steps, 2e-3
    )


def yolox_task(name: str, steps: int, size: int) -> Task:
    """A small YOLOX on `size` pictures per step."""

    def losses(network: nn.Module, store: FrameStore, seed: int, step: int) -> Losses:
        batch = minibatch(store, seed, step, size)
        with torch.autocast("cpu", torch.bfloat16):
            levels = network(torch.cat([normalised(one.picture) for one in batch]))
        boxes = [torch.from_numpy(one.boxes) for one in batch]
        return yolox_loss(levels, boxes, [torch.from_numpy(one.classes) for one in batch])

    def served(network: nn.Module) -> nn.Module:
        assert isinstance(network, Yolox)
        return ServedYolox(network, score_threshold=0.01, overlap=0.6, most=60)

    return Task(lambda _: yolox(name, len(LABELS)), losses, served, still_scores, STILLS, steps, 2e-3)


def embedding_task(steps: int, pairs: int) -> Task:
    """An embedding head on the trained large detector, on `pairs` of frames per step."""

    def build(detector: Path | None) -> nn.Module:
        if detector is None or not (detector / CHECKPOINT).is_file():
            given = "nothing" if detector is None else f"{detector}, which holds no {CHECKPOINT}"
            raise SystemExit(f"--detector is {given}: train {LARGE} first and give its --out folder")
        trained = small_faster_rcnn(LARGE, len(LABELS))
        trained.load_state_dict(torch.load(detector / CHECKPOINT, weights_only=True)["network"])
        return EmbeddingDetector(trained, LARGE)

    def losses(network: nn.Module, store: FrameStore, seed: int, step: int) -> Losses:
        return embedding_losses(lambda *given: embed_with(network, *given), store, seed, step, pairs)

    def scores(network: nn.Module, served: nn.Module, scenes: int) -> dict[str, float]:
        return {
            f"matched_{apart}_frames_later": round(
                matched_share(lambda *given: embed_with(network, *given), scenes, apart), 4
            )
            for apart in MATCHES_APART
        } | still_scores(network, served, scenes)

    return Task(build, losses, ServedDetector, scores, (*STILLS, "embeddings"), steps, 1e-3)


def still_scores(network: nn.Module, served: nn.Module, scenes: int) -> dict[str, float]:
    """COCO's average precision of `served` on one still of each of the first `scenes`, as a camera's JPEG."""
    if scenes > HELD_OUT_SEEDS:
        raise ValueError(f"{scenes} scenes: those from {HELD_OUT_SEEDS} on are trained on")
    pairs = [(still.truth, detected(served, still.media.frames[0])) for still in scene_stills(scenes)]
    scores = detection_scores([truth for truth, _ in pairs], [found for _, found in pairs], LABELS)
    return {"mAP": round(scores.m_ap, 4), "AP50": round(scores.ap50, 4), "AP75": round(scores.ap75, 4)}


STILLS = ("boxes", "scores", "classes")
TASKS = {
    LARGE: detector_task(LARGE, 1600, 8),
    "scenes_detector_small": detector_task("scenes_detector_small", 4000, 8),
    "scenes_yolox": yolox_task("scenes_yolox", 1500, 8),
    "scenes_qdtrack": embedding_task(600, 6),
}


def as_tensor(picture: Picture) -> Tensor:
    """[3, height, width] in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))).float() / 255


def normalised(picture: Picture) -> Tensor:
    """[1, 3, height, width] as the exported networks take it."""
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    return ((as_tensor(picture) - mean) / std)[None]


def detected(served: nn.Module, picture: Picture) -> Detections:
    """What `served` finds in one picture of the networks' size."""
    with torch.no_grad():
        boxes, scores, classes = served(normalised(picture))[:3]
    return Detections(boxes.numpy(), scores.numpy(), classes.numpy())


def embed_with(network: nn.Module, pictures: Sequence[Picture], boxes: Sequence[Tensor]) -> list[Tensor]:
    """What an `EmbeddingDetector` makes of boxes in pictures of one size."""
    assert isinstance(network, EmbeddingDetector)
    images = torch.cat([normalised(picture) for picture in pictures])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=network.training):
        features = network.detector.backbone(images)
    found = network.embed(features, list(boxes), (images.shape[2], images.shape[3]))
    return list(torch.split(found, [len(some) for some in boxes]))


def _target(labelled: Labelled) -> dict[str, Any]:
    return {"boxes": torch.from_numpy(labelled.boxes), "labels": torch.from_numpy(labelled.classes + 1)}
