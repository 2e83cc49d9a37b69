"""What the scene trainings see: rendered frames kept in one file, and seeded minibatches of altered copies.

Rendering costs more than a step of the smaller networks, so a fixed number of scenes is rendered once into
`frames.npy` (four frames of each scene) and read from there by every training. Copies are mirrored, recoloured,
and sent through what an edge node does to a picture: a smaller resolution and a lower JPEG quality. Pictures are
always brought back to the network's own size. None of the scenes is held out for scores.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from models.datasets.scenes import HELD_OUT_SEEDS, FrameTruth, SceneSettings, plan_scene, render

FRAMES_PER_SCENE = 4
APART = 4  # frames between those taken of one scene
LEAST_VISIBLE = 0.25  # objects less visible than this are not asked for
RESOLUTIONS = (0.5, 0.6, 0.75, 0.9)
QUALITIES = (30, 96)  # from .. below

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Labelled:
    """One picture and the objects in it that a detector should find."""

    picture: Picture  # [height, width, 3]
    boxes: npt.NDArray[np.float32]  # [n, 4] x1, y1, x2, y2 in pixels
    classes: npt.NDArray[np.int64]  # [n], index into LABELS
    tracks: npt.NDArray[np.int64]  # [n], equal only for the same object of the same scene


@dataclass(frozen=True, eq=False)
class FrameStore:
    """Rendered training frames, `FRAMES_PER_SCENE` in a row from each scene."""

    frames: npt.NDArray[np.uint8]  # [n, height, width, 3], mapped from the file
    truth: tuple[FrameTruth, ...]

    def __len__(self) -> int:
        return len(self.truth)

    def labelled(self, index: int) -> Labelled:
        """The frame as it was rendered, with its visible objects."""
        truth = self.truth[index]
        shown = (truth.visibility >= LEAST_VISIBLE) & (np.diff(truth.boxes.reshape(-1, 2, 2), axis=1) >= 3).all((1, 2))
        return Labelled(
            np.asarray(self.frames[index]),
            truth.boxes[shown].astype(np.float32),
            truth.classes[shown],
            truth.tracks[shown],
        )


def open_store(
    folder: Path, scenes: int, seed: int, on_scene: Callable[[int, int], None] = lambda done, total: None
) -> FrameStore:
    """The frames of `scenes` training scenes from `folder`, rendered first if they are not there.

    Seeds of different `seed` do not overlap, nor with the held-out ones.
    """
    settings = SceneSettings(frames=(FRAMES_PER_SCENE - 1) * APART + 1)
    first = HELD_OUT_SEEDS + seed * 100_000
    frames_file, truth_file = (folder / f"frames-{seed}-{scenes}.{kind}" for kind in ("npy", "npz"))
    if not truth_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shape = (scenes * FRAMES_PER_SCENE, settings.height, settings.width, 3)
        frames = np.lib.format.open_memmap(frames_file, "w+", np.uint8, shape)
        found: list[FrameTruth] = []
        for number in range(scenes):
            clip = render(plan_scene(first + number, settings), range(0, settings.frames, APART))
            frames[number * FRAMES_PER_SCENE : (number + 1) * FRAMES_PER_SCENE] = clip.frames
            found += clip.truth
            on_scene(number + 1, scenes)
        frames.flush()
        _write_truth(truth_file, found)
    return FrameStore(np.load(frames_file, mmap_mode="r"), _read_truth(truth_file))


@dataclass(frozen=True)
class Look:
    """How a copy is mirrored and recoloured. Two frames of a pair need the same, to show the same objects."""

    across: bool
    down: bool
    channels: tuple[int, ...]  # order of red, green, blue

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> "Look":
        """One at random: each way mirrored half the time, recoloured half the time."""
        across, down, recoloured = (bool(rng.random() < 0.5) for _ in range(3))
        return cls(across, down, tuple(rng.permutation(3).tolist()) if recoloured else (0, 1, 2))


def altered(labelled: Labelled, rng: np.random.Generator, look: Look | None = None) -> Labelled:
    """A copy with that look (or a random one), and more often than not re-encoded."""
    picture, boxes = labelled.picture, labelled.boxes.copy()
    height, width = picture.shape[:2]
    look = look or Look.drawn(rng)
    if look.across:
        picture = picture[:, ::-1]
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    if look.down:
        picture = picture[::-1]
        boxes[:, [1, 3]] = height - boxes[:, [3, 1]]
    picture = np.ascontiguousarray(picture[:, :, list(look.channels)])
    if rng.random() < 0.6:
        resolution = float(rng.choice(RESOLUTIONS)) if rng.random() < 0.6 else 1.0
        picture = sent(picture, resolution, int(rng.integers(*QUALITIES)))
    return Labelled(picture, boxes, labelled.classes, labelled.tracks)


def sent(picture: Picture, resolution: float, quality: int) -> Picture:
    """What a node receives of a picture at that resolution and JPEG quality, enlarged to the old size again."""
    height, width = picture.shape[:2]
    small = Image.fromarray(picture)
    if resolution < 1:
        small = small.resize((round(width * resolution), round(height * resolution)), Image.Resampling.BILINEAR)
    coded = simplejpeg.encode_jpeg(np.ascontiguousarray(small), quality, "RGB", "420")
    received: Picture = simplejpeg.decode_jpeg(coded)
    if resolution < 1:
        received = np.asarray(Image.fromarray(received).resize((width, height), Image.Resampling.BILINEAR))
    return received


def minibatch(store: FrameStore, seed: int, step: int, size: int) -> list[Labelled]:
    """The pictures of one training step; the same ones whenever seed and step are the same."""
    rng = np.random.default_rng([seed, step])
    return [altered(store.labelled(int(index)), rng) for index in rng.integers(0, len(store), size)]


def minibatch_of_pairs(store: FrameStore, seed: int, step: int, size: int) -> list[tuple[Labelled, Labelled]]:
    """Two frames of the same scene each, with one look, otherwise altered separately."""
    rng = np.random.default_rng([seed, step])
    pairs = []
    for scene in rng.integers(0, len(store) // FRAMES_PER_SCENE, size):
        first, second = rng.choice(FRAMES_PER_SCENE, 2, replace=False) + scene * FRAMES_PER_SCENE
        look = Look.drawn(rng)
        one, other = (store.labelled(int(index)) for index in (first, second))
        pairs.append((altered(one, rng, look), altered(other, rng, look)))
    return pairs


def _write_truth(file: Path, truth: list[FrameTruth]) -> None:
    """All rows of all frames, and how many each frame has."""
    np.savez(
        file,
        counts=[len(one.tracks) for one in truth],
        tracks=np.concatenate([one.tracks for one in truth]),
        classes=np.concatenate([one.classes for one in truth]),
        boxes=np.concatenate([one.boxes for one in truth]),
        visibility=np.concatenate([one.visibility for one in truth]),
    )


def _read_truth(file: Path) -> tuple[FrameTruth, ...]:
    with np.load(file) as stored:
        ends = np.cumsum(stored["counts"])[:-1]
        columns = (np.split(stored[key], ends) for key in ("tracks", "classes", "boxes", "visibility"))
        return tuple(FrameTruth(*rows) for rows in zip(*columns, strict=True))
