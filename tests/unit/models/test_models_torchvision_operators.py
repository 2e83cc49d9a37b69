"""The stand-in operators equal brute force in numpy, and roi_align's gradient equals finite differences."""

import importlib
import importlib.util
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

MISSING = [name for name in ("torch", "torchvision", "timm") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"needs {', '.join(MISSING)}: see the [train] extra", allow_module_level=True)

import torch  # noqa: E402 - after the skip

from models.architectures import torchvision_operators  # noqa: E402

Align = Callable[..., torch.Tensor]
KINDS = ("torchvision", "c++", "torch")


@pytest.fixture(scope="module")
def in_use() -> str:
    return torchvision_operators.register()


@pytest.fixture(params=["registered", "plain torch"])
def align(request: pytest.FixtureRequest, in_use: str) -> Align:
    if request.param == "plain torch":
        return torchvision_operators.roi_align
    return torch.ops.torchvision.roi_align


def boxes(count: int, side: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * side * 0.6
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=generator) * side * 0.3], dim=1)


def bilinear(plane: npt.NDArray[np.float64], y: float, x: float) -> float:
    """The value at one point: the border's up to one pixel outside, zero beyond."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    value = 0.0
    for row in {math.floor(y), min(math.floor(y) + 1, height - 1)}:
        for column in {math.floor(x), min(math.floor(x) + 1, width - 1)}:
            value += max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - column)) * float(plane[row, column])
    return value


def aligned_by_hand(
    features: npt.NDArray[np.float64],
    rois: npt.NDArray[np.float64],
    scale: float,
    ph: int,
    pw: int,
    ratio: int,
    aligned: bool,
) -> npt.NDArray[np.float64]:
    """Cell by cell, sample by sample."""
    result = np.zeros((len(rois), features.shape[1], ph, pw))
    for r, (picture, *corners) in enumerate(rois):
        x1, y1, x2, y2 = (corner * scale - (0.5 if aligned else 0.0) for corner in corners)
        w, h = x2 - x1, y2 - y1
        if not aligned:
            w, h = max(w, 1.0), max(h, 1.0)
        down, across = ratio or math.ceil(h / ph), ratio or math.ceil(w / pw)
        for c, i, j in np.ndindex(features.shape[1], ph, pw):
            points = [
                (y1 + (i + (a + 0.5) / down) * h / ph, x1 + (j + (b + 0.5) / across) * w / pw)
                for a in range(down)
                for b in range(across)
            ]
            result[r, c, i, j] = np.mean([bilinear(features[int(picture), c], *point) for point in points])
    return result


def test_torchvision_and_timm_import_after_registering(in_use: str) -> None:
    assert in_use in KINDS
    assert importlib.import_module("torchvision").__name__ == "torchvision"
    assert importlib.import_module("timm").create_model("efficientnet_b0", num_classes=3).num_classes == 3
    assert torchvision_operators.register() == torchvision_operators.register(compiled=False) == in_use


def test_nms_equals_brute_force(in_use: str) -> None:
    from torchvision.ops import box_iou, nms

    found = boxes(300, 60.0)
    scores = torch.rand(300, generator=torch.Generator().manual_seed(1)).round(decimals=2)  # with ties
    overlap = box_iou(found, found)
    kept: list[int] = []
    for index in sorted(range(300), key=lambda i: (-float(scores[i]), i)):
        if all(overlap[index, other] <= 0.4 for other in kept):
            kept.append(index)
    assert torchvision_operators.nms(found, scores, 0.4).tolist() == kept
    assert nms(found, scores, 0.4).tolist() == kept
    assert 0 < len(kept) < 300
    assert nms(found[:0], scores[:0], 0.4).tolist() == []
    assert torchvision_operators.nms(found[:0], scores[:0], 0.4).tolist() == []


@pytest.mark.parametrize("ratio", [2, 0])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_equals_a_computation_by_hand(align: Align, ratio: int, aligned: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, 2, 12, 15, generator=generator, dtype=torch.float64)
    found = boxes(8, 30.0).double()
    found[0] = torch.tensor([-9.0, -8.0, 4.0, 40.0])  # reaches far outside
    rois = torch.cat([torch.randint(0, 2, (8, 1), generator=generator).double(), found], dim=1)
    expected = aligned_by_hand(features.numpy(), rois.numpy(), 0.5, 4, 3, ratio, aligned)
    assert np.abs(expected).max() > 0.5
    got = align(features, rois, 0.5, 4, 3, ratio, aligned)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-9)
    single = align(features.float(), rois.float(), 0.5, 4, 3, ratio, aligned)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, atol=1e-4)
    assert align(features, rois[:0], 0.5, 4, 3, ratio, aligned).shape == (0, 2, 4, 3)


@pytest.mark.parametrize("kind", ["registered", "plain torch"])
@pytest.mark.parametrize("ratio", [2, 0])
def test_the_gradient_equals_finite_differences(in_use: str, kind: str, ratio: int) -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(2, 2, 6, 7, generator=generator, dtype=torch.float64)
    rois = torch.tensor([[0, 1.0, 2, 10, 9], [1, -3, 4, 20, 25], [1, 3, 3, 9, 9]], dtype=torch.float64)
    upstream = torch.randn(3, 2, 3, 2, generator=generator, dtype=torch.float64)
    if kind == "registered":
        leaf = features.clone().requires_grad_()
        (torch.ops.torchvision.roi_align(leaf, rois, 0.5, 3, 2, ratio, True) * upstream).sum().backward()
        assert leaf.grad is not None
        gradient = leaf.grad
    else:
        gradient = torchvision_operators.roi_align_backward(upstream, rois, 0.5, 3, 2, 2, 2, 6, 7, ratio, True)

    def loss(values: torch.Tensor) -> float:
        return float((torchvision_operators.roi_align(values, rois, 0.5, 3, 2, ratio, True) * upstream).sum())

    step = 1e-4
    for place in np.ndindex(*features.shape):
        above, below = features.clone(), features.clone()
        above[place] += step
        below[place] -= step
        assert float(gradient[place]) == pytest.approx((loss(above) - loss(below)) / (2 * step), abs=1e-8)


def test_shapes_are_known_without_values(in_use: str) -> None:
    features, rois = torch.empty(2, 5, 8, 9, device="meta"), torch.empty(11, 5, device="meta")
    assert torch.ops.torchvision.roi_align(features, rois, 1.0, 7, 6, 2, True).shape == (11, 5, 7, 6)
    grad = torch.empty(11, 5, 7, 6, device="meta")
    found = torch.ops.torchvision._roi_align_backward(grad, rois, 1.0, 7, 6, 2, 5, 8, 9, 2, True)
    assert found.shape == (2, 5, 8, 9)


def test_a_region_of_no_picture_is_refused(in_use: str) -> None:
    if in_use != "c++":
        pytest.skip("of the C++ operators")
    with pytest.raises(RuntimeError, match="names picture 3 of a batch of 2"):
        torch.ops.torchvision.roi_align(torch.zeros(2, 1, 4, 4), torch.tensor([[3.0, 0, 0, 1, 1]]), 1.0, 2, 2, 2, True)


def test_quantised_boxes_are_refused_by_name(in_use: str) -> None:
    if in_use == "torchvision":
        pytest.skip("torchvision's own operators are in use here")
    with pytest.raises(NotImplementedError, match="use float boxes"):
        torch.ops.torchvision.qnms(boxes(2, 9.0), torch.ones(2), 0.5)


def test_without_a_compiler_a_note_says_what_is_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler, said in (("no-such-compiler", "install g"), ("false", "failed")):
        monkeypatch.setenv("CXX", compiler)
        with caplog.at_level(logging.WARNING):
            assert not torchvision_operators._load_built()
        assert said in caplog.text
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
def test_the_compiled_operators_take_over_from_the_plain_ones() -> None:
    """In a process of its own, because operators are registered once per process."""
    program = """
import torch
from models.architectures import torchvision_operators as ours
first = ours.register(compiled=False)
from torchvision.ops import nms, roi_align
g = torch.Generator().manual_seed(0)
corner = torch.rand(500, 2, generator=g) * 60
found = torch.cat([corner, corner + 1 + torch.rand(500, 2, generator=g) * 20], 1)
scores = torch.rand(500, generator=g)
features = torch.randn(2, 3, 30, 40, generator=g, requires_grad=True)
rois = torch.cat([torch.randint(0, 2, (30, 1), generator=g).float(), found[:30] * 2 - 20], 1)  # some outside

def results():
    kept = nms(found, scores, 0.5)
    values = roi_align(features, rois, (7, 6), 0.5, 2, True)
    (gradient,) = torch.autograd.grad(values.square().sum(), features)
    return kept, values.detach(), gradient

before = results()
print(first, ours.register(), ours.register(compiled=False))
for a, b in zip(before, results()):
    assert torch.allclose(a, b, atol=1e-4)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() in (["torch", "c++", "c++"], ["torchvision"] * 3, ["torch"] * 3)
