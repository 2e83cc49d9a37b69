"""The scene trainings: what they see, what they minimise, and that they learn, stop and go on."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='pip install -e ".[train]"')
pytest.importorskip("pycocotools", reason='pip install -e ".[edge]"')

import onnxruntime  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from torch import nn  # noqa: E402

from models.datasets.scenes import HELD_OUT_SEEDS, SceneSettings, plan_scene, render  # noqa: E402
from models.edge_items import scene_stills  # noqa: E402
from models.train_scenes import export, rate_at, train  # noqa: E402
from models.train_scenes_data import (  # noqa: E402
    FrameStore,
    Labelled,
    Look,
    altered,
    minibatch,
    minibatch_of_pairs,
    open_store,
    sent,
)
from models.train_scenes_embedding import embedding_losses, matched_share, pair_losses  # noqa: E402
from models.train_scenes_tasks import TASKS, Task, detector_task, embed_with, normalised, still_scores, yolox_task  # noqa: E402


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FrameStore:
    return open_store(tmp_path_factory.mktemp("frames"), 2, 7)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take minutes where other work has the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quiet() -> Progress:
    return Progress(console=Console(quiet=True))


def test_stored_frames_are_those_of_scenes_that_are_not_held_out(tmp_path: Path) -> None:
    open_store(tmp_path, 1, 7)
    again = open_store(tmp_path, 1, 7)  # from the file
    clip = render(plan_scene(HELD_OUT_SEEDS + 700_000, SceneSettings(frames=13)), [0, 4, 8, 12])
    assert again.frames.tobytes() == clip.frames.tobytes()
    assert len(again) == 4
    for one, other in zip(again.truth, clip.truth, strict=True):
        assert one.boxes.tobytes() == other.boxes.tobytes()
        assert one.tracks.tolist() == other.tracks.tolist()


def test_no_score_is_taken_on_trained_scenes() -> None:
    with pytest.raises(ValueError, match="trained on"):
        still_scores(nn.Identity(), nn.Identity(), HELD_OUT_SEEDS + 1)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("down", [False, True])
def test_boxes_follow_the_picture(across: bool, down: bool) -> None:
    """After any alteration the box is still where the white rectangle is."""
    picture = np.zeros((96, 128, 3), np.uint8)
    picture[16:48, 24:88] = 255
    whole = Labelled(picture, np.array([[24, 16, 88, 48]], np.float32), np.array([2]), np.array([5]))
    for seed in range(8):
        copy = altered(whole, np.random.default_rng(seed), Look(across, down, (2, 0, 1)))
        white = copy.picture.min(axis=2) > 127
        rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
        assert np.abs(copy.boxes[0] - [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).max() <= 2
        assert copy.classes.tolist() == [2]
    assert whole.boxes.tolist() == [[24, 16, 88, 48]]


def test_a_look_mixes_colours_and_is_shared_by_a_pair(store: FrameStore) -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:] = (10, 20, 30)
    empty = Labelled(picture, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64))
    copy = altered(empty, np.random.default_rng(0), Look(False, False, (2, 0, 1)))
    assert np.abs(copy.picture.astype(int) - [30, 10, 20]).max() < 6
    for first, second in minibatch_of_pairs(store, 1, 4, 3):
        # Frames of one scene, altered alike, look alike as a whole; their objects and noise differ.
        assert np.abs(first.picture.mean(axis=(0, 1)) - second.picture.mean(axis=(0, 1))).max() < 12
        assert set(first.tracks) & set(second.tracks)


def test_what_is_sent_has_the_old_size_and_lost_detail(store: FrameStore) -> None:
    picture = store.labelled(0).picture
    errors = [
        np.abs(sent(picture, *how).astype(int) - picture).mean() for how in ((1.0, 95), (1.0, 30), (0.5, 95), (0.5, 30))
    ]
    assert sent(picture, 0.5, 30).shape == picture.shape
    assert errors[0] < errors[1] < errors[3]
    assert errors[0] < errors[2] < errors[3]


def test_a_step_sees_the_same_whenever_it_is_taken(store: FrameStore) -> None:
    first, again, next_one, other_seed = (minibatch(store, *at, 2) for at in ((3, 5), (3, 5), (3, 6), (4, 5)))
    assert [one.picture.tobytes() for one in first] == [one.picture.tobytes() for one in again]
    assert [one.boxes.tolist() for one in first] == [one.boxes.tolist() for one in again]
    for other in (next_one, other_seed):
        assert [one.picture.tobytes() for one in first] != [one.picture.tobytes() for one in other]


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [rate_at(step, 100, 2.0) for step in range(100)]
    assert rates[:8] == pytest.approx([2.0 * share / 8 for share in range(1, 9)])
    assert max(rates) == 2.0
    assert rates[54] == pytest.approx(2.0 * (0.01 + 0.99 / 2))  # half way down, where the cosine is 0
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[8:]))


@pytest.mark.parametrize(
    "task",
    [
        detector_task("scenes_detector_small", 8, 2),
        yolox_task("scenes_yolox", 8, 1),
    ],
    ids=["faster_rcnn", "yolox"],
)
def test_steps_lower_the_loss_of_one_minibatch(store: FrameStore, task: Task) -> None:
    torch.manual_seed(0)
    network = task.build(None).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        total = torch.stack(list(task.losses(network, store, 1, 0).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_a_stopped_training_goes_on_to_the_same_weights(store: FrameStore, tmp_path: Path) -> None:
    task = detector_task("scenes_detector_small", 3, 1)

    def run(folder: Path, stop_after_s: float, seed: int = 1) -> object:
        folder.mkdir(exist_ok=True)
        return train(
            task,
            store,
            folder,
            seed=seed,
            steps=3,
            checkpoint_every=2,
            stop_after_s=stop_after_s,
            detector=None,
            progress=quiet(),
        )

    whole = run(tmp_path / "whole", float("inf"))
    assert run(tmp_path / "parts", 0.0) is None
    assert run(tmp_path / "parts", 0.0) is None
    parts = run(tmp_path / "parts", 0.0)
    assert isinstance(whole, tuple)
    assert isinstance(parts, tuple)
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, parts[0].state_dict()[name]), name
    with pytest.raises(SystemExit, match="--seed 1 --steps 3"):
        run(tmp_path / "parts", 0.0, seed=2)


def test_the_embedding_head_needs_a_trained_detector(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds no checkpoint\.pt"):
        TASKS["scenes_qdtrack"].build(tmp_path)


def test_an_exported_file_answers_like_the_network_at_any_size(tmp_path: Path) -> None:
    torch.manual_seed(2)
    task = TASKS["scenes_detector_small"]
    network: Any = task.build(None).eval()
    network.roi_heads.score_thresh = 0.2
    served = task.served(network)
    session = onnxruntime.InferenceSession(export(served, task.outputs, tmp_path / "model.onnx"))
    for width, height in ((320, 192), (128, 96)):
        picture = render(plan_scene(1, SceneSettings(width=width, height=height, frames=1))).frames[0]
        with torch.no_grad():
            wanted = [value.numpy() for value in served(normalised(picture))]
        found = session.run(None, {"image": normalised(picture).numpy()})
        assert len(wanted[0]) > 0
        for one, other in zip(wanted, found, strict=True):
            assert np.abs(one - other).max() < 1e-3


def test_pair_losses_are_the_published_sums() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(4, 3)), rng.normal(size=(5, 3))
    our_tracks, their_tracks = np.array([1, 2, -1, 9]), np.array([2, 1, 1, -1, 3])
    contrast, off_positive, off_negative = [], [], []
    for v, track in zip(ours, our_tracks, strict=True):
        if track not in their_tracks or track == -1:
            continue
        same = their_tracks == track
        likeness = theirs @ v
        total = sum(np.exp(n - p) for p in likeness[same] for n in likeness[~same])
        contrast.append(np.log(1 + total))
        cosine = likeness / np.linalg.norm(v) / np.linalg.norm(theirs, axis=1)
        off_positive += ((cosine[same] - 1) ** 2).tolist()
        off_negative += (cosine[~same] ** 2).tolist()
    found = pair_losses(*(torch.from_numpy(values) for values in (ours, our_tracks, theirs, their_tracks)))
    assert found is not None
    assert float(found[0]) == pytest.approx(np.mean(contrast))
    assert float(found[1]) == pytest.approx((np.mean(off_positive) + np.mean(off_negative)) / 2)


def test_a_pair_without_a_shared_object_teaches_nothing() -> None:
    embeddings = torch.ones(2, 3)
    assert pair_losses(embeddings, torch.tensor([1, -1]), embeddings, torch.tensor([2, -1])) is None


def test_embedding_losses_are_small_for_an_oracle(store: FrameStore) -> None:
    """Embeddings that know the true object's colour patch beat those that know nothing."""

    def means(pictures: Sequence[Any], boxes: Sequence[Any]) -> list[Any]:
        found = []
        for picture, some in zip(pictures, boxes, strict=True):
            cut = (picture[int(y1) : int(y2) + 1, int(x1) : int(x2) + 1] for x1, y1, x2, y2 in some.tolist())
            found.append(torch.tensor(np.array([part.mean(axis=(0, 1)) / 25 - 5 for part in cut])))
        return found

    def constant(pictures: Sequence[Any], boxes: Sequence[Any]) -> list[Any]:
        return [torch.ones(len(some), 3, dtype=torch.float64) for some in boxes]

    knowing, ignorant = (
        sum(float(embedding_losses(embed, store, 1, step, 2)["cosine"]) for step in range(3))
        for embed in (means, constant)
    )
    assert knowing < ignorant
    assert matched_share(means, 4, 2) > matched_share(constant, 4, 2) + 0.3


