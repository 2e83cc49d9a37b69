"""The edge network's graph: nodes, links and shortest paths (Huang, Section III-A and VI-B).

Paths are shortest by transmission time of one megabit (the sum of 1/bandwidth), ties by routing cost; the paper
says only "shortest". Links join sites less than 0.5 km apart by haversine distance; capacities are drawn once per
graph from the paper's sets with a seed (the paper leaves open whether once or per episode).
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from policies.placement.contract import BoolArray, FloatArray, IntArray

# Section VI-B: what capacities are drawn from, and the unit routing cost.
BANDWIDTHS_MBPS = (50.0, 100.0, 200.0, 300.0, 400.0)
UPLINKS_MBPS = (36.0, 48.0, 64.0, 72.0)
CAPACITIES_TFLOPS = (0.5, 1.26, 1.33)
MEMORIES_MB = (1024.0, 2048.0, 4096.0)
ROUTING_USD_PER_MB = 0.002  # per megabit and link ("per Mbps" in the paper; see papers' Eq. 8 and the results page)
LINK_RADIUS_KM = 0.5

# Sixteen Optus base stations in Melbourne's business district (site id, latitude, longitude): figures from the
# EUA dataset (Lai et al. 2018, MIT licence), a spread-out choice that stays connected at 0.5 km.
EUA16 = (
    ("51622", -37.814484, 144.9635),
    ("301895", -37.810219, 144.9618),
    ("134449", -37.817384, 144.959217),
    ("304363", -37.820744, 144.955485),
    ("303676", -37.815387, 144.968815),
    ("304744", -37.815195, 144.974409),
    ("134754", -37.810996, 144.967095),
    ("304060", -37.809041, 144.971828),
    ("404118", -37.814905, 144.954913),
    ("134403", -37.818166, 144.964831),
    ("10003238", -37.81239, 144.9712),
    ("130005", -37.813381, 144.959612),
    ("304365", -37.812934, 144.952075),
    ("135045", -37.811928, 144.956414),
    ("11581", -37.818202, 144.954367),
    ("303652", -37.81653, 144.961967),
)


class GraphError(ValueError):
    """A graph is wrong; the message names what and what would be right."""


@dataclass(frozen=True)
class EdgeGraph:
    """K nodes and L links with their capacities, checked to be connected and finite."""

    names: tuple[str, ...]
    positions: FloatArray  # (K, 2) latitude and longitude in degrees
    tflops: FloatArray  # (K,) A_k, TFLOP per second
    memory_mb: FloatArray  # (K,) B_k
    uplink_mbps: FloatArray  # (K,) rho
    links: IntArray  # (L, 2) node pairs
    bandwidth_mbps: FloatArray  # (L,) w_e
    routing_usd_per_mb: FloatArray  # (L,) psi_e per megabit

    def __post_init__(self) -> None:
        """Refuse capacities that are not positive and finite, and graphs that are not connected."""
        nodes = len(self.names)
        for key in ("tflops", "memory_mb", "uplink_mbps"):
            _check(key, getattr(self, key), nodes)
        _check("bandwidth_mbps", self.bandwidth_mbps, len(self.links))
        if self.links.size and (self.links.min() < 0 or self.links.max() >= nodes):
            raise GraphError(f"links name node {int(self.links.max())}; the graph has nodes 0 to {nodes - 1}")
        if not np.isfinite(self.positions).all():
            raise GraphError("positions hold NaN or infinite figures; give degrees of latitude and longitude")
        reached = {0}
        for _ in range(nodes):
            reached |= {int(b) for a, b in self.links if int(a) in reached}
            reached |= {int(a) for a, b in self.links if int(b) in reached}
        if len(reached) < nodes:
            lost = ", ".join(name for k, name in enumerate(self.names) if k not in reached)
            raise GraphError(f"the graph is in two parts: no path from {self.names[0]} to {lost}; add a link")

    @property
    def nodes(self) -> int:
        """Number of nodes K."""
        return len(self.names)

    def bandwidth_matrix(self) -> FloatArray:
        """W: symmetric (K, K) link bandwidths in Mbps, 0 where there is no link."""
        matrix = np.zeros((self.nodes, self.nodes))
        matrix[self.links[:, 0], self.links[:, 1]] = self.bandwidth_mbps
        return np.maximum(matrix, matrix.T)

    def nearest_node(self, latitude: float, longitude: float) -> int:
        """The node whose access point is closest to a position (Section III-B). Raises GraphError on NaN."""
        if not (np.isfinite(latitude) and np.isfinite(longitude)):
            raise GraphError(f"position {latitude},{longitude} is not finite; give degrees of latitude, longitude")
        return int(np.argmin(haversine_km(self.positions, np.array([latitude, longitude]))))


@dataclass(frozen=True)
class Paths:
    """Shortest paths between all nodes of one graph."""

    s_per_megabit: FloatArray  # (K, K) sum of 1/bandwidth along the path
    usd_per_megabit: FloatArray  # (K, K) sum of unit routing costs along the path
    hops: IntArray  # (K, K)
    next_node: IntArray  # (K, K) the first step from a node towards another; itself on the diagonal

    def route(self, start: int, end: int) -> list[int]:
        """Nodes from start to end, both included."""
        route = [start]
        while route[-1] != end:
            route.append(int(self.next_node[route[-1], end]))
        return route


def shortest_paths(graph: EdgeGraph) -> Paths:
    """All shortest paths by transmission time (Floyd and Warshall), ties by routing cost."""
    nodes = graph.nodes
    seconds = np.full((nodes, nodes), np.inf)
    usd = np.full((nodes, nodes), np.inf)
    hops = np.zeros((nodes, nodes), dtype=np.int64)
    following = np.tile(np.arange(nodes), (nodes, 1))
    np.fill_diagonal(seconds, 0.0)
    np.fill_diagonal(usd, 0.0)
    for (a, b), width, price in zip(graph.links, graph.bandwidth_mbps, graph.routing_usd_per_mb, strict=True):
        if 1.0 / width < seconds[a, b]:
            seconds[a, b] = seconds[b, a] = 1.0 / width
            usd[a, b] = usd[b, a] = price
            hops[a, b] = hops[b, a] = 1
    for middle in range(nodes):
        through_s = seconds[:, middle, None] + seconds[None, middle, :]
        through_usd = usd[:, middle, None] + usd[None, middle, :]
        nearer = through_s < seconds - 1e-12
        equal = ~nearer & (through_s <= seconds + 1e-12)
        better = nearer | (equal & (through_usd < usd - 1e-12))
        hops = np.where(better, hops[:, middle, None] + hops[None, middle, :], hops)
        following = np.where(better, following[:, middle, None], following)
        seconds = np.where(better, through_s, seconds)
        usd = np.where(better, through_usd, usd)
    np.fill_diagonal(following, np.arange(nodes))
    return Paths(seconds, usd, hops, following)


def haversine_km(positions: FloatArray, point: FloatArray) -> FloatArray:
    """Great-circle distance in kilometres from every (…, 2) position to one (…, 2) point."""
    a, b = np.radians(positions), np.radians(point)
    half = np.sin((a - b) / 2) ** 2
    chord = half[..., 0] + np.cos(a[..., 0]) * np.cos(b[..., 0]) * half[..., 1]
    return cast(FloatArray, 2 * 6371.0 * np.arcsin(np.sqrt(chord)))


def links_within(positions: FloatArray, radius_km: float) -> IntArray:
    """Pairs (L, 2) of sites less than radius_km apart."""
    near = haversine_km(positions[:, None, :], positions[None, :, :]) < radius_km
    return np.argwhere(np.triu(near, 1)).astype(np.int64)


def graph_from_sites(
    names: Sequence[str], positions: FloatArray, seed: int, radius_km: float = LINK_RADIUS_KM
) -> EdgeGraph:
    """A graph over given sites whose capacities are drawn with the seed from the paper's sets."""
    rng = np.random.default_rng(seed)
    links = links_within(positions, radius_km)
    nodes = len(names)
    return EdgeGraph(
        names=tuple(names),
        positions=positions,
        bandwidth_mbps=rng.choice(BANDWIDTHS_MBPS, len(links)),
        uplink_mbps=rng.choice(UPLINKS_MBPS, nodes),
        tflops=rng.choice(CAPACITIES_TFLOPS, nodes),
        memory_mb=rng.choice(MEMORIES_MB, nodes),
        links=links,
        routing_usd_per_mb=np.full(len(links), ROUTING_USD_PER_MB),
    )


