"""Runtimes: emulation follows its law, a user's ONNX file runs as declared, every mismatch is refused."""

import importlib.metadata
import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from models.catalog import Accuracy, Emulation, Input, Preprocess, Variant, VariantError, read_variant
from models.onnx_runtime import OnnxRuntime
from models.preprocess import InvalidInput, Prepared
from models.runtime import Answer, EmulatedRuntime, batch_factor, open_runtime

PIXELS = np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def emulated(law: Emulation, accuracy: float = 0.75, classes: int = 5) -> EmulatedRuntime:
    labels = tuple(str(index) for index in range(classes))
    known = Accuracy(value=accuracy, source="modelled")
    variant = Variant(name="e", service="s", runtime="emulated", labels=labels, accuracy=known, emulated=law)
    runtime = open_runtime(variant, seed=11)
    assert isinstance(runtime, EmulatedRuntime)
    return runtime


@pytest.mark.parametrize("distribution", ["gamma", "lognormal"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_service_times_have_the_laws_mean_and_variation(distribution: Any, batch_size: int) -> None:
    runtime = emulated(Emulation(service_ms=20.0, cv=0.4, distribution=distribution, fixed_share=0.4))
    draws = np.array([runtime.duration_s(batch_size) for _ in range(20_000)])
    expected = 0.020 * (0.4 + 0.6 * batch_size)
    # 5 standard errors of a mean of 20,000 draws.
    assert draws.mean() == pytest.approx(expected, abs=5 * 0.4 * expected / math.sqrt(20_000))
    assert draws.std() / draws.mean() == pytest.approx(0.4, rel=0.05)
    assert (draws > 0).all()


def test_the_papers_batch_law() -> None:
    runtime = emulated(Emulation(service_ms=43.0, fixed_share=0.4))
    assert runtime.duration_s(1) == pytest.approx(0.043)
    assert runtime.duration_s(5) == pytest.approx(0.043 * 3.4)
    with pytest.raises(ValueError, match="at least 1"):
        batch_factor(0.4, 0)


def test_draws_repeat_by_seed_and_answers_do_not_disturb_times() -> None:
    law = Emulation(service_ms=10.0, cv=0.5, distribution="gamma")
    first, second = emulated(law), emulated(law)
    second.execute([Prepared(label=1)] * 100)
    assert [first.duration_s(1) for _ in range(5)] == [second.duration_s(1) for _ in range(5)]


def test_labelled_payloads_are_answered_right_with_the_accuracy() -> None:
    runtime = emulated(Emulation(service_ms=0.0), accuracy=0.75)
    prepared = runtime.prepare(b"tidegate-label:2\n" + bytes(1000), "image/png")
    named = np.array([answer.top_k(1)[0][0] for answer in runtime.execute([prepared] * 20_000)])
    assert (named == 2).mean() == pytest.approx(0.75, abs=0.015)
    wrong = np.bincount(named, minlength=5)[[0, 1, 3, 4]]
    assert wrong / wrong.sum() == pytest.approx(np.full(4, 0.25), abs=0.03)


def test_other_payloads_stand_for_class_0_and_bad_labels_are_refused() -> None:
    runtime = emulated(Emulation(service_ms=0.0), accuracy=1.0)
    assert runtime.execute([runtime.prepare(b"\xff\xd8\xff anything", "image/jpeg")])[0].top_k(1) == [(0, 1.0)]
    for body in (b"", b"tidegate-label:5\n", b"tidegate-label:-1\n", b"tidegate-label:x\n"):
        with pytest.raises(InvalidInput):
            runtime.prepare(body, "image/jpeg")


def test_top_k_is_sorted_with_ties_by_index_and_never_longer_than_the_classes() -> None:
    scores = np.array([0.1, 0.3, 0.1, 0.3, 0.2], dtype=np.float32)
    answer = Answer(scores=scores)
    assert [index for index, _ in answer.top_k(3)] == [1, 3, 4]
    assert len(answer.top_k(9)) == 5
    random = np.random.default_rng(0).random(1000).astype(np.float32)
    assert [i for i, _ in Answer(scores=random).top_k(5)] == np.argsort(-random)[:5].tolist()


def save_linear(folder: Path, weights: npt.NDArray[np.float32], batch: str | int = "batch") -> None:
    """An ONNX file `mine.onnx`: logits = flatten(image) @ weights, made by hand."""
    height, width = 4, 5
    classes = weights.shape[1]
    nodes = [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["out"])]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, height, width])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, classes])
    graph = helper.make_graph(nodes, "linear", [image], [out], [numpy_helper.from_array(weights, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "mine.onnx")


ENTRY = """
name = "mine"
service = "pets"
runtime = "onnxruntime"
path = "mine.onnx"
labels = ["cat", "dog", "cow"]
input = {name = "image", shape = [3, 4, 5]}
[preprocess]
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
interpolation = "bicubic"
"""


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("batch", ["batch", 1])
def test_a_users_own_model_runs_from_one_entry(tmp_path: Path, batch: str | int) -> None:
    weights = np.random.default_rng(1).normal(size=(60, 3)).astype(np.float32)
    save_linear(tmp_path, weights, batch)
    (tmp_path / "mine.toml").write_text(ENTRY)
    runtime = open_runtime(read_variant(tmp_path / "mine.toml"))
    runtime.warm_up()
    prepared = runtime.prepare(png(), "image/png")
    answers = runtime.execute([prepared, prepared, prepared])
    small = np.asarray(Image.fromarray(PIXELS).resize((5, 4), Image.Resampling.BICUBIC)) / 255
    image = (small - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    logits = image.transpose(2, 0, 1).reshape(-1) @ weights
    expected = np.exp(logits) / np.exp(logits).sum()
    assert len(answers) == 3
    for answer in answers:
        assert answer.scores == pytest.approx(expected, abs=1e-5)
        assert answer.scores.dtype == np.float32
    runtime.close()
    runtime.close()


def test_probabilities_are_passed_on_unchanged(tmp_path: Path) -> None:
    save_linear(tmp_path, np.full((60, 3), 0.25, dtype=np.float32))
    (tmp_path / "mine.toml").write_text('output = "probabilities"\n' + ENTRY)
    runtime = open_runtime(read_variant(tmp_path / "mine.toml"))
    ones = Prepared(tensor=np.ones((3, 4, 5), dtype=np.float32))
    assert runtime.execute([ones])[0].scores.tolist() == [15.0, 15.0, 15.0]
    with pytest.raises(ValueError, match="no tensor"):
        runtime.execute([Prepared(label=1)])


@pytest.mark.parametrize("output", ["logits", "probabilities"])
@pytest.mark.filterwarnings("error")
def test_scores_that_are_no_numbers_are_a_failure_of_the_model(tmp_path: Path, output: str) -> None:
    save_linear(tmp_path, np.full((60, 3), 3e38, dtype=np.float32))
    (tmp_path / "mine.toml").write_text(f'output = "{output}"\n' + ENTRY)
    runtime = open_runtime(read_variant(tmp_path / "mine.toml"))
    with pytest.raises(ValueError, match="mine gave scores that are not finite"):
        runtime.execute([Prepared(tensor=np.full((3, 4, 5), 3e38, dtype=np.float32))])


@pytest.mark.parametrize(
    ("old", "new", "key", "remedy"),
    [
        ('name = "image"', 'name = "images"', "input.name", "image"),
        ("[3, 4, 5]", "[3, 4, 6]", "input.shape", "batch first"),
        ("[3, 4, 5]", '[3, 4, 5], dtype = "float16"', "input.dtype", "tensor(float)"),
        ('"cow"]', '"cow", "hen"]', "labels", "3 classes"),
        ("mine.onnx", "absent.onnx", "path", "no such file"),
        ("mine.onnx", "mine.toml", "path", "cannot be loaded"),
    ],
)
def test_an_entry_that_does_not_fit_its_file_is_refused(
    tmp_path: Path, old: str, new: str, key: str, remedy: str
) -> None:
    save_linear(tmp_path, np.zeros((60, 3), dtype=np.float32))
    (tmp_path / "mine.toml").write_text(ENTRY.replace(old, new))
    with pytest.raises(VariantError) as caught:
        open_runtime(read_variant(tmp_path / "mine.toml"))
    assert caught.value.key == key
    assert remedy in caught.value.remedy


def test_a_file_fixed_to_another_batch_is_refused(tmp_path: Path) -> None:
    save_linear(tmp_path, np.zeros((60, 3), dtype=np.float32), batch=4)
    (tmp_path / "mine.toml").write_text(ENTRY)
    with pytest.raises(VariantError, match="free batch axis"):
        open_runtime(read_variant(tmp_path / "mine.toml"))


def linear_variant(tmp_path: Path) -> Variant:
    save_linear(tmp_path, np.zeros((60, 3), dtype=np.float32))
    return Variant(
        name="mine",
        service="s",
        runtime="onnxruntime",
        path=str(tmp_path / "mine.onnx"),
        labels=("a", "b", "c"),
        input=Input(name="image", shape=(3, 4, 5)),
        preprocess=Preprocess(),
    )


def test_a_missing_device_is_refused_with_its_remedy(tmp_path: Path) -> None:
    variant = linear_variant(tmp_path)
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(VariantError, match='device = "cpu"'):
            open_runtime(variant, device="cuda")
    with pytest.raises(VariantError, match="choose one of"):
        open_runtime(variant, device="tpu")


def test_a_provider_that_fell_back_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU wheel lists CUDA as available, and still runs on the CPU where its libraries are missing."""
    variant = linear_variant(tmp_path)
    import onnxruntime

    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers: real(path, options, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(VariantError, match="fell back"):
        OnnxRuntime(variant, device="cuda")


def test_both_wheels_together_and_none_at_all_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = linear_variant(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "1.0")
        with pytest.raises(VariantError, match="uninstall both"):
            open_runtime(variant)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(VariantError, match="pip install"):
        open_runtime(variant)
