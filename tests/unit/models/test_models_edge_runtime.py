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

from models import detection  # noqa: E402 - after the skip
from models.catalog import VariantError  # noqa: E402
from models.detection import Detections  # noqa: E402
from models.edge_catalog import EdgeVariant, edge_variant_from  # noqa: E402
from models.edge_runtime import open_edge_runtime  # noqa: E402
from models.onnx_runtime import open_session  # noqa: E402
from models.tracking import Tracks  # noqa: E402
from tests.fakes.finder_network import SQUARE, write_finder  # noqa: E402

SIDE = 64


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


@pytest.mark.parametrize("kind", ["", "qdtrack"])
def test_a_variant_runs_on_as_many_threads_as_it_is_given(
    finder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    real = open_session

    def noted(name: str, path: str, device: str, threads: int, *rest: Any) -> Any:
        asked.append((device, threads))
        return real(name, path, device, threads, *rest)

    monkeypatch.setattr(detection, "open_session", noted)
    changes = {"service": "tracking", "tracker": kind} if kind else {}
    open_edge_runtime(variant(finder, **changes), "cpu", 2).close()
    assert asked == [("cpu", 2)]
