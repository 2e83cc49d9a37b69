"""Tracking networks with weights: a public checkpoint's, or drawn; for `models/edge_export.py`.

    bytetrack_yolox_x   ByteTrack's own files (Megvii's names: backbone.backbone..., head...), or mmtracking's
                        (backbone.stage1..., neck..., bbox_head...), one class
    sort_r50_fpn        mmdetection's names, as mmtracking's detectors for MOT17, one class
    qdtrack_r50_fpn     the same with an embedding head: mmtracking's (track_head.embed_head...) or the authors' own
                        (roi_head.track_head...)

Where the detector of a whole tracker is stored below `detector.`, that is taken off. How good a file is, its name does
not prove: the entry says *published* with no accuracy, and `tidegate models profile` measures it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models import checkpoint_names
from models.architectures import faster_rcnn, qdtrack, yolox
from models.architectures.faster_rcnn import Architecture, OneImage
from models.catalog import Accuracy, VariantError
from models.checkpoint_names import CheckpointError, State
from models.detection import OUTPUTS
from models.edge_weights import read_state
from models.tracking import EMBEDDINGS

PEDESTRIANS = 1  # classes of MOT17
OVERLAP = 0.7  # of ByteTrack's suppression
NOT_KNOWN = Accuracy()
_RANDOM = "random"
_HEADS = ("track_head.embed_head.", "roi_head.track_head.", "track_head.")


_MM_YOLOX = (
    ("backbone.stem.", "backbone.backbone.stem."),
    *((f"backbone.stage{stage}.", f"backbone.backbone.dark{stage + 1}.") for stage in (1, 2, 3, 4)),
    ("neck.reduce_layers.0.", "backbone.lateral_conv0."),
    ("neck.reduce_layers.1.", "backbone.reduce_conv1."),
    ("neck.top_down_blocks.0.", "backbone.C3_p4."),
    ("neck.top_down_blocks.1.", "backbone.C3_p3."),
    ("neck.downsamples.0.", "backbone.bu_conv2."),
    ("neck.downsamples.1.", "backbone.bu_conv1."),
    ("neck.bottom_up_blocks.0.", "backbone.C3_n3."),
    ("neck.bottom_up_blocks.1.", "backbone.C3_n4."),
    ("neck.out_convs.", "head.stems."),
    ("bbox_head.multi_level_cls_convs.", "head.cls_convs."),
    ("bbox_head.multi_level_reg_convs.", "head.reg_convs."),
    ("bbox_head.multi_level_conv_cls.", "head.cls_preds."),
    ("bbox_head.multi_level_conv_reg.", "head.reg_preds."),
    ("bbox_head.multi_level_conv_obj.", "head.obj_preds."),
)
_MM_BLOCKS = ((".main_conv.", ".conv1."), (".short_conv.", ".conv2."), (".final_conv.", ".conv3."), (".blocks.", ".m."))


class Served(Protocol):
    """Makes a network serve one image."""

    def __call__(self, network: Any) -> nn.Module: ...


@dataclass(frozen=True)
class BuiltTracker:
    """A tracker's network in evaluation mode, where its weights are from, and how it answers one image."""

    network: Any
    origin: str
    serve: Served
    outputs: tuple[str, ...] = OUTPUTS
    accuracy: Accuracy = NOT_KNOWN

    def in_precision(self, precision: str) -> nn.Module:
        """The network for one image. Raises `VariantError` for anything but "float32"."""
        if precision != "float32":
            raise VariantError("export", "precision", precision, "trackers are exported as float32")
        return self.serve(self.network).eval()


def build_yolox(name: str, weights: str, seed: int = 0, *, size: str = "yolox_x") -> BuiltTracker:
    """ByteTrack's YOLOX with the weights of a file, or drawn ("random"). Raises `VariantError`."""
    torch.manual_seed(seed)
    network = yolox.yolox(size, PEDESTRIANS).eval()
    origin = _load(network, name, weights, yolox_names)
    if weights == _RANDOM:
        settle_yolox(network)
    return BuiltTracker(network, origin, lambda chosen: yolox.ServedYolox(chosen, 0.01, OVERLAP))


