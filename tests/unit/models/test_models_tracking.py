"""Associations and trackers, on detections made by arithmetic: who is who is known."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from models.associations import SORT, Association, BoxAssociation, LooksAssociation, Seen, associate
from models.quasi_dense import NOBODY, QuasiDense, QuasiDenseSettings, bi_softmax, iou
from models.tracking import Tracks, follow, in_the_original

pytest.importorskip("trackers", reason='pip install -e ".[edge]" and what `make` adds')

KINDS = ["sort", "bytetrack", "qdtrack"]
Floats = npt.NDArray[np.float64]


def seen(boxes: Floats, scores: list[float], classes: list[int], looks: Floats | None = None) -> Seen:
    """One frame; looks default to one direction per row."""
    given = np.eye(len(boxes), 8) * 8 if looks is None else looks
    return Seen(
        boxes.astype(np.float32).reshape(-1, 4),
        np.array(scores, dtype=np.float32),
        np.array(classes, dtype=np.int64),
        given.astype(np.float32),
    )


def drifting(frame: int) -> Floats:
    """Three objects on straight lines, well apart."""
    left = np.array([10.0 + 3 * frame, 100 - 2 * frame, 200])
    top = np.array([10.0, 60 + frame, 120 - 2 * frame])
    return np.stack([left, top, left + 30, top + 24], axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_three_objects_on_straight_lines_are_three_whole_tracks(kind: str) -> None:
    rng = np.random.default_rng(0)
    frames = []
    for frame in range(20):
        shuffled = rng.permutation(3)
        boxes = drifting(frame)[shuffled] + rng.normal(0, 0.3, (3, 4))
        frames.append(seen(boxes, [0.95] * 3, (shuffled + 4).tolist(), np.eye(8)[shuffled] * 8))
    tracks = follow(frames, associate(kind))
    assert len(tracks.rows) == 60
    assert tracks.rows[:, 0].tolist() == [f for f in range(1, 21) for _ in range(3)]
    assert len(set(tracks.rows[:, 1])) == 3
    # In the answer, a track is one object all along: its box is near that object's line.
    for track in set(tracks.rows[:, 1].tolist()):
        mine = tracks.rows[tracks.rows[:, 1] == track]
        lines = np.array([drifting(int(frame) - 1)[:, :2] for frame in mine[:, 0]])
        gaps = np.abs(lines - mine[:, None, 2:4]).sum(axis=2)
        assert len(set(gaps.argmin(axis=1).tolist())) == 1
        assert gaps.min(axis=1).max() < 4
    assert np.allclose(tracks.rows[:, 4:6], [30, 24], atol=3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_track_has_one_class_and_rows_lie_in_order(kind: str) -> None:
    frames = [seen(drifting(f)[:1], [0.95], [1 if f == 3 else 2]) for f in range(8)]
    tracks = follow(frames, associate(kind))
    assert tracks.classes.tolist() == [2] * 8
    assert np.all(np.diff(tracks.rows[:, 0]) == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_clips_without_objects_or_frames_have_no_tracks(kind: str) -> None:
    nothing = seen(np.empty((0, 4)), [], [], np.empty((0, 8)))
    assert follow([], associate(kind)).rows.shape == (0, 7)
    tracks = follow([nothing] * 4, associate(kind))
    assert (tracks.rows.shape, tracks.classes.shape) == ((0, 7), (0,))
    between = [seen(drifting(0), [0.95] * 3, [0] * 3), nothing, nothing, seen(drifting(1), [0.95] * 3, [0] * 3)]
    assert set(follow(between, associate(kind)).rows[:, 0]) <= {1, 4}


def test_bytetrack_keeps_a_track_through_doubtful_frames_and_sort_does_not() -> None:
    frames = [seen(drifting(f)[:1], [0.3 if 6 <= f < 14 else 0.9], [0]) for f in range(20)]
    by_byte, by_sort = follow(frames, associate("bytetrack")), follow(frames, associate("sort"))
    assert by_byte.rows[:, 0].tolist() == list(range(1, 21))
    assert len(set(by_byte.rows[:, 1])) == 1
    assert not set(range(7, 15)) & set(by_sort.rows[:, 0].astype(int))


@pytest.mark.parametrize("kind", ["sort", "bytetrack"])
def test_one_sighting_is_no_track_and_two_are_reported_from_the_first(kind: str) -> None:
    flash = np.array([[200.0, 20, 230, 44]])
    frames = []
    for frame in range(10):
        boxes, scores = drifting(frame)[:1], [0.9]
        if frame == 4:
            boxes, scores = np.vstack([boxes, flash]), [0.9, 0.9]
        frames.append(seen(boxes, scores, [0] * len(boxes)))
    tracks = follow(frames, associate(kind))
    assert tracks.rows[:, 0].tolist() == list(range(1, 11))
    assert len(set(tracks.rows[:, 1])) == 1


def test_looks_tell_apart_what_boxes_cannot() -> None:
    """Two objects jump to each other's places: boxes say they stayed, looks say they moved."""
    places = np.array([[10.0, 10, 40, 40], [100, 10, 130, 40]])
    looks = np.eye(2, 8) * 8
    frames = [seen(places, [0.95] * 2, [0] * 2, looks if f % 2 == 0 else looks[::-1]) for f in range(6)]
    tracks = follow(frames, associate("qdtrack"))
    first = tracks.rows[tracks.rows[:, 1] == 1]
    assert first[:, 2].tolist() == [10, 100, 10, 100, 10, 100]


