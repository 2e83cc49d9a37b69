"""The trained variants on real nodes: what a node answers is what the variant finds, whichever way the request went."""

import asyncio
from pathlib import Path

import msgspec
import numpy as np
import pytest

from models.adapt import AdaptedFrames, Configuration, Limits, Media, adapt, decode
from models.clips import encode_jpeg
from models.datasets.scenes import HELD_OUT_SEEDS, plan_scene, render
from models.detection import Detections
from models.edge_catalog import load_edge_catalog
from models.edge_runtime import EdgeRuntime, open_edge_runtime
from models.mp4 import write_mp4
from models.tracking import Tracks
from protocol.edge_records import EdgeServiceSpec, Emulation
from protocol.outcomes import Attempt
from protocol.records import Deployment
from tests.fakes.edge_models import bright_deployment
from tests.fakes.edge_rig import Answer, EdgeRig, edge_rig

HALF = Configuration(resolution=0.5, jpeg_quality=90, frame_rate=5.0)
WHOLE = Configuration(resolution=1.0, jpeg_quality=95)
TABLE = """
name = "scenes"
[requests]
data_mb = [0.01, 1.0]
deadlines_s = [2.0]
[[configuration]]
name = "whole"
resolution = 1.0
jpeg_quality = 95
size_factor = 1.0
size_factor_source = "modelled"
inferences = 1
[[configuration]]
name = "half"
resolution = 0.5
jpeg_quality = 90
frame_rate = 5
size_factor = 0.25
size_factor_source = "modelled"
inferences = 1
"""
VARIANT = """
[[variant]]
name = "{name}"
memory_mb = 40
tflop = 0.0006
accuracy = [0.7, 0.5]
accuracy_source = ["modelled", "modelled"]
"""


def deployment(folder: Path) -> Deployment:
    """Nodes a and b, a link between them, the trained variants."""
    names = {"detection": ("scenes_detector_small", "scenes_detector_large"), "tracking": ("scenes_bytetrack",)}
    services = {}
    for service, variants in names.items():
        path = folder / f"{service}.toml"
        path.write_text(TABLE + "".join(VARIANT.format(name=name) for name in variants))
        services[service] = EdgeServiceSpec(table=str(path))
    made = bright_deployment(folder, nodes="ab", emulate=Emulation(uplink=False, links=False))
    assert made.edge is not None
    return msgspec.structs.replace(made, edge=msgspec.structs.replace(made.edge, services=services))


def found_directly(
    runtime: EdgeRuntime, media: Media, configuration: Configuration
) -> tuple[Detections | Tracks, float]:
    """What the variant finds in the adapted frames, and their scale."""
    adapted = adapt(media, configuration)
    return runtime.run(AdaptedFrames(adapted.payload)), adapted.scale


async def asked(rig: EdgeRig, body: bytes, **settings: object) -> Answer:
    """The answer of node b to what came to node a."""

    async def look() -> Answer | None:
        found = await rig.ask("a", "b", body, **settings)
        return found if found.attempt != Attempt.UNAVAILABLE else None

    return await rig.until(look)


def test_images_and_a_clip_through_two_nodes(tmp_path: Path, fake_redis_url: str) -> None:
    catalog = load_edge_catalog()
    runtimes = {name: open_edge_runtime(catalog[name]) for name in ("scenes_detector_small", "scenes_bytetrack")}
    scenes = [render(plan_scene(HELD_OUT_SEEDS + number), range(0, 40, 20)).frames[1] for number in range(3)]
    clip = write_mp4(list(render(plan_scene(HELD_OUT_SEEDS + 9), range(15)).frames), 15.0)

    async def scenario() -> None:
        (tmp_path / "catalog").mkdir()
        async with edge_rig(tmp_path, fake_redis_url, deployment(tmp_path), tmp_path / "catalog") as rig:
            seen = 0
            for frame in scenes:
                body = encode_jpeg(frame, 95)
                for number, configuration in enumerate((WHOLE, HALF)):
                    ended = await asked(rig, body, variant="scenes_detector_small", configuration=number)
                    assert ended.attempt == Attempt.OK, ended.reply.reason
                    media = decode(body, "image/jpeg", Limits())
                    found, scale = found_directly(runtimes["scenes_detector_small"], media, configuration)
                    assert isinstance(found, Detections)
                    answers = ended.json["detections"]
                    left_top = np.array([one["box"] for one in answers]).reshape(-1, 4)[:, :2]
                    assert left_top == pytest.approx(found.boxes[:, :2] / scale, abs=0.01)
                    assert [one["score"] for one in answers] == pytest.approx(found.scores.tolist(), abs=1e-5)
                    seen += len(answers)
            assert seen > 10, "scenes with something in them"

            ended = await asked(
                rig, clip, variant="scenes_bytetrack", service="tracking", configuration=1, content_type="video/mp4"
            )
            assert ended.attempt == Attempt.OK, ended.reply.reason
            found, scale = found_directly(runtimes["scenes_bytetrack"], decode(clip, "video/mp4", Limits()), HALF)
            assert isinstance(found, Tracks)
            rows = np.array(ended.json["tracks"])
            assert sorted(set(rows[:, 0])) == [1, 4, 7, 10, 13], "five frames a second of fifteen"
            assert rows[:, 0] == pytest.approx(3 * found.rows[:, 0] - 2)
            assert rows[:, 2:4] == pytest.approx(found.rows[:, 2:4] / scale, abs=0.01)
            assert ended.json["labels"] == list(catalog["scenes_bytetrack"].labels)
            assert rig.resident_mb("b") < 375, "sixteen of them have to fit into 6 GB"

    asyncio.run(scenario())
