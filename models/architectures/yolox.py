"""YOLOX (Ge et al. 2021): CSPDarknet, a path-aggregating pyramid and a decoupled head without anchors.

Modules bear the names of the public checkpoints (Megvii's, and ByteTrack's, which are one-class ones), so that such a
state dict loads as it is. Every place of the three grids (strides 8, 16, 32) predicts one box: the offset of its
centre in cells, the logarithm of its sides in strides, whether there is an object, and which. Published sizes differ
in depth (blocks per stage) and width (channels); "nano" also splits its 3x3 convolutions into depthwise and pointwise
ones. Training: `yolox_loss.py`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.architectures import torchvision_operators

torchvision_operators.register()

from torchvision.ops import batched_nms  # noqa: E402 - its operators must be there first

STRIDES = (8, 16, 32)
_PRIOR = 0.01  # score of an untrained head: most places hold nothing


@dataclass(frozen=True)
class YoloxSize:
    """Depth and width as the published configurations give them."""

    depth: float
    width: float
    depthwise: bool = False


SIZES = {
    "yolox_nano": YoloxSize(0.33, 0.25, depthwise=True),
    "yolox_tiny": YoloxSize(0.33, 0.375),
    "yolox_s": YoloxSize(0.33, 0.50),
    "yolox_m": YoloxSize(0.67, 0.75),
    "yolox_l": YoloxSize(1.0, 1.0),
    "yolox_x": YoloxSize(1.33, 1.25),
    "scenes_yolox": YoloxSize(0.33, 0.25),
}


class Convolution(nn.Module):
    """Convolution, batch normalisation, SiLU. Names as in the checkpoints: conv, bn."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, side, stride, (side - 1) // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)

    def forward(self, features: Tensor) -> Tensor:
        return functional.silu(self.bn(self.conv(features)))


class DepthwiseConvolution(nn.Module):
    """One 3x3 filter per channel, then a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int = 1) -> None:
        super().__init__()
        self.dconv = Convolution(inputs, inputs, side, stride, groups=inputs)
        self.pconv = Convolution(inputs, outputs, 1)

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.pconv(self.dconv(features))
        return found


class Bottleneck(nn.Module):
    """1x1 and 3x3 convolution, added to its input if `shortcut`."""

    def __init__(self, width: int, shortcut: bool, depthwise: bool) -> None:
        super().__init__()
        self.conv1 = Convolution(width, width, 1)
        self.conv2 = convolution(width, width, 3, 1, depthwise)
        self.shortcut = shortcut

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.conv2(self.conv1(features))
        return found + features if self.shortcut else found


class CspLayer(nn.Module):
    """Two halves of the channels: one through `blocks` bottlenecks, one past them; joined by a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, blocks: int, shortcut: bool, depthwise: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = Convolution(inputs, half, 1)
        self.conv2 = Convolution(inputs, half, 1)
        self.conv3 = Convolution(2 * half, outputs, 1)
        self.m = nn.Sequential(*(Bottleneck(half, shortcut, depthwise) for _ in range(blocks)))

    def forward(self, features: Tensor) -> Tensor:
        joined = torch.cat((self.m(self.conv1(features)), self.conv2(features)), dim=1)
        found: Tensor = self.conv3(joined)
        return found


