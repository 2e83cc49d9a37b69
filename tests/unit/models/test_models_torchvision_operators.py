"""The stand-in operators equal brute force and torchvision's own pure-Python reference."""

import importlib
import importlib.util
import subprocess
import sys

import pytest

MISSING = [name for name in ("torch", "torchvision", "timm") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"needs {', '.join(MISSING)}: see the [export] extra", allow_module_level=True)

import torch  # noqa: E402 - after the skip

from models.architectures import torchvision_operators  # noqa: E402

KINDS = ("torchvision", "c++", "torch")


@pytest.fixture(scope="module")
def in_use() -> str:
    return torchvision_operators.register(compiled=False)


def boxes(count: int, side: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * side * 0.6
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=generator) * side * 0.3], dim=1)


def test_torchvision_and_timm_import_after_registering(in_use: str) -> None:
    assert in_use in KINDS
    assert importlib.import_module("torchvision").__name__ == "torchvision"
    assert importlib.import_module("timm").create_model("efficientnet_b0", num_classes=3).num_classes == 3


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
    assert torchvision_operators.nms(found[:0], scores[:0], 0.4).tolist() == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on loading the reference
@pytest.mark.parametrize("ratio", [2, 0])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_equals_torchvisions_reference(in_use: str, ratio: int, aligned: bool) -> None:
    from torchvision.ops import roi_align

    reference = importlib.import_module("torchvision.ops.roi_align")._roi_align
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, 3, 40, 40, generator=generator)
    rois = torch.cat([torch.randint(0, 2, (20, 1), generator=generator).float(), boxes(20, 80.0)], dim=1)
    with torch.compiler.set_stance("force_eager"):  # the reference compiles itself: a minute for nothing
        expected = reference(features, rois, 0.5, 7, 6, ratio, aligned)
    ours = torchvision_operators.roi_align(features, rois, 0.5, 7, 6, ratio, aligned)
    assert ours.shape == (20, 3, 7, 6)
    assert torch.allclose(ours, expected, atol=1e-4)
    assert torch.allclose(roi_align(features, rois, (7, 6), 0.5, ratio, aligned), expected, atol=1e-4)


def test_quantised_boxes_are_refused_by_name(in_use: str) -> None:
    if in_use == "torchvision":
        pytest.skip("torchvision's own operators are in use here")
    with pytest.raises(NotImplementedError, match="use float boxes"):
        torch.ops.torchvision.qnms(boxes(2, 9.0), torch.ones(2), 0.5)


@pytest.mark.slow
def test_the_compiled_operators_equal_the_plain_ones() -> None:
    """In a process of its own, because operators are registered once per process. Compiles for about 30 s."""
    program = """
import torch
from models.architectures import torchvision_operators as ours
print(ours.register())
from torchvision.ops import nms, roi_align
g = torch.Generator().manual_seed(0)
corner = torch.rand(500, 2, generator=g) * 60
found = torch.cat([corner, corner + 1 + torch.rand(500, 2, generator=g) * 20], 1)
scores = torch.rand(500, generator=g)
assert torch.equal(nms(found, scores, 0.5), ours.nms(found, scores, 0.5))
features = torch.randn(2, 3, 30, 40, generator=g)
rois = torch.cat([torch.randint(0, 2, (30, 1), generator=g).float(), found[:30] * 2 - 20], 1)  # some outside
for ratio in (2, 0):
    for aligned in (True, False):
        got = roi_align(features, rois, (7, 6), 0.5, ratio, aligned)
        assert torch.allclose(got, ours.roi_align(features, rois, 0.5, 7, 6, ratio, aligned), atol=1e-4)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in KINDS