def published_matching(
    likeness: Floats, scores: list[float], known: list[int], settings: QuasiDenseSettings
) -> list[int]:
    """The matching rule as the paper's algorithm words it, with loops over a copy of the likenesses."""
    left = likeness.copy()
    found = []
    for place, score in enumerate(scores):
        column = max(range(len(known)), key=lambda c: (left[place, c], -c))
        if (
            left[place, column] > settings.match_likeness
            and known[column] != NOBODY
            and score > settings.continue_score
        ):
            found.append(known[column])
            for other in range(len(scores)):
                if other != place:
                    left[other, column] = 0
        else:
            found.append(NOBODY)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_matches_are_those_of_the_rule_written_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    settings = QuasiDenseSettings(within_class=False)
    tracker = QuasiDense(settings)
    apart = np.array([[60.0 * i, 0, 60 * i + 40, 40] for i in range(6)])
    looks = rng.normal(0, 1.2, (6, 5))
    first = tracker.update(apart, np.linspace(0.99, 0.94, 6), np.zeros(6, dtype=np.int64), looks)
    assert first.tolist() == [1, 2, 3, 4, 5, 6]
    scores = np.sort(rng.uniform(0.4, 0.89, 6))[::-1]
    again = looks[rng.permutation(6)] + rng.normal(0, 0.4, (6, 5))
    found = tracker.update(apart, scores, np.zeros(6, dtype=np.int64), again)
    products = again @ looks.T
    rows = np.exp(products) / np.exp(products).sum(axis=1, keepdims=True)
    columns = np.exp(products) / np.exp(products).sum(axis=0, keepdims=True)
    assert np.allclose(bi_softmax(products), (rows + columns) / 2)
    assert found.tolist() == published_matching((rows + columns) / 2, scores.tolist(), [1, 2, 3, 4, 5, 6], settings)
    assert len(set(found.tolist()) - {NOBODY}) == len([n for n in found.tolist() if n != NOBODY])


def test_likeness_is_high_only_where_each_is_the_others_best() -> None:
    products = np.array([[9.0, 0.0], [8.0, 0.0]])
    likeness = bi_softmax(products)
    assert likeness[0, 0] > 0.85
    assert likeness[1, 0] < 0.65


def test_of_two_that_look_alike_the_better_one_continues_the_track() -> None:
    boxes = np.array([[0.0, 0, 30, 30], [100, 0, 130, 30]])
    look, kinds = np.array([[5.0, 0]]), np.zeros(2, dtype=np.int64)
    tracker = QuasiDense(QuasiDenseSettings())
    tracker.update(boxes[:1], np.array([0.95]), kinds[:1], look)
    assert tracker.update(boxes, np.array([0.7, 0.8]), kinds, look.repeat(2, 0)).tolist() == [NOBODY, 1]


def test_duplicates_of_a_better_box_get_no_track() -> None:
    box = np.array([10.0, 10, 50, 50])
    boxes = np.stack([box, box + 1, box + np.array([0, 0, 25, 25])])
    numbers = QuasiDense(QuasiDenseSettings()).update(
        boxes, np.array([0.95, 0.94, 0.45]), np.zeros(3, dtype=np.int64), np.eye(3) * 8
    )
    assert numbers.tolist() == [1, NOBODY, NOBODY]


def test_a_backdrop_keeps_a_newcomer_from_taking_a_track() -> None:
    """A doubtful box that resembles a track a little stays as a backdrop; when it comes back it matches that."""
    settings = QuasiDenseSettings()
    boxes = np.array([[0.0, 0, 30, 30], [100, 0, 130, 30]])
    looks = np.array([[4.0, 0], [3.0, 3.0]])
    kinds = np.zeros(2, dtype=np.int64)
    with_backdrop = QuasiDense(settings)
    assert with_backdrop.update(boxes, np.array([0.95, 0.6]), kinds, looks).tolist() == [1, NOBODY]
    assert with_backdrop.update(boxes[1:], np.array([0.6]), kinds[1:], looks[1:]).tolist() == [NOBODY]
    without = QuasiDense(settings)
    assert without.update(boxes[:1], np.array([0.95]), kinds[:1], looks[:1]).tolist() == [1]
    assert without.update(boxes[1:], np.array([0.6]), kinds[1:], looks[1:]).tolist() == [1]


