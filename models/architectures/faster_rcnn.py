"""Faster R-CNN with the backbones of Huang's Table II, from torchvision's parts, as the public weights expect it.

    image ── backbone ──► feature maps ── rpn ──► proposals ── roi_heads ──► boxes, scores, classes

Two codes trained the public weights, and they disagree in small things that cost accuracy if mixed up: `Conventions`
names them. The parts that torchvision fixes to its own (anchors, region pooling) are written here; the head that it
lacks (C4) is in `c4_head.py`. Call `torchvision_operators.register()` before importing torchvision: `build` does.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.architectures import torchvision_operators

Shape = tuple[int, int]
RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors
SIZE_DIVISOR = 32  # the coarsest stage's stride: images are padded to a multiple


@dataclass(frozen=True)
class Architecture:
    """What the network is made of. Widths below the published ones are for tests."""

    blocks: tuple[int, int, int, int] = (3, 4, 6, 3)  # bottleneck blocks in each stage
    groups: int = 1
    group_width: int = 64
    head: Literal["fpn", "c4"] = "fpn"
    early_stride: bool = False  # a stage's stride in its first 1x1 convolution (Caffe's networks), not in the 3x3 one
    classes: int = 80
    pyramid: int = 256  # channels of the feature pyramid
    hidden: int = 1024  # width of the box head's two layers


ARCHITECTURES = {
    "faster_rcnn_r50_fpn": Architecture(),
    "faster_rcnn_r50_c4": Architecture(head="c4", early_stride=True),
    "faster_rcnn_r101_fpn": Architecture(blocks=(3, 4, 23, 3)),
    "faster_rcnn_x101_64x4d_fpn": Architecture(blocks=(3, 4, 23, 3), groups=64, group_width=4),
}


@dataclass(frozen=True)
class Conventions:
    """Where the codes that trained the public weights differ."""

    whole_anchors: bool  # anchors rounded to whole pixels, strides taken from the map's size
    aligned: bool  # pixel centres at 0.5 when regions are pooled
    sampling_ratio: int  # samples per cell and axis; 0: as many as the cell has pixels
    norm_epsilon: float


MMDETECTION = Conventions(whole_anchors=False, aligned=True, sampling_ratio=0, norm_epsilon=1e-5)
# Its public file was trained without an epsilon; torch wants one above zero.
TORCHVISION = Conventions(whole_anchors=True, aligned=False, sampling_ratio=2, norm_epsilon=1e-12)


class FasterRcnn(nn.Module):
    """Backbone, proposals, heads: the names under which torchvision keeps their weights."""

    backbone: Any
    rpn: Any
    roi_heads: Any

    def __init__(self, backbone: nn.Module, rpn: nn.Module, roi_heads: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.rpn = rpn
        self.roi_heads = roi_heads


class OneImage(nn.Module):
    """One image [1, 3, h, w] through a network of torchvision's shape (`backbone`, `rpn`, `roi_heads`).

    Gives boxes [n, 4] in the image's pixels, scores [n] and classes [n] without the background. Padding to the stride's
    multiple happens inside, with zeros (the mean colour).
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from torchvision.models.detection.image_list import ImageList

        height, width = image.shape[-2:]
        padded = functional.pad(image, (0, -width % SIZE_DIVISOR, 0, -height % SIZE_DIVISOR))
        features = self.network.backbone(padded)
        sizes = [(height, width)]
        (proposals,), _ = self.network.rpn(ImageList(padded, sizes), features)
        (found,), _ = self.network.roi_heads(features, [never_none(proposals)], sizes)
        return found["boxes"], found["scores"], found["labels"] - 1


def never_none(proposals: Tensor) -> Tensor:
    """Proposals [n, 4] and one without area: that yields no box, and keeps an exported graph whole where n is 0."""
    return functional.pad(proposals, (0, 0, 0, 1))


