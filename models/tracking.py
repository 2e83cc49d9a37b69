"""Trackers: the frames of a clip in, tracks out: a detector on every frame, then an association over all of them.

One network per tracker (`models/detection.py` runs it); QDTrack's also gives an `embeddings` row per box. What belongs
together over time is `models/associations.py`'s work.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from models.associations import Association, Seen, associate
from models.catalog import VariantError
from models.detection import Detector, Image, open_detector
from models.edge_catalog import EdgeVariant

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

EMBEDDINGS = "embeddings"


class Tracks(msgspec.Struct, frozen=True, eq=False):
    """The tracks of one clip, by frame and then by track, in the order of MOTChallenge's files."""

    rows: FloatArray  # [m, 7]: frame (from 1), track, left, top, width, height (pixels of the frames), score
    classes: IntArray  # [m], index into the variant's labels; the same all along a track


class Tracker:
    """A loaded tracker. Keeps nothing from one clip to the next; one call at a time."""

    def __init__(self, variant: EdgeVariant, detector: Detector) -> None:
        self.variant = variant
        self._detector = detector

    def track(self, frames: Sequence[Image]) -> Tracks:
        """Tracks of `frames` [height, width, 3], in order. Raises `ValueError` as `Detector.detect` does."""
        return follow([self.look(frame) for frame in frames], self.association())

    def association(self) -> Association:
        """A new one for one clip."""
        return associate(self.variant.tracker, self.variant.begin_score, self.variant.sure_score)

    def look(self, frame: Image) -> Seen:
        """What the network sees in one frame."""
        found = self._detector.outputs(frame)
        return Seen(found["boxes"], found["scores"], found["classes"], _embeddings(found))

    def warm_up(self) -> None:
        """Run the network and the association once, so that the first clip waits for no import."""
        self._detector.warm_up()
        side = self.variant.short_side
        self.track([np.full((side, side, 3), 127, dtype=np.uint8)])

    def close(self) -> None:
        """Give the network's memory back."""
        self._detector.close()


def open_tracker(variant: EdgeVariant, *, device: str = "cpu", threads: int = 1) -> Tracker:
    """Load `variant`. Raises `VariantError`, also where the package `trackers` is needed and missing."""
    try:
        associate(variant.tracker)
    except ImportError as error:
        remedy = f'the package {error.name} is missing: pip install -e ".[edge]" and what `make` adds to it'
        raise VariantError(variant.name, "tracker", variant.tracker, remedy) from error
    return Tracker(variant, open_detector(variant, device=device, threads=threads))


def follow(seen: Sequence[Seen], association: Association) -> Tracks:
    """Tracks of a clip of which every frame was looked at. A track has the class that its scores speak for most."""
    found = [row for one in seen for row in association.update(one)]
    found.sort(key=lambda row: (row[0], row[2]))
    rows = np.empty((len(found), 7))
    votes: dict[int, dict[int, float]] = {}
    for place, (frame, detection, track) in enumerate(found):
        left, top, right, bottom = seen[frame].boxes[detection].tolist()
        score = float(seen[frame].scores[detection])
        rows[place] = (frame + 1, track, left, top, right - left, bottom - top, score)
        label = int(seen[frame].classes[detection])
        of_track = votes.setdefault(track, {})
        of_track[label] = of_track.get(label, 0.0) + score
    winner = {track: max(of_track, key=lambda label: (of_track[label], -label)) for track, of_track in votes.items()}
    return Tracks(rows, np.array([winner[track] for _, _, track in found], dtype=np.int64))


def in_the_original(tracks: Tracks, scale: float, frame_numbers: Sequence[int]) -> Tracks:
    """Tracks of adapted frames in the pixels and frame numbers of the clip they were made from.

    `scale` and `frame_numbers` are those of `models.adapt.Adapted`.
    """
    rows = tracks.rows.copy()
    numbers = np.asarray(frame_numbers, dtype=np.float64)
    rows[:, 0] = numbers[rows[:, 0].astype(np.int64) - 1]
    rows[:, 2:6] /= scale
    return Tracks(rows, tracks.classes)


def _embeddings(found: dict[str, npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    given = found.get(EMBEDDINGS)
    return np.empty((len(found["scores"]), 0), dtype=np.float32) if given is None else given
