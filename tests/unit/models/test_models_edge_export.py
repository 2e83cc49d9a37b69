"""Exported detectors: box for box what torch gives, served by their own entries, honest about their weights."""

import copy
import functools
import hashlib
import importlib.util
import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner

MISSING = [n for n in ("torch", "torchvision", "onnx", "onnxruntime") if importlib.util.find_spec(n) is None]
if MISSING:
    pytest.skip(f"needs {', '.join(MISSING)}: see the [train] extra", allow_module_level=True)

import torch  # noqa: E402 - after the skip

from models import edge_export, edge_weights  # noqa: E402
from models.architectures import faster_rcnn  # noqa: E402
from models.architectures.c4_head import C4Regions  # noqa: E402
from models.architectures.faster_rcnn import Architecture, OneImage, build, rough_noise, settle  # noqa: E402
from models.architectures.half_precision import folded, in_half  # noqa: E402
from models.catalog import VariantError  # noqa: E402
from models.detection import open_detector  # noqa: E402
from models.edge_catalog import load_edge_catalog  # noqa: E402
from models.edge_export import agreement, compare, export_edge, write_detector  # noqa: E402

FPN = Architecture(blocks=(1, 1, 1, 1), pyramid=16, hidden=32)
C4 = Architecture(blocks=(1, 1, 1, 1), head="c4", early_stride=True)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty proposals in three parts, the last of one."""
    monkeypatch.setattr(C4Regions, "PART", 10)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads that wait for each other are many times slower where others work, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published names, for networks of little width."""
    for name, architecture in faster_rcnn.ARCHITECTURES.items():
        monkeypatch.setitem(faster_rcnn.ARCHITECTURES, name, C4 if architecture.head == "c4" else FPN)


@functools.cache
def _settled(architecture: Architecture) -> Any:
    torch.manual_seed(0)
    network = build(architecture, proposals=60 if architecture is FPN else 20)
    settle(network)
    return network


def settled(architecture: Architecture) -> Any:
    """A network of its own for each test, drawn once."""
    return copy.deepcopy(_settled(architecture))


