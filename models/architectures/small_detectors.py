"""Small Faster R-CNNs for the rendered scenes: torchvision's two stages on feature pyramids of our own.

Two sizes of one design. A residual network of 3x3 convolutions gives features at strides 4 to 32; the pyramid adds
the coarse ones to the fine; torchvision's region proposal network and box head do the rest, narrower than usual and
with anchors that fit objects of 10 to 80 pixels in pictures of 320x192. Class 0 is the background inside the
network, as torchvision counts; what `ServedDetector` gives back counts from 0 again.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.architectures import torchvision_operators

torchvision_operators.register()

from torchvision.models.detection import FasterRCNN  # noqa: E402 - its operators must be there first
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.models.detection.image_list import ImageList  # noqa: E402
from torchvision.ops import MultiScaleRoIAlign  # noqa: E402

from models.architectures.faster_rcnn import never_none  # noqa: E402

WIDTH, HEIGHT = 320, 192  # pixels of the input
MEAN, STD = (0.45, 0.45, 0.45), (0.25, 0.25, 0.25)  # of values 0..1


@dataclass(frozen=True)
class DetectorSize:
    """What makes one of the detectors larger than the other."""

    widths: tuple[int, int, int, int, int]  # channels of the stem and at strides 4, 8, 16, 32
    blocks: tuple[int, int, int, int]  # residual blocks at strides 4, 8, 16, 32
    pyramid: int  # channels of every pyramid level
    finest: int  # the finest stride of the pyramid: 4 or 8
    anchors: tuple[float, ...]  # side of the anchors in pixels, per level from the finest
    head: int  # width of the box head
    cells: int  # side of the grid that a box is pooled to
    proposals: int  # boxes the second stage looks at


SIZES = {
    "scenes_detector_large": DetectorSize(
        (24, 32, 64, 96, 128), (2, 2, 2, 1), 48, 4, (14.0, 24.0, 40.0, 68.0), 192, 7, 60
    ),
    "scenes_detector_small": DetectorSize((12, 12, 24, 40, 56), (1, 1, 1, 1), 24, 8, (18.0, 34.0, 62.0), 64, 5, 30),
}


class Block(nn.Module):
    """x + two 3x3 convolutions of x; a stride or a new width changes x by a 1x1 convolution first."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(inputs, outputs, stride=stride), nn.ReLU(), convolution(outputs, outputs))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, side=1, stride=stride)

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.shortcut(features) + self.body(features))


class SmallPyramid(nn.Module):
    """[n, 3, h, w] to features of equal width: "0" the finest stride, each next one twice as coarse, up to 32."""

    def __init__(self, size: DetectorSize) -> None:
        super().__init__()
        stem, *widths = size.widths
        self.stem = nn.Sequential(convolution(3, stem, stride=2), nn.ReLU())
        stages: list[nn.Module] = []
        inputs = stem
        for width, blocks in zip(widths, size.blocks, strict=True):
            stages.append(
                nn.Sequential(Block(inputs, width, stride=2), *(Block(width, width) for _ in range(1, blocks)))
            )
            inputs = width
        self.stages = nn.ModuleList(stages)
        self.skipped = {4: 0, 8: 1}[size.finest]
        used = widths[self.skipped :]
        self.lateral = nn.ModuleList(nn.Conv2d(width, size.pyramid, 1) for width in used)
        self.smooth = nn.ModuleList(nn.Conv2d(size.pyramid, size.pyramid, 3, padding=1) for _ in used)
        self.out_channels = size.pyramid

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        features = self.stem(images)
        found: list[Tensor] = []
        for stage in self.stages:
            features = stage(features)
            found.append(features)
        above: Tensor | None = None
        levels: list[Tensor] = []
        pairs = list(zip(self.lateral, self.smooth, found[self.skipped :], strict=True))
        for lateral, smooth, features in reversed(pairs):
            merged = lateral(features)
            if above is not None:
                merged = merged + functional.interpolate(above, scale_factor=2.0, mode="nearest")
            above = merged
            levels.append(smooth(merged))
        # Half precision ends here: boxes need whole pixels of 320, and bfloat16 has steps of two there.
        return OrderedDict((str(index), level.float()) for index, level in enumerate(reversed(levels)))


