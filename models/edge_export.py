"""Detectors as ONNX files, suppression inside, with the entry that `models/edge_catalog.py` reads.

The result lies as every export does: `FOLDER/NAME/1/model.onnx` and its labels, and `FOLDER/edge/NAME.toml`. A file
takes images of any size. Each is held against torch, box for box, before it gets its entry. Networks and weights come
from `models/edge_weights.py`.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from models.architectures.faster_rcnn import ARCHITECTURES, rough_noise
from models.catalog import Accuracy, VariantError
from models.detection import INPUT, OUTPUTS
from models.edge_catalog import SUBFOLDER, EdgeVariant, load_edge_catalog, read_edge_variant
from models.edge_weights import build_faster_rcnn, input_spread
from models.tracker_weights import build_qdtrack, build_sort, build_yolox

OPSET = 17
SIZES = ((224, 320), (288, 192))  # height and width of the images that file and network are compared on
TIE = 1e-4  # scores nearer than this may change places
# Half precision is held to show the same things, not the same boxes: a network of random weights amplifies rounding a
# hundredfold (features differ by 5% at its end), and suppression then keeps another of two boxes.
SCORE_TOLERANCE = {"float32": 0.01, "float16": 0.2}
OVERLAP = {"float32": 0.99, "float16": 0.5}
LEAST_AGREEING = {"float32": 1.0, "float16": 0.6}


class BuiltDetector(Protocol):
    """A network with weights, ready to be translated."""

    @property
    def origin(self) -> str:
        """Where its weights are from, in words."""

    @property
    def accuracy(self) -> Accuracy:
        """What is known of it with these weights."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """What its file gives: `OUTPUTS`, and more where there is more per box."""

    def in_precision(self, precision: str) -> Any:
        """A module from one image to the outputs; "float32" is the network itself."""


BUILDERS: dict[str, Callable[[str, str, int], BuiltDetector]] = {
    **dict.fromkeys(ARCHITECTURES, build_faster_rcnn),
    "bytetrack_yolox_x": build_yolox,
    "sort_r50_fpn": build_sort,
    "qdtrack_r50_fpn": build_qdtrack,
}
"""By variant: from its name, the weights asked for and a seed to a network. Raises `VariantError`."""

Outputs = tuple[npt.NDArray[Any], ...]


@dataclass(frozen=True)
class Agreement:
    """How a file's boxes stand to the network's: of `compared` untied ones, `agreeing` have their like."""

    compared: int
    agreeing: int

    @property
    def share(self) -> float:
        return self.agreeing / self.compared if self.compared else 1.0


def export_edge(
    name: str,
    folder: Path,
    *,
    weights: str = "torchvision",
    precision: str = "",
    seed: int = 0,
    on_step: Callable[[str], None] = lambda step: None,
) -> EdgeVariant:
    """Export the built-in detector `name` into `folder`; gives the variant as the catalog will read it.

    `weights` is "torchvision" (downloaded), "random" (drawn by `seed`) or the path of a checkpoint of mmdetection or
    torchvision (.pth, .safetensors). `precision` is "float32", "float16" or, left out, what the built-in entry says.
    Raises `VariantError` if the name, the weights or a package is missing, or the file differs from torch.
    """
    if name not in BUILDERS:
        raise VariantError("export", "name", name, f"choose one of {', '.join(BUILDERS)}")
    variant = load_edge_catalog()[name]
    precision = precision or variant.precision
    if precision not in OVERLAP:
        raise VariantError("export", "precision", precision, "choose float32 or float16")
    on_step("building the network")
    built = BUILDERS[name](name, weights, seed)
    file = folder / name / "1" / "model.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    on_step("translating it")
    write_detector(built.in_precision(precision), file, outputs=built.outputs)
    on_step("comparing the file with the network")
    agreement = compare(
        built.in_precision("float32"),
        file,
        spread=input_spread(variant),
        overlap=OVERLAP[precision],
        score=SCORE_TOLERANCE[precision],
    )
    if agreement.share < LEAST_AGREEING[precision]:
        file.unlink()
        said = f"{agreement.agreeing} of {agreement.compared} boxes agree with torch: not written"
        raise VariantError("export", name, precision, said)
    on_step("writing its entry")
    (folder / name / "labels.txt").write_text("\n".join(variant.labels) + "\n", encoding="utf-8")
    entry = folder / SUBFOLDER / f"{name}.toml"
    entry.parent.mkdir(exist_ok=True)
    changed = msgspec.structs.replace(
        variant,
        precision=precision,
        weights="random" if weights == "random" else "published",
        accuracy=built.accuracy,
        description=f"{variant.description}; weights: {built.origin}",
    )
    head = (
        f"# Written by `tidegate models export` (weights: {weights}).\n"
        f"# Compared with torch: {agreement.agreeing} of {agreement.compared} boxes agree.\n"
    )
    entry.write_text(head + entry_text(changed, f"../{name}/1/model.onnx", f"../{name}/labels.txt"), encoding="utf-8")
    return read_edge_variant(entry)


def write_detector(
    served: Any, file: Path, *, outputs: tuple[str, ...] = OUTPUTS, example: tuple[int, int] = (96, 128)
) -> None:
    """Write `served` (image [1, 3, h, w] to boxes, scores, classes and what else `outputs` names) for any h and w.

    The translation follows one run on noise of the size `example`; what depends on values or sizes must be
    tensor operations, as torchvision's are.
    """
    image = torch.randn(1, 3, *example, generator=torch.Generator().manual_seed(0))
    free = {INPUT: {2: "height", 3: "width"}, **{name: {0: "boxes_found"} for name in outputs}}
    with warnings.catch_warnings():
        # The tracer warns of every size that becomes a constant; the comparison at other sizes is the proof.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            served.eval(),
            (image,),
            str(file),
            input_names=[INPUT],
            output_names=list(outputs),
            dynamic_axes=free,
            opset_version=OPSET,
            dynamo=False,
        )


def compare(served: Any, file: Path, *, spread: float = 1.0, overlap: float = 0.99, score: float = 0.01) -> Agreement:
    """Network and file on `rough_noise` times `spread`, of several sizes; see `agreement`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(1)
    compared = agreeing = 0
    for height, width in SIZES:
        image = spread * rough_noise(height, width, generator)
        with torch.no_grad():
            expected = tuple(value.numpy() for value in served(image)[: len(OUTPUTS)])
        found = tuple(session.run(list(OUTPUTS), {INPUT: image.numpy()}))
        one = agreement(expected, found, overlap=overlap, score=score)
        compared, agreeing = compared + one.compared, agreeing + one.agreeing
    return Agreement(compared, agreeing)


