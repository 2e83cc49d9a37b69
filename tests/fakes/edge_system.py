"""A whole Tidegate with edge nodes in real processes, whose variants are faked (`edge_models.py`), and a client for it.

Four nodes in a row, a - b - c - d, each a worker of its own; worker w-a serves a classification, too.
"""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import aiohttp
import msgspec
import numpy as np
import pytest

from models.clips import encode_jpeg
from models.edge_catalog import EdgeVariant
from protocol.deployment import DeploymentFile, GatewaySettings
from protocol.edge_records import EdgeLinkSpec, EdgeNodeSpec, EdgeServiceSpec, EdgeSpec, NodeStatus
from protocol.frames import Kind
from protocol.link import Connection, connect
from protocol.outcomes import Attempt
from protocol.records import InstanceSpec, ServiceSpec, WorkerSpec
from tests.fakes.running_system import RunningSystem, any_port, until
from tidegate import check
from tidegate.supervisor import Supervisor

JPEG = {"content-type": "image/jpeg"}
MJPEG = {"content-type": "video/x-motion-jpeg; fps=10"}


def edge_file(folder: Path, names: str = "abcd", memory_mb: float = 500.0, **edge: Any) -> DeploymentFile:
    """The deployment; `edge` are settings of its [edge] part."""
    tables = {
        "detection": _table(folder / "bright-detection.toml", {"small": (100, 0.01, 0.4), "large": (300, 0.05, 0.6)}),
        "tracking": _table(folder / "bright-tracking.toml", {"follower": (120, 0.02, 0.5)}),
    }
    settings: dict[str, Any] = {
        "services": {n: EdgeServiceSpec(table=str(path), requirement_ms=10_000.0) for n, path in tables.items()},
        "nodes": tuple(
            EdgeNodeSpec(
                name=name, latitude=-37.8, longitude=144.9 + n / 100, tflops=1.0, memory_mb=memory_mb, uplink_mbps=100.0
            )
            for n, name in enumerate(names)
        ),
        "links": tuple(EdgeLinkSpec(between=pair, bandwidth_mbps=100.0) for pair in itertools.pairwise(names)),
        "policy": "beam",
        "window_ms": 50.0,
    }
    spec = EdgeSpec(**{**settings, **edge})
    first, *others = (WorkerSpec(name=f"w-{name}", node=name) for name in names)
    null = InstanceSpec(variant="null", capacity=256)
    return DeploymentFile(
        name="edge",
        services={"null": ServiceSpec(variants=("null",), requirement_ms=5000.0)},
        workers=(msgspec.structs.replace(first, instances=(null,)), *others),
        edge=spec,
        gateway=GatewaySettings(port=any_port()),
    )


def _table(path: Path, variants: dict[str, tuple[float, float, float]]) -> Path:
    """A placement table: by variant its megabytes, tera-operations and accuracy; two configurations."""
    entries = [
        f'[[configuration]]\nname = "{name}"\nresolution = {scale}\njpeg_quality = 90\nsize_factor = {factor}\n'
        f'size_factor_source = "modelled"\ninferences = 1\n'
        for name, scale, factor in (("whole", 1.0, 1.0), ("half", 0.5, 0.25))
    ]
    entries += [
        f'[[variant]]\nname = "{name}"\nmemory_mb = {memory_mb}\ntflop = {tflop}\n'
        f"accuracy = [{accuracy}, {accuracy - 0.1:.1f}]\n"
        f'accuracy_source = ["modelled", "modelled"]\n'
        for name, (memory_mb, tflop, accuracy) in variants.items()
    ]
    path.write_text('name = "bright"\n[requests]\ndata_mb = [0.01, 1.0]\ndeadlines_s = [2.0]\n' + "\n".join(entries))
    return path


def edge_catalog(folders: tuple[Path, ...] = ()) -> dict[str, EdgeVariant]:
    """What the tables name, as if it lay in the catalog."""
    trackers: dict[str, Literal["", "sort"]] = {"small": "", "large": "", "follower": "sort"}
    return {
        name: EdgeVariant(
            name=name,
            service="tracking" if tracker else "detection",
            tracker=tracker,
            path="/faked.onnx",
            labels=("bright",),
            memory_mb=1.0,
            tflop=0.01,
            weights="random",
        )
        for name, tracker in trackers.items()
    }


