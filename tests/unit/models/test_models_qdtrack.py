"""QDTrack's embedding head and the exported whole, each against plain computations."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from models.architectures import qdtrack
from models.architectures.small_detectors import small_faster_rcnn
from models.detection import OUTPUTS
from models.edge_export import write_detector
from models.tracking import EMBEDDINGS

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def small_head() -> qdtrack.EmbeddingHead:
    return qdtrack.EmbeddingHead(24, 5, convolutions=2, between=16, hidden=32, width=8, groups=4)


def small_network() -> qdtrack.Qdtrack:
    detector = small_faster_rcnn("scenes_detector_small", 4)
    return qdtrack.Qdtrack(detector, small_head()).eval()


def test_names_and_shapes_are_those_of_the_public_checkpoints() -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for layer in range(4):
        expected[f"convs.{layer}.conv.weight"] = (256, 256, 3, 3)
        expected[f"convs.{layer}.gn.weight"] = expected[f"convs.{layer}.gn.bias"] = (256,)
    expected |= {"fcs.0.weight": (1024, 256 * 7 * 7), "fcs.0.bias": (1024,)}
    expected |= {"fc_embed.weight": (256, 1024), "fc_embed.bias": (256,)}
    head = qdtrack.EmbeddingHead()
    assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == expected


def test_one_convolution_is_what_its_formula_says() -> None:
    layer = qdtrack.NormedConvolution(2, 4, 2)
    torch.nn.init.normal_(layer.gn.weight)
    torch.nn.init.normal_(layer.gn.bias)
    image = torch.randn(1, 2, 3, 3)
    weight, padded = layer.conv.weight.detach().numpy(), np.pad(image[0].numpy(), ((0, 0), (1, 1), (1, 1)))
    raw = np.zeros((4, 3, 3))
    for channel, row, column in itertools.product(range(4), range(3), range(3)):
        raw[channel, row, column] = (weight[channel] * padded[:, row : row + 3, column : column + 3]).sum()
    for group in (slice(0, 2), slice(2, 4)):
        raw[group] = (raw[group] - raw[group].mean()) / math.sqrt(raw[group].var() + 1e-5)
    scale, shift = (p.detach().numpy()[:, None, None] for p in (layer.gn.weight, layer.gn.bias))
    expected = np.maximum(raw * scale + shift, 0)
    assert np.allclose(layer(image)[0].detach().numpy(), expected, atol=1e-5)


def test_the_head_is_its_layers_one_after_another() -> None:
    head = small_head()
    pooled = torch.randn(3, 24, 5, 5)
    features = pooled
    for layer in (head.convs[0], head.convs[1]):
        features = layer(features)
    dense = head.fcs[0]
    assert isinstance(dense, torch.nn.Linear)
    torch.nn.init.zeros_(dense.bias)
    hidden = np.maximum(features.flatten(1).detach().numpy() @ dense.weight.detach().numpy().T, 0)
    expected = hidden @ head.fc_embed.weight.detach().numpy().T
    assert np.allclose(head(pooled).detach().numpy(), expected, atol=1e-5)


def test_served_boxes_are_the_detectors_and_embeddings_those_of_its_boxes() -> None:
    network = small_network()
    image = torch.randn(1, 3, 192, 320)
    network.detector.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        boxes, scores, classes, embeddings = qdtrack.ServedQdtrack(network)(image)
        features = network.detector.backbone(image)
        again = network.embeddings(features, [boxes], (192, 320))
    assert len(boxes) == len(scores) == len(classes) == len(embeddings) > 0
    assert 0 <= classes.min() <= classes.max() <= 3
    assert torch.allclose(embeddings, again, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the older exporter, the one that can write these networks
@pytest.mark.parametrize("least_score", [0.0, 1.0])
def test_the_exported_file_answers_alike_and_also_finds_nothing(tmp_path: Path, least_score: float) -> None:
    network = small_network()
    network.detector.roi_heads.score_thresh = least_score
    served, file = qdtrack.ServedQdtrack(network).eval(), tmp_path / "model.onnx"
    image = torch.randn(1, 3, 100, 130)
    with torch.no_grad():
        torch.onnx.export(
            served,
            (torch.rand(1, 3, 192, 320),),
            str(file),
            input_names=["image"],
            output_names=["boxes", "scores", "classes", "embeddings"],
            dynamic_axes={"image": {2: "h", 3: "w"}}
            | {k: {0: "n"} for k in ("boxes", "scores", "classes", "embeddings")},
            opset_version=17,
            dynamo=False,
        )
        expected = [value.numpy() for value in served(image)]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": image.numpy()})
    assert len(found[0]) == (0 if least_score == 1.0 else len(expected[0]))
    if least_score == 0.0:
        assert np.abs(found[0] - expected[0]).max() < 1e-2
        assert np.abs(found[3] - expected[3]).max() < 1e-3


def test_an_exported_file_whose_network_proposes_nothing_gives_nothing(tmp_path: Path) -> None:
    """Traced where there are proposals, run where every one is moved out of the picture."""
    network = small_network()
    network.detector.rpn.head.bbox_pred.weight.data.mul_(10)
    network.detector.roi_heads.score_thresh = 0.0
    proposed: list[int] = []
    network.detector.rpn.register_forward_hook(lambda module, given, found: proposed.append(len(found[0][0])))
    served, file = qdtrack.ServedQdtrack(network).eval(), tmp_path / "model.onnx"
    write_detector(served, file, outputs=(*OUTPUTS, EMBEDDINGS))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    faint = torch.randn(1, 3, 96, 128)
    for image in (faint, 1e12 * faint):
        with torch.no_grad():
            expected = [len(value) for value in served(image)]
        found = session.run(None, {"image": image.numpy()})
        assert [len(value) for value in found] == expected
        assert (expected[0] > 0) == (proposed[-1] > 0) == (image is faint)