class GridAnchors(nn.Module):
    """Anchors of every feature map, cell by cell, ratio by ratio, size by size: one [anchors, 4] for each image.

    `sizes` and `strides` (pixels) are given per map. Anchors of one cell are centred on the cell's corner.
    """

    def __init__(self, sizes: Sequence[Sequence[float]], strides: Sequence[int], *, whole: bool) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.whole = whole
        self.per_cell = len(sizes[0]) * len(RATIOS)
        for level, chosen in enumerate(sizes):
            corners = []
            for ratio in RATIOS:
                for size in chosen:
                    half_w, half_h = size / math.sqrt(ratio) / 2, size * math.sqrt(ratio) / 2
                    corners.append((-half_w, -half_h, half_w, half_h))
            cell = torch.tensor(corners)
            self.register_buffer(f"cell_{level}", cell.round() if whole else cell, persistent=False)

    def forward(self, images: Any, features: Sequence[Tensor]) -> list[Tensor]:
        every = []
        for level, feature in enumerate(features):
            rows, columns = feature.shape[-2:]
            down = across = self.strides[level]
            if self.whole:
                down, across = images.tensors.shape[-2] // rows, images.tensors.shape[-1] // columns
            y = torch.arange(rows, device=feature.device) * down
            x = torch.arange(columns, device=feature.device) * across
            y, x = torch.meshgrid(y, x, indexing="ij")
            corner = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            every.append((corner + self.get_buffer(f"cell_{level}")).reshape(-1, 4))
        anchors = torch.cat(every)
        return [anchors for _ in images.image_sizes]


class PyramidAlign(nn.Module):
    """Regions pooled from the map that suits their size: [regions, channels, 7, 7] in the proposals' order.

    A region of side s goes to level floor(log2(s / 56)) of 0 to 3 (the finest has stride 4).
    """

    SIZE = 7
    NAMES = ("0", "1", "2", "3")
    FINEST = 56.0  # pixels; from twice this side on, the second level

    def __init__(self, conventions: Conventions) -> None:
        super().__init__()
        self.aligned, self.ratio = conventions.aligned, conventions.sampling_ratio

    def forward(self, features: Mapping[str, Tensor], proposals: list[Tensor], sizes: list[Shape]) -> Tensor:
        from torchvision.ops import roi_align

        regions = numbered(proposals)
        w, h = regions[:, 3] - regions[:, 1], regions[:, 4] - regions[:, 2]
        side = torch.sqrt(w * h) / self.FINEST + 1e-6
        level = torch.stack([side >= 2.0**step for step in range(1, len(self.NAMES))]).sum(dim=0)
        places, pooled = [], []
        for index, name in enumerate(self.NAMES):
            place = torch.where(level == index)[0]
            places.append(place)
            pooled.append(
                roi_align(features[name], regions[place], self.SIZE, 0.25 / 2**index, self.ratio, self.aligned)
            )
        return torch.cat(pooled)[torch.argsort(torch.cat(places))]


def numbered(proposals: Sequence[Tensor]) -> Tensor:
    """All images' boxes in one tensor [n, 5], the image's number in front."""
    parts = [functional.pad(boxes, (1, 0), value=float(image)) for image, boxes in enumerate(proposals)]
    return torch.cat(parts)


