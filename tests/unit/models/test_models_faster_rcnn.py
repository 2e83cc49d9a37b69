"""Faster R-CNN's parts and the whole, held against torchvision's own, the paper's table and sums by hand."""

import importlib.util
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

MISSING = [name for name in ("torch", "torchvision") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"needs {', '.join(MISSING)}: see the [train] extra", allow_module_level=True)

import torch  # noqa: E402 - after the skip

from models.architectures import torchvision_operators  # noqa: E402
from models.architectures.faster_rcnn import (  # noqa: E402
    ARCHITECTURES,
    MMDETECTION,
    TORCHVISION,
    Architecture,
    GridAnchors,
    OneImage,
    PyramidAlign,
    build,
    residual_network,
    rough_noise,
    settle,
)
from models.edge_catalog import load_edge_catalog  # noqa: E402

torchvision_operators.register()

from torchvision.models.detection import FasterRCNN  # noqa: E402
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.models.detection.backbone_utils import BackboneWithFPN  # noqa: E402
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead  # noqa: E402
from torchvision.models.detection.image_list import ImageList  # noqa: E402
from torchvision.ops import MultiScaleRoIAlign, roi_align  # noqa: E402

NARROW = Architecture(blocks=(1, 1, 1, 1), classes=5, pyramid=16, hidden=32)
STRIDES = (4, 8, 16, 32, 64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads that wait for each other are many times slower where others work, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def maps(height: int, width: int, channels: int = 2) -> "OrderedDict[str, torch.Tensor]":
    """A pyramid of noise for an image padded to 32: the last map halves the one before, rounding up."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(height // s, width // s) for s in STRIDES[:4]]
    sizes.append((-(-height // 64), -(-width // 64)))
    names = ("0", "1", "2", "3", "pool")
    return OrderedDict(
        (name, torch.randn(1, channels, *size, generator=generator)) for name, size in zip(names, sizes, strict=True)
    )


def proposals(count: int, height: int, width: int) -> torch.Tensor:
    """Boxes of 4 to 500 pixels; some share no pixel with the image's middle."""
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.9
    side = torch.exp(torch.rand(count, 2, generator=generator) * math.log(125.0)) * 4
    far = torch.minimum(corner + side, torch.tensor([float(width), float(height)]))
    return torch.cat([corner, far], dim=1)


def test_anchors_stand_where_the_formula_puts_them() -> None:
    features = list(maps(96, 160).values())
    anchors = GridAnchors([[8.0 * s] for s in STRIDES], STRIDES, whole=False)
    (found,) = anchors(ImageList(torch.zeros(1, 3, 96, 160), [(96, 160)]), features)
    expected = []
    for stride, feature in zip(STRIDES, features, strict=True):
        for row in range(feature.shape[2]):
            for column in range(feature.shape[3]):
                for ratio in (0.5, 1.0, 2.0):
                    w, h = 8 * stride / math.sqrt(ratio), 8 * stride * math.sqrt(ratio)
                    x, y = column * stride, row * stride
                    expected.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    np.testing.assert_allclose(found.numpy(), np.array(expected), atol=1e-3)
    areas = (found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1])
    assert areas.min().item() == pytest.approx(32.0**2, rel=1e-5)


