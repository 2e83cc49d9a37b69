"""What a node costs beside its computations: time for an image, memory of sixteen. `pytest -m benchmark -s` tells."""

import asyncio
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from models.clips import encode_jpeg
from models.datasets.scenes import HELD_OUT_SEEDS, plan_scene, render
from models.mp4 import write_mp4
from protocol.edge_records import EdgeServiceSpec, Emulation
from protocol.outcomes import Attempt
from protocol.records import Deployment
from tests.fakes.edge_models import bright_deployment, picture
from tests.fakes.edge_rig import EdgeRig, edge_rig

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]

SCENES = {
    "detection": ("scenes_detector_small", "scenes_detector_large", "scenes_detector_yolox"),
    "tracking": ("scenes_sort", "scenes_bytetrack", "scenes_qdtrack"),
}


def test_time_of_an_image(tmp_path: Path, fake_redis_url: str) -> None:
    """Variants that take next to no time, nothing emulated: what is left is the node's own work and the links."""
    off = Emulation(uplink=False, links=False, compute="real")

    async def scenario() -> None:
        async with edge_rig(tmp_path, fake_redis_url, bright_deployment(tmp_path, emulate=off)) as rig:
            body = picture()
            for to, what in (("a", "at its local node"), ("b", "one link away"), ("c", "two links away")):

                async def linked(to: str = to) -> bool | None:
                    return (await rig.ask("a", to, body)).attempt == Attempt.OK or None

                await rig.until(linked, 60.0)
                alone_ms, own_ms = [], []
                for _ in range(200):
                    begun_s = time.perf_counter()
                    ended = await rig.ask("a", to, body)
                    alone_ms.append(1e3 * (time.perf_counter() - begun_s))
                    spent = ended.reply.spent
                    own_ms.append(1e3 * (spent.decode_s + spent.adapt_s + spent.compute_s))
                begun_s = time.perf_counter()
                await asyncio.gather(*(ask_often(rig, to, body, 50) for _ in range(8)))
                rate = 400 / (time.perf_counter() - begun_s)
                median, high = np.percentile(alone_ms, (50, 99))
                print(
                    f"an image {what}: median {median:.2f} ms, p99 {high:.2f} ms, of which decoding, adapting and"
                    f" computing {np.median(own_ms):.2f} ms; 8 clients {rate:.0f}/s"
                )

    asyncio.run(scenario())


async def ask_often(rig: EdgeRig, to: str, body: bytes, times: int) -> None:
    """One client of several."""
    for _ in range(times):
        assert (await rig.ask("a", to, body)).attempt == Attempt.OK


def test_memory_of_sixteen_nodes(tmp_path: Path, fake_redis_url: str) -> None:
    """The nodes of eua16 as `python -m workers`: idle, then with all of this project's edge variants in each."""
    (tmp_path / "catalog").mkdir()
    frames = list(render(plan_scene(HELD_OUT_SEEDS + 9), range(6)).frames)
    bodies = {
        "detection": (encode_jpeg(frames[0], 95), "image/jpeg"),
        "tracking": (write_mp4(frames, 15.0), "video/mp4"),
    }

    async def scenario() -> None:
        async with edge_rig(tmp_path, fake_redis_url, scenes_deployment(tmp_path), tmp_path / "catalog") as rig:
            names = rig.network.graph.names
            tell(rig, "idle")
            for service, variants in SCENES.items():
                body, content_type = bodies[service]
                for variant in variants:
                    for name in names:
                        ended = await rig.ask(
                            name,
                            name,
                            body,
                            service=service,
                            variant=variant,
                            content_type=content_type,
                            budget_s=120.0,
                        )
                        assert ended.attempt == Attempt.OK, ended.reply.reason
                tell(rig, f"with {service}: {', '.join(variants)}")
            assert sum(rig.resident_mb(name) for name in names) < 6144

    asyncio.run(scenario())


def scenes_deployment(folder: Path) -> Deployment:
    """The sixteen nodes of eua16 with the measured tables."""
    services = {service: EdgeServiceSpec(table=f"scenes-{service}") for service in SCENES}
    made = bright_deployment(folder, graph="eua16", emulate=Emulation(uplink=False, links=False, compute="real"))
    assert made.edge is not None
    return msgspec.structs.replace(made, edge=msgspec.structs.replace(made.edge, services=services))


def tell(rig: EdgeRig, what: str) -> None:
    """Memory that the processes hold, and their shares of it where they share."""
    resident_mb = [rig.resident_mb(name) for name in rig.processes]
    share_mb = 0.0
    for process in rig.processes.values():
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        share_mb += next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))
    print(
        f"{what}: {min(resident_mb):.0f} to {max(resident_mb):.0f} MB resident, {sum(resident_mb):.0f} MB in all"
        f" ({share_mb:.0f} MB counting shared pages once)"
    )
