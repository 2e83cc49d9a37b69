"""Detectors and trackers through one door, with a network that finds the brightest rows and columns."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

for _package in ("onnx", "onnxruntime", "trackers"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"needs {_package}", allow_module_level=True)

from onnx import TensorProto, helper, numpy_helper, save  # noqa: E402 - after the skip

from models.catalog import VariantError  # noqa: E402
from models.detection import Detections  # noqa: E402
from models.edge_catalog import EdgeVariant, edge_variant_from  # noqa: E402
from models.edge_runtime import open_edge_runtime  # noqa: E402
from models.tracking import Tracks  # noqa: E402

SIDE = 64
SQUARE = 16


def write_finder(file: Path) -> Path:
    """A graph that reports a square of 16 pixels around the brightest column and row of the red values, score 0.95."""
    values: dict[str, npt.NDArray[Any]] = {
        "zero": np.array([0], dtype=np.int64),
        "reach": np.array([-8, -8, 8, 8], dtype=np.float32),
        "given": np.array([0.95], dtype=np.float32),
        "looks": np.array([[3.0, 0.0]], dtype=np.float32),
    }
    window = np.ones((1, 1, SQUARE + 1, SQUARE + 1), dtype=np.float32)
    nodes = [
        helper.make_node("Gather", ["image", "zero"], ["red"], axis=1),
        helper.make_node("Conv", ["red", "window"], ["sums"], pads=[8, 8, 8, 8]),
        helper.make_node("ReduceMax", ["sums"], ["by_column"], axes=[0, 1, 2], keepdims=0),
        helper.make_node("ReduceMax", ["sums"], ["by_row"], axes=[0, 1, 3], keepdims=0),
        helper.make_node("ArgMax", ["by_column"], ["x"], axis=0),
        helper.make_node("ArgMax", ["by_row"], ["y"], axis=0),
        helper.make_node("Concat", ["x", "y", "x", "y"], ["centre"], axis=0),
        helper.make_node("Cast", ["centre"], ["place"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["place", "reach"], ["corners"]),
        helper.make_node("Unsqueeze", ["corners", "zero"], ["boxes"]),
        helper.make_node("Identity", ["given"], ["scores"]),
        helper.make_node("Identity", ["zero"], ["classes"]),
        helper.make_node("Identity", ["looks"], ["embeddings"]),
    ]
    outputs = [
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, 4]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1]),
        helper.make_tensor_value_info("classes", TensorProto.INT64, [1]),
        helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, [1, 2]),
    ]
    graph = helper.make_graph(
        nodes,
        "finder",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, "h", "w"])],
        outputs,
        [numpy_helper.from_array(value, name) for name, value in (values | {"window": window}).items()],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), file)
    return file


def variant(path: Path, **changes: Any) -> EdgeVariant:
    values = {
        "name": "finder",
        "service": "detection",
        "path": str(path),
        "labels": ["square"],
        "short_side": SIDE,
        "long_side": 2 * SIDE,
        "memory_mb": 1.0,
        "tflop": 0.0,
        "weights": "random",
    }
    return edge_variant_from(values | changes, "test", Path("/"))


def square(left: int, top: int) -> npt.NDArray[np.uint8]:
    frame = np.zeros((SIDE, 2 * SIDE, 3), dtype=np.uint8)
    frame[top : top + SQUARE, left : left + SQUARE] = 255
    return frame


@pytest.fixture(scope="module")
def finder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_finder(tmp_path_factory.mktemp("finder") / "finder.onnx")


def test_a_detector_answers_one_image(finder: Path) -> None:
    runtime = open_edge_runtime(variant(finder))
    found = runtime.run([square(30, 20)])
    assert isinstance(found, Detections)
    assert np.abs(found.boxes[0] - [30, 20, 46, 36]).max() <= 1.5
    with pytest.raises(ValueError, match="one image"):
        runtime.run([square(30, 20)] * 2)
    with pytest.raises(ValueError, match="one image"):
        runtime.run([])


@pytest.mark.parametrize("kind", ["sort", "bytetrack", "qdtrack"])
def test_a_tracker_follows_the_square_and_starts_anew_with_each_clip(finder: Path, kind: str) -> None:
    runtime = open_edge_runtime(variant(finder, service="tracking", tracker=kind))
    runtime.warm_up()
    frames = [square(20 + 3 * step, 10 + step) for step in range(8)]
    for _ in range(2):
        tracks = runtime.run(frames)
        assert isinstance(tracks, Tracks)
        assert tracks.rows[:, 0].tolist() == list(range(1, 9))
        assert len(set(tracks.rows[:, 1])) == 1
        expected = [[20 + 3 * step, 10 + step, SQUARE, SQUARE] for step in range(8)]
        assert np.abs(tracks.rows[:, 2:6] - expected).max() <= 1.5
        assert tracks.classes.tolist() == [0] * 8
    assert runtime.run([]).rows.shape == (0, 7)  # type: ignore[union-attr]
    runtime.close()
    with pytest.raises(ValueError, match="closed"):
        runtime.run(frames)


def test_smaller_frames_give_boxes_in_their_own_pixels(finder: Path) -> None:
    runtime = open_edge_runtime(variant(finder))
    found = runtime.run([square(30, 20)[::2, ::2]])
    assert isinstance(found, Detections)
    assert np.abs(found.boxes[0] - [15, 10, 23, 18]).max() <= 1.5


def test_a_missing_package_is_named_with_its_remedy(finder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(VariantError, match="edge"):
        open_edge_runtime(variant(finder, service="tracking", tracker="sort"))
    open_edge_runtime(variant(finder, service="tracking", tracker="qdtrack"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VariantError, match="no such file"):
        open_edge_runtime(variant(tmp_path / "none.onnx", service="tracking", tracker="qdtrack"))


def test_serving_imports_neither_torch_nor_opencv() -> None:
    program = (
        "import models.edge_runtime, sys; assert not {'torch', 'cv2', 'trackers', 'av', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
