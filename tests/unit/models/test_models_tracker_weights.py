"""Tracking networks: public names load, files answer as torch does, and what does not fit is said."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

MISSING = [n for n in ("torch", "torchvision", "onnx", "onnxruntime") if importlib.util.find_spec(n) is None]
if MISSING:
    pytest.skip(f"needs {', '.join(MISSING)}: see the [train] extra", allow_module_level=True)

import torch  # noqa: E402 - after the skip
from torch import Tensor  # noqa: E402

from models import tracker_weights  # noqa: E402
from models.architectures import faster_rcnn, yolox  # noqa: E402
from models.architectures.faster_rcnn import Architecture, rough_noise  # noqa: E402
from models.catalog import VariantError  # noqa: E402
from models.checkpoint_names import CheckpointError  # noqa: E402
from models.edge_catalog import load_edge_catalog  # noqa: E402
from models.edge_export import compare, export_edge, write_detector  # noqa: E402

NARROW = Architecture(blocks=(1, 1, 1, 1), pyramid=16, hidden=32, classes=1)
# Ours and mmdetection's, written out from a public file's listing.
NAMES = (
    ("backbone.body.", "backbone."),
    ("backbone.fpn.inner_blocks.{}.0.", "neck.lateral_convs.{}.conv."),
    ("backbone.fpn.layer_blocks.{}.0.", "neck.fpn_convs.{}.conv."),
    ("rpn.head.conv.0.0.", "rpn_head.rpn_conv."),
    ("rpn.head.cls_logits.", "rpn_head.rpn_cls."),
    ("rpn.head.bbox_pred.", "rpn_head.rpn_reg."),
    ("roi_heads.box_head.fc6.", "roi_head.bbox_head.shared_fcs.0."),
    ("roi_heads.box_head.fc7.", "roi_head.bbox_head.shared_fcs.1."),
    ("roi_heads.box_predictor.cls_score.", "roi_head.bbox_head.fc_cls."),
    ("roi_heads.box_predictor.bbox_pred.", "roi_head.bbox_head.fc_reg."),
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def public_state(network: Any, prefix: str = "") -> dict[str, Tensor]:
    """A detector's weights as mmdetection would have stored them."""
    found: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        for ours, theirs in NAMES:
            for level in range(4):
                if name.startswith(ours.format(level)):
                    found[prefix + theirs.format(level) + name[len(ours.format(level)) :]] = value
    for kind in ("weight", "bias"):
        scores, boxes = f"{prefix}roi_head.bbox_head.fc_cls.{kind}", f"{prefix}roi_head.bbox_head.fc_reg.{kind}"
        found[scores] = torch.cat([found[scores][1:], found[scores][:1]])  # the background comes last there
        found[boxes] = found[boxes][4:]  # and has no boxes
    return found


def random_values(network: Any) -> None:
    generator = torch.Generator().manual_seed(8)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator))


@pytest.mark.parametrize("prefix", ["", "detector."])
def test_a_sort_detector_of_public_names_loads(prefix: str, tmp_path: Path) -> None:
    source = faster_rcnn.build(NARROW)
    random_values(source)
    torch.save({"state_dict": public_state(source, prefix), "meta": {"epoch": 4}}, tmp_path / "sort.pth")
    built = tracker_weights.build_sort("sort_r50_fpn", str(tmp_path / "sort.pth"), architecture=NARROW)
    for name, value in source.state_dict().items():
        if "bbox_pred" not in name or "rpn" in name:
            assert torch.equal(built.network.state_dict()[name], value), name
    assert built.origin.startswith("sort.pth")
    assert built.accuracy.value is None


@pytest.mark.parametrize(("prefix", "head"), [("detector.", "track_head.embed_head."), ("", "roi_head.track_head.")])
def test_qdtrack_loads_from_either_source(prefix: str, head: str, tmp_path: Path) -> None:
    source = tracker_weights.build_qdtrack("qdtrack_r50_fpn", "random", architecture=NARROW).network
    random_values(source)
    state = public_state(source.detector, prefix)
    state |= {f"{head}{name}": value for name, value in source.track_head.state_dict().items()}
    torch.save(state, tmp_path / "qdtrack.pth")
    built = tracker_weights.build_qdtrack("qdtrack_r50_fpn", str(tmp_path / "qdtrack.pth"), architecture=NARROW)
    for name, value in source.track_head.state_dict().items():
        assert torch.equal(built.network.track_head.state_dict()[name], value), name
    fc6 = "roi_heads.box_head.fc6.weight"
    assert torch.equal(built.network.detector.state_dict()[fc6], source.detector.state_dict()[fc6])


