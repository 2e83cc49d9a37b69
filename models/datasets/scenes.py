"""Rendered scenes of moving objects with exact truth: what our small detectors and trackers are trained and scored on.

A scene is a seed and a few settings; everything else follows from them, so a data set is a list of numbers:

    clip = render(plan_scene(seed=7, settings=SceneSettings()))
    clip.frames[0]          uint8 [192, 320, 3]
    clip.truth[0].boxes     float64 [n, 4], corners in pixels, tight around what is in the picture

Balls, boxes, triangles and stars with textures move over a textured background: straight on, in turns, nearer and
further, in front of each other, in and out of the picture. A frame is the average of a few instants while the
shutter is open (motion blur); brightness drifts; every frame has its own noise. Truth is that of the middle of the
exposure. Seeds below `HELD_OUT_SEEDS` are for scores, never for training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from models.datasets import shapes

LABELS = shapes.LABELS
HELD_OUT_SEEDS = 1_000_000

_STEPS = 8  # points of a path per frame


class SceneError(ValueError):
    """Settings no scene can be made from; says which key, its value and what would be right."""


class SceneSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How scenes look. Sizes are radii in pixels, speeds pixels per second."""

    width: int = 320
    height: int = 192
    fps: float = 15.0
    frames: int = 45
    objects: tuple[int, int] = (3, 8)  # in the picture at the start, from .. to
    arrivals: tuple[int, int] = (0, 4)  # entering later
    radius: tuple[float, float] = (8.0, 34.0)
    speed: tuple[float, float] = (10.0, 110.0)
    shutter: float = 0.6  # share of a frame's time that light falls in
    instants: int = 3  # averaged per frame; odd, so that the middle one is among them
    noise: float = 3.0  # levels of 255, standard deviation

    def __post_init__(self) -> None:
        whole = {"width": (32, 4096), "height": (32, 4096), "frames": (1, 10_000), "instants": (1, 31)}
        for key, (low, high) in whole.items():
            if not low <= getattr(self, key) <= high:
                raise SceneError(f"{key} = {getattr(self, key)}: choose {low} to {high}")
        if self.instants % 2 == 0:
            raise SceneError(f"instants = {self.instants}: choose an odd number, truth is that of the middle one")
        if not self.fps > 0:
            raise SceneError(f"fps = {self.fps}: choose frames per second above 0")
        if not 0 <= self.shutter <= 1:
            raise SceneError(f"shutter = {self.shutter}: choose a share of the frame's time, 0 to 1")
        for key in ("objects", "arrivals", "radius", "speed"):
            low, high = getattr(self, key)
            if not 0 <= low <= high:
                raise SceneError(f"{key} = {low}, {high}: choose two numbers from 0 upwards, the smaller first")
        if self.radius[0] < 2:
            raise SceneError(f"radius = {self.radius[0]}, {self.radius[1]}: choose 2 pixels or more")


@dataclass(frozen=True, eq=False)
class Thing:
    """One object: its class, its look, and its path in `_STEPS` points per frame from half a frame before the start."""

    track: int  # 1, 2, ...; those with larger numbers are nearer
    label: int
    corners: shapes.Points
    sprites: tuple[shapes.Floats, ...]
    path: npt.NDArray[np.float64]  # [points, 4]: x, y, radius (pixels), angle (radians)


@dataclass(frozen=True, eq=False)
class Scene:
    """All that a clip shows, before any frame of it is drawn."""

    settings: SceneSettings
    seed: int
    background: shapes.Floats  # [3, height, width]
    things: tuple[Thing, ...]
    brightness: npt.NDArray[np.float64]  # [frames], a factor


@dataclass(frozen=True, eq=False)
class FrameTruth:
    """What is in one frame, hidden or not, as long as its box in the picture is a pixel wide and high."""

    tracks: npt.NDArray[np.int64]  # [n], the same object has the same number in all frames
    classes: npt.NDArray[np.int64]  # [n], index into LABELS
    boxes: npt.NDArray[
        np.float64
    ]  # [n, 4]: x1, y1, x2, y2 in pixels: tight around the part in the picture, covered or not
    visibility: npt.NDArray[np.float64]  # [n]: share of the object's area that is in the picture and not covered


@dataclass(frozen=True, eq=False)
class RenderedClip:
    """Frames of a scene with their truth. `numbers` are the frames' places in the scene, from 0."""

    frames: npt.NDArray[np.uint8]  # [n, height, width, 3]
    truth: tuple[FrameTruth, ...]
    numbers: tuple[int, ...]
    fps: float