@pytest.mark.parametrize("architecture", [FPN, C4], ids=["fpn", "c4"])
def test_the_file_equals_torch_at_every_size(tmp_path: Path, architecture: Architecture) -> None:
    """Boxes in the same order, and their values; sizes that no multiple of 32 meets, and some with one pixel."""
    import onnxruntime

    served = OneImage(settled(architecture))
    write_detector(served, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    seen = 0
    for height, width in ((96, 128), (161, 97), (40, 300), (1, 90), (33, 1)):
        image = rough_noise(max(height, 16), max(width, 16), torch.Generator().manual_seed(height))
        image = image[:, :, :height, :width].contiguous()
        with torch.no_grad():
            boxes, scores, classes = (value.numpy() for value in served(image))
        found = session.run(["boxes", "scores", "classes"], {"image": image.numpy()})
        np.testing.assert_allclose(found[0], boxes, atol=0.02)
        np.testing.assert_allclose(found[1], scores, atol=1e-3)
        np.testing.assert_array_equal(found[2], classes)
        seen += len(boxes)
    assert seen > 40


@pytest.mark.parametrize("architecture", [FPN, pytest.param(C4, marks=pytest.mark.slow)], ids=["fpn", "c4"])
def test_a_network_that_proposes_or_finds_nothing_gives_nothing(tmp_path: Path, architecture: Architecture) -> None:
    import onnxruntime

    image = rough_noise(64, 96, torch.Generator().manual_seed(0))
    for case in ("no boxes", "no proposals"):
        network = settled(architecture)
        if case == "no boxes":
            network.roi_heads.box_predictor.cls_score.bias.data[0] = 1e4  # all background
        served = OneImage(network)
        write_detector(served, tmp_path / "m.onnx", example=(64, 96))
        if case == "no proposals":
            image = 1e12 * image  # every box moved out of the image, as none was when the file was made
            proposed: list[int] = []
            network.rpn.register_forward_hook(lambda module, given, found, n=proposed: n.append(len(found[0][0])))
        session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
        with torch.no_grad():
            assert [len(value) for value in served(image)] == [0, 0, 0]
        if case == "no proposals":
            assert proposed == [0]
        assert [len(value) for value in session.run(None, {"image": image.numpy()})] == [0, 0, 0]


@pytest.mark.usefixtures("narrow")
def test_an_export_is_served_by_its_own_entry(tmp_path: Path) -> None:
    steps: list[str] = []
    name = "faster_rcnn_r101_fpn"
    variant = export_edge(name, tmp_path, weights="random", on_step=steps.append)
    assert steps == [
        "building the network",
        "translating it",
        "comparing the file with the network",
        "writing its entry",
    ]
    assert (variant.weights, variant.accuracy.value, variant.accuracy.source) == ("random", None, "none")
    assert "RANDOM" in variant.description
    built_in = load_edge_catalog()[name]
    assert (variant.labels, variant.mean, variant.tflop) == (built_in.labels, built_in.mean, built_in.tflop)
    assert load_edge_catalog([tmp_path])[name] == variant
    assert Path(variant.path) == tmp_path / name / "1" / "model.onnx"
    text = (tmp_path / "edge" / f"{name}.toml").read_text()
    assert "weights: random" in text
    detector = open_detector(variant)
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    found = detector.detect(np.kron(image, np.ones((8, 8, 1), dtype=np.uint8)))
    assert len(found.scores) > 0
    assert found.boxes[:, 2].max() <= 320
    assert found.boxes[:, 3].max() <= 240
    assert (np.diff(found.scores) <= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["faster_rcnn_r50_fpn", "faster_rcnn_r101_fpn", "faster_rcnn_x101_64x4d_fpn"])
def test_the_papers_networks_export_at_their_full_width(tmp_path: Path, name: str) -> None:
    """Half a minute each; C4 is left out, whose last stage takes minutes in torch."""
    variant = export_edge(name, tmp_path, weights="random", precision="float32")
    found = re.search(r"(\d+) of (\d+) boxes agree", (tmp_path / "edge" / f"{name}.toml").read_text())
    assert found is not None
    assert found[1] == found[2]
    assert int(found[1]) > 100
    assert Path(variant.path).stat().st_size / 2**20 == pytest.approx(variant.memory_mb, rel=0.01)


@pytest.mark.usefixtures("narrow")
def test_the_command_exports_detectors(tmp_path: Path) -> None:
    from tidegate.models_commands import app

    runner = CliRunner()
    asked = ["export", "faster_rcnn_r101_fpn", "--weights", "random", "--json", "-o", str(tmp_path)]
    done = runner.invoke(app, asked)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["available"], said["accuracy"], said["service"]) == (True, None, "detection")
    listed = json.loads(runner.invoke(app, ["list", "--json", "-c", str(tmp_path)]).stdout)["variants"]
    rows = {row["name"]: row for row in listed}
    assert rows["faster_rcnn_r101_fpn"]["file"] == said["path"]
    assert rows["faster_rcnn_x101_64x4d_fpn"]["available"] is False
    for wrong, remedy in (
        (["--runtime", "torch"], "detectors run in onnxruntime"),
        (["--weights", "timm"], "timm has no detectors"),
    ):
        failed = runner.invoke(app, ["export", "faster_rcnn_r101_fpn", *wrong, "-o", str(tmp_path)])
        assert failed.exit_code == 2
        assert remedy in failed.stderr
    unknown = runner.invoke(app, ["export", "yolo"])
    assert unknown.exit_code == 2
    assert "pnasnet5large, " in unknown.stderr
    assert "faster_rcnn_r50_c4" in unknown.stderr


@pytest.mark.usefixtures("narrow")
def test_the_seed_draws_the_weights() -> None:
    def weight(seed: int) -> torch.Tensor:
        built = edge_weights.build_faster_rcnn("faster_rcnn_r50_fpn", "random", seed)
        return built.network.roi_heads.box_head.fc7.weight  # type: ignore[no-any-return]

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))


@pytest.mark.usefixtures("narrow")
def test_a_file_that_differs_from_torch_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(served: Any, file: Path, **given: Any) -> None:
        write_detector(OneImage(settled(FPN)), file)
        served.network.backbone.body.conv1.weight.data.mul_(-1)

    monkeypatch.setattr(edge_export, "write_detector", other)
    with pytest.raises(VariantError, match=r"boxes agree with torch: not written"):
        export_edge("faster_rcnn_r101_fpn", tmp_path, weights="random")
    assert not list(tmp_path.rglob("*.onnx"))
    assert not list(tmp_path.rglob("*.toml"))


