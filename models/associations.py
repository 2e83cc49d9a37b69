"""From detections frame by frame to tracks: SORT and ByteTrack (package `trackers`), QDTrack (`quasi_dense.py`).

An association sees the detections of one frame after another and says which track each belongs to. SORT takes the
sure boxes only and predicts where each track's box goes; ByteTrack lets the doubtful ones continue tracks that found
no sure box; QDTrack goes by looks. What is sure, and what may begin a track, depends on the network's scores: a
variant's entry may say. `trackers` brings OpenCV and takes two seconds and 90 MB to import, which happens when the
first SORT or ByteTrack is made.
"""

from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from models.quasi_dense import NOBODY, FloatArray, IntArray, QuasiDense, QuasiDenseSettings


class Seen(msgspec.Struct, frozen=True, eq=False):
    """What a network saw in one frame; `embeddings` [n, d] where it gives some, else [n, 0]."""

    boxes: npt.NDArray[np.float32]  # [n, 4] corners, pixels
    scores: npt.NDArray[np.float32]  # [n]
    classes: IntArray  # [n]
    embeddings: npt.NDArray[np.float32]


class BoxSettings(msgspec.Struct, frozen=True):
    """SORT's and ByteTrack's parameters. Frames are those that the tracker is given, whatever their rate."""

    begin_score: float  # least score that begins a track
    sure_score: float  # boxes from it on are matched first (ByteTrack), or at all (SORT)
    match_overlap: float  # least IoU of a match
    remember_frames: int  # that a track may be out of sight


class Association(Protocol):
    """Detections of one clip, frame by frame, to track numbers."""

    def update(self, seen: Seen) -> list[tuple[int, int, int]]:
        """(frame from 0, detection, track) of what is now known; also of the frame before, once it is sure."""
        ...


# Scores as published for MOT17. Overlaps are ByteTrack's for both: at low frame rates boxes hardly overlap, and SORT's
# own 0.3 costs 0.14 MOTA at 3 frames per second of our scenes for nothing at 15.
SORT = BoxSettings(begin_score=0.5, sure_score=0.5, match_overlap=0.1, remember_frames=5)
BYTETRACK = BoxSettings(begin_score=0.7, sure_score=0.6, match_overlap=0.1, remember_frames=30)


class BoxAssociation:
    """SORT or ByteTrack by box overlap and motion.

    Both wait for a second box before they number a track. A clip is there as a whole, so the first box is reported
    then, too.
    """

    def __init__(self, kind: str, settings: BoxSettings) -> None:
        import supervision
        from trackers import ByteTrackTracker, SORTTracker

        common: dict[str, Any] = {
            "lost_track_buffer": settings.remember_frames,
            "frame_rate": 30.0,  # what `lost_track_buffer` counts in: so it counts frames
            "track_activation_threshold": settings.begin_score,
            "minimum_consecutive_frames": 2,
            "minimum_iou_threshold": settings.match_overlap,
        }
        self._tracker: Any
        if kind == "sort":
            self._tracker = SORTTracker(**common)
        else:
            self._tracker = ByteTrackTracker(high_conf_det_threshold=settings.sure_score, **common)
        self._boxes = supervision.Detections
        self._least_score = settings.sure_score if kind == "sort" else 0.0
        self._frame = -1
        self._first: list[tuple[Any, int]] = []  # tracklets of the last frame with the detection that began them

    def update(self, seen: Seen) -> list[tuple[int, int, int]]:
        """See `Association`."""
        self._frame += 1
        chosen = np.flatnonzero(seen.scores >= self._least_score)
        before = list(self._tracker.tracks)  # held, so that no new one gets an old one's place in memory
        found = self._tracker.update(
            self._boxes(
                xyxy=seen.boxes[chosen].astype(np.float64).reshape(-1, 4),
                confidence=seen.scores[chosen].astype(np.float64),
                class_id=chosen,  # comes back beside the track: which detection it was
            )
        )
        known: list[tuple[int, int, int]] = []
        if len(found):
            known = [
                (self._frame, int(detection), int(track))
                for detection, track in zip(found.class_id, found.tracker_id, strict=True)
                if track != NOBODY
            ]
        confirmed = [
            (self._frame - 1, detection, int(tracklet.tracker_id))
            for tracklet, detection in self._first
            if tracklet.tracker_id != NOBODY
        ]
        taken = {detection for _, detection, _ in known}
        free = [int(detection) for detection in chosen if int(detection) not in taken]
        self._first = []
        for tracklet in self._tracker.tracks:
            if free and not any(tracklet is old for old in before):
                gap = np.abs(seen.boxes[free] - np.asarray(tracklet.get_state_bbox())).sum(axis=1)
                self._first.append((tracklet, free[int(gap.argmin())]))
        return confirmed + known


class LooksAssociation:
    """QDTrack's association in this file's terms."""

    def __init__(self, settings: QuasiDenseSettings) -> None:
        self._association = QuasiDense(settings)
        self._frame = -1

    def update(self, seen: Seen) -> list[tuple[int, int, int]]:
        """See `Association`."""
        self._frame += 1
        embeddings: FloatArray = seen.embeddings.astype(np.float64)
        numbers = self._association.update(seen.boxes, seen.scores, seen.classes, embeddings)
        return [(self._frame, place, number) for place, number in enumerate(numbers.tolist()) if number != NOBODY]


def associate(kind: str, begin_score: float = 0.0, sure_score: float = 0.0) -> Association:
    """A new association for one clip. `kind`: "sort", "bytetrack" or "qdtrack"; scores of 0: the method's own.

    Raises ImportError where the package `trackers` is needed and missing.
    """
    if kind == "qdtrack":
        own = QuasiDenseSettings()
        begin_score, sure_score = begin_score or own.begin_score, sure_score or own.continue_score
        return LooksAssociation(msgspec.structs.replace(own, begin_score=begin_score, continue_score=sure_score))
    settings = {"sort": SORT, "bytetrack": BYTETRACK}[kind]
    begin_score, sure_score = begin_score or settings.begin_score, sure_score or settings.sure_score
    return BoxAssociation(kind, msgspec.structs.replace(settings, begin_score=begin_score, sure_score=sure_score))
