"""Make `import torchvision` work beside a CPU build of torch, and its detection models train there.

torchvision's wheel for Linux carries compiled operators that need CUDA libraries. Beside a CPU torch they do not
load, and since torchvision decorates `torchvision::nms` on import, even timm fails to import. `register` defines
what is missing, and only then: `nms` and `roi_align` with its gradient, in C++ (`torchvision_operators.cpp`, built
once and kept in the user's cache) where there is a compiler, else in torch, about ten times slower; and `qnms`
(quantised boxes) as a name that refuses to run. Call it before importing torchvision or timm.
"""

import hashlib
import importlib
import importlib.util
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared")
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
    "_roi_align_backward(Tensor grad, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "SymInt batch_size, SymInt channels, SymInt height, SymInt width, int sampling_ratio, bool aligned) -> Tensor",
)

# Operators vanish with their library object. "names" holds the schemas, "torch" the slow kernels while they are used.
_kept: dict[str, torch.library.Library] = {}
_in_use = ""


def register(*, compiled: bool = True) -> str:
    """Define the operators if they are missing; says which are in use: "torchvision", "c++" or "torch".

    With `compiled`, C++ is tried first: it is built once (about 30 s) and then read from the cache. May be called
    any number of times; a later call that asks for C++ replaces the torch ones.
    """
    global _in_use
    if not _in_use:
        if _compiled_ones_load():
            _in_use = "torchvision"
        else:
            _define_names()
    if _in_use in ("torchvision", "c++"):
        return _in_use
    if compiled and _load_built():
        slow = _kept.pop("torch", None)
        if slow is not None:
            slow._destroy()  # type: ignore[no-untyped-call]
        _in_use = "c++"
    elif not _in_use:
        library = torch.library.Library("torchvision", "IMPL")  # type: ignore[no-untyped-call]
        library.impl("nms", nms, "CPU")  # type: ignore[no-untyped-call]
        library.impl("roi_align", roi_align, "CPU")  # type: ignore[no-untyped-call]
        library.impl("_roi_align_backward", roi_align_backward, "CPU")  # type: ignore[no-untyped-call]
        _kept["torch"] = library
        _in_use = "torch"
    return _in_use


def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices [kept] of the boxes [n, 4] (x1, y1, x2, y2) to keep, by falling score; ties keep their order."""
    order = scores.sort(descending=True, stable=True).indices
    boxes = dets[order]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = torch.ones(len(boxes), dtype=torch.bool)
    kept = []
    for index in range(len(boxes)):
        if not left[index]:
            continue
        kept.append(index)
        low = torch.maximum(boxes[:, :2], boxes[index, :2])
        high = torch.minimum(boxes[:, 2:], boxes[index, 2:])
        both = (high - low).clamp(min=0).prod(dim=1)
        left &= ~(both / (area + area[index] - both) > iou_threshold)
    return order[torch.tensor(kept, dtype=torch.long)]


def roi_align(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Average of bilinear samples per cell, [n, channels, height, width]; boxes [n, 5]: picture, x1, y1, x2, y2."""
    height, width = input.shape[2:]
    output = input.new_zeros(len(rois), input.shape[1], pooled_height, pooled_width)
    for index, roi in enumerate(rois.tolist()):
        rows, columns = _axes(
            roi, spatial_scale, (pooled_height, pooled_width), sampling_ratio, aligned, (height, width), input.dtype
        )
        # Bilinear weights factor into one matrix per axis: [cells, height] @ plane @ [width, cells].
        output[index] = rows @ input[int(roi[0])] @ columns.T
    return output


def roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch_size: int,
    channels: int,
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """The gradient of `roi_align` with respect to its input, [pictures, channels, height, width]."""
    result = grad.new_zeros(batch_size, channels, height, width)
    for index, roi in enumerate(rois.tolist()):
        rows, columns = _axes(
            roi, spatial_scale, (pooled_height, pooled_width), sampling_ratio, aligned, (height, width), grad.dtype
        )
        result[int(roi[0])] += rows.T @ grad[index] @ columns
    return result


def _axes(
    roi: list[float],
    scale: float,
    cells: tuple[int, int],
    ratio: int,
    aligned: bool,
    size: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """One region's weights, [cells, size] for rows and for columns."""
    shift = 0.5 if aligned else 0.0
    x1, y1, x2, y2 = (value * scale - shift for value in roi[1:])
    w, h = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1.0), max(y2 - y1, 1.0))
    return _samples(y1, h, cells[0], ratio, size[0]).to(dtype), _samples(x1, w, cells[1], ratio, size[1]).to(dtype)