def test_a_detector_alone_is_no_qdtrack(tmp_path: Path) -> None:
    torch.save(public_state(faster_rcnn.build(NARROW)), tmp_path / "detector.pth")
    with pytest.raises(VariantError, match="no embedding head"):
        tracker_weights.build_qdtrack("qdtrack_r50_fpn", str(tmp_path / "detector.pth"), architecture=NARROW)


def test_bytetracks_file_loads_and_another_size_does_not(tmp_path: Path) -> None:
    source = yolox.yolox("yolox_nano", 1)
    random_values(source)
    torch.save({"model": source.state_dict(), "start_epoch": 80}, tmp_path / "bytetrack.pth.tar")
    built = tracker_weights.build_yolox("bytetrack_yolox_x", str(tmp_path / "bytetrack.pth.tar"), size="yolox_nano")
    assert torch.equal(
        built.network.state_dict()["head.stems.1.conv.weight"], source.state_dict()["head.stems.1.conv.weight"]
    )
    with pytest.raises(VariantError, match="another network"):
        tracker_weights.build_yolox("bytetrack_yolox_x", str(tmp_path / "bytetrack.pth.tar"), size="yolox_tiny")
    with pytest.raises(VariantError, match="--weights PATH"):
        tracker_weights.build_yolox("bytetrack_yolox_x", "torchvision", size="yolox_nano")