def small_faster_rcnn(name: str, classes: int) -> FasterRCNN:
    """The network called `name` (a key of `SIZES`) for that many classes, untrained.

    torchvision's interface: lists of images [3, 192, 320] in 0..1 and, in training, of targets with "boxes" and
    "labels" from 1. Losses come back in training, else boxes, labels from 1 and scores.
    """
    size = SIZES[name]
    levels = len(size.anchors)
    anchors = AnchorGenerator(tuple((side,) for side in size.anchors), ((0.7, 1.0, 1.4),) * levels)
    # Boxes up to 12 cells wide are pooled from the finest level, up to 24 from the next, and so on.
    pool = MultiScaleRoIAlign(
        [str(level) for level in range(levels)],
        output_size=size.cells,
        sampling_ratio=2,
        canonical_scale=6 * size.finest,
        canonical_level={4: 2, 8: 3}[size.finest],
    )
    network = FasterRCNN(
        SmallPyramid(size),
        rpn_anchor_generator=anchors,
        box_roi_pool=pool,
        box_head=BoxHead(size.pyramid * size.cells**2, size.head),
        box_predictor=BoxPredictor(size.head, classes + 1),
        image_mean=MEAN,
        image_std=STD,
        min_size=HEIGHT,
        max_size=WIDTH,
        _skip_resize=True,  # in training, where every picture has that size
        rpn_pre_nms_top_n_train=400,
        rpn_post_nms_top_n_train=150,
        rpn_pre_nms_top_n_test=2 * size.proposals,
        rpn_post_nms_top_n_test=size.proposals,
        rpn_batch_size_per_image=128,
        box_batch_size_per_image=64,
        box_score_thresh=0.05,
        box_detections_per_img=40,
    )
    return network


class BoxHead(nn.Module):
    """[boxes, channels, cells, cells] to [boxes, width]: two layers."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(1), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )

    def forward(self, pooled: Tensor) -> Tensor:
        features: Tensor = self.layers(pooled)
        return features


class BoxPredictor(nn.Module):
    """[boxes, width] to class logits [boxes, classes] and box changes [boxes, 4 * classes]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, classes)
        self.change = nn.Linear(width, 4 * classes)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.score(features), self.change(features)


class EmbeddingHead(nn.Module):
    """[boxes, channels, cells, cells] to [boxes, length]: two convolutions and a layer, after QDTrack's."""

    def __init__(self, channels: int, cells: int, length: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(1),
            nn.Linear(channels * cells**2, length),
        )

    def forward(self, pooled: Tensor) -> Tensor:
        embeddings: Tensor = self.layers(pooled)
        return embeddings


class EmbeddingDetector(nn.Module):
    """A trained small Faster R-CNN, kept as it is, with an embedding head on its features."""

    def __init__(self, detector: FasterRCNN, name: str, length: int = 64) -> None:
        super().__init__()
        self.detector = detector.requires_grad_(False)
        size = SIZES[name]
        self.head = EmbeddingHead(size.pyramid, size.cells, length)

    def train(self, mode: bool = True) -> "EmbeddingDetector":
        """Only the head trains: the detector's normalisation stays that of its own training."""
        super().train(mode)
        self.detector.eval()
        return self

    def embed(self, features: dict[str, Tensor], boxes: list[Tensor], size: tuple[int, int]) -> Tensor:
        """[sum of boxes, length]: what the objects in those boxes (per picture [k, 4]) look like."""
        pooled = self.detector.roi_heads.box_roi_pool(features, boxes, [size] * len(boxes))
        found: Tensor = self.head(pooled)
        return found


class ServedDetector(nn.Module):
    """One normalised picture [1, 3, h, w] to boxes [n, 4] (pixels of it), scores [n] and classes [n] from 0.

    Sides are multiples of 32. With an `EmbeddingDetector`, also embeddings [n, length].
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        embedding = self.network if isinstance(self.network, EmbeddingDetector) else None
        detector: Any = self.network if embedding is None else embedding.detector
        features = detector.backbone(image)
        size = (image.shape[2], image.shape[3])
        (proposals,), _ = detector.rpn(ImageList(image, [size]), features, None)
        found, _ = detector.roi_heads(features, [never_none(proposals)], [size], None)
        boxes = found[0]["boxes"]
        answer = (boxes, found[0]["scores"], found[0]["labels"] - 1)
        return answer if embedding is None else (*answer, embedding.embed(features, [boxes], size))


def convolution(inputs: int, outputs: int, side: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (at stride 1), with batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, side, stride=stride, padding=side // 2, bias=False), nn.BatchNorm2d(outputs)
    )
