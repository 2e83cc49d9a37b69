"""Pictures and clips with truth for the profile and its like: from COCO, from MOT17, or rendered scenes.

Each item is made when it is asked for and may be dropped after use, so that a data set need not fit into memory.
Rendered ones are sent through a JPEG of the quality that a client's camera would give, as everything else was.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from models.adapt import Media
from models.clips import encode_jpeg
from models.datasets.coco import CocoData, DatasetError, read_coco
from models.datasets.mot import MotSequence, read_mot
from models.datasets.scenes import LABELS, SceneSettings, plan_scene, render
from models.edge_scores import PEDESTRIAN, ClipTruth, StillTruth
from models.preprocess import InvalidInput, decode

CAMERA_QUALITY = 95
HARDLY_VISIBLE = 0.25  # scenes: less visible objects are crowds, neither asked for nor held against a detector
HIDDEN = 0.1  # scenes: less visible objects do not count for a tracker


class Still(msgspec.Struct, frozen=True, eq=False):
    """One picture."""

    media: Media
    truth: StillTruth


class Clip(msgspec.Struct, frozen=True, eq=False):
    """One clip."""

    media: Media
    truth: ClipTruth


class Stills(msgspec.Struct, frozen=True, eq=False):
    """A data set of pictures: what its classes are called, how many pictures, and where they come from."""

    source: str
    labels: tuple[str, ...]
    count: int
    coco: CocoData | None = None
    first_seed: int = 0

    def __iter__(self) -> Iterator[Still]:
        """Raises `DatasetError` where a picture cannot be read."""
        if self.coco is not None:
            yield from (_coco_still(self.coco, index) for index in range(self.count))
            return
        for seed in range(self.first_seed, self.first_seed + self.count):
            clip = render(plan_scene(seed, SceneSettings(frames=3)), [1])
            one = clip.truth[0]
            sides = one.boxes[:, 2:] - one.boxes[:, :2]
            truth = StillTruth(one.boxes, one.classes, sides.prod(axis=1), one.visibility < HARDLY_VISIBLE)
            yield Still(_through_a_camera(clip.frames, 0.0), truth)


class Clips(msgspec.Struct, frozen=True, eq=False):
    """A data set of clips."""

    source: str
    count: int
    fps: float
    sequences: tuple[MotSequence, ...] = ()
    most_frames: int = 0  # of a sequence; 0: all
    first_seed: int = 0

    def __iter__(self) -> Iterator[Clip]:
        """Raises `DatasetError` where a frame cannot be read."""
        if self.sequences:
            yield from (_mot_clip(one, self.most_frames) for one in self.sequences)
            return
        for seed in range(self.first_seed, self.first_seed + self.count):
            clip = render(plan_scene(seed))
            rows = [
                (number, track, box[0], box[1], box[2] - box[0], box[3] - box[1], seen >= HIDDEN, PEDESTRIAN, seen)
                for number, one in enumerate(clip.truth, 1)
                for track, box, seen in zip(one.tracks, one.boxes, one.visibility, strict=True)
            ]
            truth = ClipTruth(np.array(rows, dtype=np.float64).reshape(-1, 9), len(clip.frames))
            yield Clip(_through_a_camera(clip.frames, clip.fps), truth)


def scene_stills(count: int, first_seed: int = 0) -> Stills:
    """One still of each held-out scene from `first_seed` on."""
    return Stills(f"rendered scenes {first_seed} to {first_seed + count - 1}", LABELS, count, first_seed=first_seed)


def scene_clips(count: int, first_seed: int = 0) -> Clips:
    """Held-out scenes as whole clips."""
    source = f"rendered scenes {first_seed} to {first_seed + count - 1}"
    return Clips(source, count, SceneSettings().fps, first_seed=first_seed)


def coco_stills(path: Path, split: str = "", most: int = 0) -> Stills:
    """The first `most` pictures (0: all) of a COCO folder. Raises `DatasetError`."""
    coco = read_coco(path, split)
    count = min(most or len(coco.images), len(coco.images))
    return Stills(f"{path.name}/{coco.annotations.name}, {count} pictures", coco.labels, count, coco)


def mot_clips(path: Path, most: int = 0, most_frames: int = 0) -> Clips:
    """The first `most` sequences (0: all) of a MOT17 folder, `most_frames` of each (0: all). Raises `DatasetError`."""
    sequences = tuple(one for one in read_mot(path) if len(one.truth))
    if not sequences:
        raise DatasetError(f"{path}: no sequence there has truth (gt/gt.txt), so nothing can be scored")
    chosen = sequences[: most or len(sequences)]
    rates = {one.fps for one in chosen}
    if len(rates) > 1:
        raise DatasetError(
            f"{path}: sequences at {sorted(rates)} frames per second; profile those of one rate at a time"
        )
    return Clips(f"{path.name}, {len(chosen)} sequences", len(chosen), chosen[0].fps, chosen, most_frames)


def _through_a_camera(frames: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]", fps: float) -> Media:
    seen = tuple(decode(encode_jpeg(frame, CAMERA_QUALITY), "image/jpeg", "rgb") for frame in frames)
    return Media(seen, fps, frames.shape[2], frames.shape[1])


def _coco_still(coco: CocoData, index: int) -> Still:
    image = coco.images[index]
    truth = StillTruth(image.boxes, image.classes, image.areas, image.crowd)
    return Still(_read_files([image.file], 0.0), truth)


def _mot_clip(sequence: MotSequence, most_frames: int) -> Clip:
    files = list(itertools.islice(sequence.frames, most_frames or None))
    rows = sequence.truth[sequence.truth[:, 0] <= len(files)]
    return Clip(_read_files(files, sequence.fps), ClipTruth(rows, len(files)))


def _read_files(files: list[Path], fps: float) -> Media:
    frames = []
    for file in files:
        try:
            frames.append(decode(file.read_bytes(), "", "rgb"))
        except (OSError, InvalidInput) as error:
            raise DatasetError(f"{file}: cannot be read: {error}") from error
    return Media(tuple(frames), fps, frames[0].shape[1], frames[0].shape[0])
