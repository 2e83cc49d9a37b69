"""The profile on detectors and trackers made of arithmetic, whose scores, sizes and passes are known."""

import itertools
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pycocotools", reason='pip install -e ".[edge]"')
pytest.importorskip("trackeval", reason='pip install -e ".[edge]" and what `make` adds')

from models import edge_profile
from models.adapt import Configuration, Media
from models.associations import Association, Seen, associate
from models.clip_limits import Frame
from models.datasets.coco import write_coco
from models.datasets.mot import write_sequence
from models.datasets.scenes import LABELS, SceneSettings, plan_scene, render
from models.detection import Detections
from models.edge_catalog import EdgeVariant, edge_variant_from, load_edge_catalog
from models.edge_items import Clip, Still, coco_stills, mot_clips, scene_clips, scene_stills
from models.edge_profile import (
    detection_settings,
    profile_detection,
    profile_tracking,
    table_of,
    tracking_settings,
)
from models.edge_scores import ClipTruth, StillTruth
from policies.placement.tables import TABLES_DIRECTORY, parse_table, read_table


def variant(name: str, tracker: str = "") -> EdgeVariant:
    values = {
        "name": name,
        "service": "tracking" if tracker else "detection",
        "tracker": tracker,
        "labels": ["x", "sq"],
    }
    return edge_variant_from(values | {"memory_mb": 3.5, "tflop": 0.25, "weights": "random"}, "test", Path("/"))


def square(left: int, top: int, side: int = 24, width: int = 160, height: int = 96) -> Frame:
    frame = np.full((height, width, 3), 30, dtype=np.uint8)
    frame[top : top + side, left : left + side] = (230, 200, 180)
    return frame


def bright_box(frame: Frame, least_side: int) -> tuple[float, ...] | None:
    """Corners of the bright area; None if it is narrower than `least_side` pixels."""
    rows, columns = np.where(frame[..., 0] > 130)
    if len(rows) == 0 or np.ptp(columns) + 1 < least_side:
        return None
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


class Finder:
    """A detector that sees bright squares of at least `least_side` pixels."""

    def __init__(self, name: str, least_side: int) -> None:
        self.variant = variant(name)
        self.least_side = least_side

    def run(self, frames: list[Frame]) -> Detections:
        box = bright_box(frames[0], self.least_side)
        boxes = np.array([] if box is None else [box], dtype=np.float32).reshape(-1, 4)
        return Detections(
            boxes=boxes, scores=np.full(len(boxes), 0.9, np.float32), classes=np.ones(len(boxes), np.int64)
        )


class Follower:
    """A tracker whose network sees bright squares; counts what it was shown."""

    def __init__(self, kind: str = "sort") -> None:
        self.variant = variant(f"follow_{kind}", kind)
        self.looks = 0

    def association(self) -> Association:
        return associate(self.variant.tracker)

    def look(self, frame: Frame) -> Seen:
        self.looks += 1
        box = bright_box(frame, 1)
        boxes = np.array([] if box is None else [box], dtype=np.float32).reshape(-1, 4)
        n = len(boxes)
        return Seen(boxes, np.full(n, 0.95, np.float32), np.zeros(n, np.int64), np.ones((n, 2), np.float32))


def still(left: int, top: int) -> Still:
    box = np.array([[left, top, left + 24, top + 24]], dtype=np.float64)
    truth = StillTruth(box, np.array([0]), np.array([576.0]), np.array([False]))
    return Still(Media((square(left, top),), 0.0, 160, 96), truth)


def clip(frames: int = 30, fps: float = 30.0) -> Clip:
    lefts = [10 + number for number in range(frames)]
    rows = [(number, 1, left, 40, 24, 24, 1, 1, 1.0) for number, left in enumerate(lefts, 1)]
    media = Media(tuple(square(left, 40) for left in lefts), fps, 160, 96)
    return Clip(media, ClipTruth(np.array(rows, dtype=np.float64), frames))


def test_settings_are_every_pair_with_the_highest_first() -> None:
    settings = detection_settings([0.5, 1.0], [70, 95])
    assert [s.name for s in settings] == ["1x_q95", "1x_q70", "0.5x_q95", "0.5x_q70"]
    assert settings[3].configuration == Configuration(resolution=0.5, jpeg_quality=70)
    assert [s.name for s in tracking_settings([1.0], [3, 15])] == ["1x_fps15", "1x_fps3"]