def build_sort(name: str, weights: str, seed: int = 0, *, architecture: Architecture | None = None) -> BuiltTracker:
    """The Faster R-CNN that SORT follows. Raises `VariantError`."""
    torch.manual_seed(seed)
    network = faster_rcnn.build(architecture or Architecture(classes=PEDESTRIANS))
    origin = _load(network, name, weights, lambda state: checkpoint_names.from_mmdetection(_detector_of(state)))
    if weights == _RANDOM:
        faster_rcnn.settle(network)
    return BuiltTracker(network, origin, OneImage)


def build_qdtrack(name: str, weights: str, seed: int = 0, *, architecture: Architecture | None = None) -> BuiltTracker:
    """The Faster R-CNN with QDTrack's embedding head. Raises `VariantError`."""
    torch.manual_seed(seed)
    chosen = architecture or Architecture(classes=PEDESTRIANS)
    detector = faster_rcnn.build(chosen)
    head = qdtrack.EmbeddingHead(chosen.pyramid, groups=min(32, chosen.pyramid), between=chosen.pyramid)
    network = qdtrack.Qdtrack(detector, head).eval()
    origin = _load(network, name, weights, qdtrack_names)
    if weights == _RANDOM:
        faster_rcnn.settle(network.detector)
    return BuiltTracker(network, origin, qdtrack.ServedQdtrack, (*OUTPUTS, EMBEDDINGS))


def yolox_names(state: State) -> dict[str, Tensor]:
    """A YOLOX checkpoint under the names of `architectures/yolox.py`. Raises `CheckpointError`.

    mmdetection keeps the head's first convolutions with the pyramid and calls the halves of a block otherwise.
    """
    state = _detector_of(state)
    if not any(name.startswith("bbox_head.") for name in state):
        return state
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        found = next((one for one in _MM_YOLOX if name.startswith(one[0])), None)
        if found is None:
            raise CheckpointError(f"has a weight {name} that mmdetection's YOLOX has not")
        ours = found[1] + name.removeprefix(found[0])
        for theirs, here in _MM_BLOCKS:
            ours = ours.replace(theirs, here)
        result[ours] = value
    return result


def qdtrack_names(state: State) -> dict[str, Tensor]:
    """A QDTrack checkpoint under the names of `architectures/qdtrack.py`. Raises `CheckpointError`."""
    head: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, value in state.items():
        prefix = next((one for one in _HEADS if name.startswith(one)), None)
        if prefix is None:
            rest[name] = value
        else:
            head[f"track_head.{name.removeprefix(prefix)}"] = value
    if not head:
        raise CheckpointError("has no embedding head (track_head): it is a detector's, not QDTrack's")
    detector = checkpoint_names.from_mmdetection(_detector_of(rest))
    return head | {f"detector.{name}": value for name, value in detector.items()}


@torch.no_grad()
def settle_yolox(network: yolox.Yolox) -> None:
    """Make a YOLOX of random weights give boxes of many sizes and scores; they still mean nothing."""
    noise = torch.Generator().manual_seed(0)
    image = torch.cat([faster_rcnn.rough_noise(192, 256, noise) for _ in range(8)])  # one would not stand for others
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # average over all batches seen
        norm.reset_running_stats()
        norm.train()
    network(image)
    for norm in norms:
        norm.eval()
    head = network.head
    for layers, spread in ((head.cls_preds, 2.0), (head.obj_preds, 2.0), (head.reg_preds, 0.15)):
        for layer in layers:
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            seen: list[Tensor] = []
            hook = layer.register_forward_hook(lambda module, given, output, seen=seen: seen.append(output))
            network(image)
            hook.remove()
            layer.weight.mul_(spread / seen[0].std().clamp(min=1e-6))  # type: ignore[operator]


def _load(network: nn.Module, name: str, weights: str, convert: Any) -> str:
    """Put the weights into the network; says where they are from. Raises `VariantError`."""
    if weights == _RANDOM:
        return "RANDOM: answers mean nothing"
    if weights in ("torchvision", "timm"):
        remedy = f"no library has weights of {name}: give --weights PATH of a public checkpoint, or --weights random"
        raise VariantError("export", "weights", weights, remedy)
    try:
        checkpoint_names.load(network, convert(read_state(Path(weights))))
    except CheckpointError as error:
        raise VariantError("export", "weights", weights, str(error)) from error
    return f"{Path(weights).name} (accuracy unknown: `tidegate models profile` measures it)"


def _detector_of(state: State) -> dict[str, Tensor]:
    return {name.removeprefix("detector."): value for name, value in state.items()}
