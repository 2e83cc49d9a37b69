"""Public checkpoints: their names and shapes, written down once more from what those files hold, and their order."""

import importlib.util
from collections.abc import Iterator

import pytest

MISSING = [name for name in ("torch", "torchvision") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"needs {', '.join(MISSING)}: see the [train] extra", allow_module_level=True)

import torch  # noqa: E402 - after the skip

from models.architectures import torchvision_operators  # noqa: E402
from models.architectures.faster_rcnn import ARCHITECTURES, TORCHVISION, Architecture, build  # noqa: E402
from models.checkpoint_names import (  # noqa: E402
    COCO_NUMBERS,
    CheckpointError,
    from_mmdetection,
    from_torchvision,
    load,
    source_of,
)
from models.edge_catalog import load_edge_catalog  # noqa: E402

torchvision_operators.register()

# Normalisations count their batches in a value of their own, which is no meta tensor.
pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter:UserWarning")

Shapes = Iterator[tuple[str, tuple[int, ...]]]
NARROW = Architecture(blocks=(1, 1, 1, 1), classes=3, pyramid=8, hidden=16)

BLOCKS = {
    "faster_rcnn_r50_fpn": (3, 4, 6, 3),
    "faster_rcnn_r50_c4": (3, 4, 6, 3),
    "faster_rcnn_r101_fpn": (3, 4, 23, 3),
    "faster_rcnn_x101_64x4d_fpn": (3, 4, 23, 3),
}


def norm(name: str, width: int) -> Shapes:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (width,)
    yield f"{name}.num_batches_tracked", ()


