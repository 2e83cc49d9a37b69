"""The shipped four-node deployment as it is: real variants, the guide's own commands, digits beside them."""

import asyncio
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from gateway.edge_answer import EdgeAnswer
from loadgen.payloads import digits
from models.adapt import Configuration, adapt, decode
from models.clip_limits import Limits
from models.clips import encode_jpeg
from models.edge_items import scene_clips, scene_stills
from policies.placement.deployed import network_of
from protocol.deployment import read_deployment
from protocol.edge_records import Emulation
from tests.fakes.edge_system import JPEG, Told, ask, assert_edge_conserved
from tests.fakes.running_system import RunningSystem, any_port, client, until
from tests.system.test_examples_in_docs import blocks
from tidegate.edge_compare_figures import largest_difference
from tidegate.up_command import with_address

ROOT = Path(__file__).parents[2]
NODES = ("harbour", "market", "station", "gardens")
CLIP = {"content-type": "video/x-motion-jpeg; fps=15", "x-deadline-ms": "60000"}


@pytest.fixture(scope="module")
def system() -> Iterator[RunningSystem]:
    file = with_address(read_deployment(ROOT / "deploy" / "edge4.toml"), None, any_port())
    with RunningSystem(file) as running:
        asyncio.run(_settled(running))
        yield running


async def _settled(system: RunningSystem) -> None:
    async with client() as session:

        async def nothing_to_note() -> bool:
            async with session.get(f"{system.url}/readyz") as response:
                return not (await response.json())["notices"]

        await until(nothing_to_note, 60.0, "nodes or the scheduler are missing")


@pytest.mark.timeout(240)
def test_the_guides_commands_work_as_they_stand(system: RunningSystem, tmp_path: Path) -> None:
    (block,) = [one for one in blocks("docs/guide.md", "sh") if "/v1/tracking" in one]
    script = block.replace(":8700", f":{system.port}")
    script = script.replace(".venv/bin/tidegate", str(Path(sys.executable).with_name("tidegate")))
    script = re.sub(r"^curl -s ", "curl -s -w '\\\\n' ", script, flags=re.MULTILINE)
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    image, clip = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert image["detections"], image
    assert image["decision"]["entry"] == "market"
    frames = {row[0] for row in clip["tracks"]}
    assert len(frames) >= 9, clip  # of 45; a frame rate of 3 keeps 9
    assert max(frames) > 30
    assert clip["decision"]["entry"] == "station"
    assert set(clip["labels"]) == {"ball", "box", "triangle", "star"}


@pytest.mark.timeout(240)
def test_images_clips_and_digits_are_answered_together_and_counted(system: RunningSystem) -> None:
    """Three services at once through one gateway, on nodes of which two host digits, too."""
    assert system.file.edge is not None
    network = network_of(system.file.edge)
    images = [encode_jpeg(one.media.frames[0], 95) for one in scene_stills(12, 910_000)]
    (seen,) = scene_clips(1, 910_000)
    clip = b"".join(encode_jpeg(frame, 95) for frame in seen.media.frames[:15])
    labelled = digits(ROOT / "models" / "pretrained" / "digits_split.json").payloads[:60]
    patient = {**JPEG, "x-deadline-ms": "60000"}

    async def run() -> None:
        async with client() as session:
            before = await assert_edge_conserved(session, system)
            right: list[Told] = []
            async with asyncio.TaskGroup() as tasks:
                edge = [
                    tasks.create_task(ask(session, system, "detection", image, patient, NODES[n % 4]))
                    for n, image in enumerate(images)
                ]
                edge += [tasks.create_task(ask(session, system, "tracking", clip, CLIP, name)) for name in NODES]
                for payload in labelled:
                    headers = {"content-type": payload.content_type, "x-deadline-ms": "30000"}
                    right.append(await ask(session, system, "digits", payload.body, headers))
            told = [one.result() for one in edge]
            assert Counter(one.status for one in [*told, *right]) == {200: 16 + 60}, Counter(
                str(one.body.get("error")) for one in [*told, *right]
            )
            good = sum(
                one.body["predictions"][0]["class_id"] == payload.label
                for one, payload in zip(right, labelled, strict=True)
            )
            assert good >= 55
            assert {one.body["instance"] for one in right} <= {"harbour/digits_heavy", "market/digits_light"}
            assert all(one.body["detections"] for one in told[:12])
            assert all(one.body["tracks"] for one in told[12:])
            _same_as_the_environment([one.body for one in told], network)
            for image, one in zip(images, told[:12], strict=True):
                settings = one.body["decision"]["configuration"]["settings"]
                configuration = Configuration(
                    resolution=settings["resolution"], jpeg_quality=round(settings["jpeg_quality"])
                )
                media = decode(image, "image/jpeg", Limits())
                assert one.body["observed"]["adapted_mb"] == len(adapt(media, configuration).payload) / 1e6
            after = await assert_edge_conserved(session, system)
            counted = {
                name: Counter(ends) - Counter(before["outcomes"].get(name, {}))
                for name, ends in after["outcomes"].items()
            }
            assert counted == {"detection": {"OK": 12}, "tracking": {"OK": 4}, "digits": {"OK": 60}}
            await _workers_agree(session, system)

    asyncio.run(run())


def _same_as_the_environment(answers: list[dict[str, Any]], network: Any) -> None:
    told = [msgspec.convert(one, EdgeAnswer) for one in answers]
    found = largest_difference(told, network, Emulation())
    assert max(found.delay_s, found.cost_usd, found.accuracy) < 1e-9
    for one in told:
        assert one.delay_s.real.total >= one.delay_s.total


async def _workers_agree(session: aiohttp.ClientSession, system: RunningSystem) -> None:
    """The instances' own books, beside the nodes'."""
    state = await system.state(session)
    for id, status in (await system.worker_statuses()).items():
        assert status.arrived == sum(status.counts) + status.length, (id, status)
        assert sum(state["dispatch"]["attempts"].get(id, {}).values()) == status.arrived