def test_an_embedding_of_each_box_comes_back_by_picture(store: FrameStore, tmp_path: Path) -> None:
    large = detector_task("scenes_detector_large", 1, 1).build(None)
    torch.save({"network": large.state_dict()}, tmp_path / "checkpoint.pt")
    network = TASKS["scenes_qdtrack"].build(tmp_path).eval()
    boxes = [torch.tensor([[10.0, 10, 40, 40], [50, 50, 90, 90]]), torch.zeros(0, 4)]
    first, second = embed_with(network, [store.labelled(0).picture, store.labelled(1).picture], boxes)
    assert first.shape == (2, 64)
    assert second.shape == (0, 64)


class Shown(nn.Module):
    """Stands in for a perfect detector: it knows the truth of each held-out still, in order."""

    def __init__(self, moved: float) -> None:
        super().__init__()
        self.truth = [still.truth for still in scene_stills(4)]
        self.moved = moved
        self.calls = 0

    def forward(self, image: Any) -> tuple[Any, ...]:
        one = self.truth[self.calls]
        self.calls += 1
        boxes = torch.from_numpy(one.boxes.astype(np.float32)) + self.moved
        return boxes, torch.ones(len(boxes)), torch.from_numpy(one.classes)


def test_scores_are_those_of_what_is_served() -> None:
    assert still_scores(nn.Identity(), Shown(0.0), 4)["mAP"] == pytest.approx(1.0)
    moved = still_scores(nn.Identity(), Shown(4.0), 4)
    assert 0 < moved["mAP"] < 0.8
    assert moved["AP50"] > moved["AP75"]
