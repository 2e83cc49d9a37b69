"""Make `import torchvision` work beside a CPU build of torch.

torchvision's wheel for Linux carries compiled operators that need CUDA libraries. Beside a CPU torch they do not
load, and since torchvision decorates `torchvision::nms` on import, even timm fails to import. `register` defines
what is missing, and only then: `nms` and `roi_align` in C++ where a compiler is found, else in torch, and
`qnms` (quantised boxes) as a name that refuses to run. Call it before importing torchvision or timm. The
stand-ins are for inference: no gradient flows through them.
"""

import functools
import importlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align": (
        "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
        "int sampling_ratio, bool aligned) -> Tensor"
    ),
}

_SOURCE = r"""
#include <torch/library.h>
#include <ATen/ATen.h>
#include <algorithm>
#include <cmath>
#include <vector>

at::Tensor nms(const at::Tensor& dets, const at::Tensor& scores, double threshold) {
  TORCH_CHECK(dets.dim() == 2 && dets.size(1) == 4, "nms: boxes must be [n, 4]");
  const auto boxes = dets.to(at::kFloat).contiguous();
  const int64_t n = boxes.size(0);
  const auto order = std::get<1>(scores.sort(/*stable=*/true, /*dim=*/0, /*descending=*/true)).contiguous();
  const float* b = boxes.data_ptr<float>();
  const int64_t* rank = order.data_ptr<int64_t>();
  std::vector<char> dropped(n, 0);
  std::vector<int64_t> kept;
  for (int64_t i = 0; i < n; ++i) {
    if (dropped[i]) continue;
    const float* p = b + 4 * rank[i];
    const float area = (p[2] - p[0]) * (p[3] - p[1]);
    kept.push_back(rank[i]);
    for (int64_t j = i + 1; j < n; ++j) {
      if (dropped[j]) continue;
      const float* q = b + 4 * rank[j];
      const float w = std::max(0.f, std::min(p[2], q[2]) - std::max(p[0], q[0]));
      const float h = std::max(0.f, std::min(p[3], q[3]) - std::max(p[1], q[1]));
      const float both = w * h;
      const float other = (q[2] - q[0]) * (q[3] - q[1]);
      if (both / (area + other - both) > threshold) dropped[j] = 1;
    }
  }
  auto result = at::empty({static_cast<int64_t>(kept.size())}, dets.options().dtype(at::kLong));
  std::copy(kept.begin(), kept.end(), result.data_ptr<int64_t>());
  return result;
}

at::Tensor roi_align(const at::Tensor& input, const at::Tensor& rois, double scale, int64_t ph, int64_t pw,
                     int64_t ratio, bool aligned) {
  TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5, "roi_align: rois must be [n, 5]");
  const auto image = input.to(at::kFloat).contiguous();
  const auto boxes = rois.to(at::kFloat).contiguous();
  const int64_t channels = image.size(1), height = image.size(2), width = image.size(3), n = boxes.size(0);
  auto output = at::zeros({n, channels, ph, pw}, image.options());
  const float* source = image.data_ptr<float>();
  const float* box = boxes.data_ptr<float>();
  float* target = output.data_ptr<float>();
  struct Sample { int64_t at[4]; float weight[4]; };
  for (int64_t r = 0; r < n; ++r) {
    const float* five = box + 5 * r;
    const float shift = aligned ? 0.5f : 0.f, s = static_cast<float>(scale);
    const float left = five[1] * s - shift, top = five[2] * s - shift;
    float w = five[3] * s - shift - left, h = five[4] * s - shift - top;
    if (!aligned) { w = std::max(w, 1.f); h = std::max(h, 1.f); }
    const float bin_h = h / ph, bin_w = w / pw;
    const int64_t gh = ratio > 0 ? ratio : static_cast<int64_t>(std::ceil(h / ph));
    const int64_t gw = ratio > 0 ? ratio : static_cast<int64_t>(std::ceil(w / pw));
    const float count = static_cast<float>(std::max<int64_t>(gh * gw, 1));
    // Where to read and how much of it is the same for every channel: compute it once per box.
    std::vector<Sample> samples;
    samples.reserve(std::max<int64_t>(ph * pw * gh * gw, 0));
    for (int64_t i = 0; i < ph; ++i) for (int64_t j = 0; j < pw; ++j)
      for (int64_t a = 0; a < gh; ++a) for (int64_t c = 0; c < gw; ++c) {
        float y = top + i * bin_h + (a + 0.5f) * bin_h / gh;
        float x = left + j * bin_w + (c + 0.5f) * bin_w / gw;
        Sample one{{0, 0, 0, 0}, {0, 0, 0, 0}};
        if (y >= -1.f && y <= height && x >= -1.f && x <= width) {
          y = std::max(y, 0.f); x = std::max(x, 0.f);
          int64_t y0 = static_cast<int64_t>(y), x0 = static_cast<int64_t>(x), y1 = y0 + 1, x1 = x0 + 1;
          if (y0 >= height - 1) { y0 = y1 = height - 1; y = static_cast<float>(y0); }
          if (x0 >= width - 1) { x0 = x1 = width - 1; x = static_cast<float>(x0); }
          const float fy = y - y0, fx = x - x0;
          one = Sample{{y0 * width + x0, y0 * width + x1, y1 * width + x0, y1 * width + x1},
                       {(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx}};
        }
        samples.push_back(one);
      }
    const int64_t picture = static_cast<int64_t>(five[0]);
    TORCH_CHECK(picture >= 0 && picture < image.size(0), "roi_align: a box names a picture outside the batch");
    for (int64_t channel = 0; channel < channels; ++channel) {
      const float* plane = source + (picture * channels + channel) * height * width;
      float* out = target + (r * channels + channel) * ph * pw;
      size_t next = 0;
      for (int64_t cell = 0; cell < ph * pw; ++cell) {
        float sum = 0.f;
        for (int64_t k = 0; k < gh * gw; ++k, ++next)
          for (int corner = 0; corner < 4; ++corner)
            sum += samples[next].weight[corner] * plane[samples[next].at[corner]];
        out[cell] = sum / count;
      }
    }
  }
  return output.to(input.scalar_type());
}

TORCH_LIBRARY_IMPL(torchvision, CPU, m) {
  m.impl("nms", nms);
  m.impl("roi_align", roi_align);
}
"""


