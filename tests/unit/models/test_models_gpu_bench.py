"""bench/gpu_runtimes.py: its arithmetic, what it would measure on a GPU, and (slow) a whole run on the processor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.catalog import Variant
from models.profiles import read_profiles

pytest.importorskip("torch", reason='needs torch: pip install -e ".[train]"')

from bench.gpu_runtimes import BATCH_SIZES, candidates, floor_s

ROOT = Path(__file__).parents[3]
RATES = {"float32_tflops": 10.0, "float16_tflops": 40.0, "memory_gb_per_s": 1000.0}


def test_the_floor_is_the_longer_of_computing_and_reading_the_weights() -> None:
    # 2 GFLOP at 10 TFLOP/s: 0.2 ms; 400 MB at 1000 GB/s: 0.4 ms, 0.2 ms in half precision.
    assert floor_s(2e9, 4e8, 1, "float32", RATES) == pytest.approx(0.4e-3)
    assert floor_s(2e9, 4e8, 5, "float32", RATES) == pytest.approx(1.0e-3)
    assert floor_s(2e9, 4e8, 1, "float16", RATES) == pytest.approx(0.2e-3)
    assert floor_s(2e9, 4e8, 8, "float16", RATES) == pytest.approx(0.4e-3)


def test_on_a_gpu_every_runtime_is_tried_in_both_precisions() -> None:
    one = Variant(name="v", service="s", runtime="onnxruntime", path="x", labels=("a",))
    found = {(label, variant.precision, where) for label, variant, where in candidates(one, one, "cuda")}
    assert found == {
        ("torch graphs float32", "float32", "cuda"),
        ("torch graphs float16", "float16", "cuda"),
        ("onnxruntime cuda float32", "float32", "cuda"),
        ("tensorrt float32", "float32", "tensorrt"),
        ("tensorrt float16", "float16", "tensorrt"),
    }


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bench/gpu_runtimes.py", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_run_on_the_processor(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--seconds", "0.05", "--at-least", "2", "--models", "efficientnet_b0"]
    done = run(*options, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["not_measured"] == []
    measured = {(row["runtime"], row["batch"]) for row in report["rows"]}
    names = ("torch", "onnxruntime", "torch eager float32")
    assert measured == {(name, batch) for name in names for batch in BATCH_SIZES}
    for row in report["rows"]:
        # On a busy machine the rates may be too low; on a quiet one the floor is a third of the best median.
        assert 0.0 < row["floor_ms"] < 1.5 * row["p50_ms"] <= 1.5 * row["p98_ms"]
    # timm's own figure: 0.39 G multiplications and additions, each pair counted as two operations here.
    assert report["models"]["efficientnet_b0"]["gflops"] == pytest.approx(2 * 0.39, rel=0.05)
    assert all(one["largest_probability_difference"] < 1e-4 for one in report["loaded"])
    profiles = read_profiles(tmp_path / "profiles.json")
    assert {times.batch_size for profile in profiles for times in profile.times} == set(BATCH_SIZES)
    table = (tmp_path / "gpu.md").read_text()
    assert table.count("| efficientnet_b0 |") == len(report["rows"])
    assert "nothing was left out" in table


def test_without_a_gpu_it_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = run("--models", "efficientnet_b0")
    assert done.returncode == 1
    assert "no GPU" in done.stderr
