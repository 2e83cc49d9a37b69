"""The C4 head of Faster R-CNN: one feature map, and the residual network's last stage as the box head.

Regions are pooled from the fourth stage's map (stride 16, 1,024 channels) to 14 x 14, go through the fifth stage, which
halves them, and are averaged to 2,048 values each. This is where the network's 0.8 tera-operations are spent.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from models.architectures.faster_rcnn import Conventions, Shape


class C4Regions(nn.Module):
    """Proposals as [regions, 2048]. `layer4` is the residual network's last stage (its fifth, counting the stem).

    A thousand regions would take 0.8 GB before the stage begins, so they go through it in parts. A part may be empty,
    which onnxruntime's averages do not bear: a region of the first pixel leads each part and is dropped behind it.
    `most` is how many regions there can be; more are refused.
    """

    SIZE = 14
    STRIDE = 16
    PART = 126  # regions; a thousand and one are eight parts, in a graph without loops

    def __init__(self, layer4: nn.Module, conventions: "Conventions", *, most: int = 1000) -> None:
        super().__init__()
        self.layer4 = layer4
        self.aligned, self.ratio = conventions.aligned, conventions.sampling_ratio
        self.parts = -(-most // self.PART)

    def forward(self, features: Mapping[str, Tensor], proposals: list[Tensor], sizes: "list[Shape]") -> Tensor:
        from torchvision.ops import roi_align

        from models.architectures.faster_rcnn import numbered

        regions = numbered(proposals)
        if len(regions) > self.parts * self.PART:
            raise ValueError(f"{len(regions)} regions: at most {self.parts * self.PART} were announced")
        leader = regions.new_tensor([[0.0, 0.0, 0.0, 1.0, 1.0]])
        found = []
        for part in range(self.parts):
            chosen = torch.cat([leader, regions[part * self.PART : (part + 1) * self.PART]])
            pooled = roi_align(features["0"], chosen, self.SIZE, 1 / self.STRIDE, self.ratio, self.aligned)
            found.append(self.layer4(pooled).mean(dim=(2, 3))[1:])
        return torch.cat(found)
