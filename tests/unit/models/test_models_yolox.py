"""YOLOX layer by layer: names and sizes of the public checkpoints, pieces against plain computations, the loss."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models.architectures import yolox, yolox_loss


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_parameter_counts_are_the_published_ones() -> None:
    published = {"yolox_nano": 0.91, "yolox_tiny": 5.06, "yolox_s": 9.0, "yolox_m": 25.3, "yolox_x": 99.1}
    with torch.device("meta"):
        for name, millions in published.items():
            count = sum(p.numel() for p in yolox.yolox(name, 80).parameters()) / 1e6
            assert abs(count - millions) <= 0.051, name


def checkpoint_shapes(depth: float, width: float, classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a public checkpoint, written out from its configuration and not from our modules."""
    shapes: dict[str, tuple[int, ...]] = {}

    def base(name: str, inputs: int, outputs: int, side: int) -> None:
        shapes[f"{name}.conv.weight"] = (outputs, inputs, side, side)
        for kind in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{kind}"] = (outputs,)
        shapes[f"{name}.bn.num_batches_tracked"] = ()

    def csp(name: str, inputs: int, outputs: int, blocks: int) -> None:
        half = outputs // 2
        base(f"{name}.conv1", inputs, half, 1)
        base(f"{name}.conv2", inputs, half, 1)
        base(f"{name}.conv3", 2 * half, outputs, 1)
        for block in range(blocks):
            base(f"{name}.m.{block}.conv1", half, half, 1)
            base(f"{name}.m.{block}.conv2", half, half, 3)

    stem, blocks = int(width * 64), round(depth * 3)
    base("backbone.backbone.stem.conv", 12, stem, 3)
    for stage, (factor, count) in enumerate(((1, blocks), (2, 3 * blocks), (4, 3 * blocks)), 2):
        base(f"backbone.backbone.dark{stage}.0", factor * stem, 2 * factor * stem, 3)
        csp(f"backbone.backbone.dark{stage}.1", 2 * factor * stem, 2 * factor * stem, count)
    base("backbone.backbone.dark5.0", 8 * stem, 16 * stem, 3)
    base("backbone.backbone.dark5.1.conv1", 16 * stem, 8 * stem, 1)
    base("backbone.backbone.dark5.1.conv2", 32 * stem, 16 * stem, 1)
    csp("backbone.backbone.dark5.2", 16 * stem, 16 * stem, blocks)
    fine, middle, coarse = (int(c * width) for c in (256, 512, 1024))
    base("backbone.lateral_conv0", coarse, middle, 1)
    csp("backbone.C3_p4", 2 * middle, middle, blocks)
    base("backbone.reduce_conv1", middle, fine, 1)
    csp("backbone.C3_p3", 2 * fine, fine, blocks)
    base("backbone.bu_conv2", fine, fine, 3)
    csp("backbone.C3_n3", 2 * fine, middle, blocks)
    base("backbone.bu_conv1", middle, middle, 3)
    csp("backbone.C3_n4", 2 * middle, coarse, blocks)
    hidden = int(256 * width)
    for level, inputs in enumerate((fine, middle, coarse)):
        base(f"head.stems.{level}", inputs, hidden, 1)
        for branch, index in itertools.product(("cls_convs", "reg_convs"), (0, 1)):
            base(f"head.{branch}.{level}.{index}", hidden, hidden, 3)
        for kind, outputs in (("cls", classes), ("reg", 4), ("obj", 1)):
            shapes[f"head.{kind}_preds.{level}.weight"] = (outputs, hidden, 1, 1)
            shapes[f"head.{kind}_preds.{level}.bias"] = (outputs,)
    return shapes


@pytest.mark.parametrize(
    ("name", "depth", "width", "classes"), [("yolox_x", 1.33, 1.25, 1), ("yolox_s", 0.33, 0.5, 80)]
)
def test_a_checkpoint_of_the_public_names_and_shapes_loads(name: str, depth: float, width: float, classes: int) -> None:
    shapes = checkpoint_shapes(depth, width, classes)
    with torch.device("meta"):
        ours = {key: tuple(value.shape) for key, value in yolox.yolox(name, classes).state_dict().items()}
    assert ours == shapes


def test_loading_takes_the_values_and_names_what_does_not_fit() -> None:
    network = yolox.yolox("yolox_nano", 1)
    state = {key: torch.full_like(value, 3) for key, value in network.state_dict().items()}
    yolox.load_checkpoint(network, {"model": state, "start_epoch": 80})
    assert all(bool((value == 3).all()) for value in network.state_dict().values())
    del state["head.obj_preds.0.bias"]
    with pytest.raises(RuntimeError, match=r"head\.obj_preds\.0\.bias"):
        yolox.load_checkpoint(network, state)