def _samples(start: float, length: float, cells: int, ratio: int, size: int) -> Tensor:
    """[cells, size]: how much each of `size` pixels adds to each cell along one axis."""
    count = ratio if ratio > 0 else int(-(-length // cells))
    weights = torch.zeros(cells, size, dtype=torch.float64)
    if count <= 0:
        return weights
    step = length / cells
    for cell in range(cells):
        for sample in range(count):
            place = start + cell * step + (sample + 0.5) * step / count
            if not -1.0 <= place <= size:
                continue
            place = min(max(place, 0.0), size - 1.0)
            low = min(int(place), size - 1)
            weights[cell, low] += 1.0 - (place - low)
            weights[cell, min(low + 1, size - 1)] += place - low
    return weights / count


def _define_names() -> None:
    """Schemas, shapes without values (for export) and the gradient; the kernels come after."""
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    _kept["names"] = library
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    library.impl("qnms", _refuse, "CPU")  # type: ignore[no-untyped-call]
    library.impl("roi_align", _align_shape, "Meta")  # type: ignore[no-untyped-call]
    library.impl("_roi_align_backward", _spread_shape, "Meta")  # type: ignore[no-untyped-call]
    torch.library.register_autograd("torchvision::roi_align", _gradient, setup_context=_remember, lib=library)
    # torchvision asks this before every call; what it calls exists now. (Importing it defines nms' shape.)
    for module in ("torchvision.extension", "torchvision.ops.roi_align"):
        vars(importlib.import_module(module))["_has_ops"] = _yes


def _align_shape(
    input: Tensor, rois: Tensor, scale: float, pooled_height: int, pooled_width: int, ratio: int, aligned: bool
) -> Tensor:
    return input.new_empty((rois.shape[0], input.shape[1], pooled_height, pooled_width))


def _spread_shape(grad: Tensor, rois: Tensor, scale: float, ph: int, pw: int, *rest: Any) -> Tensor:
    return grad.new_empty(rest[:4])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep for the gradient what is not in the output's gradient: the regions, the sizes and the settings."""
    features, rois, *settings = inputs
    ctx.save_for_backward(rois)
    ctx.shape, ctx.settings = features.shape, settings


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The features' gradient; regions get none, as in torchvision."""
    (rois,) = ctx.saved_tensors
    scale, ph, pw, ratio, aligned = ctx.settings
    backward = torch.ops.torchvision._roi_align_backward
    return backward(grad, rois, scale, ph, pw, *ctx.shape, ratio, aligned), None, None, None, None, None, None


def _compiled_ones_load() -> bool:
    """Whether torchvision's own operators are there, or load into this torch."""
    if hasattr(torch.ops.torchvision, "nms"):
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError('torchvision is missing: pip install "torchvision==0.28.0" --no-deps')
    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))  # type: ignore[no-untyped-call]
    except OSError:
        return False
    return hasattr(torch.ops.torchvision, "nms")


def _load_built() -> bool:
    """Load the C++ operators, built first if the cache has none; false, with a note, where that fails."""
    try:
        torch.ops.load_library(str(_built()))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _LOG.warning("detection operators run in plain torch, about ten times slower: %s", error)
        return False
    return True


def _built() -> Path:
    """The library's file. It is written beside its place and moved there: a build cut short leaves nothing behind."""
    digest = hashlib.sha256("\n".join([_SOURCE.read_text(), torch.__version__, *_FLAGS]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tidegate" / "operators"
    target = cache / f"torchvision-{digest}.so"
    if target.is_file():
        return target
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise FileNotFoundError("no C++ compiler: install g++ (or set CXX)")
    from torch.utils import cpp_extension

    cache.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        fresh = Path(folder) / target.name
        command = [compiler, *_FLAGS, *includes, str(_SOURCE), "-o", str(fresh), *libraries]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode != 0:
            raise OSError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        fresh.replace(target)
    return target


def _yes() -> bool:
    return True


def _refuse(*_: Any) -> Tensor:
    raise NotImplementedError("torchvision::qnms (quantised boxes) is not part of a CPU torch: use float boxes")
