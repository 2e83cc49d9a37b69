"""What placing adds to a window, and what large uploads do to others' latencies: figures for docs/results/edge.md.

pytest -m benchmark -s tests/benchmarks/test_edge_controller_bench.py
"""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from policies.placement.graph import named_graph
from protocol.deployment import DeploymentFile, GatewaySettings
from protocol.edge_records import EdgeServiceSpec, EdgeSpec
from protocol.records import InstanceSpec, WorkerSpec
from tests.fakes.edge_models import picture
from tests.fakes.edge_system import JPEG, ask, edge_file, edge_system
from tests.fakes.running_system import RunningSystem, any_port, client, until
from tidegate import supervisor

ROOT = Path(__file__).parents[2]
WINDOWS = 20


def _sixteen(policy: str) -> DeploymentFile:
    """Huang's graph and tables; windows take eight requests, four of each service."""
    names = named_graph("eua16").names
    services = {
        "detection": EdgeServiceSpec(table="detection", requirement_ms=4000.0),
        "tracking": EdgeServiceSpec(table="tracking", requirement_ms=25_000.0),
    }
    return DeploymentFile(
        name="sixteen",
        workers=tuple(WorkerSpec(name=f"w-{name}", node=name) for name in names),
        edge=EdgeSpec(graph="eua16", services=services, policy=policy, per_service=5),
        gateway=GatewaySettings(port=any_port()),
    )


async def _windows(system: RunningSystem) -> list[float]:
    """Milliseconds from a window's end to its decision, of windows with eight requests."""
    names, image = named_graph("eua16").names, picture(width=640, height=360)
    took_ms = []
    async with client() as session:

        async def settled() -> bool:
            async with session.get(f"{system.url}/readyz") as response:
                return not (await response.json())["notices"]

        await until(settled, 60.0, "nodes or the scheduler are missing")
        for _ in range(WINDOWS):
            asked = [
                ask(session, system, service, image, JPEG, names[4 * n + s])
                for n in range(4)
                for s, service in enumerate(("detection", "tracking"))
            ]
            told = await asyncio.gather(*asked)
            assert {one.status for one in told} == {200}
            took_ms.append(told[0].body["delay_s"]["real"]["decide"] * 1e3)
            await asyncio.sleep(0.3)
    return took_ms


@pytest.mark.benchmark
@pytest.mark.parametrize("policy", ["sequential", "hisper-sequential", "beam"])
def test_what_placing_adds_to_a_window(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "refuse_unknown", lambda file: None)  # the variants are faked
    with edge_system(_sixteen(policy), embedded=False) as system:
        took_ms = asyncio.run(_windows(system))
    print(f"\n{policy}, 8 requests, 16 nodes: p50 {np.median(took_ms):.1f} ms, p90 {np.quantile(took_ms, 0.9):.1f} ms")
    assert np.median(took_ms) < 30.0


def _clients(url: str, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.fakes.edge_clients", words[0], url, *words[1:]]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def _said(process: "subprocess.Popen[str]") -> dict[str, float]:
    out, _ = process.communicate(timeout=60)
    said: dict[str, float] = json.loads(out)
    return said


@pytest.mark.benchmark
def test_what_large_uploads_do_to_classifications(tmp_path: Path) -> None:
    """100 classifications a second alone, then while 20 MB clips arrive twice a second, four times in turns."""
    file = edge_file(tmp_path)
    first, *others = file.workers
    apart = WorkerSpec(name="apart", instances=(InstanceSpec(variant="null", capacity=256),))
    file = msgspec.structs.replace(file, workers=(msgspec.structs.replace(first, instances=()), *others, apart))
    alone, beside = [], []
    with edge_system(file, embedded=False) as system:
        for _ in range(4):
            alone.append(_said(_clients(system.url, "probe", "500", "100"))["p99"])
            uploads = _clients(system.url, "clips", "0.5", "10")
            beside.append(_said(_clients(system.url, "probe", "500", "100"))["p99"])
            assert _said(uploads) == {"400": 10}  # they are no clips; what matters is that they came
    ratios = np.array(beside) / np.array(alone)
    rounds = ", ".join(f"{one:.1f} and {other:.1f}" for one, other in zip(alone, beside, strict=True))
    print(f"\nclassification p99 alone and beside 40 MB/s, ms: {rounds}; ratio {np.median(ratios):.2f} (median)")