def test_focus_puts_the_four_pixels_of_a_square_behind_each_other() -> None:
    focus = yolox.Focus(12)
    torch.nn.init.zeros_(focus.conv.conv.weight)
    for channel in range(12):
        focus.conv.conv.weight.data[channel, channel, 1, 1] = 1.0  # pass each channel through
    image = torch.arange(2 * 2 * 3, dtype=torch.float32).reshape(1, 3, 2, 2)
    found = focus.eval()(image)[0, :, 0, 0]
    upper_left, lower_left, upper_right, lower_right = (image[0, :, r, c] for c in (0, 1) for r in (0, 1))
    expected = functional.silu(torch.cat((upper_left, lower_left, upper_right, lower_right)) / math.sqrt(1 + 1e-3))
    assert torch.allclose(found, expected, atol=1e-6)


def test_one_convolution_is_what_its_formula_says() -> None:
    torch.manual_seed(0)
    layer = yolox.Convolution(2, 3, 3, stride=2).eval()
    layer.bn.running_mean.copy_(torch.randn(3))  # type: ignore[union-attr]
    layer.bn.running_var.copy_(torch.rand(3) + 0.5)  # type: ignore[union-attr]
    image = torch.randn(1, 2, 5, 5)
    padded = np.pad(image[0].numpy(), ((0, 0), (1, 1), (1, 1)))
    weight = layer.conv.weight.detach().numpy()
    for channel, row, column in itertools.product(range(3), range(3), range(3)):
        value = float((weight[channel] * padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]).sum())
        mean, variance = float(layer.bn.running_mean[channel]), float(layer.bn.running_var[channel])  # type: ignore[index]
        value = (value - mean) / math.sqrt(variance + 1e-3)
        assert layer(image)[0, channel, row, column].item() == pytest.approx(value / (1 + math.exp(-value)), abs=1e-5)


def test_shapes_level_by_level() -> None:
    network = yolox.yolox("yolox_nano", 7).eval()
    image = torch.zeros(2, 3, 96, 160)
    with torch.no_grad():
        features = network.backbone.backbone(image)
        levels = network(image)
    assert [tuple(f.shape) for f in features] == [(2, 64, 12, 20), (2, 128, 6, 10), (2, 256, 3, 5)]
    assert [tuple(level.shape) for level in levels] == [(2, 12, 12, 20), (2, 12, 6, 10), (2, 12, 3, 5)]


