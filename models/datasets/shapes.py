"""What a rendered scene is made of: outlines of the four classes, textured sprites, backgrounds.

An outline is exact (a polygon, or a circle for the ball), so that truth boxes need no pixels. A sprite is the
outline filled with a texture, drawn once per object at a few sizes; scenes only turn, scale and lay it down.
All colours are float32 levels 0..255, planes first: [3, height, width].
"""

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

LABELS = ("ball", "box", "triangle", "star")

SPRITE_REACH = 1.1  # a sprite covers -1.1..1.1 of the object's radius
SPRITE_SIDES = (14, 28, 56, 112)  # pixels; each twice the one before

Floats = npt.NDArray[np.float32]
Points = npt.NDArray[np.float64]

_TURNS = np.linspace(0, 2 * math.pi, 180, endpoint=False)
_CIRCLE = np.stack([np.cos(_TURNS), np.sin(_TURNS)], axis=1)  # where a ball is cut off by the picture's border


def outline(label: int, aspect: float) -> Points:
    """Corners [n, 2] of the class's outline around (0, 0), none further than 1 from it; [0, 2] for the ball.

    `aspect` (0..1) is the box's height over its width, and how deep a star is cut; the others ignore it.
    """
    if LABELS[label] == "ball":
        return np.zeros((0, 2))
    if LABELS[label] == "box":
        across, down = 1 / math.hypot(1.0, aspect), aspect / math.hypot(1.0, aspect)
        return np.array([[-across, -down], [across, -down], [across, down], [-across, down]])
    if LABELS[label] == "triangle":
        return _around(np.arange(3) / 3, np.ones(3))
    return _around(np.arange(10) / 10, np.where(np.arange(10) % 2, 0.32 + 0.2 * aspect, 1.0))


def area(corners: Points) -> float:
    """Area inside an outline of radius 1."""
    if len(corners) == 0:
        return math.pi
    after = np.roll(corners, -1, axis=0)
    return float(abs((corners[:, 0] * after[:, 1] - corners[:, 1] * after[:, 0]).sum()) / 2)


def bounds(
    corners: Points, at: tuple[float, float, float, float], width: int, height: int
) -> tuple[float, float, float, float] | None:
    """(x1, y1, x2, y2) of the part in the picture of an outline at (x, y, radius, angle); None if no part is in it."""
    x, y, radius, angle = at
    if x + radius <= 0 or y + radius <= 0 or x - radius >= width or y - radius >= height:
        return None
    whole = x >= radius and y >= radius and x + radius <= width and y + radius <= height
    if len(corners) == 0 and whole:
        return x - radius, y - radius, x + radius, y + radius
    drawn = _CIRCLE if len(corners) == 0 else corners
    cos, sin = radius * math.cos(angle), radius * math.sin(angle)
    placed = np.stack([x + cos * drawn[:, 0] - sin * drawn[:, 1], y + sin * drawn[:, 0] + cos * drawn[:, 1]], axis=1)
    reached = placed if whole else _inside_parts(placed, np.array([width, height], float))
    if len(reached) == 0:
        return None
    (x1, y1), (x2, y2) = reached.min(axis=0), reached.max(axis=0)
    return float(x1), float(y1), float(x2), float(y2)


def _inside_parts(polygon: Points, size: Points) -> Points:
    """[n, 2]: ends of what is in the picture of each edge, and the picture's corners that the polygon covers."""
    starts, edges = polygon, np.roll(polygon, -1, axis=0) - polygon
    first, last = np.zeros(len(polygon)), np.ones(len(polygon))
    for axis in (0, 1):  # the stretch of each edge, as shares of it, between two opposite sides of the picture
        along = np.where(edges[:, axis] == 0, 1e-12, edges[:, axis])
        to_low, to_high = -starts[:, axis] / along, (size[axis] - starts[:, axis]) / along
        first = np.maximum(first, np.minimum(to_low, to_high))
        last = np.minimum(last, np.maximum(to_low, to_high))
    kept = first <= last
    ends = [starts[kept] + share[kept, None] * edges[kept] for share in (first, last)]
    frame = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]) * size
    return np.concatenate([*ends, frame[inside_outline(polygon, frame[:, 0], frame[:, 1])]])


def sprites(corners: Points, rng: np.random.Generator) -> tuple[Floats, ...]:
    """The object drawn at each of `SPRITE_SIDES`: [4, side * side], colour times coverage, then coverage 0..1."""
    largest = SPRITE_SIDES[-1]
    paint = _texture(largest, rng)
    drawn = []
    for side, cover in zip(SPRITE_SIDES, _coverages(corners), strict=True):
        colour = paint if side == largest else _resized(paint, side, side)
        drawn.append(np.concatenate([colour * cover, cover[None]]).reshape(4, -1))
    return tuple(drawn)