def test_whole_anchors_equal_torchvisions() -> None:
    """At a height whose coarsest map does not divide it: torchvision's stride there is not 64."""
    features = list(maps(800 // 32 * 32, 160).values())
    images = ImageList(torch.zeros(2, 3, 800, 160), [(800, 160), (790, 150)])
    ours = GridAnchors([[8.0 * s] for s in STRIDES], STRIDES, whole=True)(images, features)
    theirs = AnchorGenerator(tuple((8 * s,) for s in STRIDES), ((0.5, 1.0, 2.0),) * 5)(images, features)
    assert len(ours) == len(theirs) == 2
    assert torch.equal(ours[1], theirs[1])


def test_pooling_equals_torchvisions_where_conventions_are_its_own() -> None:
    features, boxes = maps(480, 640, channels=3), proposals(60, 480, 640)
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)(features, [boxes], [(480, 640)])
    ours = PyramidAlign(TORCHVISION)(features, [boxes], [(480, 640)])
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(PyramidAlign(MMDETECTION)(features, [boxes], [(480, 640)]), theirs, atol=1e-2)


def test_a_regions_level_follows_its_side() -> None:
    sides = (10.0, 111.9, 112.0, 223.0, 225.0, 447.0, 448.0, 900.0)
    levels = (0, 0, 1, 1, 2, 2, 3, 3)
    features = {str(i): torch.full((1, 1, 1024 // 4 // 2**i, 1024 // 4 // 2**i), float(i)) for i in range(4)}
    boxes = torch.tensor([(20.0, 20.0, 20.0 + side, 20.0 + side) for side in sides])
    found = PyramidAlign(MMDETECTION)(features, [boxes], [(1024, 1024)])
    assert found[:, 0, 3, 3].round(decimals=3).tolist() == list(levels)


def test_the_network_equals_torchvisions_with_the_same_weights() -> None:
    torch.manual_seed(0)
    ours = build(NARROW, TORCHVISION, proposals=100)
    settle(ours)
    body = residual_network(NARROW, TORCHVISION)
    names = {f"layer{stage + 1}": str(stage) for stage in range(4)}
    theirs = FasterRCNN(
        BackboneWithFPN(body, names, [256, 512, 1024, 2048], NARROW.pyramid),
        min_size=190,
        max_size=300,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=AnchorGenerator(tuple((8 * s,) for s in STRIDES), ((0.5, 1.0, 2.0),) * 5),
        rpn_post_nms_top_n_test=100,
        box_head=TwoMLPHead(NARROW.pyramid * 49, NARROW.hidden),
        box_predictor=FastRCNNPredictor(NARROW.hidden, NARROW.classes + 1),
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    image = rough_noise(190, 300, torch.Generator().manual_seed(2))
    with torch.no_grad():
        boxes, scores, classes = OneImage(ours)(image)
        (expected,) = theirs([image[0]])
    assert len(boxes) > 20
    assert len(set(classes.tolist())) > 1
    assert torch.allclose(boxes, expected["boxes"], atol=1e-3)
    assert torch.allclose(scores, expected["scores"], atol=1e-5)
    assert torch.equal(classes + 1, expected["labels"])


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_parameters_weigh_what_the_paper_says(name: str) -> None:
    """Table II's memory is four bytes a parameter, in MiB. Built without values, so it costs no memory here."""
    with torch.device("meta"):
        network = build(ARCHITECTURES[name])
    mebibytes = sum(parameter.numel() for parameter in network.parameters()) * 4 / 2**20
    assert mebibytes == pytest.approx(load_edge_catalog()[name].memory_mb, rel=0.003)


def test_parameters_are_as_many_as_torchvision_publishes() -> None:
    """Its count has ten classes more and leaves out the frozen normalisations."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    with torch.device("meta"):
        network = build(ARCHITECTURES["faster_rcnn_r50_fpn"])
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    count = sum(parameter.numel() for parameter in network.parameters())
    count += 10 * 5 * (1024 + 1) - sum(norm.weight.numel() + norm.bias.numel() for norm in norms)
    assert count == FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["num_params"]


@pytest.mark.parametrize("early", [True, False])
def test_the_stride_stands_where_the_weights_expect_it(early: bool) -> None:
    architecture = Architecture(blocks=(2, 2, 2, 2), early_stride=early)
    network = residual_network(architecture, MMDETECTION)
    for stage in (network.layer2, network.layer3, network.layer4):
        assert (stage[0].conv1.stride, stage[0].conv2.stride) == (((2, 2), (1, 1)) if early else ((1, 1), (2, 2)))
        assert (stage[1].conv1.stride, stage[1].conv2.stride) == ((1, 1), (1, 1))
    assert network.layer1[0].conv1.stride == (1, 1)


def test_the_c4_head_in_parts_equals_the_whole() -> None:
    from models.architectures.c4_head import C4Regions

    torch.manual_seed(0)
    body = residual_network(Architecture(blocks=(1, 1, 1, 1), early_stride=True), MMDETECTION).eval()
    head = C4Regions(body.layer4, MMDETECTION, most=12)
    head.PART, head.parts = 5, 3
    features = {"0": torch.randn(1, 1024, 12, 16)}
    boxes = proposals(11, 192, 256)
    rois = torch.cat([torch.zeros(11, 1), boxes], dim=1)
    with torch.no_grad():
        expected = body.layer4(roi_align(features["0"], rois, 14, 1 / 16, 0, True)).mean(dim=(2, 3))
        assert torch.allclose(head(features, [boxes], [(192, 256)]), expected, atol=1e-5)
        assert torch.allclose(head(features, [boxes[:2]], [(192, 256)]), expected[:2], atol=1e-5)
        assert head(features, [boxes[:0]], [(192, 256)]).shape == (0, 2048)
        with pytest.raises(ValueError, match="16 regions: at most 15"):
            head(features, [boxes[[0] * 16]], [(192, 256)])


@pytest.mark.parametrize("spread", [1.0, 58.0])
def test_a_settled_network_answers_with_distinct_scores(spread: float) -> None:
    torch.manual_seed(0)
    network = build(NARROW, proposals=100)
    image = spread * rough_noise(200, 300, torch.Generator().manual_seed(2))

    def outputs() -> Any:
        with torch.no_grad():
            return OneImage(network)(image)

    settle(network, spread=spread)
    boxes, scores, _ = outputs()
    assert len(boxes) > 20
    assert len(set(scores.tolist())) == len(scores)
    assert 0.05 < scores.min() < scores.max() < 0.99999
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 300
    assert boxes[:, 3].max() <= 200
    assert not network.training