def test_detectors_lose_what_a_configuration_makes_too_small() -> None:
    settings = detection_settings([1.0, 0.25], [95, 40])
    items = [still(40, 30), still(80, 8), still(4, 50)]
    steps: list[int] = []
    runtimes: Any = [Finder("all", 1), Finder("large", 12)]
    figures = profile_detection(runtimes, items, settings, ["sq"], steps.append)
    every, large = figures.variants
    assert min(every.accuracy) > 0.5
    assert every.accuracy[0] == pytest.approx(1.0)
    assert large.accuracy[0] == pytest.approx(1.0)
    assert large.accuracy[2:] == (0.0, 0.0)
    assert figures.size_factor[0] == 1.0
    assert all(np.diff(figures.size_factor) < 0)
    assert figures.inferences == (1, 1, 1, 1)
    assert steps == [1, 2, 3]
    assert min(every.service_ms) > 0


def test_size_factors_are_means_of_each_request_against_itself() -> None:
    from models.adapt import adapt

    settings = detection_settings([1.0, 0.5], [95])
    items = [still(40, 30), still(80, 8)]
    sizes = [[len(adapt(item.media, s.configuration).payload) for s in settings] for item in items]
    runtimes: Any = [Finder("all", 1)]
    figures = profile_detection(runtimes, items, settings, ["sq"], lambda done: None)
    assert figures.size_factor[1] == pytest.approx(np.mean([small / large for large, small in sizes]))
    assert figures.data_mb == (min(s[0] for s in sizes) / 1e6, max(s[0] for s in sizes) / 1e6)


def test_a_variant_that_knows_none_of_the_classes_is_refused() -> None:
    runtimes: Any = [Finder("all", 1)]
    with pytest.raises(ValueError, match="none of the data set's classes"):
        profile_detection(runtimes, [still(4, 4)], detection_settings([1.0], [95]), ["other"], lambda done: None)
    with pytest.raises(ValueError, match="no pictures"):
        profile_detection(runtimes, [], detection_settings([1.0], [95]), ["sq"], lambda done: None)


@pytest.mark.parametrize("kind", ["sort", "qdtrack"])
def test_trackers_are_scored_in_the_originals_frames_and_pixels(kind: str) -> None:
    settings = tracking_settings([1.0, 0.5], [30, 10, 5])
    follower = Follower(kind)
    trackers: Any = [follower]
    figures = profile_tracking(trackers, [clip(), clip()], settings, lambda done: None)
    assert figures.inferences == (30, 10, 5, 30, 10, 5)
    assert follower.looks == 2 * 2 * 30  # once per clip, resolution and frame
    (measured,) = figures.variants
    assert min(measured.accuracy) > 0.95  # a straight line: filled gaps lie on it
    assert measured.accuracy[0] == pytest.approx(1.0)
    assert figures.size_factor[1] == pytest.approx(1 / 3, abs=0.02)
    assert set(measured.further) == {"hota", "idf1"}


