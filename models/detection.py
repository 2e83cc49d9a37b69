"""Detectors: an image in, boxes with classes and scores out, in the pixels of that image.

A detector's file takes `image` [1, 3, h, w] (float32, any h and w, resized and normalised as its entry says) and gives
`boxes` [n, 4] in the pixels of that input, `scores` [n] and `classes` [n], suppression included; it may give more, row
by row (an embedding of each box). Files come from `models/edge_export.py`; this module needs onnxruntime only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from models.catalog import Preprocess, VariantError
from models.edge_catalog import EdgeVariant
from models.onnx_runtime import open_session
from models.preprocess import to_input

if TYPE_CHECKING:
    import onnxruntime

Image = npt.NDArray[np.uint8]
"""RGB, [height, width, 3]."""

INPUT = "image"
OUTPUTS = ("boxes", "scores", "classes")


class Detections(msgspec.Struct, frozen=True, eq=False):
    """What was found in one image, by falling score."""

    boxes: npt.NDArray[np.float32]  # [n, 4]: x1, y1, x2, y2 in pixels of the image, inside it
    scores: npt.NDArray[np.float32]  # [n], 0 to 1
    classes: npt.NDArray[np.int64]  # [n], index into the variant's labels


class Fitted(NamedTuple):
    """An image as its network takes it: `tensor` [1, 3, h, w] and the scales that were applied to x and to y."""

    tensor: npt.NDArray[np.float32]
    x_scale: float
    y_scale: float


class Detector:
    """A loaded detector. One call at a time."""

    def __init__(self, variant: EdgeVariant, session: "onnxruntime.InferenceSession") -> None:
        self.variant = variant
        self._session: onnxruntime.InferenceSession | None = session
        self._names = [str(output.name) for output in session.get_outputs()]

    def detect(self, image: Image) -> Detections:
        """Boxes with at least the variant's score.

        Raises `ValueError` if the image has no pixels, or what the network gives means nothing.
        """
        found = self.outputs(image)
        return Detections(boxes=found["boxes"], scores=found["scores"], classes=found["classes"])

    def outputs(self, image: Image) -> dict[str, npt.NDArray[Any]]:
        """All outputs by name, the same rows of each: `boxes` as in `Detections`, `scores`, `classes` and what else
        the file gives per box. Raises `ValueError` as `detect` does.
        """
        if self._session is None:
            raise ValueError(f"{self.variant.name} is closed")
        fitted = fit(image, self.variant)
        raw = dict(zip(self._names, self._session.run(None, {INPUT: fitted.tensor}), strict=True))
        return _in_the_image(raw, fitted, image, self.variant)

    def warm_up(self) -> None:
        """Run twice on a grey image: the first run plans memory, the second uses the plan."""
        side = self.variant.short_side
        for _ in range(2):
            self.detect(np.full((side, side, 3), 127, dtype=np.uint8))

    def close(self) -> None:
        """Drop the session; onnxruntime frees its memory with it."""
        self._session = None


def open_detector(variant: EdgeVariant, *, device: str = "cpu", threads: int = 1) -> Detector:
    """Load `variant` on `device` ("cpu", "cuda"; "cuda:1" for the second GPU), `threads` wide on a CPU.

    Raises `VariantError` if the file, the device or a package is missing, or the file is not a detector's.
    """
    if not variant.path:
        remedy = f"no file yet: `tidegate models export {variant.name}`, then name the folder with --catalog"
        raise VariantError(variant.name, "path", variant.path, remedy)
    if not Path(variant.path).is_file():
        raise VariantError(variant.name, "path", variant.path, "no such file; `tidegate models export` makes one")
    session = open_session(variant.name, variant.path, device, threads, lambda *asked: _providers(variant, *asked))
    _check_session(session, variant)
    return Detector(variant, session)


def fit(image: Image, variant: EdgeVariant) -> Fitted:
    """Resize, normalise and pad `image` as `variant` says. Raises `ValueError` if it is not an image."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ValueError(f"an image is uint8 [height, width, 3], not {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    h, w = fitted_size(height, width, variant.short_side, variant.long_side)
    how = Preprocess(
        mean=tuple(level / 255 for level in variant.mean),
        std=tuple(level / 255 for level in variant.std),
        colour=variant.colour,
    )
    tensor = to_input(image, how, (3, h, w))[np.newaxis]
    padded_h, padded_w = (-(-length // variant.pad_to) * variant.pad_to for length in (h, w))
    if (padded_h, padded_w) != (h, w):
        fill = (variant.pad_value - np.asarray(variant.mean)) / np.asarray(variant.std)
        whole = np.empty((1, 3, padded_h, padded_w), dtype=np.float32)
        whole[:] = fill.astype(np.float32).reshape(1, 3, 1, 1)
        whole[:, :, :h, :w] = tensor
        tensor = whole
    return Fitted(tensor, w / width, h / height)


def fitted_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """(height, width) after resizing: the ratio kept, as large as both sides allow, each at least one pixel."""
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _in_the_image(
    raw: Mapping[str, npt.NDArray[Any]], fitted: Fitted, image: Image, variant: EdgeVariant
) -> dict[str, npt.NDArray[Any]]:
    """Outputs with boxes in the image's pixels; what is too unsure or lies outside is left out; best first."""
    boxes = raw["boxes"].astype(np.float32)
    scores = raw["scores"].astype(np.float32)
    classes = raw["classes"].astype(np.int64)
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise ValueError(f"{variant.name} gave boxes or scores that are not finite numbers")
    if classes.size and not 0 <= classes.min() <= classes.max() < len(variant.labels):
        raise ValueError(f"{variant.name} names class {classes.max()}, but its entry has {len(variant.labels)} labels")
    height, width = image.shape[:2]
    scale = np.asarray([fitted.x_scale, fitted.y_scale] * 2, dtype=np.float32)
    boxes = np.clip(boxes / scale, 0, np.asarray([width, height] * 2, dtype=np.float32))
    kept = (scores >= variant.score_threshold) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    rows = np.flatnonzero(kept)
    rows = rows[np.argsort(-scores[rows], kind="stable")]
    own = {"boxes": boxes, "scores": scores, "classes": classes}
    return {name: own.get(name, values)[rows] for name, values in raw.items()}


def _providers(variant: EdgeVariant, kind: str, index: int) -> list[str | tuple[str, dict[str, str]]]:
    """Providers in order of preference. Images differ in size: no search for the best kernel, which takes seconds."""
    if kind == "cpu":
        return ["CPUExecutionProvider"]
    if kind == "cuda":
        options = {"device_id": str(index), "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "1"}
        return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]
    raise VariantError(variant.name, "device", kind, "a detector runs on cpu or cuda: its input has no fixed size")


def _check_session(session: "onnxruntime.InferenceSession", variant: EdgeVariant) -> None:
    """Hold the file against what a detector's file has."""
    inputs = [(item.name, item.type, len(item.shape)) for item in session.get_inputs()]
    if inputs != [(INPUT, "tensor(float)", 4)]:
        remedy = f"a detector's file takes one input {INPUT!r}, float32 [1, 3, h, w]; this one takes {inputs}"
        raise VariantError(variant.name, "path", variant.path, remedy)
    missing = set(OUTPUTS) - {output.name for output in session.get_outputs()}
    if missing:
        remedy = f"a detector's file gives {', '.join(OUTPUTS)}; this one lacks {', '.join(sorted(missing))}"
        raise VariantError(variant.name, "path", variant.path, remedy)