def build(architecture: Architecture, conventions: Conventions = MMDETECTION, *, proposals: int = 1000) -> FasterRcnn:
    """The network with freshly drawn weights (see `settle`), in evaluation mode.

    `proposals` is how many boxes at most reach the head. Before suppression (overlap 0.7) there are 1,000 per pyramid
    level, or 6,000 of the only map. Answers have a score of 0.05 and more, overlap 0.5 at most, and are 100 at most.
    These are the settings behind the published accuracies.
    """
    torchvision_operators.register()
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.roi_heads import RoIHeads
    from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

    from models.architectures.c4_head import C4Regions

    body = residual_network(architecture, conventions)
    align: nn.Module
    if architecture.head == "fpn":
        stages = [256, 512, 1024, 2048]
        names = {f"layer{stage + 1}": str(stage) for stage in range(4)}
        backbone: nn.Module = BackboneWithFPN(body, names, stages, architecture.pyramid)
        anchors = GridAnchors(
            [[8.0 * s] for s in (4, 8, 16, 32, 64)], (4, 8, 16, 32, 64), whole=conventions.whole_anchors
        )
        align, channels = PyramidAlign(conventions), architecture.pyramid
        head: nn.Module = TwoMLPHead(channels * PyramidAlign.SIZE**2, architecture.hidden)
        features, before = architecture.hidden, 1000
    else:
        align = C4Regions(body.layer4, conventions, most=proposals + 1)  # with `never_none`'s own
        backbone = nn.Sequential()
        backbone.add_module("body", IntermediateLayerGetter(body, {"layer3": "0"}))
        anchors = GridAnchors([[32.0, 64.0, 128.0, 256.0, 512.0]], (16,), whole=conventions.whole_anchors)
        head, channels, features, before = nn.Identity(), 1024, 2048, 6000
    # Matching and sampling (training) as torchvision has them; nothing here is trained with them.
    rpn = RegionProposalNetwork(
        anchors,
        RPNHead(channels, anchors.per_cell),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": before},
        post_nms_top_n={"training": 2000, "testing": proposals},
        nms_thresh=0.7,
    )
    roi_heads = RoIHeads(
        align,
        head,
        FastRCNNPredictor(features, architecture.classes + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=512,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),  # deltas' deviations 0.1, 0.1, 0.2, 0.2
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
    )
    return FasterRcnn(backbone, rpn, roi_heads).eval()


def residual_network(architecture: Architecture, conventions: Conventions) -> Any:
    """torchvision's ResNet or ResNeXt for `architecture`."""
    from torchvision.models.resnet import Bottleneck, ResNet

    norm = functools.partial(nn.BatchNorm2d, eps=conventions.norm_epsilon)
    network = ResNet(
        Bottleneck,
        list(architecture.blocks),
        groups=architecture.groups,
        width_per_group=architecture.group_width,
        norm_layer=norm,
    )
    if architecture.early_stride:
        for stage in (network.layer2, network.layer3, network.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = stage[0].conv2.stride, stage[0].conv1.stride
    return network


@torch.no_grad()
def settle(network: FasterRcnn, *, spread: float = 1.0, height: int = 192, width: int = 256) -> None:
    """Make a network of random weights behave like a trained one in size, on `rough_noise` times `spread`.

    Its normalisation is fitted, so that values neither fade nor overflow, and the four predictors are scaled until
    their outputs spread: scores are distinct and many pass the threshold. Its answers still mean nothing.
    """
    image = spread * rough_noise(height, width, torch.Generator().manual_seed(0))
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # average over all batches seen
        norm.reset_running_stats()
        norm.train()
    run = OneImage(network)
    kept = network.rpn._post_nms_top_n
    network.rpn._post_nms_top_n = kept | {"testing": min(kept["testing"], 50)}  # enough to see how outputs spread
    run(image)
    for norm in norms:
        norm.eval()
    head, last = network.rpn.head, network.roi_heads.box_predictor
    for layer, wanted in ((head.cls_logits, 2.0), (head.bbox_pred, 0.2), (last.cls_score, 3.0), (last.bbox_pred, 1.0)):
        seen: list[Tensor] = []
        hook = layer.register_forward_hook(lambda module, given, output, seen=seen: seen.append(output.flatten()))
        run(image)
        hook.remove()
        layer.weight.mul_(wanted / torch.cat(seen).std().clamp(min=1e-6))
    network.rpn._post_nms_top_n = kept


def rough_noise(height: int, width: int, generator: torch.Generator) -> Tensor:
    """A normalised image [1, 3, height, width] (sides at least 16) of patches with grain: for boxes of all sizes.

    White noise alone would not do: the first stages average it away, and every photograph would then overflow.
    """
    coarse = torch.randn(1, 3, height // 16, width // 16, generator=generator)
    patches = functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    return patches + 0.3 * torch.randn(1, 3, height, width, generator=generator)