def test_a_trackers_time_is_of_one_forward_pass_with_its_share_of_the_association(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock on which every look, and every clip's association, takes a second."""
    clock = itertools.count()
    monkeypatch.setattr(edge_profile, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    trackers: Any = [Follower()]
    figures = profile_tracking(trackers, [clip(), clip()], tracking_settings([1.0], [30, 10]), lambda done: None)
    assert figures.variants[0].service_ms == pytest.approx((31_000 / 30, 11_000 / 10))


def test_what_is_hardly_visible_is_a_crowd_and_what_is_hidden_does_not_count() -> None:
    seen = [render(plan_scene(seed, SceneSettings(frames=3)), [1]).truth[0].visibility for seed in range(8)]
    crowds = [one.truth.crowd.tolist() for one in scene_stills(8)]
    assert crowds == [(one < 0.25).tolist() for one in seen]
    assert {True, False} <= {crowd for one in crowds for crowd in one}
    (whole,) = scene_clips(1, first_seed=3)
    assert whole.truth.rows[:, 6].tolist() == (whole.truth.rows[:, 8] >= 0.1).tolist()
    assert set(whole.truth.rows[:, 6]) == {0.0, 1.0}


def test_truth_ends_with_the_frames_that_are_read(tmp_path: Path) -> None:
    scene = render(plan_scene(3), range(6))
    write_sequence(tmp_path / "SCENE", list(scene.frames), scene.truth, scene.fps, LABELS)
    (cut,) = mot_clips(tmp_path, most_frames=4)
    assert len(cut.media.frames) == cut.truth.frame_count == 4
    assert set(cut.truth.rows[:, 0]) == {1, 2, 3, 4}


def test_the_table_is_one_that_placement_reads_with_every_cell_measured() -> None:
    settings = tracking_settings([1.0, 0.5], [30, 10])
    trackers: Any = [Follower()]
    figures = profile_tracking(trackers, [clip()], settings, lambda done: None)
    text = table_of(figures, name="tracking", notes=["made by a test"], deadlines_s=[1, 2.5])
    assert text.startswith("# made by a test\n")
    table = parse_table(tomllib.loads(text), "test")
    assert table.configurations == ("1x_fps30", "1x_fps10", "0.5x_fps30", "0.5x_fps10")
    expected = [{"resolution": s.configuration.resolution, "frame_rate": s.configuration.frame_rate} for s in settings]
    assert list(table.settings) == expected
    assert np.allclose(table.accuracy[:, 0], figures.variants[0].accuracy, atol=1e-5)
    assert {source for row in table.accuracy_source for source in row} == {"measured"}
    assert (table.memory_mb[0], table.tflop[0], table.deadlines_s) == (3.5, 0.25, (1.0, 2.5))
    assert table.inferences.tolist() == [30, 10, 30, 10]


def test_rendered_and_written_scenes_are_the_same_items(tmp_path: Path) -> None:
    assert [one.media.frames[0].shape for one in scene_stills(2, first_seed=5)] == [(192, 320, 3)] * 2
    scene = render(plan_scene(3), range(6))
    write_sequence(tmp_path / "mot" / "SCENE", list(scene.frames), scene.truth, scene.fps, LABELS)
    (from_files,) = list(mot_clips(tmp_path / "mot"))
    (whole,) = list(scene_clips(1, first_seed=3))
    assert len(whole.media.frames) == 45
    assert len(from_files.media.frames) == 6
    first = whole.truth.rows[whole.truth.rows[:, 0] <= 6]
    assert np.allclose(from_files.truth.rows[:, :8], first[:, :8], atol=0.01)
    assert np.abs(from_files.media.frames[2].astype(int) - whole.media.frames[2]).mean() < 4
    write_coco(tmp_path / "coco", [(scene.frames[0], scene.truth[0])], LABELS)
    coco = coco_stills(tmp_path / "coco")
    assert (coco.labels, coco.count) == (LABELS, 1)
    (one,) = list(coco)
    assert np.allclose(one.truth.boxes, scene.truth[0].boxes, atol=0.02)
    assert one.truth.crowd.tolist() == (scene.truth[0].visibility < 0.25).tolist()


@pytest.mark.parametrize(("service", "varied"), [("detection", "jpeg_quality"), ("tracking", "frame_rate")])
def test_the_shipped_tables_of_the_scenes_are_wholly_measured(service: str, varied: str) -> None:
    """Sixteen configurations of variants that are in the catalog with their figures; less data, less accuracy."""
    table = read_table(TABLES_DIRECTORY / f"scenes-{service}.toml")
    assert len(table.configurations) == 16
    assert all(set(given) == {"resolution", varied} for given in table.settings)
    assert {source for row in table.accuracy_source for source in row} | set(table.size_factor_source) == {"measured"}
    catalog = load_edge_catalog()
    for name, memory_mb, tflop in zip(table.variants, table.memory_mb, table.tflop, strict=True):
        variant = catalog[name]
        assert (variant.service, variant.weights) == (service, "trained")
        assert memory_mb == pytest.approx(variant.memory_mb, abs=0.01)
        assert tflop == pytest.approx(variant.tflop, rel=1e-5)
    assert (table.accuracy[0] > 0.6).all()
    assert (table.accuracy[0] > 1.4 * table.accuracy[-1]).all()
    assert table.size_factor[0] == 1.0
    assert table.size_factor[-1] < 0.15
