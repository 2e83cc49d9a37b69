"""QDTrack's network (Pang et al. 2021): a two-stage detector, and a head that says what each box looks like.

The detector is any of torchvision's shape (backbone, rpn, roi_heads): R-50-FPN for the published tracker
(`faster_rcnn.py`); the rendered scenes' tracker has a smaller head of its own (`small_detectors.py`). The head takes
the same pyramid's features, pooled to a grid of cells per box, through four convolutions and two layers to an
embedding; its modules bear the names of the public checkpoints (convs.0.conv, convs.0.gn, ..., fcs.0, fc_embed).
Association: `models/quasi_dense.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.architectures import torchvision_operators

torchvision_operators.register()

from torchvision.models.detection.image_list import ImageList  # noqa: E402 - its operators must be there first

from models.architectures.faster_rcnn import SIZE_DIVISOR, never_none  # noqa: E402


class NormedConvolution(nn.Module):
    """3x3 convolution, group normalisation, ReLU. Names as in the checkpoints: conv, gn."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.gn = nn.GroupNorm(groups, outputs)

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.gn(self.conv(features)))


class EmbeddingHead(nn.Module):
    """Pooled boxes [n, channels, cells, cells] to embeddings [n, width]. The defaults are the published head's."""

    def __init__(
        self,
        channels: int = 256,
        cells: int = 7,
        *,
        convolutions: int = 4,
        between: int = 256,
        hidden: int = 1024,
        width: int = 256,
        groups: int = 32,
    ) -> None:
        super().__init__()
        inputs = [channels] + [between] * (convolutions - 1)
        self.convs = nn.ModuleList(NormedConvolution(each, between, groups) for each in inputs)
        self.fcs = nn.ModuleList([nn.Linear(between * cells**2, hidden)])
        self.fc_embed = nn.Linear(hidden, width)
        nn.init.normal_(self.fc_embed.weight, 0, 0.01)
        nn.init.zeros_(self.fc_embed.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        for layer in self.convs:
            pooled = layer(pooled)
        embedding: Tensor = self.fc_embed(torch.relu(self.fcs[0](pooled.flatten(1))))
        return embedding


class Qdtrack(nn.Module):
    """A detector with an embedding head beside its box head, both on boxes pooled by the detector's own pooling."""

    def __init__(self, detector: Any, head: EmbeddingHead) -> None:
        super().__init__()
        self.detector = detector
        self.track_head = head

    def embeddings(self, features: dict[str, Tensor], boxes: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Of all boxes (per image [k, 4], pixels of the input of `size` height, width), one image after another."""
        pooled = self.detector.roi_heads.box_roi_pool(features, boxes, [size] * len(boxes))
        found: Tensor = self.track_head(pooled)
        return found


class ServedQdtrack(nn.Module):
    """One normalised image [1, 3, h, w] to boxes [n, 4] (pixels of it), scores [n], classes [n] from 0, embeddings."""

    def __init__(self, network: Qdtrack) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        detector, height, width = self.network.detector, image.shape[2], image.shape[3]
        padded = functional.pad(image, (0, -width % SIZE_DIVISOR, 0, -height % SIZE_DIVISOR))
        features = detector.backbone(padded)
        size = (height, width)
        (proposals,), _ = detector.rpn(ImageList(padded, [size]), features, None)
        found, _ = detector.roi_heads(features, [never_none(proposals)], [size], None)
        boxes = found[0]["boxes"]
        # One box more than was found: exported, the head's normalisation cannot run on none.
        asked = torch.cat((boxes, boxes.new_tensor([[0.0, 0.0, 16.0, 16.0]])))
        embeddings = self.network.embeddings(features, [asked], size)[:-1]
        return boxes, found[0]["scores"], found[0]["labels"] - 1, embeddings
