"""Rendered scenes: truth against pixels drawn from the outline by another library, repetition, motion."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from models.datasets import shapes
from models.datasets.scenes import LABELS, Scene, SceneError, SceneSettings, Thing, plan_scene, pose, render

STILL = SceneSettings(frames=2, shutter=0.0, noise=0.0)
FINE = 4  # Pillow draws outlines this much larger than life


def alone(scene: Scene, thing: Thing) -> Scene:
    """The scene with nothing but one object."""
    return Scene(scene.settings, scene.seed, scene.background, (thing,), scene.brightness)


def outline_mask(scene: Scene, thing: Thing, frame: float) -> np.ndarray:
    """[height, width] coverage 0..1 of an object, drawn by Pillow from its outline."""
    x, y, radius, angle = pose(scene, thing, frame)
    height, width = scene.background.shape[1:]
    canvas = Image.new("L", (width * FINE, height * FINE))
    draw = ImageDraw.Draw(canvas)
    if LABELS[thing.label] == "ball":
        draw.ellipse([(c * FINE - 0.5) for c in (x - radius, y - radius, x + radius, y + radius)], fill=255)
    else:
        turned = [
            (
                (x + radius * (math.cos(angle) * u - math.sin(angle) * v)) * FINE - 0.5,
                (y + radius * (math.sin(angle) * u + math.cos(angle) * v)) * FINE - 0.5,
            )
            for u, v in thing.corners
        ]
        draw.polygon(turned, fill=255)
    fine = np.asarray(canvas, np.float64) / 255
    cover: np.ndarray = fine.reshape(height, FINE, width, FINE).mean(axis=(1, 3))
    return cover


@pytest.mark.parametrize("seed", range(6))
def test_boxes_are_tight_around_what_is_drawn(seed: int) -> None:
    """An object drawn alone changes pixels of the empty scene right up to its box, and none outside it."""
    scene = plan_scene(seed, STILL)
    empty = render(Scene(scene.settings, scene.seed, scene.background, (), scene.brightness), [0]).frames[0]
    compared = 0
    for thing in scene.things:
        clip = render(alone(scene, thing), [0])
        changed = np.abs(clip.frames[0].astype(int) - empty).max(axis=2) > 12
        if not len(clip.truth[0].boxes) or not changed.any():
            continue
        x1, y1, x2, y2 = clip.truth[0].boxes[0]
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        drawn = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        # A pixel is coloured or not: up to one pixel at a blunt edge, two at a star's or triangle's sharp point.
        assert (drawn[:2] >= np.floor([x1, y1]) - 1).all()
        assert (drawn[2:] <= np.ceil([x2, y2]) + 1).all()
        if pose(scene, thing, 0)[2] > 12:
            assert np.abs(drawn - [x1, y1, x2, y2]).max() < 3
            compared += 1
    assert compared


@pytest.mark.parametrize("seed", range(3))
def test_boxes_and_visibility_agree_with_masks_drawn_by_pillow(seed: int) -> None:
    scene = plan_scene(100 + seed, STILL)
    truth = render(scene, [0]).truth[0]
    nearer = np.zeros(scene.background.shape[1:], bool)
    things = {thing.track: thing for thing in scene.things}
    for track in sorted(truth.tracks, reverse=True):  # from the nearest to the furthest
        row = int(np.flatnonzero(truth.tracks == track)[0])
        mask = outline_mask(scene, things[track], 0)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        drawn = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert np.abs(drawn - truth.boxes[row]).max() <= 1.5
        radius = pose(scene, things[track], 0)[2]
        visible = (mask * ~nearer).sum() / (shapes.area(things[track].corners) * radius**2)
        assert truth.visibility[row] == pytest.approx(min(1.0, visible), abs=0.01 + 0.7 / radius)
        nearer |= mask >= 0.5


def test_truth_is_of_the_middle_of_the_exposure() -> None:
    """However long the shutter is open, boxes and visibility are those of an instant."""
    for seed in range(4):
        short, long = (
            render(plan_scene(seed, SceneSettings(frames=2, shutter=shutter)), [1]).truth[0] for shutter in (0.0, 1.0)
        )
        assert short.boxes.tolist() == long.boxes.tolist()
        assert short.visibility.tolist() == long.visibility.tolist()


@pytest.mark.parametrize("label", range(len(LABELS)))
def test_bounds_at_the_border_are_those_of_points_inside_both(label: int) -> None:
    """Brute force: of a fine grid over the picture, the outermost points that lie in the outline."""
    width, height, fine = 48, 32, 4
    x, y = np.meshgrid((np.arange(width * fine) + 0.5) / fine, (np.arange(height * fine) + 0.5) / fine)
    rng = np.random.default_rng(label)
    for _ in range(40):
        corners = shapes.outline(label, float(rng.uniform(0.5, 1)))
        at = (
            float(rng.uniform(-8, 56)),
            float(rng.uniform(-8, 40)),
            float(rng.uniform(4, 40)),
            float(rng.uniform(0, 7)),
        )
        cos, sin = math.cos(at[3]) / at[2], math.sin(at[3]) / at[2]
        dx, dy = x - at[0], y - at[1]
        inside = shapes.inside_outline(corners, dx * cos + dy * sin, dy * cos - dx * sin)
        box = shapes.bounds(corners, at, width, height)
        if not inside.any():
            assert box is None or min(box[2] - box[0], box[3] - box[1]) < 1
            continue
        wanted = (x[inside].min(), y[inside].min(), x[inside].max(), y[inside].max())
        assert box is not None
        # A sharp point may lie between the grid's points.
        assert np.abs(np.subtract(box, wanted)).max() < 1.0
        assert (np.array(box[:2]) <= wanted[:2]).all()
        assert (np.array(box[2:]) >= wanted[2:]).all()


@pytest.mark.parametrize(("x", "y", "share"), [(160, 96, 1.0), (0, 96, 0.5), (320, 192, 0.25), (160, 192, 0.5)])
def test_visibility_is_the_share_of_the_area_in_the_picture(x: float, y: float, share: float) -> None:
    corners = shapes.outline(LABELS.index("ball"), 1.0)
    path = np.tile([x, y, 30.0, 0.0], ((2 + 1) * 8 + 1, 1))
    thing = Thing(1, LABELS.index("ball"), corners, _sprites(corners), path)
    scene = Scene(STILL, 0, np.zeros((3, 192, 320), np.float32), (thing,), np.ones(2))
    assert render(scene, [0]).truth[0].visibility[0] == pytest.approx(share, abs=0.015)


def test_an_object_behind_another_is_less_visible_than_alone() -> None:
    scene = plan_scene(0, STILL)
    near = scene.things[1]
    behind = Thing(1, near.label, near.corners, near.sprites, near.path)
    truth = render(Scene(scene.settings, 3, scene.background, (behind, near), scene.brightness), [0]).truth[0]
    assert truth.visibility[0] == 0
    assert truth.visibility[1] > 0


def test_the_same_seed_gives_the_same_bytes() -> None:
    settings = SceneSettings(frames=4)
    first, again, other = (render(plan_scene(seed, settings)) for seed in (5, 5, 6))
    assert first.frames.tobytes() == again.frames.tobytes()
    for one, two in zip(first.truth, again.truth, strict=True):
        assert one.boxes.tobytes() == two.boxes.tobytes()
        assert one.tracks.tobytes() == two.tracks.tobytes()
    assert first.frames.tobytes() != other.frames.tobytes()


def test_a_chosen_frame_is_that_of_the_whole_clip() -> None:
    scene = plan_scene(8, SceneSettings(frames=5))
    whole, one = render(scene), render(scene, [3])
    assert one.frames[0].tobytes() == whole.frames[3].tobytes()
    assert one.numbers == (3,)
    assert one.truth[0].visibility.tolist() == whole.truth[3].visibility.tolist()


def test_tracks_keep_class_and_move_without_jumps() -> None:
    settings = SceneSettings(frames=40)
    for seed in range(5):
        scene = plan_scene(seed, settings)
        for thing in scene.things:
            poses = np.array([pose(scene, thing, frame) for frame in range(settings.frames)])
            steps = np.hypot(*np.diff(poses[:, :2], axis=0).T)
            assert steps.max() <= settings.speed[1] / settings.fps + 1e-9
            assert np.abs(np.diff(poses[:, 2])).max() < 0.05 * poses[:, 2].max()
            turned = np.diff(np.unwrap(np.arctan2(*np.diff(poses[:, :2], axis=0).T[::-1])))
            assert np.abs(turned).max() <= 2.0 / settings.fps + 1e-9
    clip = render(plan_scene(0, settings))
    label: dict[int, int] = {}
    for one in clip.truth:
        assert len(set(one.tracks.tolist())) == len(one.tracks)
        for track, found in zip(one.tracks.tolist(), one.classes.tolist(), strict=True):
            assert label.setdefault(track, found) == found


def test_objects_enter_and_leave() -> None:
    """Over ten scenes some tracks begin after the first frame and some end before the last."""
    entered = left = 0
    for seed in range(10):
        scene = plan_scene(seed, SceneSettings(frames=45))
        for thing in scene.things:
            x, y, radius, _ = np.array([pose(scene, thing, frame) for frame in (0, 44)]).T
            outside = (x < -radius) | (x > 320 + radius) | (y < -radius) | (y > 192 + radius)
            entered += bool(outside[0] and not outside[1])
            left += bool(outside[1] and not outside[0])
    assert entered >= 3
    assert left >= 3


def test_a_fast_object_is_blurred_along_its_way_only() -> None:
    """The average of instants: an object's edge in the direction of motion is wider than with a short shutter."""
    path = np.zeros(((2 + 1) * 8 + 1, 4))
    path[:, 0] = np.linspace(100, 172, len(path))  # 24 pixels per frame to the right
    path[:, 1:3] = (96, 20)
    corners = shapes.outline(LABELS.index("box"), 1.0)
    white = tuple(np.concatenate([255 * one[3:], 255 * one[3:], 255 * one[3:], one[3:]]) for one in _sprites(corners))
    thing = Thing(1, LABELS.index("box"), corners, white, path)

    def half_tones(shutter: float) -> tuple[int, int]:
        settings = SceneSettings(frames=2, shutter=shutter, noise=0.0, instants=9)
        scene = Scene(settings, 0, np.zeros((3, 192, 320), np.float32), (thing,), np.ones(2))
        gray = render(scene, [1]).frames[0][:, :, 0]
        between = (gray > 20) & (gray < 235)
        row, column = int(path[12, 1]), int(pose(scene, thing, 1)[0])
        return int(between[row].sum()), int(between[:, column].sum())

    assert half_tones(0.0)[0] <= 4
    assert half_tones(1.0)[0] >= 36  # two edges of 24 pixels, less the darkest and lightest steps
    assert half_tones(1.0)[1] <= 4