def test_half_precision_halves_the_file_and_shows_the_same(tmp_path: Path) -> None:
    network = settled(FPN)
    whole, half = tmp_path / "whole.onnx", tmp_path / "half.onnx"
    write_detector(OneImage(network), whole)
    write_detector(OneImage(in_half(network)), half)
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    found = compare(OneImage(network), half, overlap=0.5, score=0.2)
    assert found.compared > 10
    assert found.share > 0.6
    assert network.backbone.body.conv1.weight.dtype == torch.float32


def test_noise_is_as_loud_as_a_photograph_becomes_for_the_network() -> None:
    """A photograph's levels spread by 58: by 1 for a network that divides by that, by 58 for one that divides by 1."""
    for name, one in load_edge_catalog().items():
        if name in edge_export.BUILDERS:
            photograph = np.random.default_rng(0).normal(100, 58, (4000, 3))
            fitted = (photograph - one.mean) / one.std
            assert edge_weights.input_spread(one) == pytest.approx(fitted.std(), rel=0.05), name


def test_folding_normalisations_changes_nothing_else() -> None:
    body = settled(FPN).backbone
    image = rough_noise(64, 64, torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = body(image)
        after = folded(body)(image)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in body.modules())
    for name, value in before.items():
        assert torch.allclose(after[name], value, atol=1e-3, rtol=1e-3)


def outputs(boxes: Any, scores: Any, classes: Any) -> tuple[npt.NDArray[Any], ...]:
    return np.array(boxes, dtype=np.float32), np.array(scores, dtype=np.float32), np.array(classes)


def test_agreement_counts_what_has_its_like() -> None:
    boxes = [[0, 0, 10, 10], [20, 20, 40, 40], [50, 0, 60, 10], [70, 0, 80, 10]]
    expected = outputs(boxes, [0.9, 0.7, 0.5, 0.1], [0, 1, 0, 0])  # the last one stands at the threshold: not asked
    assert agreement(expected, expected) == edge_export.Agreement(3, 3)
    shuffled = outputs(boxes[::-1], [0.1, 0.5, 0.7, 0.9], [0, 0, 1, 0])
    assert agreement(expected, shuffled) == edge_export.Agreement(3, 3)
    assert agreement(expected, outputs(boxes, [0.9, 0.7, 0.5, 0.1], [0, 0, 0, 0])).agreeing == 2
    assert agreement(expected, outputs(boxes, [0.9, 0.6, 0.5, 0.1], [0, 1, 0, 0])).agreeing == 2
    moved = [[1, 0, 11, 10], *boxes[1:]]  # IoU 9 / 11
    assert agreement(expected, outputs(moved, [0.9, 0.7, 0.5, 0.1], [0, 1, 0, 0])).agreeing == 2
    assert agreement(expected, outputs(moved, [0.9, 0.7, 0.5, 0.1], [0, 1, 0, 0]), overlap=0.8).agreeing == 3
    none = outputs(np.zeros((0, 4)), [], [])
    assert agreement(expected, none) == edge_export.Agreement(3, 0)
    assert agreement(none, expected).compared == 0
    tied = outputs(boxes, [0.9, 0.9, 0.5, 0.1], [0, 1, 0, 0])
    assert agreement(tied, tied) == edge_export.Agreement(1, 1)


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("yolo", {}, "choose one of faster_rcnn_r50_fpn"),
        ("faster_rcnn_r50_fpn", {"weights": "/no/such.pth"}, "cannot be read as plain weights"),
        ("faster_rcnn_r101_fpn", {"weights": "torchvision"}, "faster_rcnn_r101_fpn_1x_coco_….pth, or random"),
        ("faster_rcnn_r50_fpn", {"weights": "random", "precision": "int8"}, "choose float32 or float16"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, asked: dict[str, str], said: str) -> None:
    with pytest.raises(VariantError, match=said):
        export_edge(name, tmp_path, **asked)  # type: ignore[arg-type]


