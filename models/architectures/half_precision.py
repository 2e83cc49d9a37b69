"""Parts of a network in half precision (float16) between neighbours in float32, for files that GPUs run so.

What computes much is halved: convolutions and the box head's layers. Boxes, scores and suppression stay float32: a
corner at pixel 1,300 would be a pixel off. A CPU runs such a file in float32, with weights rounded to half.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils import _pytree


class InHalf(nn.Module):
    """`part` on halved inputs, its outputs in float32 again (tensors, lists and dictionaries of them)."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part.half()

    def forward(self, *given: Any) -> Any:
        halved = _pytree.tree_map(lambda value: value.half(), given)
        return _pytree.tree_map(lambda value: value.float(), self.part(*halved))


def in_half(network: Any) -> Any:
    """A copy of a Faster R-CNN (evaluation mode) whose backbone, proposals' head and box head are in half precision."""
    network = copy.deepcopy(network)
    network.backbone = InHalf(folded(network.backbone))
    network.rpn.head = InHalf(network.rpn.head)
    if hasattr(network.roi_heads.box_roi_pool, "layer4"):
        network.roi_heads.box_roi_pool.layer4 = InHalf(folded(network.roi_heads.box_roi_pool.layer4))
    else:
        network.roi_heads.box_head = InHalf(network.roi_heads.box_head)
    return network


@torch.no_grad()
def folded(part: nn.Module) -> nn.Module:
    """`part` with every normalisation folded into the convolution that stands before it, in place.

    Halved by itself, a normalisation would lose precision twice, and small variances would fall to zero.
    """
    before = ""
    for name, child in part.named_children():
        if isinstance(child, nn.BatchNorm2d):
            convolution = getattr(part, before)
            setattr(part, before, fuse_conv_bn_eval(convolution, child))
            setattr(part, name, nn.Identity())
        else:
            folded(child)
        before = name
    return part
