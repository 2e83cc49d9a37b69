"""torch and OpenVINO behind the runtime interface: the same answers as plain arithmetic, the same refusals."""

import importlib.util
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.catalog import Input, Variant, VariantError
from models.onnx_runtime import _Bindings
from models.preprocess import Prepared
from models.runtime import Answer, open_runtime

RNG = np.random.default_rng(4)
WEIGHTS = RNG.normal(size=(48, 3)).astype(np.float32)
IMAGES = RNG.normal(size=(9, 3, 4, 4)).astype(np.float32)


def variant_for(runtime: str, folder: Path) -> Variant:
    """logits = flatten(image) @ WEIGHTS, as a file that `runtime` reads."""
    file = folder / ("linear.pt2" if runtime == "torch" else "linear.onnx")
    if runtime == "torch":
        save_program(file)
    else:
        save_onnx(file)
    made = Variant(
        name="linear",
        service="s",
        runtime="onnxruntime",
        path=str(file),
        labels=("a", "b", "c"),
        input=Input(shape=(3, 4, 4)),
    )
    return msgspec.structs.replace(made, runtime=runtime)


def save_program(file: Path) -> None:
    import torch

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.Parameter(torch.from_numpy(WEIGHTS))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1) @ self.weights

    batch = torch.export.Dim("batch", min=1, max=16)
    torch.export.save(
        torch.export.export(Linear(), (torch.zeros(2, 3, 4, 4),), dynamic_shapes=({0: batch},)), str(file)
    )


def save_onnx(file: Path) -> None:
    nodes = [helper.make_node("Flatten", ["input"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["out"])]
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["b", 3, 4, 4])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["b", 3])
    graph = helper.make_graph(nodes, "linear", [image], [out], [numpy_helper.from_array(WEIGHTS, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)


def expected(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    logits = images.reshape(len(images), -1).astype(np.float64) @ WEIGHTS
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: npt.NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return result


def needs(runtime: str) -> None:
    package = {"torch": "torch", "openvino": "openvino", "onnxruntime": "onnxruntime"}[runtime]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install {package}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's exporter, to itself
@pytest.mark.parametrize("runtime", ["onnxruntime", "torch", "openvino"])
def test_every_runtime_gives_the_answers_of_plain_arithmetic(tmp_path: Path, runtime: str) -> None:
    needs(runtime)
    opened = open_runtime(variant_for(runtime, tmp_path))
    opened.warm_up()
    for size in (1, 3, 9):
        answers: list[Answer] = opened.execute([Prepared(tensor=image) for image in IMAGES[:size]])
        assert len(answers) == size
        assert np.stack([a.scores for a in answers]) == pytest.approx(expected(IMAGES[:size]), abs=1e-5)
    opened.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_missing_files_devices_and_foreign_files_are_refused(tmp_path: Path, runtime: str) -> None:
    needs(runtime)
    good = variant_for(runtime, tmp_path)
    with pytest.raises(VariantError, match="no such file"):
        open_runtime(msgspec.structs.replace(good, path=str(tmp_path / "absent")))
    with pytest.raises(VariantError, match="device"):
        open_runtime(good, device="tpu")
    (tmp_path / "foreign.onnx").write_bytes(b"not a model")
    with pytest.raises(VariantError, match=r"cannot be loaded|not a program"):
        open_runtime(msgspec.structs.replace(good, path=str(tmp_path / "foreign.onnx")))


def test_openvino_holds_the_file_against_its_entry(tmp_path: Path) -> None:
    needs("openvino")
    good = variant_for("openvino", tmp_path)
    with pytest.raises(VariantError, match="batch first"):
        open_runtime(msgspec.structs.replace(good, input=Input(shape=(3, 4, 5))))
    with pytest.raises(VariantError, match="the file has"):
        open_runtime(msgspec.structs.replace(good, input=Input(name="image", shape=(3, 4, 4))))


def test_torch_without_a_gpu_says_so(tmp_path: Path) -> None:
    needs("torch")
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (tmp_path / "any.pt2").write_bytes(b"")
    variant = Variant(name="v", service="s", runtime="torch", path=str(tmp_path / "any.pt2"), labels=("a",))
    with pytest.raises(VariantError, match="sees no GPU"):
        open_runtime(variant, device="cuda")


def test_bound_buffers_give_each_batch_its_own_answers(tmp_path: Path) -> None:
    """The path that GPUs use, here with buffers in host memory: sizes interleave, contents change in place."""
    needs("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(
        variant_for("onnxruntime", tmp_path).path, providers=["CPUExecutionProvider"]
    )
    bindings = _Bindings(session, "input", "out", device="cpu")
    for start, size in ((0, 3), (3, 1), (2, 3), (0, 1), (5, 3)):
        images = IMAGES[start : start + size]
        assert bindings.run(images) == pytest.approx(images.reshape(size, -1) @ WEIGHTS, abs=1e-4)