@contextlib.contextmanager
def edge_system(file: DeploymentFile, *, embedded: bool = True, ready: bool = True) -> Iterator[RunningSystem]:
    """It, running, with workers whose edge variants are faked."""

    def command(supervisor: Supervisor, name: str) -> list[str]:
        address = f"unix:{supervisor.folder}/{name}.sock"
        return [sys.executable, "-m", "tests.fakes.edge_worker", name, supervisor.board_url, address]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supervisor, "_worker_command", command)
        patch.setattr(check, "load_edge_catalog", edge_catalog)
        with RunningSystem(file, embedded=embedded, ready=ready) as system:
            yield system


def clip(frames: int = 5, width: int = 160, height: int = 120) -> bytes:
    """An MJPEG clip of a bright box that moves to the right."""
    pictures = []
    for number in range(frames):
        frame = np.zeros((height, width, 3), dtype=np.uint8)
        frame[16:48, 8 * number : 8 * number + 32] = 255
        pictures.append(encode_jpeg(frame, 95))
    return b"".join(pictures)


class Told(msgspec.Struct):
    """What a client was told."""

    status: int
    body: dict[str, Any]


async def ask(
    session: aiohttp.ClientSession,
    system: RunningSystem,
    service: str,
    body: bytes,
    headers: dict[str, str],
    node: str = "",
    method: str = "POST",
) -> Told:
    """One request, entering at `node` if it is named."""
    where = {"x-edge-node": node} if node else {}
    url = f"{system.url}/v1/{service}"
    async with session.request(method, url, data=body, headers={**headers, **where}) as response:
        return Told(response.status, await response.json())


async def node_statuses(system: RunningSystem) -> dict[str, NodeStatus]:
    """Every node's own word, asked over a link of our own."""
    statuses = {}
    for worker in system.file.workers:
        link = await connect(
            f"unix:{system.supervisor.folder}/{worker.name}.sock", lambda: Connection(lambda one, frame: None)
        )
        _, future = link.request(Kind.NODE_STATUS_REQUEST)
        status = msgspec.msgpack.decode((await future).meta, type=NodeStatus)
        link.close("done")
        statuses[status.node] = status
    return statuses


async def assert_edge_conserved(
    session: aiohttp.ClientSession, system: RunningSystem, *, restarted: str = ""
) -> dict[str, Any]:
    """The conservation law, once all is at rest: at the gateway, at each node, and between them.

    What ended at a node, by the gateway's books, is what that node counts, unless it was `restarted`, its gateway
    gave up waiting or its answer was lost on the way. Gives back the gateway's state.
    """

    async def at_rest() -> bool:
        try:
            statuses = await node_statuses(system)
        except OSError:
            return False  # one is being restarted
        return not (await system.state(session))["in_flight"] and not any(one.length for one in statuses.values())

    await until(at_rest, 20.0, "requests are still in flight")
    state = await system.state(session)
    ended = sum(number for outcomes in state["outcomes"].values() for number in outcomes.values())
    assert state["arrived"] == ended + state["in_flight"], state
    assert state["edge"]["requests"]["under_way"] == 0, state["edge"]
    attempts = state["edge"]["requests"]["attempts"]
    statuses = await node_statuses(system)
    unheard = 0
    for name, status in statuses.items():
        assert status.arrived == sum(status.counts) + status.length, status
        ends = attempts.get(name, {})
        reached = sum(number for end, number in ends.items() if end not in ("LOST", "CANCELLED"))
        if name in restarted:
            assert reached >= sum(status.counts), (name, ends, status)
            continue
        assert reached <= sum(status.counts), (name, ends, status)
        # A cancelled attempt stands in the gateway's books at its entry, in the nodes' where it then was.
        cancelled = status.counts[Attempt.CANCELLED]
        assert restarted or reached >= sum(status.counts) - cancelled, (name, ends, status)
        unheard += sum(status.counts) - cancelled - reached
    if restarted:
        # Answers given here that were on their way back through the node that died: the gateway has heard LOST of the
        # first node, or UNAVAILABLE from the one before it.
        lost = sum(ends.get("LOST", 0) + ends.get("UNAVAILABLE", 0) for ends in attempts.values())
        assert unheard <= lost, (attempts, statuses)
    else:
        ended_there = sum(sum(ends.values()) for ends in attempts.values())
        assert ended_there == sum(status.arrived for status in statuses.values()), (attempts, statuses)
    return state
