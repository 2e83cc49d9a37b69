"""Detectors over onnxruntime, held against a file whose answers are known: a graph that reports its own input."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

for _package in ("onnx", "onnxruntime"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"needs {_package}", allow_module_level=True)

from onnx import TensorProto, helper, numpy_helper, save  # noqa: E402 - after the skip

from models.catalog import VariantError  # noqa: E402
from models.detection import Detector, fit, fitted_size, open_detector  # noqa: E402
from models.edge_catalog import EdgeVariant, edge_variant_from  # noqa: E402

SHARES = np.array([[0.25, 0.5, 0.5, 1.0], [0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.5, 1.5], [0.9, 0.9, 0.9, 0.95]])
SCORES = np.array([0.3, 0.9, 0.3, 0.6])
CLASSES = np.array([1, 0, 2, 0])


def variant(path: Path | str = "", **changes: Any) -> EdgeVariant:
    values = {
        "name": "shares",
        "service": "detection",
        "path": str(path),
        "labels": ["a", "b", "c"],
        "short_side": 40,
        "long_side": 100,
        "memory_mb": 1.0,
        "tflop": 0.0,
        "weights": "random",
    }
    return edge_variant_from(values | changes, "test", Path("/"))


def write_graph(
    file: Path,
    *,
    shares: npt.NDArray[Any] = SHARES,
    scores: npt.NDArray[Any] = SCORES,
    classes: npt.NDArray[Any] = CLASSES,
    names: tuple[str, ...] = ("image", "boxes", "scores", "classes", "rows"),
) -> Path:
    """Boxes at fixed shares of the input's width and height; `rows` numbers them, as an embedding would."""
    image, boxes, score, kind, rows = names
    constants: dict[str, npt.NDArray[Any]] = {
        "shares": shares.astype(np.float32),
        "s": scores.astype(np.float32),
        "c": classes.astype(np.int64),
        "order": np.array([3, 2, 3, 2]),
        "r": np.arange(len(scores), dtype=np.float32).reshape(-1, 1),
    }
    nodes = [
        helper.make_node("Shape", [image], ["shape"]),
        helper.make_node("Gather", ["shape", "order"], ["sizes"]),
        helper.make_node("Cast", ["sizes"], ["float_sizes"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["shares", "float_sizes"], [boxes]),
        helper.make_node("Identity", ["s"], [score]),
        helper.make_node("Identity", ["c"], [kind]),
        helper.make_node("Identity", ["r"], [rows]),
    ]
    graph = helper.make_graph(
        nodes,
        "shares",
        [helper.make_tensor_value_info(image, TensorProto.FLOAT, [1, 3, "h", "w"])],
        [
            helper.make_tensor_value_info(boxes, TensorProto.FLOAT, ["n", 4]),
            helper.make_tensor_value_info(score, TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info(kind, TensorProto.INT64, ["n"]),
            helper.make_tensor_value_info(rows, TensorProto.FLOAT, ["n", 1]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), file)
    return file


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_graph(tmp_path_factory.mktemp("graph") / "model.onnx")


def noise(height: int, width: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), [(80, 160), (33, 57), (1, 1), (1, 300), (1000, 2)])
def test_boxes_come_back_in_the_images_pixels(graph: Path, height: int, width: int) -> None:
    found = open_detector(variant(graph)).detect(noise(height, width))
    # The box without area is left out, the one that reaches outside is cut, the best stands first.
    expected = np.minimum(SHARES[[1, 0, 2]], 1.0) * np.array([width, height] * 2)
    np.testing.assert_allclose(found.boxes, expected, atol=0.01)
    np.testing.assert_allclose(found.scores, [0.9, 0.3, 0.3])
    assert found.classes.tolist() == [0, 1, 2]
    assert [str(values.dtype) for values in (found.boxes, found.scores, found.classes)] == [
        "float32",
        "float32",
        "int64",
    ]


def test_padding_moves_no_box(tmp_path: Path) -> None:
    """Boxes count in the padded input's pixels: half of 64 is 32, of which the image's scale is taken off."""
    file = write_graph(tmp_path / "m.onnx")
    found = open_detector(variant(file, pad_to=64)).detect(noise(80, 100))  # fitted to 40 x 50, padded to 64 x 64
    np.testing.assert_allclose(found.boxes[0], [0, 0, 64.0, 64.0], atol=0.01)


def test_further_outputs_keep_their_rows(graph: Path) -> None:
    found = open_detector(variant(graph)).outputs(noise(50, 50))
    assert found["rows"][:, 0].tolist() == [1, 0, 2]
    assert list(found) == ["boxes", "scores", "classes", "rows"]


def test_boxes_below_the_threshold_are_left_out(graph: Path) -> None:
    assert open_detector(variant(graph, score_threshold=0.5)).detect(noise(50, 50)).scores.tolist() == [
        pytest.approx(0.9)
    ]


def test_nothing_found_is_an_empty_answer(tmp_path: Path) -> None:
    file = write_graph(tmp_path / "m.onnx", shares=SHARES[:0], scores=SCORES[:0], classes=CLASSES[:0])
    found = open_detector(variant(file)).detect(noise(9, 9))
    assert (found.boxes.shape, found.scores.shape, found.classes.shape) == ((0, 4), (0,), (0,))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(480, 640, (800, 1067)), (1080, 1920, (750, 1333)), (100, 100, (800, 800)), (1, 5000, (1, 1333))],
)
def test_the_size_keeps_the_ratio_within_both_sides(height: int, width: int, expected: tuple[int, int]) -> None:
    assert fitted_size(height, width, 800, 1333) == expected
    assert fitted_size(width, height, 800, 1333) == expected[::-1]