class SpatialPyramid(nn.Module):
    """Largest values over 5, 9 and 13 places beside the features themselves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = Convolution(width, width // 2, 1)
        self.conv2 = Convolution(4 * (width // 2), width, 1)

    def forward(self, features: Tensor) -> Tensor:
        half = self.conv1(features)
        pooled = [functional.max_pool2d(half, side, 1, side // 2) for side in (5, 9, 13)]
        found: Tensor = self.conv2(torch.cat([half, *pooled], dim=1))
        return found


class Focus(nn.Module):
    """Every 2x2 pixels become four times the channels: left before right, and within, upper before lower."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv = Convolution(12, outputs, 3)

    def forward(self, images: Tensor) -> Tensor:
        corners = [images[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
        found: Tensor = self.conv(torch.cat(corners, dim=1))
        return found


class CspDarknet(nn.Module):
    """[n, 3, h, w] to features at strides 8, 16 and 32."""

    def __init__(self, size: YoloxSize) -> None:
        super().__init__()
        width, blocks = int(size.width * 64), max(round(size.depth * 3), 1)
        self.stem = Focus(width)
        self.dark2 = self._stage(width, blocks, size)
        self.dark3 = self._stage(2 * width, 3 * blocks, size)
        self.dark4 = self._stage(4 * width, 3 * blocks, size)
        self.dark5 = nn.Sequential(
            convolution(8 * width, 16 * width, 3, 2, size.depthwise),
            SpatialPyramid(16 * width),
            CspLayer(16 * width, 16 * width, blocks, False, size.depthwise),
        )

    @staticmethod
    def _stage(inputs: int, blocks: int, size: YoloxSize) -> nn.Sequential:
        return nn.Sequential(
            convolution(inputs, 2 * inputs, 3, 2, size.depthwise),
            CspLayer(2 * inputs, 2 * inputs, blocks, True, size.depthwise),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine = self.dark3(self.dark2(self.stem(images)))
        middle = self.dark4(fine)
        return fine, middle, self.dark5(middle)


class Pyramid(nn.Module):
    """CSPDarknet's features passed down from coarse to fine, and up again (PAFPN)."""

    def __init__(self, size: YoloxSize) -> None:
        super().__init__()
        fine, middle, coarse = (int(channels * size.width) for channels in (256, 512, 1024))
        blocks, split = round(3 * size.depth), size.depthwise
        self.backbone = CspDarknet(size)
        self.lateral_conv0 = Convolution(coarse, middle, 1)
        self.C3_p4 = CspLayer(2 * middle, middle, blocks, False, split)
        self.reduce_conv1 = Convolution(middle, fine, 1)
        self.C3_p3 = CspLayer(2 * fine, fine, blocks, False, split)
        self.bu_conv2 = convolution(fine, fine, 3, 2, split)
        self.C3_n3 = CspLayer(2 * fine, middle, blocks, False, split)
        self.bu_conv1 = convolution(middle, middle, 3, 2, split)
        self.C3_n4 = CspLayer(2 * middle, coarse, blocks, False, split)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine, middle, coarse = self.backbone(images)
        from_coarse = self.lateral_conv0(coarse)
        merged = self.C3_p4(torch.cat((_doubled(from_coarse), middle), dim=1))
        from_middle = self.reduce_conv1(merged)
        first = self.C3_p3(torch.cat((_doubled(from_middle), fine), dim=1))
        second = self.C3_n3(torch.cat((self.bu_conv2(first), from_middle), dim=1))
        third = self.C3_n4(torch.cat((self.bu_conv1(second), from_coarse), dim=1))
        return first, second, third


class Head(nn.Module):
    """Per level two branches of two convolutions: one for classes, one for boxes and for being an object."""

    def __init__(self, classes: int, size: YoloxSize) -> None:
        super().__init__()
        width = int(256 * size.width)
        inputs = [int(channels * size.width) for channels in (256, 512, 1024)]

        def branch() -> nn.Sequential:
            return nn.Sequential(*(convolution(width, width, 3, 1, size.depthwise) for _ in range(2)))

        def prediction(outputs: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(width, outputs, 1) for _ in STRIDES)

        self.stems = nn.ModuleList(Convolution(channels, width, 1) for channels in inputs)
        self.cls_convs = nn.ModuleList(branch() for _ in STRIDES)
        self.reg_convs = nn.ModuleList(branch() for _ in STRIDES)
        self.cls_preds, self.reg_preds, self.obj_preds = prediction(classes), prediction(4), prediction(1)
        bias = -math.log((1 - _PRIOR) / _PRIOR)
        for layer in (*self.cls_preds, *self.obj_preds):
            nn.init.constant_(layer.bias, bias)

    def forward(self, levels: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        found = []
        for index, features in enumerate(levels):
            stem = self.stems[index](features)
            of_class, of_box = self.cls_convs[index](stem), self.reg_convs[index](stem)
            parts = (self.reg_preds[index](of_box), self.obj_preds[index](of_box), self.cls_preds[index](of_class))
            found.append(torch.cat(parts, dim=1))
        return found


class Yolox(nn.Module):
    """Images [n, 3, h, w] (sides multiples of 32) to one map a level [n, 5 + classes, h / stride, w / stride], raw.

    Channels: x and y offset in cells, logarithm of width and height in strides, object logit, class logits.
    """

    def __init__(self, classes: int, size: YoloxSize) -> None:
        super().__init__()
        self.classes = classes
        self.backbone = Pyramid(size)
        self.head = Head(classes, size)

    def forward(self, images: Tensor) -> list[Tensor]:
        levels: list[Tensor] = self.head(self.backbone(images))
        return levels


class ServedYolox(nn.Module):
    """One image [1, 3, h, w] to boxes [n, 4] (corners, pixels of it), scores [n] and classes [n], best first."""

    def __init__(self, network: Yolox, score_threshold: float, overlap: float = 0.7, most: int = 300) -> None:
        super().__init__()
        self.network = network
        self.score_threshold, self.overlap, self.most = score_threshold, overlap, most

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        height, width = image.shape[2], image.shape[3]
        padded = functional.pad(image, (0, -width % STRIDES[-1], 0, -height % STRIDES[-1]))
        places = decoded(self.network(padded))[0]
        scores, classes = (places[:, 4:5].sigmoid() * places[:, 5:].sigmoid()).max(dim=1)
        kept = torch.where(scores > self.score_threshold)[0]
        boxes, scores, classes = corners(places[kept, :4]), scores[kept], classes[kept]
        chosen = batched_nms(boxes, scores, classes, self.overlap)[: self.most]
        return boxes[chosen], scores[chosen], classes[chosen]


def yolox(name: str, classes: int) -> Yolox:
    """The network of the size called `name` (a key of `SIZES`), untrained."""
    return Yolox(classes, SIZES[name])


def decoded(levels: list[Tensor]) -> Tensor:
    """Raw maps as [n, places, 5 + classes]: centre x, y, width, height in pixels, then the logits as they are."""
    found = []
    for stride, level in zip(STRIDES, levels, strict=True):
        height, width = level.shape[2:]
        flat = level.flatten(2).transpose(1, 2)
        grid = cells(height, width).to(level)
        centre, sides = (flat[..., :2] + grid) * stride, flat[..., 2:4].exp() * stride
        found.append(torch.cat((centre, sides, flat[..., 4:]), dim=2))
    return torch.cat(found, dim=1)


def cells(height: int, width: int) -> Tensor:
    """Column and row of every cell of a grid, row by row: [height * width, 2]."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((columns, rows), dim=2).reshape(-1, 2)


def corners(boxes: Tensor) -> Tensor:
    """[..., 4] centre x, y, width, height as left, top, right, bottom."""
    half = boxes[..., 2:] / 2
    return torch.cat((boxes[..., :2] - half, boxes[..., :2] + half), dim=-1)


def convolution(inputs: int, outputs: int, side: int, stride: int, depthwise: bool) -> nn.Module:
    """A convolution with normalisation and SiLU, whole or split into depthwise and pointwise."""
    if depthwise:
        return DepthwiseConvolution(inputs, outputs, side, stride)
    return Convolution(inputs, outputs, side, stride)


def load_checkpoint(network: Yolox, state: dict[str, Any]) -> None:
    """Load a public checkpoint: the state dict itself, or the file's content with it under "model".

    Raises RuntimeError with every name that is missing, left over or of another shape.
    """
    network.load_state_dict(state.get("model", state))


def _doubled(features: Tensor) -> Tensor:
    return functional.interpolate(features, scale_factor=2.0, mode="nearest")