def agreement(expected: Outputs, found: Outputs, *, overlap: float = 0.99, score: float = 0.01) -> Agreement:
    """How many of the expected boxes have their like: same class, IoU above `overlap`, score within `score`.

    Left out are boxes whose score ties with another's, the last one (the limit on their number may cut
    either of two), and those within `score` of the threshold that all answers have passed.
    """
    boxes, scores, classes = expected
    gap = np.abs(scores[:, None] - scores[None]) + np.eye(len(scores))
    least = scores.min(initial=1.0)
    asked = np.flatnonzero((gap.min(axis=1, initial=1.0) > TIE) & (scores > least + min(score, 0.02)))
    if not asked.size:
        return Agreement(0, 0)
    like = (found[2][None] == classes[asked, None]) & (np.abs(found[1][None] - scores[asked, None]) <= score)
    like &= _overlaps(boxes[asked], found[0]) > overlap
    return Agreement(len(asked), int(like.any(axis=1).sum()))


def entry_text(variant: EdgeVariant, path: str, labels: str) -> str:
    """The variant as TOML, with `path` and `labels` relative to the entry."""
    values = msgspec.to_builtins(variant) | {"path": path, "labels": labels}
    accuracy = {key: value for key, value in values.pop("accuracy").items() if value is not None}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    lines += ["", "[accuracy]", *(f"{key} = {json.dumps(value)}" for key, value in accuracy.items())]
    return "\n".join(lines) + "\n"


def _overlaps(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Intersection over union of every pair, [left, right]."""
    low = np.maximum(left[:, None, :2], right[None, :, :2])
    high = np.minimum(left[:, None, 2:], right[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (left, right)]
    share: npt.NDArray[Any] = both / np.maximum(areas[0][:, None] + areas[1][None] - both, 1e-9)
    return share
