"""Scores held against cases small enough to count by hand, and against trackeval's own way from files."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("pycocotools", reason='pip install -e ".[edge]"')
pytest.importorskip("trackeval", reason='pip install -e ".[edge]" and what `make` adds')

from models.detection import Detections
from models.edge_scores import (
    ClipTruth,
    StillTruth,
    detection_scores,
    interpolated,
    tracking_scores,
)

Floats = npt.NDArray[np.float64]


def still(boxes: list[list[float]], classes: list[int], crowd: list[bool] | None = None) -> StillTruth:
    array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    areas = (array[:, 2:] - array[:, :2]).prod(axis=1)
    return StillTruth(array, np.array(classes), areas, np.array(crowd or [False] * len(boxes), dtype=bool))


def found(boxes: list[list[float]], scores: list[float], classes: list[int]) -> Detections:
    return Detections(
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        scores=np.array(scores, dtype=np.float32),
        classes=np.array(classes, dtype=np.int64),
    )


BOX = [10.0, 10, 50, 50]
FAR = [100.0, 100, 140, 150]


def test_right_boxes_score_one_and_none_score_zero() -> None:
    truth = [still([BOX, FAR], [0, 1]), still([FAR], [0])]
    right = [found([BOX, FAR], [0.9, 0.8], [0, 1]), found([FAR], [0.7], [0])]
    assert detection_scores(truth, right, ["a", "b"]).m_ap == pytest.approx(1.0)
    nothing = [found([], [], []), found([], [], [])]
    assert detection_scores(truth, nothing, ["a", "b"]).m_ap == 0.0


def test_precision_over_recall_counted_by_hand() -> None:
    """Two objects; answers by score: right, wrong, right. Precision is 1 up to recall 1/2, then 2/3: at COCO's 101
    recalls 51 of 1 and 50 of 2/3."""
    truth = [still([BOX, FAR], [0, 0])]
    answer = [found([BOX, [200, 200, 240, 240], FAR], [0.9, 0.8, 0.7], [0, 0, 0])]
    scores = detection_scores(truth, answer, ["a"])
    expected = (51 * 1.0 + 50 * 2 / 3) / 101
    assert scores.m_ap == pytest.approx(expected, abs=1e-6)
    assert scores.ap50 == pytest.approx(expected, abs=1e-6)


def test_looser_boxes_count_at_looser_overlaps_only() -> None:
    """The answer overlaps by 32 / 40 = 0.8: right at 0.50 to 0.80 (seven of ten thresholds)."""
    answer = [found([[10, 10, 50, 42]], [0.9], [0])]
    scores = detection_scores([still([BOX], [0])], answer, ["a"])
    assert scores.m_ap == pytest.approx(0.7, abs=1e-6)
    assert [scores.ap50, scores.ap75] == pytest.approx([1.0, 1.0])


def test_a_wrong_class_counts_for_nothing_and_a_crowd_against_nobody() -> None:
    truth = [still([BOX, FAR], [0, 0], [False, True])]
    scores = detection_scores(truth, [found([BOX, FAR], [0.5, 0.9], [0, 0])], ["a", "b"])
    assert scores.m_ap == pytest.approx(1.0)
    assert detection_scores(truth, [found([BOX], [0.5], [0])], ["a", "b"]).m_ap == pytest.approx(1.0)
    assert detection_scores(truth, [found([BOX], [0.5], [1])], ["a", "b"]).m_ap == 0.0


def truth_rows(tracks: dict[int, list[tuple[int, float]]], kind: int = 1, counts: int = 1) -> Floats:
    """Boxes of 20 x 20: per track (frame, left)."""
    rows = [
        (frame, track, left, 0.0, 20.0, 20.0, counts, kind, 1.0) for track, at in tracks.items() for frame, left in at
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 9)


def answer_rows(tracks: dict[int, list[tuple[int, float]]]) -> Floats:
    rows = [(frame, track, left, 0.0, 20.0, 20.0, 0.9) for track, at in tracks.items() for frame, left in at]
    return np.array(rows, dtype=np.float64).reshape(-1, 7)


def test_a_copy_of_the_truth_scores_one() -> None:
    tracks = {1: [(f, 5.0 * f) for f in range(1, 7)], 2: [(f, 300 - 5.0 * f) for f in range(2, 7)]}
    scores = tracking_scores([ClipTruth(truth_rows(tracks), 6)], [answer_rows({t + 6: at for t, at in tracks.items()})])
    assert [scores.mota, scores.hota, scores.idf1] == pytest.approx([1.0, 1.0, 1.0])
    assert (scores.wrong, scores.missed, scores.switches) == (0, 0, 0)


def test_misses_wrong_boxes_and_a_switch_counted_by_hand() -> None:
    """One object, ten frames: frame 3 missed, a wrong box in frame 5, another identity from frame 7 on.

    MOTA = 1 - (1 + 1 + 1) / 10. IDF1 = 2 IDTP / (truth + answers) = 2 * 5 / (10 + 10): the longer identity is right in
    frames 1, 2, 4, 5, 6. HOTA at any threshold: the square root of the sum of A over TPs, divided by TP + FN + FP = 11:
    five TPs of A = 5 / (10 + 5 - 5) (frames of truth + frames of that identity - both), four of 4 / (10 + 4 - 4).
    """
    truth = truth_rows({1: [(f, 50.0) for f in range(1, 11)]})
    answer = answer_rows(
        {
            1: [(f, 50.0) for f in (1, 2, 4, 5, 6)],
            2: [(f, 50.0) for f in (7, 8, 9, 10)],
        }
    )
    wrong = np.array([[5, 3, 400, 0, 20, 20, 0.9]])
    scores = tracking_scores([ClipTruth(truth, 10)], [np.vstack([answer, wrong])])
    assert (scores.missed, scores.wrong, scores.switches) == (1, 1, 1)
    assert scores.mota == pytest.approx(1 - 3 / 10)
    assert scores.idf1 == pytest.approx(2 * 5 / (10 + 10))
    associated = 5 * (5 / (10 + 5 - 5)) + 4 * (4 / (10 + 4 - 4))
    assert scores.hota == pytest.approx(np.sqrt(associated / 11), abs=1e-6)


def test_nothing_found_misses_everything() -> None:
    scores = tracking_scores([ClipTruth(truth_rows({1: [(1, 0.0), (2, 0.0)]}), 2)], [np.empty((0, 7))])
    assert (scores.mota, scores.missed, scores.hota) == (0.0, 2, 0.0)


def test_boxes_on_distractors_are_not_held_against_a_tracker() -> None:
    pedestrian = truth_rows({1: [(f, 50.0) for f in (1, 2, 3)]})
    reflection = truth_rows({2: [(f, 200.0) for f in (1, 2, 3)]}, kind=12, counts=0)
    answer = answer_rows({1: [(f, 50.0) for f in (1, 2, 3)], 2: [(f, 200.0) for f in (1, 2, 3)]})
    truth = ClipTruth(np.vstack([pedestrian, reflection]), 3)
    assert tracking_scores([truth], [answer]).mota == pytest.approx(1.0)


def test_clips_are_added_up() -> None:
    right = {1: [(1, 0.0), (2, 0.0), (3, 0.0)]}
    clips = [ClipTruth(truth_rows(right), 3)] * 2
    scores = tracking_scores(clips, [answer_rows(right), np.empty((0, 7))])
    assert [scores.mota, scores.missed] == pytest.approx([0.5, 3])


def random_clip(rng: np.random.Generator, frames: int) -> tuple[Floats, Floats]:
    """Truth of all kinds of rows, and an answer that is sometimes near it."""
    truth, answer = [], []
    for track in range(1, 9):
        left, top = rng.uniform(0, 300), rng.uniform(0, 200)
        kind = int(rng.choice([1, 1, 1, 2, 7, 8, 12]))
        for frame in range(1, frames + 1):
            left, top = left + rng.normal(0, 3), top + rng.normal(0, 3)
            counts = int(kind == 1 and rng.random() < 0.9)
            truth.append((frame, track, left, top, 40.0, 60.0, counts, kind, 1.0))
            if rng.random() < 0.8:
                number = track + (10 if frame > 6 and track % 3 == 0 else 0)
                shift = rng.normal(0, 6, 2)
                answer.append((frame, number, left + shift[0], top + shift[1], 40.0, 60.0, 0.9))
    return np.array(truth), np.array(answer)


@pytest.mark.filterwarnings("ignore")  # trackeval's file reader
def test_scores_are_those_of_trackeval_reading_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import trackeval

    rng = np.random.default_rng(6)
    clips = [random_clip(rng, 12) for _ in range(3)]
    names = [f"MOT17-{number:02d}-FRCNN" for number in range(1, 4)]
    for name, (truth, answer) in zip(names, clips, strict=True):
        folder = tmp_path / "gt" / "MOT17-train" / name
        (folder / "gt").mkdir(parents=True)
        np.savetxt(folder / "gt" / "gt.txt", truth, delimiter=",", fmt="%.6f")
        lines = [",".join(f"{v:g}" if i in (0, 1, 6, 7) else f"{v:.6f}" for i, v in enumerate(row)) for row in truth]
        (folder / "gt" / "gt.txt").write_text("\n".join(lines) + "\n")
        (folder / "seqinfo.ini").write_text(f"[Sequence]\nname={name}\nseqLength=12\n")
        data = tmp_path / "trackers" / "MOT17-train" / "ours" / "data"
        data.mkdir(parents=True, exist_ok=True)
        rows = [f"{int(r[0])},{int(r[1])},{r[2]:.6f},{r[3]:.6f},{r[4]:.6f},{r[5]:.6f},{r[6]},-1,-1,-1" for r in answer]
        (data / f"{name}.txt").write_text("\n".join(rows) + "\n")
    config = {
        "GT_FOLDER": str(tmp_path / "gt"),
        "TRACKERS_FOLDER": str(tmp_path / "trackers"),
        "SEQ_INFO": dict.fromkeys(names, 12),
        "SPLIT_TO_EVAL": "train",
        "PRINT_CONFIG": False,
    }
    quiet = {"PRINT_RESULTS": False, "PRINT_CONFIG": False, "TIME_PROGRESS": False, "OUTPUT_SUMMARY": False}
    evaluator = trackeval.Evaluator(quiet | {"OUTPUT_DETAILED": False, "PLOT_CURVES": False})
    metrics = [trackeval.metrics.HOTA(), trackeval.metrics.CLEAR({"PRINT_CONFIG": False})]
    metrics.append(trackeval.metrics.Identity({"PRINT_CONFIG": False}))
    results, _ = evaluator.evaluate([trackeval.datasets.MotChallenge2DBox(config)], metrics)
    capsys.readouterr()
    expected = results["MotChallenge2DBox"]["ours"]["COMBINED_SEQ"]["pedestrian"]
    scores = tracking_scores([ClipTruth(truth, 12) for truth, _ in clips], [answer for _, answer in clips])
    assert scores.mota == pytest.approx(expected["CLEAR"]["MOTA"], abs=1e-9)
    assert scores.hota == pytest.approx(expected["HOTA"]["HOTA"].mean(), abs=1e-6)
    assert scores.idf1 == pytest.approx(expected["Identity"]["IDF1"], abs=1e-9)
    assert scores.switches == expected["CLEAR"]["IDSW"] > 0


def test_frames_left_out_lie_on_the_line_between_their_neighbours() -> None:
    rows = np.array([[1, 7, 0, 0, 10, 10, 0.8], [4, 7, 30, 6, 16, 10, 0.5], [7, 7, 30, 6, 16, 10, 0.5]])
    filled = interpolated(rows, [1, 4, 7], 8)
    assert filled[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert filled[1, 2:].tolist() == pytest.approx([10, 2, 12, 10, 0.7])
    assert filled[7, 2:6].tolist() == [30, 6, 16, 10]


def test_a_track_is_not_carried_across_a_kept_frame_it_lacks_in() -> None:
    rows = np.array([[1, 7, 0, 0, 10, 10, 0.8], [7, 7, 30, 6, 16, 10, 0.5]])
    assert interpolated(rows, [1, 4, 7, 10], 11)[:, 0].tolist() == [1, 7]
    assert interpolated(np.empty((0, 7)), [1, 4], 6).shape == (0, 7)