def test_a_track_is_forgotten_after_its_frames_and_may_keep_its_class() -> None:
    settings = QuasiDenseSettings(remember_frames=3)
    box, look = np.array([[0.0, 0, 30, 30]]), np.array([[5.0, 0]])
    nothing = (np.empty((0, 4)), np.empty(0), np.empty(0, dtype=np.int64), np.empty((0, 2)))
    for gap, expected in ((2, 1), (3, 2)):
        tracker = QuasiDense(settings)
        tracker.update(box, np.array([0.95]), np.array([1]), look)
        for _ in range(gap):
            tracker.update(*nothing)
        assert tracker.update(box, np.array([0.95]), np.array([1]), look).tolist() == [expected]
    for within, expected in ((True, 2), (False, 1)):
        tracker = QuasiDense(QuasiDenseSettings(within_class=within))
        tracker.update(box, np.array([0.95]), np.array([1]), look)
        assert tracker.update(box, np.array([0.95]), np.array([2]), look).tolist() == [expected]


def test_a_variants_own_scores_replace_the_methods() -> None:
    frames = [seen(drifting(f)[:1], [0.45], [0]) for f in range(6)]
    for kind in KINDS:
        assert len(follow(frames, associate(kind)).rows) == 0
        assert len(follow(frames, associate(kind, begin_score=0.4, sure_score=0.4)).rows) == 6


def test_embeddings_are_remembered_with_momentum() -> None:
    tracker = QuasiDense(QuasiDenseSettings(momentum=0.8))
    box, one = np.array([[0.0, 0, 30, 30]]), np.zeros(1, dtype=np.int64)
    tracker.update(box, np.array([0.95]), one, np.array([[4.0, 0.0]]))
    tracker.update(box, np.array([0.95]), one, np.array([[3.0, 1.0]]))
    assert tracker._tracks[1].embedding.tolist() == pytest.approx([0.2 * 4 + 0.8 * 3, 0.8 * 1])


def test_overlaps_are_those_of_counted_pixels() -> None:
    rng = np.random.default_rng(2)
    corner = rng.integers(0, 20, (6, 2))
    boxes = np.hstack([corner, corner + rng.integers(0, 15, (6, 2))]).astype(float)

    def pixels(box: Floats) -> set[tuple[int, int]]:
        left, top, right, bottom = box.astype(int)
        return set(itertools.product(range(left, right), range(top, bottom)))

    for (i, one), (j, two) in itertools.product(enumerate(boxes), enumerate(boxes)):
        union = pixels(one) | pixels(two)
        expected = len(pixels(one) & pixels(two)) / len(union) if union else 0
        assert iou(boxes, boxes)[i, j] == pytest.approx(expected)


def test_answers_are_in_the_pixels_and_numbers_of_the_original() -> None:
    tracks = Tracks(np.array([[1.0, 7, 10, 20, 30, 40, 0.5], [2, 7, 11, 21, 30, 40, 0.5]]), np.array([0, 0]))
    found = in_the_original(tracks, 0.5, (1, 4))
    assert found.rows.tolist() == [[1, 7, 20, 40, 60, 80, 0.5], [4, 7, 22, 42, 60, 80, 0.5]]
    assert tracks.rows[1, 0] == 2


@pytest.mark.parametrize("association", [BoxAssociation("sort", SORT), LooksAssociation(QuasiDenseSettings())])
def test_associations_name_detections_of_frames_they_have_seen(association: Association) -> None:
    for frame in range(6):
        for of_frame, detection, track in association.update(seen(drifting(frame), [0.95] * 3, [0] * 3)):
            assert of_frame in (frame - 1, frame)
            assert detection in (0, 1, 2)
            assert track >= 0


def test_a_backdrop_is_forgotten_after_its_frames() -> None:
    """The newcomer of the test above, but with a frame between: nothing keeps it from the track any more."""
    boxes = np.array([[0.0, 0, 30, 30], [100, 0, 130, 30]])
    looks, kinds = np.array([[4.0, 0], [3.0, 3.0]]), np.zeros(2, dtype=np.int64)
    for backdrop_frames, expected in ((1, 1), (2, NOBODY)):
        tracker = QuasiDense(QuasiDenseSettings(backdrop_frames=backdrop_frames))
        tracker.update(boxes, np.array([0.95, 0.6]), kinds, looks)
        tracker.update(np.empty((0, 4)), np.empty(0), kinds[:0], looks[:0])
        assert tracker.update(boxes[1:], np.array([0.6]), kinds[1:], looks[1:]).tolist() == [expected]


def test_of_classes_with_equal_scores_a_track_has_the_first() -> None:
    for order in ([0, 1], [1, 0]):
        frames = [seen(drifting(f)[:1], [0.95], [label], np.ones((1, 2))) for f, label in enumerate(order)]
        assert follow(frames, associate("qdtrack")).classes.tolist() == [0, 0]