def plan_scene(seed: int, settings: SceneSettings | None = None) -> Scene:
    """The scene of that seed and those settings; the same on every call."""
    settings = settings or SceneSettings()
    rng = np.random.default_rng([20261122, seed])
    ground = shapes.background(settings.width, settings.height, rng)
    inside = int(rng.integers(settings.objects[0], settings.objects[1] + 1))
    later = int(rng.integers(settings.arrivals[0], settings.arrivals[1] + 1))
    arrives = rng.permutation(np.arange(inside + later) < later)
    things = tuple(_thing(number, bool(late), settings, rng) for number, late in enumerate(arrives, start=1))
    swing, pace, start = rng.uniform(0, 0.2), rng.uniform(0.5, 3), rng.uniform(0, 2 * math.pi)
    time_s = np.arange(settings.frames) / settings.fps
    brightness = rng.uniform(0.75, 1.1) * (1 + swing * np.sin(pace * time_s + start))
    return Scene(settings, seed, ground, things, brightness)


def render(scene: Scene, numbers: Sequence[int] | None = None) -> RenderedClip:
    """Frames (all of them, or those of the given numbers from 0) with their truth; the same bytes on every call."""
    chosen = tuple(range(scene.settings.frames)) if numbers is None else tuple(numbers)
    if not all(0 <= number < scene.settings.frames for number in chosen):
        raise SceneError(f"frames = {chosen}: this scene has frames 0 to {scene.settings.frames - 1}")
    drawn = [_frame(scene, number) for number in chosen]
    height, width = scene.background.shape[1:]
    frames = np.stack([frame for frame, _ in drawn]) if drawn else np.zeros((0, height, width, 3), np.uint8)
    return RenderedClip(frames, tuple(truth for _, truth in drawn), chosen, scene.settings.fps)


def pose(scene: Scene, thing: Thing, frame: float) -> tuple[float, float, float, float]:
    """(x, y, radius, angle) of an object at a time in frames: whole numbers are middles of exposures."""
    at = (frame + 0.5) * _STEPS
    before = min(max(int(at), 0), len(thing.path) - 2)
    x, y, radius, angle = thing.path[before] + (at - before) * (thing.path[before + 1] - thing.path[before])
    return float(x), float(y), float(radius), float(angle)


def _thing(track: int, late: bool, settings: SceneSettings, rng: np.random.Generator) -> Thing:
    """An object with a random look and path: inside the picture at the start, or on its way in if `late`."""
    label = int(rng.integers(len(LABELS)))
    corners = shapes.outline(label, float(rng.uniform(0.5, 1.0)))
    radius = math.exp(rng.uniform(*np.log(settings.radius)))
    speed, heading = rng.uniform(*settings.speed), rng.uniform(0, 2 * math.pi)
    width, height = settings.width, settings.height
    x, y = rng.uniform(0.05, 0.95) * width, rng.uniform(0.05, 0.95) * height
    if late:
        # Straight back from a point inside, until outside: it enters within the first two thirds of the clip.
        enters_s = rng.uniform(0, 0.67) * settings.frames / settings.fps
        edge = min(
            ((width if math.cos(heading) < 0 else 0) - x) / (math.cos(heading) or 1e-9),
            ((height if math.sin(heading) < 0 else 0) - y) / (math.sin(heading) or 1e-9),
            key=abs,
        )
        back = edge - 1.1 * radius - speed * enters_s
        x, y = x + back * math.cos(heading), y + back * math.sin(heading)
    path = _path(x, y, radius, speed, heading, late, settings, rng)
    return Thing(track, label, corners, shapes.sprites(corners, rng), path)


def _path(
    x: float,
    y: float,
    radius: float,
    speed: float,
    heading: float,
    straight_first: bool,
    settings: SceneSettings,
    rng: np.random.Generator,
) -> npt.NDArray[np.float64]:
    """[points, 4]: constant speed, straight stretches and turns, slow change of size, steady spin."""
    points = (settings.frames + 1) * _STEPS + 1
    step_s = 1 / (settings.fps * _STEPS)
    turning = np.zeros(points)
    at = rng.uniform(0.5, 1.5) if straight_first else 0.0
    while at < points * step_s:
        stretch = rng.uniform(0.5, 1.6)
        rate = rng.uniform(-2.0, 2.0) if rng.random() < 0.45 else 0.0
        turning[int(at / step_s) : int((at + stretch) / step_s)] = rate
        at += stretch
    headings = heading + np.concatenate([[0.0], np.cumsum(turning[:-1])]) * step_s
    xs = x + np.concatenate([[0.0], np.cumsum(np.cos(headings[:-1]))]) * speed * step_s
    ys = y + np.concatenate([[0.0], np.cumsum(np.sin(headings[:-1]))]) * speed * step_s
    time_s = np.arange(points) * step_s
    nearer = np.exp(rng.uniform(-0.15, 0.15) * np.sin(rng.uniform(0.5, 2.0) * time_s + rng.uniform(0, 6)))
    angles = rng.uniform(0, 2 * math.pi) + rng.normal(0, 0.7) * time_s
    return np.stack([xs, ys, radius * nearer, angles], axis=1)