def _sprites(corners: shapes.Points) -> tuple[shapes.Floats, ...]:
    return shapes.sprites(corners, np.random.default_rng(0))


@pytest.mark.parametrize("label", range(len(LABELS)))
def test_an_outline_lies_in_its_circle_and_has_the_area_of_its_pixels(label: int) -> None:
    corners = shapes.outline(label, 0.7)
    assert np.hypot(*corners.T).max(initial=1.0) == pytest.approx(1.0)
    axis = (np.arange(1000) + 0.5) / 500 - 1
    inside = shapes.inside_outline(corners, *np.meshgrid(axis, axis))
    assert inside.mean() * 4 == pytest.approx(shapes.area(corners), abs=0.01)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"width": 3}, "width = 3"),
        ({"instants": 4}, "instants = 4"),
        ({"fps": 0.0}, "fps = 0.0"),
        ({"shutter": 1.5}, "shutter = 1.5"),
        ({"speed": (5.0, 1.0)}, "speed = 5.0, 1.0"),
        ({"radius": (1.0, 4.0)}, "radius = 1.0"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, object], told: str) -> None:
    with pytest.raises(SceneError, match=told):
        SceneSettings(**settings)  # type: ignore[arg-type]


def test_a_frame_that_the_scene_does_not_have_is_refused() -> None:
    with pytest.raises(SceneError, match="frames 0 to 1"):
        render(plan_scene(0, STILL), [2])


def test_the_smallest_and_an_empty_scene_can_be_drawn() -> None:
    settings = SceneSettings(width=32, height=32, frames=1, objects=(0, 0), arrivals=(0, 0))
    clip = render(plan_scene(0, settings))
    assert clip.frames.shape == (1, 32, 32, 3)
    assert clip.truth[0].boxes.shape == (0, 4)
