"""What the runtimes ask of a GPU, seen by stand-ins that compute on the processor and record every call.

No GPU is needed, and none was ever used: this shows what is asked for, not that a GPU gives it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.catalog import Input, Variant, VariantError, kind_and_index
from models.onnx_runtime import OnnxRuntime, _providers
from models.preprocess import Prepared
from models.runtime import GPU_BATCHES, filled, gpu_batches

RNG = np.random.default_rng(4)
WEIGHTS = RNG.normal(size=(48, 3)).astype(np.float32)
IMAGES = RNG.normal(size=(20, 3, 4, 4)).astype(np.float32)


def variant(folder: Path, batch: str | int = "b", weights: Any = WEIGHTS) -> Variant:
    """logits = flatten(image) @ weights, as an ONNX file."""
    nodes = [helper.make_node("Flatten", ["input"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["out"])]
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 4, 4])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, 3])
    graph = helper.make_graph(nodes, "linear", [image], [out], [numpy_helper.from_array(weights, "w")])
    file = folder / "linear.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)
    shape = Input(shape=(3, 4, 4))
    return Variant(name="linear", service="s", runtime="onnxruntime", path=str(file), labels=tuple("abc"), input=shape)


def expected(images: Any) -> Any:
    powers = np.exp(images.reshape(len(images), -1).astype(np.float64) @ WEIGHTS)
    return powers / powers.sum(axis=1, keepdims=True)


def prepared(count: int) -> list[Prepared]:
    return [Prepared(tensor=image) for image in IMAGES[:count]]


class Gpu:
    """onnxruntime's classes on a machine with GPUs: forwards to the CPU provider, and writes down what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
        import onnxruntime

        self.calls: list[tuple[Any, ...]] = []
        real_session, real_value = onnxruntime.InferenceSession, onnxruntime.OrtValue.ortvalue_from_shape_and_type
        gpu = self

        def value(shape: Any, dtype: Any, device: str, index: int) -> Any:
            gpu.calls.append(("buffer", tuple(shape), device, index))
            return real_value(shape, dtype, "cpu", 0)

        class Binding:
            def __init__(self, binding: Any) -> None:
                self.binding = binding

            def bind_output(self, name: str, device: str, index: int) -> None:
                gpu.calls.append(("output", name, device, index))
                self.binding.bind_output(name, "cpu", 0)

            def __getattr__(self, name: str) -> Any:
                if name.startswith(("synchronize", "copy")):
                    gpu.calls.append((name,))
                return getattr(self.binding, name)

        class Session:
            def __init__(self, path: str, options: Any, providers: Any) -> None:
                gpu.calls.append(("session", providers))
                self.session = real_session(path, options, providers=["CPUExecutionProvider"])

            def get_providers(self) -> list[str]:
                return [provider, "CPUExecutionProvider"]

            def io_binding(self) -> Binding:
                return Binding(self.session.io_binding())

            def run_with_iobinding(self, binding: Binding) -> None:
                gpu.calls.append(("run",))
                self.session.run_with_iobinding(binding.binding)

            def run(self, *_: Any) -> None:
                raise AssertionError("on a GPU every run goes through bound buffers")

            def disable_fallback(self) -> None:
                gpu.calls.append(("no fallback",))

            def __getattr__(self, name: str) -> Any:
                return getattr(self.session, name)

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [provider])
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: self.calls.append(("preload",)))
        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
        monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", value)

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == name]


def test_batches_are_filled_or_split_to_the_sizes_that_were_warmed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(monkeypatch, "CUDAExecutionProvider")
    runtime = OnnxRuntime(variant(tmp_path), device="cuda:1")
    runtime.warm_up()
    assert [shape[0] for _, shape, *_ in gpu.named("buffer")] == list(GPU_BATCHES)
    assert {(device, index) for _, _, device, index in gpu.named("buffer") + gpu.named("output")} == {("cuda", 1)}
    made = len(gpu.named("buffer"))
    for count in (1, 2, 4, 7, 8, 9, 20):
        scores = np.stack([answer.scores for answer in runtime.execute(prepared(count))])
        assert scores == pytest.approx(expected(IMAGES[:count]), abs=1e-5)
    assert len(gpu.named("buffer")) == made  # nothing new is allocated, and no kernel searched, while serving


def test_copies_are_waited_for_and_fallbacks_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, "CUDAExecutionProvider")
    runtime = OnnxRuntime(variant(tmp_path), device="cuda")
    names = [call[0] for call in gpu.calls]
    assert names == ["preload", "session", "no fallback"]
    (first, second) = gpu.named("session")[0][1]
    assert first[0] == "CUDAExecutionProvider"
    assert first[1]["device_id"] == "0"
    assert second == "CPUExecutionProvider"
    runtime.execute(prepared(1))
    assert [call[0] for call in gpu.calls[-4:]] == [
        "synchronize_inputs",
        "run",
        "synchronize_outputs",
        "copy_outputs_to_cpu",
    ]


def test_a_file_for_one_image_is_never_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, "CUDAExecutionProvider")
    runtime = OnnxRuntime(variant(tmp_path, batch=1), device="cuda")
    runtime.warm_up()
    scores = np.stack([answer.scores for answer in runtime.execute(prepared(3))])
    assert scores == pytest.approx(expected(IMAGES[:3]), abs=1e-5)
    assert {shape[0] for _, shape, *_ in gpu.named("buffer")} == {1}