def eua16(seed: int = 0) -> EdgeGraph:
    """The paper's setting: sixteen EUA sites; the seed draws the capacities."""
    return graph_from_sites([s[0] for s in EUA16], np.array([s[1:] for s in EUA16]), seed)


def read_eua(path: Path) -> tuple[list[str], FloatArray]:
    """Site ids and positions (n, 2) of an EUA site file (SITE_ID, LATITUDE, LONGITUDE). Raises GraphError."""
    try:
        with path.open(newline="") as file:
            rows = [(r["SITE_ID"], float(r["LATITUDE"]), float(r["LONGITUDE"])) for r in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise GraphError(f"{path}: not an EUA site file (SITE_ID, LATITUDE, LONGITUDE): {error!r}") from error
    return [r[0] for r in rows], np.array([r[1:] for r in rows])


def pick_connected(positions: FloatArray, count: int, seed: int, radius_km: float = LINK_RADIUS_KM) -> IntArray:
    """Indices of `count` connected sites, grown site by site: each new one is linked and farthest from the rest.

    Raises GraphError where the sites around the seeded start do not reach the count.
    """
    distance = haversine_km(positions[:, None, :], positions[None, :, :])
    chosen = [int(np.random.default_rng(seed).integers(len(positions)))]
    while len(chosen) < count:
        nearest = distance[:, chosen].min(axis=1)
        linked: BoolArray = nearest < radius_km
        linked[chosen] = False
        if not linked.any():
            raise GraphError(f"only {len(chosen)} connected sites within {radius_km} km; {count} are needed")
        chosen.append(int(np.argmax(np.where(linked, nearest, -1.0))))
    return np.array(sorted(chosen))


def named_graph(name: str) -> EdgeGraph:
    """A graph by name: `eua16`, `eua16:SEED`, `geometric:SEED` (16 random sites) or `FILE.csv:SEED` (EUA format).

    `eua16-bandwidths:SEED` is `eua16` with nothing but its links' bandwidths drawn anew.
    """
    base, _, tail = name.rpartition(":") if ":" in name else (name, "", "0")
    if not tail.isdigit():
        raise GraphError(f"graph {name!r}: the part after ':' is a seed, a whole number")
    seed = int(tail)
    if base == "eua16":
        return eua16(seed)
    if base == "eua16-bandwidths":
        drawn = np.random.default_rng([seed, 1])
        kept = eua16(0)
        return replace(kept, bandwidth_mbps=drawn.choice(BANDWIDTHS_MBPS, len(kept.links)))
    if base == "geometric":
        # Sites at random over the same area and density as EUA16: a graph that no policy has seen.
        rng = np.random.default_rng(seed)
        low, high = np.array([-37.8225, 144.950]), np.array([-37.8075, 144.976])
        positions = low + (high - low) * rng.random((400, 2))
        names = [f"site{i}" for i in range(len(positions))]
    elif base.endswith(".csv"):
        names, positions = read_eua(Path(base))
    else:
        raise GraphError(
            f"graph {name!r} is unknown; use eua16, eua16:SEED, eua16-bandwidths:SEED, geometric:SEED or FILE.csv:SEED"
        )
    picked = pick_connected(positions, 16, seed)
    return graph_from_sites([names[i] for i in picked], positions[picked], seed)


def _check(key: str, values: FloatArray, count: int) -> None:
    if values.shape != (count,) or not np.isfinite(values).all() or (values <= 0).any():
        raise GraphError(f"{key} is {values!r}; it must be {count} finite numbers above 0")
