"""A network written by hand: it finds the brightest square of 16 pixels, as a detector's and a tracker's file would."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper, save

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