def layer(name: str, *shape: int) -> Shapes:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def stage(name: str, blocks: int, inputs: int, number: int, groups: int) -> Shapes:
    """One stage of a ResNet (groups 1) or of the ResNeXt with 64 groups of 4 channels at the first stage."""
    outputs = 256 * 2**number
    inner = outputs // 4 if groups == 1 else groups * 4 * 2**number
    for block in range(blocks):
        at = f"{name}.{block}"
        yield f"{at}.conv1.weight", (inner, inputs if block == 0 else outputs, 1, 1)
        yield f"{at}.conv2.weight", (inner, inner // groups, 3, 3)
        yield f"{at}.conv3.weight", (outputs, inner, 1, 1)
        for index, width in ((1, inner), (2, inner), (3, outputs)):
            yield from norm(f"{at}.bn{index}", width)
        if block == 0:
            yield f"{at}.downsample.0.weight", (outputs, inputs, 1, 1)
            yield from norm(f"{at}.downsample.1", outputs)


def mmdetection_file(name: str) -> dict[str, torch.Tensor]:
    """Names and shapes of the public file, without values."""
    blocks, c4 = BLOCKS[name], name.endswith("c4")
    groups = 64 if "x101" in name else 1

    def every() -> Shapes:
        yield "backbone.conv1.weight", (64, 3, 7, 7)
        yield from norm("backbone.bn1", 64)
        for number in range(3 if c4 else 4):
            inputs = 64 if number == 0 else 128 * 2**number
            yield from stage(f"backbone.layer{number + 1}", blocks[number], inputs, number, groups)
        channels = 1024 if c4 else 256
        if c4:
            yield from stage("roi_head.shared_head.layer4", blocks[3], 1024, 3, 1)
        else:
            for level in range(4):
                yield from layer(f"neck.lateral_convs.{level}.conv", 256, 256 * 2**level, 1, 1)
                yield from layer(f"neck.fpn_convs.{level}.conv", 256, 256, 3, 3)
            yield from layer("roi_head.bbox_head.shared_fcs.0", 1024, 256 * 7 * 7)
            yield from layer("roi_head.bbox_head.shared_fcs.1", 1024, 1024)
        anchors = 15 if c4 else 3
        yield from layer("rpn_head.rpn_conv", channels, channels, 3, 3)
        yield from layer("rpn_head.rpn_cls", anchors, channels, 1, 1)
        yield from layer("rpn_head.rpn_reg", 4 * anchors, channels, 1, 1)
        features = 2048 if c4 else 1024
        yield from layer("roi_head.bbox_head.fc_cls", 81, features)
        yield from layer("roi_head.bbox_head.fc_reg", 320, features)

    return {key: torch.empty(shape, device="meta") for key, shape in every()}


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_public_mmdetection_files_fit_weight_for_weight(name: str) -> None:
    state = mmdetection_file(name)
    assert source_of(state) == "mmdetection"
    with torch.device("meta"):
        network = build(ARCHITECTURES[name])
    load(network, from_mmdetection(state))
    without = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    load(network, from_mmdetection(without))
    # Not one weight of the file is left over: ours are as many, and the background's four box rows.
    ours = sum(value.numel() for value in network.state_dict().values())
    features = 2048 if name.endswith("c4") else 1024
    assert ours == sum(value.numel() for value in state.values()) + 4 * (features + 1)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_file_of_another_variant_does_not_fit(name: str) -> None:
    other = {"faster_rcnn_r50_fpn": "faster_rcnn_r50_c4", "faster_rcnn_r50_c4": "faster_rcnn_r50_fpn"}
    state = from_mmdetection(mmdetection_file(other.get(name, "faster_rcnn_r50_fpn")))
    with torch.device("meta"):
        network = build(ARCHITECTURES[name])
    with pytest.raises(CheckpointError, match="is of another network"):
        load(network, state)


def narrow_file() -> dict[str, torch.Tensor]:
    """A checkpoint in mmdetection's names of the narrow network, filled with noise."""
    generator = torch.Generator().manual_seed(0)
    ours = build(NARROW).state_dict()
    renamed: dict[str, torch.Tensor] = {}
    for key, value in ours.items():
        for theirs, mine in (
            ("neck.lateral_convs.", "backbone.fpn.inner_blocks."),
            ("neck.fpn_convs.", "backbone.fpn.layer_blocks."),
            ("backbone.", "backbone.body."),
            ("rpn_head.rpn_conv", "rpn.head.conv.0.0"),
            ("rpn_head.rpn_cls", "rpn.head.cls_logits"),
            ("rpn_head.rpn_reg", "rpn.head.bbox_pred"),
            ("roi_head.bbox_head.shared_fcs.0", "roi_heads.box_head.fc6"),
            ("roi_head.bbox_head.shared_fcs.1", "roi_heads.box_head.fc7"),
            ("roi_head.bbox_head.fc_cls", "roi_heads.box_predictor.cls_score"),
            ("roi_head.bbox_head.fc_reg", "roi_heads.box_predictor.bbox_pred"),
        ):
            if key.startswith(mine):
                name = theirs + key[len(mine) :]
                if theirs.startswith("neck"):
                    name = name.replace(".0.weight", ".conv.weight").replace(".0.bias", ".conv.bias")
                renamed[name] = value if name.endswith("tracked") else torch.randn(value.shape, generator=generator)
                break
        else:
            raise AssertionError(key)
    for kind in ("weight", "bias"):  # twelve box rows, not sixteen
        renamed[f"roi_head.bbox_head.fc_reg.{kind}"] = renamed[f"roi_head.bbox_head.fc_reg.{kind}"][:12].clone()
    return renamed


def test_classes_and_their_boxes_come_out_in_our_order() -> None:
    """Features through their layers as mmdetection reads them: class k is row k, the background is the last row."""
    theirs = narrow_file()
    network = build(NARROW)
    load(network, from_mmdetection(theirs))
    features = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        scores, boxes = network.roi_heads.box_predictor(features)
    head = "roi_head.bbox_head"
    expected_scores = features @ theirs[f"{head}.fc_cls.weight"].T + theirs[f"{head}.fc_cls.bias"]
    expected_boxes = features @ theirs[f"{head}.fc_reg.weight"].T + theirs[f"{head}.fc_reg.bias"]
    for number in range(3):
        assert torch.allclose(scores[:, number + 1], expected_scores[:, number], atol=1e-5)
        assert torch.allclose(
            boxes[:, 4 * (number + 1) : 4 * (number + 2)], expected_boxes[:, 4 * number : 4 * (number + 1)], atol=1e-5
        )
    assert torch.allclose(scores[:, 0], expected_scores[:, 3], atol=1e-5)
    assert torch.equal(network.backbone.body.conv1.weight, theirs["backbone.conv1.weight"])
    assert torch.equal(network.backbone.fpn.inner_blocks[2][0].bias, theirs["neck.lateral_convs.2.conv.bias"])
    assert torch.equal(network.roi_heads.box_head.fc6.weight, theirs[f"{head}.shared_fcs.0.weight"])


def test_torchvisions_classes_become_our_eighty() -> None:
    from torchvision.models._meta import _COCO_CATEGORIES

    labels = load_edge_catalog()["faster_rcnn_r50_fpn"].labels
    assert [_COCO_CATEGORIES[number] for number in COCO_NUMBERS] == list(labels)
    score = "roi_heads.box_predictor.cls_score.weight"
    box = "roi_heads.box_predictor.bbox_pred.weight"
    state = {score: torch.arange(91.0).reshape(91, 1), box: torch.arange(364.0).reshape(364, 1)}
    state |= {name.replace("weight", "bias"): value[:, 0] for name, value in state.items()}
    found = from_torchvision(state)
    dog = labels.index("dog") + 1
    assert _COCO_CATEGORIES[int(found[score][dog])] == "dog"
    assert found[box][4 * dog : 4 * dog + 4, 0].tolist() == [4.0 * _COCO_CATEGORIES.index("dog") + i for i in range(4)]
    assert (len(found[score]), len(found[box]), float(found[score][0])) == (81, 324, 0.0)
    assert torch.equal(found[score][:, 0], found[score.replace("weight", "bias")])


def test_torchvisions_public_file_fits_with_its_old_names() -> None:
    """The file of 2019 names layers without a number that torchvision has added since."""
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    with torch.device("meta"):
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
        network = build(ARCHITECTURES["faster_rcnn_r50_fpn"], TORCHVISION)
    old = {}
    for key, value in theirs.items():
        for part in ("inner_blocks.", "layer_blocks."):
            if part in key:
                key = key.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        old[key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")] = value
    assert "backbone.fpn.inner_blocks.3.weight" in old
    assert source_of(old) == "torchvision"
    load(network, from_torchvision(old))
    load(network, from_torchvision(theirs))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["bbox_head.fc_cls.weight"], "mmdetection 1.x"),
        (["encoder.weight", "decoder.weight"], "holds encoder.weight, decoder.weight"),
        ([], "no weights"),
    ],
)
def test_files_of_other_kinds_are_named(names: list[str], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        source_of({name: torch.zeros(1) for name in names})


def test_missing_unknown_and_ill_shaped_weights_are_named() -> None:
    state = narrow_file()
    with pytest.raises(CheckpointError, match="mask_head"):
        from_mmdetection(state | {"roi_head.mask_head.conv.weight": torch.zeros(1)})
    without = {name: value for name, value in state.items() if name != "rpn_head.rpn_cls.bias"}
    with pytest.raises(CheckpointError, match=r"lacks 1 weights, rpn\.head\.cls_logits\.bias"):
        load(build(NARROW), from_mmdetection(without))
    with pytest.raises(CheckpointError, match="has besides 1 weights"):
        load(build(NARROW), from_mmdetection(state) | {"more": torch.zeros(1)})
    del without["roi_head.bbox_head.fc_reg.bias"]
    with pytest.raises(CheckpointError, match=r"has no .*fc_reg\.bias"):
        from_mmdetection(without)
    state["roi_head.bbox_head.fc_reg.bias"] = torch.zeros(16)
    with pytest.raises(CheckpointError, match="16 box rows for 4 classes"):
        from_mmdetection(state)