def test_tensorrt_that_runs_as_cuda_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What onnxruntime does where TensorRT's libraries are missing."""
    import onnxruntime

    monkeypatch.setenv("TIDEGATE_ENGINE_CACHE", str(tmp_path))
    Gpu(monkeypatch, "CUDAExecutionProvider")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    with pytest.raises(VariantError, match="fell back"):
        OnnxRuntime(variant(tmp_path), device="tensorrt")


def test_tensorrt_engines_cover_the_batches_and_belong_to_a_files_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEGATE_ENGINE_CACHE", str(tmp_path / "engines"))
    one = msgspec.structs.replace(variant(tmp_path), precision="float16")
    first, second, last = _providers(one, "tensorrt", 2)
    assert isinstance(first, tuple)
    name, options = first
    assert name == "TensorrtExecutionProvider"
    assert options["trt_fp16_enable"] == "1"
    assert options["trt_profile_min_shapes"] == "input:1x3x4x4"
    assert options["trt_profile_max_shapes"] == f"input:{GPU_BATCHES[-1]}x3x4x4"
    assert (second[0], last) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options["device_id"] == second[1]["device_id"] == "2"  # type: ignore[index]
    folder = options["trt_engine_cache_path"]
    assert Path(folder).is_dir()
    assert folder == _folder(one)
    variant(tmp_path, weights=WEIGHTS + 1)  # the same file name, other weights
    assert folder != _folder(one)


def _folder(one: Variant) -> str:
    first = _providers(one, "tensorrt")[0]
    assert isinstance(first, tuple)
    return first[1]["trt_engine_cache_path"]


@pytest.mark.parametrize("count", range(1, 21))
def test_filling_and_splitting(count: int) -> None:
    parts = gpu_batches(IMAGES[:count])
    assert np.array_equal(np.concatenate(parts), IMAGES[:count])
    for part in parts:
        whole = filled(part)
        assert len(whole) in GPU_BATCHES
        assert np.array_equal(whole[: len(part)], part)
        assert not whole[len(part) :].any()


@pytest.mark.parametrize(
    ("device", "found"), [("cpu", ("cpu", 0)), ("cuda", ("cuda", 0)), ("tensorrt:3", ("tensorrt", 3))]
)
def test_a_device_names_its_gpu(device: str, found: tuple[str, int]) -> None:
    assert kind_and_index(device) == found


def test_torch_records_a_graph_for_each_batch_size_and_replays_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch", reason='needs torch: pip install -e ".[train]"')
    from models import torch_runtime

    calls: list[tuple[Any, ...]] = []
    recorded: list[Any] = []  # the forward passes of the graph that is being recorded

    class Graph:
        arguments: Any
        output: Any

        def replay(self) -> None:
            calls.append(("replay", len(self.output)))
            with torch.inference_mode():
                self.output.copy_(forward(*self.arguments))

    @contextlib.contextmanager
    def record(graph: Any, capture_error_mode: str) -> Iterator[None]:
        recorded.clear()
        yield
        graph.arguments, graph.output = recorded[-1]
        calls.append(("record", len(graph.output), capture_error_mode))

    forward = torch_runtime._forward

    def remembered(*arguments: Any) -> Any:
        output = forward(*arguments)
        assert arguments[2].is_contiguous(memory_format=torch.channels_last)
        recorded.append((arguments, output))
        return output

    class Stream:
        def wait_stream(self, other: Any) -> None: ...

    class Event:
        def record(self) -> None: ...
        def synchronize(self) -> None:
            calls.append(("waited",))

    def current(device: str) -> contextlib.AbstractContextManager[None]:
        calls.append(("device", device))
        return contextlib.nullcontext()

    real_zeros = torch.zeros
    monkeypatch.setattr(torch_runtime, "_forward", remembered)
    monkeypatch.setattr(torch, "zeros", lambda shape, device="cpu": real_zeros(shape))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for name, stand_in in (
        ("CUDAGraph", Graph),
        ("graph", record),
        ("Stream", Stream),
        ("Event", Event),
        ("current_stream", Stream),
        ("stream", lambda stream: contextlib.nullcontext()),
        ("device", current),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    network = torch.nn.Sequential(torch.nn.Flatten(1), torch.nn.Linear(48, 3, bias=False))
    network[1].weight.data = torch.from_numpy(WEIGHTS.T.copy())
    monkeypatch.setattr(torch_runtime, "_load", lambda *_: (network, "cuda:1"))
    runtime = torch_runtime.TorchRuntime(variant(tmp_path), device="cuda:1")
    runtime.warm_up()
    assert [call[1:] for call in calls if call[0] == "record"] == [(size, "thread_local") for size in GPU_BATCHES]
    assert {call[1] for call in calls if call[0] == "device"} == {"cuda:1"}
    calls.clear()
    for count in (1, 4, 20, 2):
        scores = np.stack([answer.scores for answer in runtime.execute(prepared(count))])
        assert scores == pytest.approx(expected(IMAGES[:count]), abs=1e-5)
    replayed = [call[1] for call in calls if call[0] == "replay"]
    assert replayed == [1, 5, 8, 8, 5, 3]
    assert [call[0] for call in calls].count("waited") == len(replayed)
    assert not [call for call in calls if call[0] == "record"]
