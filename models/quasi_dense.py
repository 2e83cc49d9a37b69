"""QDTrack's association: who is who by what they look like (Pang et al. 2021, "Quasi-Dense Similarity Learning").

Every detection brings an embedding. Its likeness to a track is the mean of two softmaxes over their inner products,
over all tracks and over all detections ("bi-softmax"): it is high only where each is the other's best match. Three
kinds of detections take part: confident ones may begin a track, middling ones only continue one, and those that matched
nothing stay for a frame as *backdrops*, which keep a newcomer from being taken for a track that resembles it. Plain
numpy; parameters as published for MOT17, which has one class. With several, a track may change its class from frame to
frame here (an unsure class would cut it), and gets the one that its scores speak for.
"""

import msgspec
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

NOBODY = -1
_TWICE = -2  # within one frame: matches a track, but too unsure to continue it; neither track nor backdrop


class QuasiDenseSettings(msgspec.Struct, frozen=True):
    """Thresholds of the published tracker; scores and overlaps are fractions."""

    begin_score: float = 0.9  # least score that begins a track
    continue_score: float = 0.5  # least score that continues one
    match_likeness: float = 0.5  # least bi-softmax likeness of a match
    unsure_likeness: float = 0.5  # a match above it that is too unsure to continue becomes no backdrop either
    backdrop_overlap: float = 0.3  # least IoU with a better box at which an unsure box counts as a duplicate
    duplicate_overlap: float = 0.7  # the same for a confident box
    remember_frames: int = 30  # that a track may be out of sight
    backdrop_frames: int = 1
    momentum: float = 0.8  # share of the newest embedding in a track's
    within_class: bool = False  # whether a track keeps its class


class _Track(msgspec.Struct):
    embedding: FloatArray
    label: int
    last_frame: int


class QuasiDense:
    """The association of one clip: call `update` once per frame, in order."""

    def __init__(self, settings: QuasiDenseSettings) -> None:
        self._settings = settings
        self._tracks: dict[int, _Track] = {}
        self._backdrops: list[tuple[FloatArray, IntArray]] = []  # newest first: embeddings, classes
        self._frame = 0
        self._next = 1

    def update(
        self,
        boxes: npt.NDArray[np.floating],
        scores: npt.NDArray[np.floating],
        classes: IntArray,
        embeddings: FloatArray,
    ) -> IntArray:
        """Track number of each detection of the next frame, or -1. Boxes [n, 4] corners, embeddings [n, d].

        Duplicates get -1 as well.
        """
        how = self._settings
        self._frame += 1
        order = np.argsort(-scores, kind="stable")
        overlaps = iou(boxes[order], boxes[order])
        kept = self._without_duplicates(scores[order], overlaps)
        order, overlaps = order[kept], overlaps[np.ix_(kept, kept)]
        score, label, embedding = scores[order], classes[order], embeddings[order].astype(np.float64)

        found = self._match(score, label, embedding)
        new = (found == NOBODY) & (score > how.begin_score)
        found[new] = np.arange(self._next, self._next + int(new.sum()))
        self._next += int(new.sum())

        self._remember(found, label, embedding, overlaps)
        numbers = np.full(len(scores), NOBODY, dtype=np.int64)
        numbers[order] = np.maximum(found, NOBODY)
        return numbers

    def _without_duplicates(self, scores: npt.NDArray[np.floating], overlaps: FloatArray) -> IntArray:
        """Places of the boxes, best first, that no better box covers."""
        how = self._settings
        most = np.where(scores < how.continue_score, how.backdrop_overlap, how.duplicate_overlap)
        better = np.tril(overlaps, -1)  # row i: overlap with boxes before i
        return np.flatnonzero(~(better > most[:, None]).any(axis=1))

    def _match(self, scores: npt.NDArray[np.floating], classes: IntArray, embeddings: FloatArray) -> IntArray:
        """Each detection's track, best detection first; -1 nobody, -2 a match too unsure to use."""
        how = self._settings
        found = np.full(len(scores), NOBODY, dtype=np.int64)
        if len(scores) == 0 or not self._tracks:
            return found
        known = np.concatenate([[t.embedding for t in self._tracks.values()], *(e for e, _ in self._backdrops)])
        labels = np.concatenate([[t.label for t in self._tracks.values()], *(c for _, c in self._backdrops)])
        numbers = np.full(len(known), NOBODY, dtype=np.int64)
        numbers[: len(self._tracks)] = list(self._tracks)
        likeness = bi_softmax(embeddings @ known.T)
        if how.within_class:
            likeness = np.where(classes[:, None] == labels[None], likeness, 0.0)
        for place in range(len(scores)):
            best = int(likeness[place].argmax())
            if likeness[place, best] <= how.match_likeness or numbers[best] == NOBODY:
                continue
            if scores[place] > how.continue_score:
                found[place] = numbers[best]
                likeness[:, best] = 0.0  # nobody else may have it
            elif likeness[place, best] > how.unsure_likeness:
                found[place] = _TWICE
        return found

    def _remember(self, found: IntArray, classes: IntArray, embeddings: FloatArray, overlaps: FloatArray) -> None:
        how = self._settings
        for number, label, embedding in zip(found.tolist(), classes.tolist(), embeddings, strict=True):
            if number < 0:
                continue
            known = self._tracks.get(number)
            if known is None:
                self._tracks[number] = _Track(embedding, label, self._frame)
            else:
                known.embedding = (1 - how.momentum) * known.embedding + how.momentum * embedding
                known.label, known.last_frame = label, self._frame
        covered = (np.tril(overlaps, -1) > how.backdrop_overlap).any(axis=1)
        backdrops = np.flatnonzero((found == NOBODY) & ~covered)
        self._backdrops.insert(0, (embeddings[backdrops], classes[backdrops]))
        del self._backdrops[how.backdrop_frames :]
        gone = [n for n, t in self._tracks.items() if self._frame - t.last_frame >= how.remember_frames]
        for number in gone:
            del self._tracks[number]


def bi_softmax(products: FloatArray) -> FloatArray:
    """Mean of the softmaxes over columns and over rows of the inner products [detections, known]."""
    return (_softmax(products, 1) + _softmax(products, 0)) / 2


def iou(first: npt.NDArray[np.floating], second: npt.NDArray[np.floating]) -> FloatArray:
    """Intersection over union of every box of [n, 4] with every one of [m, 4] (corners): [n, m]; 0 without area."""
    one, two = first.astype(np.float64)[:, None], second.astype(np.float64)[None]
    sides = np.minimum(one[..., 2:], two[..., 2:]) - np.maximum(one[..., :2], two[..., :2])
    both = sides.clip(min=0).prod(axis=-1)
    whole = (one[..., 2:] - one[..., :2]).prod(axis=-1) + (two[..., 2:] - two[..., :2]).prod(axis=-1) - both
    found: FloatArray = np.divide(both, whole, out=np.zeros_like(both), where=whole > 0)
    return found


def _softmax(values: FloatArray, axis: int) -> FloatArray:
    raised = np.exp(values - values.max(axis=axis, keepdims=True))
    share: FloatArray = raised / raised.sum(axis=axis, keepdims=True)
    return share
