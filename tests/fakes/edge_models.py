"""Edge variants without networks, and tables for them: what is bright in a frame is found, exactly where it is.

By name: "broken…" cannot be loaded, "raising…" raises when it runs, "slow…" takes 0.3 s a frame and 0.2 s to load,
"follow…" tracks; all others detect.
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models.clip_limits import Frame
from models.clips import encode_jpeg
from models.detection import Detections
from models.edge_catalog import EdgeVariant
from models.tracking import Tracks
from policies.placement.graph import named_graph
from protocol.edge_records import EdgeLinkSpec, EdgeNodeSpec, EdgeServiceSpec, EdgeSpec, Emulation
from protocol.records import Deployment, WorkerSpec

DETECTORS = {"small": (100.0, 0.01), "large": (300.0, 0.05), "broken": (50.0, 0.01), "raising": (50.0, 0.01)}
"""Megabytes and tera-operations of the table that `write_tables` writes; "slow" and "follower" beside them."""


class BrightRuntime:
    """Finds the box around what is brighter than 128."""

    def __init__(self, variant: EdgeVariant, slow_s: float) -> None:
        self.variant = variant
        self.closed = False
        self._slow_s = slow_s

    def run(self, frames: Sequence[Frame]) -> Detections | Tracks:
        """One object per frame that has something bright; the same track all along."""
        if self.closed:
            raise RuntimeError("closed already")
        if self.variant.name.startswith("raising"):
            raise ArithmeticError("the network broke")
        boxes = []
        for frame in frames:
            if self._slow_s:
                time.sleep(self._slow_s)
            boxes.append(bright_box(frame))
        if not self.variant.tracker:
            found = np.array(boxes[:1], dtype=np.float32).reshape(-1, 4)
            return Detections(found, np.full(len(found), 0.9, np.float32), np.zeros(len(found), np.int64))
        rows = [
            (number, 1, left, top, right - left, bottom - top, 0.9)
            for number, (left, top, right, bottom) in enumerate(boxes, 1)
        ]
        return Tracks(np.array(rows, dtype=np.float64).reshape(-1, 7), np.zeros(len(rows), np.int64))

    def warm_up(self) -> None:
        """Nothing to warm."""

    def close(self) -> None:
        """It will run no more."""
        self.closed = True


def open_bright(name: str, device: str, threads: int) -> BrightRuntime:
    """As `workers.edge_variants.OpenVariant`."""
    if name.startswith("broken"):
        raise OSError(f"{name}.onnx is cut off")
    slow = name.startswith("slow")
    if slow:
        time.sleep(0.2)
    tracks = name.startswith("follow")
    variant = EdgeVariant(
        name=name,
        service="tracking" if tracks else "detection",
        tracker="sort" if tracks else "",
        labels=("bright",),
        memory_mb=1.0,
        tflop=0.01,
        weights="random",
    )
    return BrightRuntime(variant, 0.3 if slow else 0.0)


def bright_box(frame: Frame) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of what is brighter than 128; the whole frame if nothing is."""
    rows, columns = np.nonzero(frame.max(axis=2) > 128)
    if not len(rows):
        return 0.0, 0.0, float(frame.shape[1]), float(frame.shape[0])
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


def picture(box: tuple[int, int, int, int] = (32, 16, 64, 48), width: int = 160, height: int = 120) -> bytes:
    """A dark JPEG with one bright box: left, top, right, bottom."""
    frame = np.zeros((height, width, 3), dtype=np.uint8)
    left, top, right, bottom = box
    frame[top:bottom, left:right] = 255
    return encode_jpeg(frame, 95)


def write_tables(folder: Path) -> tuple[Path, Path]:
    """Placement tables of the variants here, for detection and tracking; two configurations each."""
    slow = {"slow": (100.0, 0.01)}
    paths = folder / "bright-detection.toml", folder / "bright-tracking.toml"
    for path, variants, setting, data_mb in (
        (paths[0], DETECTORS | slow, "jpeg_quality = 80", "[0.01, 1.0]"),
        (paths[1], {"follower": (120.0, 0.02), "slow-follower": (120.0, 0.02)}, "frame_rate = 5", "[0.1, 5.0]"),
    ):
        entries = [
            f'[[configuration]]\nname = "{name}"\nresolution = {scale}\n{setting}\nsize_factor = {factor}\n'
            f'size_factor_source = "measured"\ninferences = {passes}\n'
            for name, scale, factor, passes in (("whole", 1.0, 1.0, 2), ("half", 0.5, 0.25, 1))
        ]
        entries += [
            f'[[variant]]\nname = "{name}"\nmemory_mb = {memory_mb}\ntflop = {tflop}\naccuracy = [0.5, 0.4]\n'
            f'accuracy_source = ["modelled", "modelled"]\n'
            for name, (memory_mb, tflop) in variants.items()
        ]
        head = f'name = "bright"\n[requests]\ndata_mb = {data_mb}\ndeadlines_s = [1.0, 2.0]\n'
        path.write_text(head + "\n".join(entries))
    return paths


def bright_deployment(
    folder: Path,
    *,
    nodes: str = "abc",
    graph: str = "",
    memory_mb: float = 400.0,
    tflops: float = 1.0,
    uplink_mbps: float = 100.0,
    bandwidth_mbps: float = 100.0,
    queue_capacity: int = 16,
    emulate: Emulation = Emulation(),  # noqa: B008 - frozen
    preload: tuple[str, ...] = (),
) -> Deployment:
    """Nodes in a row (a - b - c), each on a worker of its own that is called after it: "w-a"; or those of a graph."""
    detection, tracking = write_tables(folder)
    names = named_graph(graph).names if graph else tuple(nodes)
    nodes = "" if graph else nodes
    return Deployment(
        name="bright",
        services={},
        workers=tuple(WorkerSpec(name=f"w-{name}", node=name, preload=preload) for name in names),
        edge=EdgeSpec(
            graph=graph,
            services={
                "detection": EdgeServiceSpec(table=str(detection)),
                "tracking": EdgeServiceSpec(table=str(tracking)),
            },
            nodes=tuple(
                EdgeNodeSpec(
                    name=name,
                    latitude=-37.8,
                    longitude=144.9 + number / 100,
                    tflops=tflops,
                    memory_mb=memory_mb,
                    uplink_mbps=uplink_mbps,
                )
                for number, name in enumerate(nodes)
            ),
            links=tuple(
                EdgeLinkSpec(between=(one, other), bandwidth_mbps=bandwidth_mbps)
                for one, other in itertools.pairwise(nodes)
            ),
            queue_capacity=queue_capacity,
            emulate=emulate,
        ),
    )