class Attack:
    """What a hostile checkpoint would do while it is read."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("attacked",)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Attack()}, "a.pth")
    Path("b.pth").write_bytes(pickle.dumps(Attack()))
    for file in ("a.pth", "b.pth"):
        with pytest.raises(VariantError, match="plain weights"):
            edge_weights.read_state(Path(file))
    assert not Path("attacked").exists()


def checkpoint(network: Any, folder: Path) -> Path:
    """The network's weights as mmdetection writes them; only the names that it needs."""
    theirs = {}
    for key, value in network.state_dict().items():
        for ours, name in (
            ("backbone.body.", "backbone."),
            ("backbone.fpn.inner_blocks.", "neck.lateral_convs."),
            ("backbone.fpn.layer_blocks.", "neck.fpn_convs."),
            ("rpn.head.conv.0.0.", "rpn_head.rpn_conv."),
            ("rpn.head.cls_logits.", "rpn_head.rpn_cls."),
            ("rpn.head.bbox_pred.", "rpn_head.rpn_reg."),
            ("roi_heads.box_head.fc6.", "roi_head.bbox_head.shared_fcs.0."),
            ("roi_heads.box_head.fc7.", "roi_head.bbox_head.shared_fcs.1."),
            ("roi_heads.box_predictor.cls_score.", "roi_head.bbox_head.fc_cls."),
            ("roi_heads.box_predictor.bbox_pred.", "roi_head.bbox_head.fc_reg."),
        ):
            if key.startswith(ours):
                name += key[len(ours) :].replace(".0.", ".conv.") if "neck" in name else key[len(ours) :]
                if "fc_cls" in name:
                    value = torch.cat([value[1:], value[:1]])
                theirs[name] = value[4:].clone() if "fc_reg" in name else value
    file = folder / "weights.pth"
    torch.save({"meta": {"CLASSES": ("person",)}, "state_dict": theirs, "optimizer": {}}, file)
    return file


@pytest.mark.usefixtures("narrow")
def test_a_public_file_brings_its_accuracy_and_another_does_not(tmp_path: Path) -> None:
    network = settled(FPN)
    file = checkpoint(network, tmp_path)
    digits = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    called = {
        f"faster_rcnn_r101_fpn_1x_coco_20200130-{digits}.pth": 0.394,
        "faster_rcnn_r101_fpn_1x_coco_20200130-00000000.pth": None,  # its content is not what its name says
        f"faster_rcnn_r101_fpn_2x_coco_20200130-{digits}.pth": None,  # another training
        "mine.pth": None,
    }
    for name, accuracy in called.items():
        (tmp_path / name).write_bytes(file.read_bytes())
        built = edge_weights.build_faster_rcnn("faster_rcnn_r101_fpn", str(tmp_path / name))
        assert built.accuracy.value == accuracy
        assert name in built.origin
    image = rough_noise(96, 96, torch.Generator().manual_seed(5))
    expected, found = OneImage(network), built.in_precision("float32")
    # The proposals' number differs: more of them change no box that is found with few.
    found.network.rpn._post_nms_top_n = network.rpn._post_nms_top_n
    with torch.no_grad():
        for mine, theirs in zip(found(image), expected(image), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-3)


@pytest.mark.usefixtures("narrow")
def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    file = checkpoint(settled(FPN), tmp_path)
    with pytest.raises(VariantError, match="is of another network"):
        edge_weights.build_faster_rcnn("faster_rcnn_r50_c4", str(file))
    torch.save({"model": {"encoder.weight": torch.zeros(2)}}, file)
    with pytest.raises(VariantError, match="holds encoder"):
        edge_weights.build_faster_rcnn("faster_rcnn_r50_fpn", str(file))


@pytest.mark.usefixtures("narrow")
def test_torchvisions_weights_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded: the place of the download is taken by weights of the same names, with 91 classes."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    torch.manual_seed(0)
    wide = build(Architecture(blocks=(1, 1, 1, 1), pyramid=16, hidden=32, classes=90))
    monkeypatch.setattr(FasterRCNN_ResNet50_FPN_Weights, "get_state_dict", lambda *_, **__: wide.state_dict())
    built = edge_weights.build_faster_rcnn("faster_rcnn_r50_fpn", "torchvision")
    assert built.accuracy.value == 0.37
    published = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["_metrics"]["COCO-val2017"]["box_map"]
    assert built.accuracy.value * 100 == published
    assert torch.equal(
        built.network.roi_heads.box_predictor.cls_score.weight[80],
        wide.roi_heads.box_predictor.cls_score.weight[90],
    )
    assert built.network.roi_heads.box_roi_pool.aligned is False

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(FasterRCNN_ResNet50_FPN_Weights, "get_state_dict", offline)
    with pytest.raises(VariantError, match=r"could not fetch them .*no route"):
        edge_weights.build_faster_rcnn("faster_rcnn_r50_fpn", "torchvision")
