"""Small Faster R-CNNs: what goes in and comes out, against torchvision's own way through the same network."""

from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason='pip install -e ".[train]"')
pytest.importorskip("pycocotools", reason='pip install -e ".[edge]"')

from models.architectures.small_detectors import (  # noqa: E402
    MEAN,
    SIZES,
    STD,
    EmbeddingDetector,
    ServedDetector,
    small_faster_rcnn,
)
from models.edge_export import write_detector  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take minutes where other work has the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


LARGE, SMALL = "scenes_detector_large", "scenes_detector_small"


@pytest.mark.parametrize("name", list(SIZES))
def test_what_is_served_is_what_torchvision_finds(name: str) -> None:
    """The same boxes by `ServedDetector` from a normalised picture and by `FasterRCNN` from the picture itself."""
    torch.manual_seed(3)
    network = small_faster_rcnn(name, 4).eval()
    network.roi_heads.score_thresh = 0.0  # an untrained network is sure of nothing
    picture = torch.rand(3, 192, 320)
    with torch.no_grad():
        [own] = network([picture])
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
        boxes, scores, classes = ServedDetector(network).eval()(((picture - mean) / std)[None])
    assert len(boxes) > 0
    assert torch.allclose(boxes, own["boxes"])
    assert torch.equal(scores, own["scores"])
    assert torch.equal(classes, own["labels"] - 1)
    assert classes.min() >= 0
    assert classes.max() <= 3


@pytest.mark.parametrize("name", list(SIZES))
def test_levels_halve_from_the_finest_stride(name: str) -> None:
    levels = small_faster_rcnn(name, 4).backbone(torch.rand(2, 3, 64, 96))
    strides = [stride for stride in (4, 8, 16, 32) if stride >= SIZES[name].finest]
    assert [tuple(level.shape) for level in levels.values()] == [
        (2, SIZES[name].pyramid, 64 // stride, 96 // stride) for stride in strides
    ]


@pytest.mark.parametrize("name", list(SIZES))
def test_every_parameter_learns(name: str) -> None:
    """One step's losses reach everything, through torchvision's and our operators; half precision included."""
    torch.manual_seed(1)
    network = small_faster_rcnn(name, 4).train()
    target = {"boxes": torch.tensor([[20.0, 20, 44, 40], [60, 10, 90, 50]]), "labels": torch.tensor([1, 4])}
    with torch.autocast("cpu", torch.bfloat16):
        losses = network([torch.rand(3, 96, 96)], [target])
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    torch.stack(list(losses.values())).sum().backward()
    idle = [key for key, value in network.named_parameters() if value.grad is None or not value.grad.isfinite().all()]
    assert idle == []
    still = [key for key, value in network.named_parameters() if value.grad.abs().max() == 0]
    assert still == []


def test_the_larger_one_is_several_times_the_smaller() -> None:
    parameters = [sum(value.numel() for value in small_faster_rcnn(name, 4).parameters()) for name in (LARGE, SMALL)]
    assert parameters[0] > 5 * parameters[1]


def test_only_the_embedding_head_learns() -> None:
    detector = small_faster_rcnn(LARGE, 4)
    network = EmbeddingDetector(detector, LARGE, length=16).train()
    assert not detector.training
    assert network.head.training
    picture = torch.rand(2, 3, 64, 96)
    boxes = [torch.tensor([[8.0, 8, 30, 40]]), torch.tensor([[50.0, 20, 80, 60], [8, 8, 30, 40]])]
    embeddings = network.embed(detector.backbone(picture), boxes, (64, 96))
    assert embeddings.shape == (3, 16)
    torch.autograd.backward(embeddings.sum())
    learning = {key.partition(".")[0] for key, value in network.named_parameters() if value.grad is not None}
    assert learning == {"head"}


def test_an_embedding_is_of_its_own_box() -> None:
    """Each row equals that of its box alone."""
    torch.manual_seed(0)
    network = EmbeddingDetector(small_faster_rcnn(LARGE, 4), LARGE, length=8).eval()
    with torch.no_grad():
        features = network.detector.backbone(torch.rand(1, 3, 64, 96))
        boxes = torch.tensor([[8.0, 8, 30, 40], [50, 20, 80, 60], [0, 0, 96, 64]])
        together = network.embed(features, [boxes], (64, 96))
        alone = torch.cat([network.embed(features, [box[None]], (64, 96)) for box in boxes])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_a_served_embedding_detector_gives_a_row_per_box() -> None:
    torch.manual_seed(0)
    detector = small_faster_rcnn(LARGE, 4)
    detector.roi_heads.score_thresh = 0.0
    served = ServedDetector(EmbeddingDetector(detector, LARGE)).eval()
    with torch.no_grad():
        boxes, scores, classes, embeddings = served(torch.randn(1, 3, 64, 96))
    assert len(boxes) == len(scores) == len(classes) > 0
    assert embeddings.shape == (len(boxes), 64)


@pytest.mark.parametrize("embeds", [False, True])
def test_an_exported_file_whose_network_proposes_nothing_gives_nothing(tmp_path: Path, embeds: bool) -> None:
    """Traced where there are proposals, run where every one is moved out of the picture."""
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    detector = small_faster_rcnn(SMALL, 4).eval()
    detector.rpn.head.bbox_pred.weight.data.mul_(10)
    detector.roi_heads.score_thresh = 0.0
    proposed: list[int] = []
    detector.rpn.register_forward_hook(lambda module, given, found: proposed.append(len(found[0][0])))
    served = ServedDetector(EmbeddingDetector(detector, SMALL) if embeds else detector).eval()
    file = tmp_path / "model.onnx"
    write_detector(served, file, outputs=("boxes", "scores", "classes", *["embeddings"] * embeds))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    faint = torch.randn(1, 3, 96, 128)
    for picture in (faint, 1e12 * faint):
        with torch.no_grad():
            expected = [len(value) for value in served(picture)]
        found = session.run(None, {"image": picture.numpy()})
        assert [len(value) for value in found] == expected
        assert (expected[0] > 0) == (proposed[-1] > 0) == (picture is faint)