def test_decoding_is_the_formula_at_every_place() -> None:
    rng = np.random.default_rng(4)
    levels = [torch.from_numpy(rng.normal(size=(1, 7, 64 // s, 96 // s)).astype(np.float32)) for s in yolox.STRIDES]
    found = yolox.decoded(levels)[0].numpy()
    place = 0
    for stride, level in zip(yolox.STRIDES, levels, strict=True):
        for row, column in itertools.product(range(64 // stride), range(96 // stride)):
            x, y, w, h, *logits = level[0, :, row, column].numpy()
            expected = [(x + column) * stride, (y + row) * stride, np.exp(w) * stride, np.exp(h) * stride, *logits]
            assert found[place] == pytest.approx(expected, rel=1e-5)
            place += 1
    assert place == len(found)


class Fixed(torch.nn.Module):
    """A network that gives back the same maps whatever it is shown."""

    def __init__(self, levels: list[Tensor]) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.levels


def test_served_boxes_are_those_above_the_threshold_that_nothing_better_covers() -> None:
    rng = np.random.default_rng(9)
    levels = [
        torch.from_numpy(rng.normal(0, 1.2, size=(1, 8, 64 // s, 96 // s)).astype(np.float32)) for s in yolox.STRIDES
    ]
    served = yolox.ServedYolox(Fixed(levels), score_threshold=0.3, overlap=0.2)  # type: ignore[arg-type]
    boxes, scores, classes = served(torch.zeros(1, 3, 64, 96))
    places = yolox.decoded(levels)[0]
    probability = places[:, 4:5].sigmoid() * places[:, 5:].sigmoid()
    best, which = probability.max(dim=1)
    order = [i for i in best.argsort(descending=True).tolist() if best[i] > 0.3]
    kept: list[int] = []
    for index in order:  # the definition of non-maximum suppression, class by class
        mine = yolox.corners(places[index, :4])
        rivals = [k for k in kept if which[k] == which[index]]
        if all(yolox_loss.paired_iou(mine, yolox.corners(places[k, :4])).item() <= 0.2 for k in rivals):
            kept.append(index)
    assert len(order) > len(kept) > 10
    assert classes.tolist() == which[kept].tolist()
    assert torch.allclose(scores, best[kept])
    assert torch.allclose(boxes, yolox.corners(places[kept, :4]))


def brute_force_assignment(
    mine: Tensor, objects: Tensor, logits: Tensor, truth: Tensor, label: Tensor, centres: Tensor, strides: Tensor
) -> dict[int, int]:
    """SimOTA from its description with loops: place to box."""
    wanted: dict[int, list[tuple[float, int]]] = {}
    near_any = [
        any(max(abs(c - (t[:2] + t[2:]) / 2).tolist()) < 1.5 * s for t in truth)
        for c, s in zip(centres, strides, strict=True)
    ]
    candidates = [i for i, near in enumerate(near_any) if near]
    for box, (t, wanted_class) in enumerate(zip(truth, label, strict=True)):
        overlaps = {i: yolox_loss.paired_iou(t, mine[i]).item() for i in candidates}
        count = max(1, int(sum(sorted(overlaps.values(), reverse=True)[:10])))
        costs = []
        for i in candidates:
            p = torch.sqrt(logits[i].sigmoid() * objects[i].sigmoid())
            class_cost = -sum(math.log(p[c]) if c == wanted_class else math.log(1 - p[c]) for c in range(len(p)))
            near = max(abs(centres[i] - (t[:2] + t[2:]) / 2).tolist()) < 1.5 * strides[i]
            costs.append((class_cost - 3 * math.log(overlaps[i] + 1e-8) + (0 if near else 1e6), i, near))
        for cost, i, near in sorted(costs)[:count]:
            if near:
                wanted.setdefault(i, []).append((cost, box))
    return {i: min(boxes)[1] for i, boxes in wanted.items()}


@pytest.mark.parametrize("seed", range(5))
def test_assignment_is_the_brute_force_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels = [torch.from_numpy(rng.normal(0, 0.6, (1, 8, 64 // s, 96 // s)).astype(np.float32)) for s in yolox.STRIDES]
    found = yolox.decoded(levels)[0]
    corner = rng.uniform(0, 60, (5, 2))
    truth = torch.from_numpy(np.hstack([corner, corner + rng.uniform(6, 34, (5, 2))]).astype(np.float32))
    label = torch.from_numpy(rng.integers(0, 3, 5))
    centres, strides = yolox_loss.places(levels)
    arguments = (yolox.corners(found[:, :4]), found[:, 4], found[:, 5:], truth, label, centres, strides)
    chosen, box_of, overlap = yolox_loss.assign(*arguments)
    assert dict(zip(chosen.tolist(), box_of.tolist(), strict=True)) == brute_force_assignment(*arguments)
    assert torch.allclose(overlap, yolox_loss.paired_iou(arguments[0][chosen], truth[box_of]))


def test_overlap_of_known_boxes() -> None:
    one = torch.tensor([[0.0, 0, 2, 2], [0, 0, 4, 4]])
    other = torch.tensor([[1.0, 1, 3, 3], [9, 9, 10, 10], [0, 0, 2, 2]])
    assert torch.allclose(yolox_loss.iou(one, other), torch.tensor([[1 / 7, 0, 1], [4 / 16, 0, 4 / 16]]))


def test_an_image_without_objects_wants_nothing() -> None:
    levels = [torch.zeros(1, 7, 64 // s, 96 // s) for s in yolox.STRIDES]
    found = yolox_loss.yolox_loss(levels, [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)])
    assert found["box"].item() == found["class"].item() == 0
    assert found["object"].item() == pytest.approx((8 * 12 + 4 * 6 + 2 * 3) * math.log(2), rel=1e-5)


def test_a_small_network_learns_two_objects_by_heart() -> None:
    torch.manual_seed(1)
    network = yolox.Yolox(2, yolox.YoloxSize(0.33, 0.125)).train()
    image = torch.zeros(1, 3, 64, 96)
    image[:, 0, 8:40, 10:42] = 1.0
    image[:, 1, 30:54, 60:90] = 1.0
    boxes, labels = torch.tensor([[10.0, 8, 42, 40], [60, 30, 90, 54]]), torch.tensor([0, 1])
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        sum(yolox_loss.yolox_loss(network(image), [boxes], [labels]).values(), torch.zeros(())).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    found, scores, classes = yolox.ServedYolox(network, 0.3, 0.5)(image)
    assert classes[:2].sort().values.tolist() == [0, 1]
    assert (scores[:2] > 0.5).all()
    assert yolox_loss.iou(boxes[classes[:2]], found[:2]).diagonal().min() > 0.75