def _frame(scene: Scene, number: int) -> tuple[npt.NDArray[np.uint8], FrameTruth]:
    """One frame [height, width, 3] and what is in it."""
    settings = scene.settings
    middle = settings.instants // 2
    total = np.zeros_like(scene.background)
    owner = np.zeros(scene.background.shape[1:], np.uint16)
    for instant in range(settings.instants):
        offset = settings.shutter * ((instant + 0.5) / settings.instants - 0.5)
        canvas = scene.background.copy()
        for thing in scene.things:
            _lay(canvas, owner if instant == middle else None, thing, pose(scene, thing, number + offset))
        total += canvas
    total *= np.float32(scene.brightness[number] / settings.instants)
    if settings.noise > 0:
        total += _noise(scene, number)
    np.clip(total, 0, 255, out=total)
    total += np.float32(0.5)
    return np.ascontiguousarray(total.astype(np.uint8).transpose(1, 2, 0)), _truth(scene, number, owner)


def _noise(scene: Scene, number: int) -> shapes.Floats:
    """[3, height, width] of normal noise: one row of numbers per frame, read at a random shift per line."""
    rng = np.random.default_rng([scene.seed, number])
    _, height, width = scene.background.shape
    row = rng.standard_normal(4 * width + 4096, dtype=np.float32) * np.float32(scene.settings.noise)
    starts = rng.integers(0, len(row) - width, (3, height))
    return np.lib.stride_tricks.sliding_window_view(row, width)[starts]


def _lay(
    canvas: shapes.Floats,
    owner: npt.NDArray[np.uint16] | None,
    thing: Thing,
    at: tuple[float, float, float, float],
) -> None:
    """Draw an object over what is there; where it covers half a pixel or more, note its track in `owner`."""
    x, y, radius, angle = at
    reach = radius * shapes.SPRITE_REACH
    height, width = canvas.shape[1:]
    left, right = max(math.floor(x - reach), 0), min(math.ceil(x + reach), width)
    top, bottom = max(math.floor(y - reach), 0), min(math.ceil(y + reach), height)
    if left >= right or top >= bottom:
        return
    level = next((i for i, side in enumerate(shapes.SPRITE_SIDES) if side >= 2 * reach), len(shapes.SPRITE_SIDES) - 1)
    side = shapes.SPRITE_SIDES[level]
    # From pixel centres back into the sprite: turned by -angle, scaled to sprite pixels.
    scale = side / (2 * reach)
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    dx = np.arange(left, right, dtype=np.float32) + np.float32(0.5 - x)
    dy = np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - y)
    u = (dx * cos + side / 2).astype(np.float32)[None, :] + (dy * sin).astype(np.float32)[:, None]
    v = (dx * -sin + side / 2).astype(np.float32)[None, :] + (dy * cos).astype(np.float32)[:, None]
    # Outside the sprite nothing is drawn; its border is empty, so clipping to it is the same.
    np.clip(u, 0, side - 1, out=u)
    np.clip(v, 0, side - 1, out=v)
    places = v.astype(np.intp)
    places *= side
    places += u.astype(np.intp)
    looked_up = thing.sprites[level].take(places, axis=1, mode="clip")
    cover = looked_up[3]
    patch = canvas[:, top:bottom, left:right]
    patch *= 1 - cover
    patch += looked_up[:3]
    if owner is not None:
        owner[top:bottom, left:right][cover >= 0.5] = thing.track


def _truth(scene: Scene, number: int, owner: npt.NDArray[np.uint16]) -> FrameTruth:
    """Boxes from the outlines, visibility from the pixels each object owns in the middle of the exposure."""
    height, width = owner.shape
    seen = np.bincount(owner.ravel(), minlength=len(scene.things) + 1)
    tracks, classes, boxes, visibility = [], [], [], []
    for thing in scene.things:
        at = pose(scene, thing, number)
        box = shapes.bounds(thing.corners, at, width, height)
        if box is None or box[2] - box[0] < 1 or box[3] - box[1] < 1:
            continue
        tracks.append(thing.track)
        classes.append(thing.label)
        boxes.append(box)
        visibility.append(min(1.0, float(seen[thing.track]) / (shapes.area(thing.corners) * at[2] ** 2)))
    return FrameTruth(
        np.array(tracks, np.int64),
        np.array(classes, np.int64),
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(visibility, np.float64),
    )