def background(width: int, height: int, rng: np.random.Generator) -> Floats:
    """[3, height, width]: a gradient between two colours, cloudy noise of three grains, and blurred patches."""
    ramp = _ramp(width, height, rng)
    first, second = rng.uniform(30, 225, (2, 3)).astype(np.float32)
    picture: Floats = first[:, None, None] * (1 - ramp) + second[:, None, None] * ramp
    for cell, strength in ((64, 22.0), (20, 14.0), (5, 7.0)):
        grid = rng.normal(0, strength, (3, -(-height // cell) + 1, -(-width // cell) + 1)).astype(np.float32)
        picture += _resized(grid, width, height)
    for _ in range(int(rng.integers(0, 5))):  # flat patches with straight edges, so that an edge alone is no object
        x, y = rng.integers(0, width), rng.integers(0, height)
        w, h = rng.integers(width // 16, width // 2), rng.integers(4, height // 2)
        picture[:, y : y + h, x : x + w] += rng.normal(0, 18, (3, 1, 1)).astype(np.float32)
    np.clip(picture, 0, 255, out=picture)
    return picture


def _around(turns: Points, radii: Points) -> Points:
    """Corners at those fractions of a turn, the first one on top."""
    angles = 2 * math.pi * turns - math.pi / 2
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


def _coverages(corners: Points) -> tuple[Floats, ...]:
    """Per sprite side, [side, side] share of each pixel inside the outline, from 2 x 2 points in the finest."""
    fine = 2 * SPRITE_SIDES[-1]
    centres = ((np.arange(fine) + 0.5) / fine * 2 - 1) * SPRITE_REACH
    x, y = np.meshgrid(centres, centres)
    inside = inside_outline(corners, x, y).astype(np.float32)
    return tuple(inside.reshape(side, fine // side, side, fine // side).mean(axis=(1, 3)) for side in SPRITE_SIDES)


def inside_outline(corners: Points, x: Points, y: Points) -> npt.NDArray[np.bool_]:
    """Which points lie inside a polygon, or the circle of radius 1 if it has no corners.

    A ray from a point inside to the right crosses its edges an odd number of times.
    """
    if len(corners) == 0:
        return x * x + y * y <= 1
    inside = np.zeros(x.shape, dtype=bool)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y1 != y2:
            inside ^= ((y1 <= y) != (y2 <= y)) & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
    return inside


def _texture(side: int, rng: np.random.Generator) -> Floats:
    """[3, side, side]: two colours mixed by stripes, checks, a gradient, spots or next to nothing."""
    first, second = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    y, x = np.mgrid[0:side, 0:side] / side
    kind = rng.integers(5)
    turn, waves = rng.uniform(0, math.pi), rng.uniform(2, 5)
    along = np.cos(turn) * x + np.sin(turn) * y
    if kind == 0:
        mix = (np.sin(2 * math.pi * waves * along) > 0).astype(np.float32)
    elif kind == 1:
        mix = (((x * waves).astype(int) + (y * waves).astype(int)) % 2).astype(np.float32)
    elif kind == 2:
        mix = along - along.min()
    elif kind == 3:
        mix = (_resized(rng.normal(0, 1, (1, 9, 9)).astype(np.float32), side, side)[0] > 0.3).astype(np.float32)
    else:
        mix = np.full((side, side), 0.15)
    light = 1.15 - 0.35 * np.hypot(x - 0.4, y - 0.35)  # a little shading, lit from the upper left
    mixed = (first[:, None, None] * (1 - mix) + second[:, None, None] * mix) * light
    painted: Floats = np.clip(mixed, 0, 255).astype(np.float32)
    return painted


def _ramp(width: int, height: int, rng: np.random.Generator) -> Floats:
    """[height, width] from 0 to 1 in a random direction."""
    turn = rng.uniform(0, 2 * math.pi)
    along = np.cos(turn) * np.linspace(-1, 1, width)[None, :] + np.sin(turn) * np.linspace(-1, 1, height)[:, None]
    ramp: Floats = ((along - along.min()) / (along.max() - along.min())).astype(np.float32)
    return ramp


def _resized(planes: Floats, width: int, height: int) -> Floats:
    """[n, height, width] by bicubic interpolation (an average where it shrinks)."""
    size = (width, height)
    return np.stack([np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC)) for plane in planes])