@functools.cache
def register(*, compiled: bool = True) -> str:
    """Define the operators if they are missing; says which are in use: "torchvision", "c++" or "torch".

    With `compiled`, C++ is tried first: about 20 s once, then kept by torch's extension cache.
    """
    if _compiled_ones_load():
        return "torchvision"
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    _kept.append(library)
    for schema in _SCHEMAS.values():
        library.define(schema)  # type: ignore[no-untyped-call]
    library.impl("qnms", _refuse, "CPU")  # type: ignore[no-untyped-call]
    kind = "c++" if compiled and _compile() else "torch"
    if kind == "torch":
        library.impl("nms", nms, "CPU")  # type: ignore[no-untyped-call]
        library.impl("roi_align", roi_align, "CPU")  # type: ignore[no-untyped-call]
    # torchvision asks this before every call; what it calls exists now.
    for module in ("torchvision.extension", "torchvision.ops.roi_align"):
        vars(importlib.import_module(module))["_has_ops"] = _yes
    return kind


_kept: list[torch.library.Library] = []  # operators vanish with their library object


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
    shift = 0.5 if aligned else 0.0
    output = input.new_zeros(len(rois), input.shape[1], pooled_height, pooled_width)
    for index, roi in enumerate(rois):
        x1, y1, x2, y2 = (float(value) * spatial_scale - shift for value in roi[1:])
        w, h = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1.0), max(y2 - y1, 1.0))
        rows = _samples(y1, h, pooled_height, sampling_ratio, height)
        columns = _samples(x1, w, pooled_width, sampling_ratio, width)
        if rows.numel() and columns.numel():
            # Bilinear weights factor into one matrix per axis: [cells, height] @ plane @ [width, cells].
            output[index] = rows.to(input.dtype) @ input[int(roi[0])] @ columns.to(input.dtype).T
    return output


def _samples(start: float, length: float, cells: int, ratio: int, size: int) -> Tensor:
    """[cells, size]: how much each of `size` pixels adds to each cell along one axis."""
    count = ratio if ratio > 0 else int(-(-length // cells))
    weights = torch.zeros(cells, size)
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


def _compile() -> bool:
    """Build and load the C++ operators; false where there is no compiler or it fails."""
    if shutil.which("c++") is None or shutil.which("ninja") is None:
        return False
    from torch.utils import cpp_extension

    try:
        cpp_extension.load_inline(  # type: ignore[no-untyped-call]
            "tidegate_torchvision_operators", [_SOURCE], extra_cflags=["-O3"], is_python_module=False
        )
    except (RuntimeError, OSError):
        return False
    return True


def _yes() -> bool:
    return True


def _refuse(*_: Any) -> Tensor:
    raise NotImplementedError("torchvision::qnms (quantised boxes) is not part of a CPU torch: use float boxes")