def test_levels_colour_and_padding_are_as_the_entry_says() -> None:
    image = noise(40, 40)
    mean, std = [10.0, 20.0, 30.0], [1.0, 2.0, 4.0]
    bgr = variant(mean=mean, std=std, colour="bgr", pad_to=32, pad_value=114.0)
    tensor, x_scale, y_scale = fit(image, bgr)
    assert tensor.shape == (1, 3, 64, 64)
    assert (x_scale, y_scale) == (1.0, 1.0)
    expected = (image[:, :, ::-1].astype(np.float64) - mean) / std
    np.testing.assert_allclose(tensor[0, :, :40, :40], expected.transpose(2, 0, 1), atol=1e-3)
    for outside in (tensor[0, :, 40:], tensor[0, :, :, 40:]):
        fill = np.broadcast_to(((114.0 - np.array(mean)) / std).reshape(3, 1, 1), outside.shape)
        np.testing.assert_allclose(outside, fill)
    np.testing.assert_allclose(fit(image, variant()).tensor[0, 0], image[:, :, 0], atol=1e-3)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((5, 5), np.uint8),
        np.zeros((5, 5, 4), np.uint8),
        np.zeros((5, 5, 3), np.float32),
    ],
)
def test_what_is_no_image_is_refused(graph: Path, image: Any) -> None:
    with pytest.raises(ValueError, match="an image is uint8"):
        open_detector(variant(graph)).detect(image)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"scores": np.array([0.3, np.nan, 0.3, 0.6])}, "not finite"),
        ({"shares": np.full((4, 4), np.inf)}, "not finite"),
        ({"classes": np.array([0, 1, 2, 3])}, "names class 3, but its entry has 3 labels"),
    ],
)
def test_answers_without_meaning_are_refused(tmp_path: Path, broken: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        open_detector(variant(write_graph(tmp_path / "m.onnx", **broken))).detect(noise(9, 9))


def test_files_that_are_no_detectors_are_refused(tmp_path: Path) -> None:
    for names, said in (
        (("picture", "boxes", "scores", "classes", "rows"), "takes one input 'image'"),
        (("image", "bbox", "scores", "labels", "rows"), "lacks boxes, classes"),
    ):
        with pytest.raises(VariantError, match=said):
            open_detector(variant(write_graph(tmp_path / "m.onnx", names=names)))
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(VariantError, match="cannot be loaded"):
        open_detector(variant(tmp_path / "m.onnx"))
    with pytest.raises(VariantError, match="no such file"):
        open_detector(variant(tmp_path / "none.onnx"))
    with pytest.raises(VariantError, match="tidegate models export shares"):
        open_detector(variant())


def test_devices_that_are_not_there_are_refused(graph: Path) -> None:
    for device in ("tensorrt", "tpu", "cuda"):
        with pytest.raises(VariantError, match=f"device = '{device}'"):
            open_detector(variant(graph), device=device)


def test_a_closed_detector_says_so(graph: Path) -> None:
    detector: Detector = open_detector(variant(graph))
    detector.warm_up()
    detector.close()
    with pytest.raises(ValueError, match="closed"):
        detector.detect(noise(9, 9))


def test_serving_imports_no_torch() -> None:
    program = "import sys, models.detection, models.edge_catalog; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
