"""A detection network with weights: torchvision's, a public checkpoint's, a file of yours, or drawn.

Files are read without running code that they may carry. A file counts as a *published* one, with its published
accuracy, only if its name and its content say so: mmdetection ends its names with the first digits of the content's
SHA-256.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from models import checkpoint_names
from models.architectures import faster_rcnn, torchvision_operators
from models.catalog import Accuracy, VariantError
from models.checkpoint_names import CheckpointError, State
from models.detection import OUTPUTS
from models.edge_catalog import EdgeVariant, load_edge_catalog

PUBLISHED = {
    # variant: (how mmdetection calls the training, COCO val2017 box AP of its file)
    "faster_rcnn_r50_fpn": ("faster_rcnn_r50_fpn_fp16_1x_coco", 0.375),
    "faster_rcnn_r50_c4": ("faster_rcnn_r50_caffe_c4_1x_coco", 0.356),
    "faster_rcnn_r101_fpn": ("faster_rcnn_r101_fpn_1x_coco", 0.394),
    "faster_rcnn_x101_64x4d_fpn": ("faster_rcnn_x101_64x4d_fpn_1x_coco", 0.421),
}
TORCHVISION_AP = 0.370  # of its Faster R-CNN R-50-FPN (COCO_V1), COCO val2017


@dataclass(frozen=True)
class Built:
    """A network in evaluation mode, where its weights are from, and how accurate they are known to be."""

    network: faster_rcnn.FasterRcnn
    origin: str
    accuracy: Accuracy
    outputs: tuple[str, ...] = OUTPUTS

    def in_precision(self, precision: str) -> faster_rcnn.OneImage:
        """The network for one image; "float16" gives a copy with its large parts halved."""
        if precision == "float32":
            return faster_rcnn.OneImage(self.network)
        from models.architectures.half_precision import in_half

        return faster_rcnn.OneImage(in_half(self.network))


def build_faster_rcnn(name: str, weights: str, seed: int = 0) -> Built:
    """The built-in detector `name` with `weights`: "torchvision", "random" (by `seed`) or a file's path.

    Raises `VariantError`.
    """
    architecture = faster_rcnn.ARCHITECTURES[name]
    try:
        torchvision_operators.register()
    except ImportError as error:
        remedy = 'pip install -e ".[train]"; then: pip install --no-deps torchvision==0.28.0'
        raise VariantError("export", "package", error.name, remedy) from error
    if weights == "random":
        torch.manual_seed(seed)
        network = faster_rcnn.build(architecture)
        faster_rcnn.settle(network, spread=input_spread(load_edge_catalog()[name]))
        return Built(network, "RANDOM: answers mean nothing", Accuracy())
    if weights == "timm":
        raise VariantError("export", "weights", weights, "timm has no detectors: torchvision, random or a file's path")
    if weights == "torchvision":
        state, origin, accuracy = _from_torchvision(name)
    else:
        state, origin, accuracy = _from_file(name, Path(weights))
    try:
        conventions = faster_rcnn.TORCHVISION
        if checkpoint_names.source_of(state) == "mmdetection":
            conventions = faster_rcnn.MMDETECTION
            state = checkpoint_names.from_mmdetection(state)
        else:
            state = checkpoint_names.from_torchvision(state)
        network = faster_rcnn.build(architecture, conventions)
        checkpoint_names.load(network, state)
    except CheckpointError as error:
        raise VariantError("export", "weights", weights, str(error)) from error
    return Built(network, origin, accuracy)


def input_spread(variant: EdgeVariant) -> float:
    """Standard deviation of the network's input where a photograph's is the usual 58 levels."""
    return 58.0 * len(variant.std) / sum(variant.std)


def read_state(file: Path) -> State:
    """The tensors of a .safetensors or .pth file by name, unwrapped. Raises `VariantError`."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return cast(State, load_file(file))
        state = torch.load(file, map_location="cpu", weights_only=True)
        for wrapper in ("state_dict", "model"):
            state = state.get(wrapper, state)
        return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    except Exception as error:  # a missing file, a foreign format, objects that only code could rebuild
        reason = " ".join(str(error).split())[:300]
        raise VariantError("export", "weights", str(file), f"cannot be read as plain weights ({reason})") from error


def _from_file(name: str, file: Path) -> tuple[State, str, Accuracy]:
    state = read_state(file)
    training, value = PUBLISHED[name]
    found = re.fullmatch(rf"{re.escape(training)}_.*-([0-9a-f]{{8}})\.pth", file.name)
    if found:
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest().startswith(found[1]):
                return state, file.name, Accuracy(value, "published", f"COCO val2017 box AP, mmdetection's {training}")
    return state, f"{file.name} (accuracy unknown: `tidegate models profile` measures it)", Accuracy()


def _from_torchvision(name: str) -> tuple[State, str, Accuracy]:
    if name != "faster_rcnn_r50_fpn":
        remedy = (
            f"torchvision has none for {name}: give the path of mmdetection's {PUBLISHED[name][0]}_….pth, or random"
        )
        raise VariantError("export", "weights", "torchvision", remedy)
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    try:
        state: Any = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # no network, no permission, a broken download
        remedy = f"torchvision could not fetch them ({error}); give --weights PATH or --weights random"
        raise VariantError("export", "weights", "torchvision", remedy) from error
    note = "COCO val2017 box AP, torchvision's FasterRCNN_ResNet50_FPN COCO_V1"
    return state, "torchvision COCO_V1", Accuracy(TORCHVISION_AP, "published", note)
