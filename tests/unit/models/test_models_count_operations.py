"""Counted multiply-adds against those of the layers' formulas."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

for _package in ("onnx", "onnxruntime", "torch"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"needs {_package}", allow_module_level=True)

import torch  # noqa: E402 - after the skip
from torch import nn  # noqa: E402

from models.count_operations import multiply_adds  # noqa: E402


class Layers(nn.Module):
    """One of each counted kind; the dense layer's rows depend on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 3, 2, stride=2)
        self.dense = nn.Linear(3, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        grown = self.up(self.grouped(self.whole(image)))
        rows = grown.flatten(2)[0].T
        chosen = rows[torch.where(image[0, 0].flatten() > 0.5)[0]]
        found: torch.Tensor = self.dense(chosen)
        return found


@pytest.mark.filterwarnings("ignore")  # of the older exporter
def test_every_kind_of_layer_is_counted_at_the_sizes_of_the_run(tmp_path: Path) -> None:
    file = tmp_path / "layers.onnx"
    axes = {"image": {2: "h", 3: "w"}, "out": {0: "n"}}
    torch.onnx.export(
        Layers().eval(),
        (torch.rand(1, 3, 16, 24),),
        str(file),
        input_names=["image"],
        output_names=["out"],
        dynamic_axes=axes,
        opset_version=17,
        dynamo=False,
    )
    image = np.random.default_rng(1).random((1, 3, 20, 32), dtype=np.float32)
    whole, grouped = 8 * 10 * 16 * 27, 8 * 10 * 16 * 2 * 9
    up, dense = 8 * 10 * 16 * 3 * 4, int((image[0, 0] > 0.5).sum()) * 3 * 5
    assert multiply_adds(file, image) == whole + grouped + up + dense


def test_a_transposed_product_sums_over_its_rows(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    weights = helper.make_tensor("weights", TensorProto.FLOAT, (2, 7), np.ones(14, np.float32))
    nodes = [helper.make_node("Gemm", ["image", "weights"], ["out"], transA=1)]
    given = helper.make_tensor_value_info("image", TensorProto.FLOAT, (2, 5))
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, (5, 7))
    graph = helper.make_graph(nodes, "product", [given], [out], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "product.onnx")
    assert multiply_adds(tmp_path / "product.onnx", np.ones((2, 5), np.float32)) == 5 * 7 * 2
