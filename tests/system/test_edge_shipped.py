"""The shipped four-node deployment as it is: real variants, the guide's commands, digits beside them, comparisons."""

import asyncio
import json
import re
import signal
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
from tests.fakes.edge_system import JPEG, Told, ask, assert_edge_conserved, node_statuses
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
    images = [encode_jpeg(one.media.frames[0], 95) for one in scene_stills(8, 910_000)]
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
            assert Counter(one.status for one in [*told, *right]) == {200: 12 + 60}, Counter(
                str(one.body.get("error")) for one in [*told, *right]
            )
            good = sum(
                one.body["predictions"][0]["class_id"] == payload.label
                for one, payload in zip(right, labelled, strict=True)
            )
            assert good >= 55
            assert {one.body["instance"] for one in right} <= {"harbour/digits_heavy", "market/digits_light"}
            assert all(one.body["detections"] for one in told[:8])
            assert all(one.body["tracks"] for one in told[8:])
            _same_as_the_environment([one.body for one in told], network)
            for image, one in zip(images, told[:8], strict=True):
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
            assert counted == {"detection": {"OK": 8}, "tracking": {"OK": 4}, "digits": {"OK": 60}}
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


def _compare(system: RunningSystem, *arguments: str) -> "subprocess.Popen[str]":
    tidegate = Path(sys.executable).with_name("tidegate")
    command = [str(tidegate), "edge", "compare", system.url, "--json", "--every-s", "2", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


async def _placing(system: RunningSystem) -> tuple[str, list[float]]:
    async with client() as session:
        edge = (await system.state(session))["edge"]
        return edge["policy"], [node["memory_mb"] for node in edge["nodes"]]


@pytest.mark.timeout(240)
def test_policies_are_compared_on_it_and_it_is_left_as_it_was(system: RunningSystem, tmp_path: Path) -> None:
    before = asyncio.run(_placing(system))
    page = tmp_path / "edge.html"
    comparing = _compare(
        system, "--policies", "heuristic,hasac", "--requests", "8", "--rehearse", "4", "--report", str(page)
    )
    out, said = comparing.communicate(timeout=180)
    assert comparing.returncode == 1, said  # for the policy that was left out
    told = json.loads(out)
    assert "trained" in told["left_out"]["hasac"]
    (figures,) = told["policies"]
    assert (figures["policy"], figures["requests"]) == ("heuristic", 8)
    assert figures["answered"] + sum(figures["failures"].values()) == 8
    assert figures["answered"] > 0
    assert set(figures["decided_by"]) <= {"heuristic in the scheduler", "sequential in the gateway"}
    assert max(figures["difference"].values()) < 1e-9
    scored = {one["measured"]["name"] for one in figures["services"].values() if one["measured"]}
    assert scored
    assert scored <= {"mAP", "MOTA"}
    assert figures["beside_s"]["compute"]["mean"] > 0
    assert "Eq. 21" in page.read_text()
    asyncio.run(_settled(system))
    assert asyncio.run(_placing(system)) == before


@pytest.mark.timeout(240)
def test_an_interrupted_comparison_tells_what_was_done_and_puts_the_deployment_back(system: RunningSystem) -> None:
    before = asyncio.run(_placing(system))
    comparing = _compare(system, "--policies", "random", "--requests", "24", "--rehearse", "0")
    assert comparing.stderr is not None
    for line in comparing.stderr:
        if line.startswith("random:"):
            break
    comparing.send_signal(signal.SIGINT)
    out, said = comparing.communicate(timeout=60)
    assert comparing.returncode == 130, said
    told = json.loads(out)
    assert 0 < told["policies"][0]["requests"] < 24
    assert told["policies"][0]["interrupted"] is True
    assert told["comparable"] is False
    asyncio.run(_settled(system))
    assert asyncio.run(_placing(system)) == before

    async def conserved() -> None:
        async with client() as session:

            async def at_rest() -> bool:
                statuses = (await node_statuses(system)).values()
                return not (await system.state(session))["in_flight"] and not any(one.length for one in statuses)

            await until(at_rest, 30.0, "requests are still in flight")
            state = await system.state(session)
            assert state["arrived"] == sum(sum(ends.values()) for ends in state["outcomes"].values())
            statuses = (await node_statuses(system)).values()
            assert all(one.arrived == sum(one.counts) for one in statuses)
            # A cancelled attempt stands in the gateway's books at its entry, in the nodes' where it then was.
            attempts = sum(sum(ends.values()) for ends in state["edge"]["requests"]["attempts"].values())
            assert sum(one.arrived for one in statuses) == attempts

    asyncio.run(conserved())
