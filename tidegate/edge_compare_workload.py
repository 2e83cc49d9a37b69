"""The workload of `tidegate edge compare`: which rendered image or clip comes when, where, and with what deadline.

Drawn as Huang's Section VI-B draws slots: every so often a window's worth of requests, `per_service` of each service,
each at a node of its own and with a deadline of its service's table. A seed and a few settings say all of it, so that
every policy gets the very same requests. The scenes are held-out ones (`models/datasets/scenes.py`), and not those that
the tables were measured on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from models.clips import encode_jpeg
from models.datasets.scenes import HELD_OUT_SEEDS
from models.edge_catalog import EdgeVariant
from models.edge_items import CAMERA_QUALITY, Clip, Still, scene_clips, scene_stills
from models.edge_scores import ClipTruth, StillTruth
from policies.placement.edge_network import EdgeNetwork

Kind = Literal["detection", "tracking"]

FIRST_SCENE: Final = 10_000
"""Scenes before it are the profile's."""
SCENES_PER_SEED: Final = 1_000
SPREAD: Final = 0.8
"""The share of a window's length over which its requests are spread."""
FIRST_WINDOW_S: Final = 0.2
REHEARSAL_S: Final = 15.0
"""A rehearsal's deadlines."""


class WorkloadError(ValueError):
    """The workload cannot be drawn: names the option, its value and what would be right."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. `item`: its number among those of its service."""

    time_s: float
    service: str
    node: int
    deadline_s: float
    item: int


@dataclass(frozen=True, eq=False)
class Item:
    """What a request sends, and what is really in it."""

    body: bytes
    content_type: str
    truth: StillTruth | ClipTruth
    fps: float  # 0 for an image


@dataclass(frozen=True, eq=False)
class EdgeWorkload:
    """Requests in the order of their times. `kinds`: which services are asked with images and which with clips."""

    arrivals: tuple[Arrival, ...]
    kinds: Mapping[str, Kind]
    items: Mapping[str, tuple[Item, ...]]
    description: str

    def rehearsal(self, requests: int) -> "EdgeWorkload":
        """Its first requests, with so much time that no load of a variant makes them late."""
        patient = (replace(one, deadline_s=max(one.deadline_s, REHEARSAL_S)) for one in self.arrivals[:requests])
        return replace(self, arrivals=tuple(patient))

    def item(self, number: int) -> Item:
        """What request `number` sends."""
        arrival = self.arrivals[number]
        return self.items[arrival.service][arrival.item]


def draw_arrivals(
    network: EdgeNetwork, requests: int, per_service: int, every_s: float, window_s: float, seed: int
) -> tuple[Arrival, ...]:
    """When requests come and where: `per_service` of each service every `every_s` seconds, `requests` in all.

    Raises WorkloadError for figures that draw nothing.
    """
    if requests < 1:
        raise WorkloadError(f"--requests {requests}: ask for at least one")
    if not every_s > 0:
        raise WorkloadError(f"--every-s {every_s:g}: give seconds above 0 from window to window")
    rng = np.random.default_rng(seed)
    seen = dict.fromkeys((table.name for table in network.tables), 0)
    arrivals: list[Arrival] = []
    begins_s = FIRST_WINDOW_S
    while len(arrivals) < requests:
        services = rng.permutation(np.repeat(np.arange(len(network.tables)), per_service))[: requests - len(arrivals)]
        times_s = begins_s + np.sort(rng.uniform(0.0, SPREAD * window_s, len(services)))
        for time_s, s in zip(times_s, services, strict=True):
            table = network.tables[s]
            node, deadline_s = int(rng.integers(network.nodes)), float(rng.choice(table.deadlines_s))
            arrivals.append(Arrival(float(time_s), table.name, node, deadline_s, seen[table.name]))
            seen[table.name] += 1
        begins_s += every_s
    return tuple(arrivals)


def kinds_of(network: EdgeNetwork, catalog: Mapping[str, EdgeVariant]) -> dict[str, Kind]:
    """What every service is asked with: a service is of the kind of its variants, or else of that of its name.

    Raises WorkloadError for one that is neither.
    """
    named = {one.table_name or one.name: one for one in catalog.values()} | dict(catalog)
    kinds: dict[str, Kind] = {}
    for table in network.tables:
        entry = next((named[variant] for variant in table.variants if variant in named), None)
        kind = entry.service if entry is not None else table.name
        if kind == "detection":
            kinds[table.name] = "detection"
        elif kind == "tracking":
            kinds[table.name] = "tracking"
        else:
            raise WorkloadError(
                f"service {table.name!r}: none of its variants ({', '.join(table.variants)}) is in the catalog here, so"
                " it is not known whether it takes images or clips; call the service detection or tracking"
            )
    return kinds


def render_workload(
    arrivals: tuple[Arrival, ...], kinds: Mapping[str, Kind], seed: int, on_step: Callable[[int], None]
) -> EdgeWorkload:
    """Renders what the arrivals send; `on_step` is told how many of them are done. Raises WorkloadError."""
    first = FIRST_SCENE + SCENES_PER_SEED * (seed % ((HELD_OUT_SEEDS - FIRST_SCENE) // SCENES_PER_SEED))
    items: dict[str, tuple[Item, ...]] = {}
    done = 0
    for service, kind in kinds.items():
        count = sum(arrival.service == service for arrival in arrivals)
        if count > SCENES_PER_SEED:
            most = SCENES_PER_SEED * len(kinds)
            raise WorkloadError(f"--requests {len(arrivals)}: at most {most}, so that every request has its own scene")
        made: list[Item] = []
        for one in scene_stills(count, first) if kind == "detection" else scene_clips(count, first):
            made.append(_item(one))
            done += 1
            on_step(done)
        items[service] = tuple(made)
    counted = ", ".join(f"{len(made)} {'images' if kinds[name] == 'detection' else 'clips'} to {name}"
                        for name, made in items.items())  # fmt: skip
    length_s = arrivals[-1].time_s
    return EdgeWorkload(arrivals, dict(kinds), items, f"{counted}, {length_s:.1f} s, rendered scenes from seed {seed}")


def _item(one: Still | Clip) -> Item:
    """As a camera sends it: JPEG, or JPEGs one after another."""
    body = b"".join(encode_jpeg(frame, CAMERA_QUALITY) for frame in one.media.frames)
    if isinstance(one, Still):
        return Item(body, "image/jpeg", one.truth, 0.0)
    return Item(body, f"video/x-motion-jpeg; fps={one.media.fps:g}", one.truth, one.media.fps)
