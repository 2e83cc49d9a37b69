"""How much a network computes for one image: multiply-adds of its convolutions and matrix products, counted in a run.

Sizes inside a two-stage detector depend on what it finds, so they are read off a run, not off the file. The placement
tables' unit is tera-multiply-adds (which the paper's tables call TFLOPs). Needs onnx and onnxruntime; development and
the profile only.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def multiply_adds(file: Path, tensor: npt.NDArray[np.float32]) -> int:
    """Multiply-adds of one run on `tensor` [1, 3, h, w]. Products inside loops and branches are not counted."""
    import onnx
    import onnxruntime

    model = onnx.load(file)
    nodes = [node for node in model.graph.node if node.op_type in _COUNTED]
    watched = sorted({name for node in nodes for name in (node.output[0], *node.input[:2])})
    constants = {one.name: tuple(one.dims) for one in model.graph.initializer}
    asked = [name for name in watched if name not in constants and name != model.graph.input[0].name]
    known = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked if name not in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # every node stays
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = session.run(asked, {model.graph.input[0].name: tensor})
    shapes = constants | {name: value.shape for name, value in zip(asked, values, strict=True)}
    shapes[model.graph.input[0].name] = tensor.shape
    return sum(_of_node(node, shapes) for node in nodes)


def _of_node(node: Any, shapes: dict[str, tuple[int, ...]]) -> int:
    """Multiply-adds of one node: for every output value, as many as it sums up (a transposed one: for every input)."""
    first, second, output = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    if node.op_type == "Conv":  # weights [outputs, inputs of the group, height, width]
        return math.prod(output) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":  # weights [inputs, outputs of the group, height, width]
        return math.prod(first) * math.prod(second[1:])
    inner = first[-1]
    if node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute):
        inner = first[0]
    return math.prod(output) * inner