def mm_yolox_shapes(depth: float, width: float) -> dict[str, tuple[int, ...]]:
    """Names and shapes of mmdetection's YOLOX with one class, written out from its configuration."""
    shapes: dict[str, tuple[int, ...]] = {}

    def base(name: str, inputs: int, outputs: int, side: int) -> None:
        shapes[f"{name}.conv.weight"] = (outputs, inputs, side, side)
        for kind in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{kind}"] = (outputs,)
        shapes[f"{name}.bn.num_batches_tracked"] = ()

    def csp(name: str, inputs: int, outputs: int, blocks: int) -> None:
        half = outputs // 2
        base(f"{name}.main_conv", inputs, half, 1)
        base(f"{name}.short_conv", inputs, half, 1)
        base(f"{name}.final_conv", 2 * half, outputs, 1)
        for block in range(blocks):
            base(f"{name}.blocks.{block}.conv1", half, half, 1)
            base(f"{name}.blocks.{block}.conv2", half, half, 3)

    channels = [int(c * width) for c in (64, 128, 256, 512, 1024)]
    blocks = [max(round(b * depth), 1) for b in (3, 9, 9, 3)]
    base("backbone.stem.conv", 12, channels[0], 3)
    for stage in (1, 2, 3, 4):
        base(f"backbone.stage{stage}.0", channels[stage - 1], channels[stage], 3)
        csp(f"backbone.stage{stage}.{2 if stage == 4 else 1}", channels[stage], channels[stage], blocks[stage - 1])
    base("backbone.stage4.1.conv1", channels[4], channels[4] // 2, 1)
    base("backbone.stage4.1.conv2", 2 * channels[4], channels[4], 1)
    low, middle, high = channels[2:]
    hidden, inner = int(256 * width), round(3 * depth)
    base("neck.reduce_layers.0", high, middle, 1)
    base("neck.reduce_layers.1", middle, low, 1)
    csp("neck.top_down_blocks.0", 2 * middle, middle, inner)
    csp("neck.top_down_blocks.1", 2 * low, low, inner)
    base("neck.downsamples.0", low, low, 3)
    base("neck.downsamples.1", middle, middle, 3)
    csp("neck.bottom_up_blocks.0", 2 * low, middle, inner)
    csp("neck.bottom_up_blocks.1", 2 * middle, high, inner)
    for level, inputs in enumerate((low, middle, high)):
        base(f"neck.out_convs.{level}", inputs, hidden, 1)
        for kind in ("cls", "reg"):
            for layer in (0, 1):
                base(f"bbox_head.multi_level_{kind}_convs.{level}.{layer}", hidden, hidden, 3)
        for kind, outputs in (("cls", 1), ("reg", 4), ("obj", 1)):
            shapes[f"bbox_head.multi_level_conv_{kind}.{level}.weight"] = (outputs, hidden, 1, 1)
            shapes[f"bbox_head.multi_level_conv_{kind}.{level}.bias"] = (outputs,)
    return shapes


@pytest.mark.parametrize(("name", "depth", "width"), [("yolox_x", 1.33, 1.25), ("yolox_tiny", 0.33, 0.375)])
def test_mmtrackings_yolox_fits_name_for_name(name: str, depth: float, width: float) -> None:
    with torch.device("meta"):
        state = {f"detector.{key}": torch.empty(shape) for key, shape in mm_yolox_shapes(depth, width).items()}
        ours = yolox.yolox(name, 1).state_dict()
    converted = tracker_weights.yolox_names(state)
    assert {key: tuple(value.shape) for key, value in converted.items()} == {k: tuple(v.shape) for k, v in ours.items()}
    assert tracker_weights.yolox_names(ours).keys() == ours.keys()
    with pytest.raises(CheckpointError, match=r"backbone\.other"):
        tracker_weights.yolox_names(state | {"backbone.other.weight": torch.empty(1)})


def test_the_halves_of_a_block_keep_their_places() -> None:
    """In mmdetection's code the main convolution leads to the bottlenecks, as the first one does in Megvii's."""
    state = {f"detector.{key}": torch.rand(shape) for key, shape in mm_yolox_shapes(0.33, 0.25).items()}
    network: Any = yolox.yolox("scenes_yolox", 1).eval()
    network.load_state_dict(tracker_weights.yolox_names(state))
    for theirs, ours in (
        ("backbone.stage2.1", network.backbone.backbone.dark3[1]),
        ("neck.top_down_blocks.1", network.backbone.C3_p3),
    ):
        for name, layer in (("main_conv", ours.conv1), ("short_conv", ours.conv2), ("final_conv", ours.conv3)):
            assert torch.equal(state[f"detector.{theirs}.{name}.conv.weight"], layer.conv.weight), (theirs, name)


def test_a_random_yolox_file_equals_torch_box_for_box(tmp_path: Path) -> None:
    built = tracker_weights.build_yolox("bytetrack_yolox_x", "random", 3, size="yolox_nano")
    write_detector(built.in_precision("float32"), tmp_path / "m.onnx", outputs=built.outputs)
    agreement = compare(built.in_precision("float32"), tmp_path / "m.onnx")
    assert agreement.compared > 50
    assert agreement.share == 1.0
    with pytest.raises(VariantError, match="float32"):
        built.in_precision("float16")


def test_a_random_qdtrack_file_equals_torch_with_its_embeddings(tmp_path: Path) -> None:
    import onnxruntime

    built = tracker_weights.build_qdtrack("qdtrack_r50_fpn", "random", 3, architecture=NARROW)
    built.network.detector.rpn._post_nms_top_n["testing"] = 60
    served = built.in_precision("float32")
    write_detector(served, tmp_path / "m.onnx", outputs=built.outputs)
    found_in_both = compare(served, tmp_path / "m.onnx")
    assert found_in_both.compared == found_in_both.agreeing > 20
    image = rough_noise(96, 160, torch.Generator().manual_seed(2))
    with torch.no_grad():
        boxes, _, _, embeddings = (value.numpy() for value in served(image))
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(["boxes", "embeddings"], {"image": image.numpy()})
    same = np.abs(boxes[:, None] - found[0][None]).max(axis=2) < 0.05  # ties may change places
    assert same.any(axis=1).all()
    assert np.abs(embeddings - found[1][same.argmax(axis=1)]).max() < 1e-3 * np.abs(embeddings).max() + 1e-4


def test_the_papers_trackers_are_in_the_catalog_with_its_figures() -> None:
    catalog = load_edge_catalog()
    table = {
        "bytetrack_yolox_x": (378.02, 0.3959),
        "sort_r50_fpn": (157.93, 0.1448),
        "qdtrack_r50_fpn": (216.95, 0.1416),
    }
    for name, (memory_mb, tflop) in table.items():
        variant = catalog[name]
        assert (variant.memory_mb, variant.tflop, variant.service) == (memory_mb, tflop, "tracking")
        assert variant.accuracy.source == "published"


def test_an_export_writes_an_entry_that_says_the_weights_are_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(yolox.SIZES, "yolox_x", yolox.SIZES["yolox_nano"])
    variant = export_edge("bytetrack_yolox_x", tmp_path, weights="random")
    assert (variant.weights, variant.tracker, variant.accuracy.value) == ("random", "bytetrack", None)
    assert "RANDOM" in variant.description
    assert load_edge_catalog([tmp_path])["bytetrack_yolox_x"].path == str(
        (tmp_path / "bytetrack_yolox_x" / "1" / "model.onnx").resolve()
    )
