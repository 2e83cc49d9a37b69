"""Edge services as real processes: images and clips in, decisions and figures out, whatever is sent, whoever dies."""

import asyncio
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.placement.deployed import network_of
from policies.placement.edge_network import EdgeNetwork
from policies.placement.window import Request, window_slots
from tests.fakes.edge_models import picture
from tests.fakes.edge_system import (
    JPEG,
    MJPEG,
    Told,
    ask,
    assert_edge_conserved,
    clip,
    edge_file,
    edge_system,
)
from tests.fakes.running_system import Load, RunningSystem, client, until

IMAGE = picture()
FOUND = [32.0, 16.0, 32.0, 32.0]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, embedded: bool) -> Iterator[RunningSystem]:
    with edge_system(edge_file(tmp_path_factory.mktemp("edge")), embedded=embedded) as running:
        asyncio.run(_settled(running))
        yield running


async def _settled(system: RunningSystem) -> None:
    """Until the scheduler places and every node can be chosen."""
    async with client() as session:

        async def nothing_to_note() -> bool:
            async with session.get(f"{system.url}/readyz") as response:
                return not (await response.json())["notices"]

        await until(nothing_to_note, 20.0, "nodes or the scheduler are missing")


def test_an_image_is_detected_where_the_policy_said(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            told = await ask(session, system, "detection", IMAGE, JPEG, "c")
            assert told.status == 200
            (found,) = told.body["detections"]
            assert found["box"] == FOUND
            assert told.body["decision"]["decided_by"] == "scheduler"
            assert told.body["decision"]["policy"] == "beam"
            assert told.body["decision"]["variant"] == "large"
            await assert_edge_conserved(session, system)

    asyncio.run(run())


def test_a_clip_is_tracked_in_its_own_coordinates(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            told = await ask(session, system, "tracking", clip(), MJPEG, "b")
            assert told.status == 200
            rows = told.body["tracks"]
            assert [row[0] for row in rows] == [1, 2, 3, 4, 5]
            assert len({row[1] for row in rows}) == 1
            for number, row in enumerate(rows):
                assert row[2:6] == pytest.approx([8 * number, 16, 32, 32], abs=3.0)

    asyncio.run(run())


def _environment_says(network: EdgeNetwork, told: Told) -> tuple[Any, ...]:
    """Delays and costs of one answered request by the environment, from what the answer lets one observe."""
    decision, delay = told.body["decision"], told.body["delay_s"]
    names = [table.name for table in network.tables]
    service = names.index(told.body["service"])
    table = network.tables[service]
    entry, node = (network.graph.names.index(decision[one]) for one in ("entry", "node"))
    i = table.configurations.index(decision["configuration"]["name"])
    j = table.variants.index(decision["variant"])
    adapted_mb = delay["access"] * float(network.graph.uplink_mbps[entry]) / 8.0
    waiting, used = np.zeros(network.nodes), np.zeros(network.nodes)
    waiting[node] = delay["queue"] * float(network.graph.tflops[node])
    deployed = np.zeros((network.nodes, network.variant_columns), dtype=bool)
    deployed[node, int(network.first_variant[service]) + j] = told.body["cost_usd"]["memory"] == 0.0
    asked = Request(told.body["service"], entry, 1e6, adapted_mb / float(network.size_factor[service, i]))
    outcome = network.evaluate(window_slots(network, [asked], waiting, used, deployed), np.array([[[i, j, node]]]))
    figures = (outcome.access_s, outcome.transmission_s, outcome.compute_s, outcome.routing_usd, outcome.memory_usd,
               outcome.compute_usd, outcome.accuracy)  # fmt: skip
    return tuple(float(figure[0, 0]) for figure in figures)


def test_three_services_at_once_and_every_figure_is_the_environments(system: RunningSystem) -> None:
    async def run() -> None:
        assert system.file.edge is not None
        network = network_of(system.file.edge)
        async with client() as session:
            before = await assert_edge_conserved(session, system)
            async with Load(session, f"{system.url}/v1/null", 50.0, b"tidegate-label:1\n") as load:
                asked = [ask(session, system, "detection", IMAGE, JPEG, "abcd"[n % 4]) for n in range(16)]
                asked += [ask(session, system, "tracking", clip(), MJPEG, "abcd"[n % 4]) for n in range(8)]
                told = await asyncio.gather(*asked)
            assert load.codes() == {"OK": len(load.sent)}
            assert Counter(one.status for one in told) == {200: 24}
            for one in told:
                delay, cost = one.body["delay_s"], one.body["cost_usd"]
                answered = (
                    delay["access"],
                    delay["transmission"],
                    delay["queue"] + delay["compute"],
                    cost["routing"],
                    cost["memory"],
                    cost["compute"],
                    one.body["expected_accuracy"],
                )
                assert answered == pytest.approx(_environment_says(network, one), abs=1e-9)
                assert delay["real"]["total"] >= delay["total"]
            after = await assert_edge_conserved(session, system)
            counted = Counter(after["outcomes"]["detection"]) - Counter(before["outcomes"].get("detection", {}))
            assert counted == {"OK": 16}
            assert len({one.body["decision"]["node"] for one in told}) > 1

    asyncio.run(run())


BAD = {
    "an unknown node": ("detection", IMAGE, {**JPEG, "x-edge-node": "z"}, 400, "there are a, b, c, d"),
    "a bad position": ("detection", IMAGE, {**JPEG, "x-position": "north"}, 400, "LATITUDE,LONGITUDE"),
    "no time": ("detection", IMAGE, {**JPEG, "x-deadline-ms": "0"}, 400, "above 0"),
    "too little time": ("detection", IMAGE, {**JPEG, "x-deadline-ms": "1"}, 504, "its time was over"),
    "an empty body": ("detection", b"", JPEG, 400, "the body is empty"),
    "another type": ("tracking", b"x", {"content-type": "text/plain"}, 415, "video/mp4"),
    "an unknown service": ("segmentation", IMAGE, JPEG, 404, "no service of this name"),
    "a corrupt image": ("detection", IMAGE[:300], JPEG, 400, ""),
    "no image": ("detection", b"GIF89a" + bytes(100), JPEG, 400, ""),
    "a corrupt clip": ("tracking", bytes(range(256)) * 40, {"content-type": "video/mp4"}, 400, ""),
    "a clip without frames": ("tracking", b"nothing", MJPEG, 400, "does not begin with a JPEG"),
    "a clip of one frame per day": ("tracking", clip(), {"content-type": "video/x-motion-jpeg; fps=0.00001"}, 413, ""),
    "a clip for a detector": ("detection", clip(), MJPEG, 415, "one image at a time"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_a_reason(system: RunningSystem, name: str) -> None:
    service, body, headers, status, says = BAD[name]

    async def run() -> None:
        async with client() as session:
            told = await ask(session, system, service, body, headers)
            assert told.status == status, told
            assert says in told.body["error"]
            assert told.body["error"]
            await assert_edge_conserved(session, system)
            assert (await ask(session, system, "detection", IMAGE, JPEG)).status == 200

    asyncio.run(run())


def test_a_get_is_told_to_post(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            told = await ask(session, system, "tracking", b"", {}, method="GET")
            assert told.status == 405
            assert "POST the image or clip" in told.body["error"]

    asyncio.run(run())


def test_a_one_pixel_image_is_served(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            told = await ask(session, system, "detection", picture((0, 0, 1, 1), 1, 1), JPEG)
            assert told.status == 200, told

    asyncio.run(run())


def test_a_clip_that_is_cut_off_while_uploading_leaves_nothing_behind(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            before = await assert_edge_conserved(session, system)
            with socket.create_connection(("127.0.0.1", system.port)) as connection:
                connection.sendall(b"POST /v1/tracking HTTP/1.1\r\nhost: x\r\ncontent-type: video/mp4\r\n")
                connection.sendall(b"content-length: 5000000\r\n\r\n" + bytes(1_000_000))

            async def cancelled() -> bool:
                outcomes = (await system.state(session))["outcomes"]["tracking"]
                return bool(outcomes.get("CANCELLED", 0) == before["outcomes"]["tracking"].get("CANCELLED", 0) + 1)

            await until(cancelled, 10.0, "the client's leaving was not noticed")
            await assert_edge_conserved(session, system)

    asyncio.run(run())


def test_the_scheduler_is_killed_and_nothing_is_lost(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            pid = system.pid("scheduler")
            told: list[Told] = []

            async def steadily() -> None:
                for n in range(30):
                    told.append(await ask(session, system, "detection", IMAGE, JPEG, "abcd"[n % 4]))
                    if n == 8:
                        os.kill(pid, signal.SIGKILL)

            await steadily()
            assert Counter(one.status for one in told) == {200: 30}
            by = [one.body["decision"]["decided_by"] for one in told]
            assert by[0] == "scheduler"
            assert "gateway" in by
            assert {one.body["decision"]["policy"] for one in told} == {"beam", "sequential"}

            async def back() -> bool:
                again = await ask(session, system, "detection", IMAGE, JPEG)
                return bool(again.body["decision"]["decided_by"] == "scheduler")

            await until(back, 20.0, "the restarted scheduler does not decide")
            await assert_edge_conserved(session, system)

    asyncio.run(run())


def test_the_board_is_killed_and_nothing_is_lost(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            pid = system.pid("board")
            told: list[Told] = []
            for n in range(40):
                told.append(await ask(session, system, "detection", IMAGE, JPEG, "abcd"[n % 4]))
                if n == 5:
                    os.kill(pid, signal.SIGKILL)
            assert Counter(one.status for one in told) == {200: 40}
            await _settled(system)  # the board that came back empty has been filled again
            await assert_edge_conserved(session, system)

    asyncio.run(run())


def test_a_node_is_killed_with_requests_and_all_are_answered(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            pid = system.pid("worker-w-b")
            asked = [
                asyncio.create_task(ask(session, system, "tracking", clip(20), MJPEG, "abcd"[n % 4])) for n in range(24)
            ]
            await asyncio.sleep(0.15)
            os.kill(pid, signal.SIGKILL)
            told = await asyncio.gather(*asked)
            assert {one.status for one in told} <= {200, 503}
            assert sum(one.status == 200 for one in told) >= 12
            assert all(one.body.get("error", "said") for one in told)
            await _settled(system)
            state = await assert_edge_conserved(session, system, restarted="b")
            assert sum(state["outcomes"]["tracking"].values()) >= 24

    asyncio.run(run())


def test_a_policy_that_cannot_be_loaded_is_told_and_sequential_places(tmp_path: Path) -> None:
    async def run(system: RunningSystem) -> None:
        async with client() as session:

            async def told() -> bool:
                async with session.get(f"{system.url}/readyz") as response:
                    notices = (await response.json())["notices"]
                return any("placed by sequential, not hisper-sequential" in one and "trained" in one for one in notices)

            await until(told, 20.0, "the reason is not told")
            answer = await ask(session, system, "detection", IMAGE, JPEG)
            assert answer.body["decision"]["policy"] == "sequential"
            assert answer.body["decision"]["decided_by"] == "scheduler"
            edge = (await system.state(session))["edge"]
            assert (edge["policy"], edge["placing_by"]) == ("hisper-sequential", "sequential")
            assert "hisper-sequential" in edge["reason"]

    with edge_system(edge_file(tmp_path, names="ab", policy="hisper-sequential")) as system:
        asyncio.run(run(system))


def test_nodes_whose_memory_fits_nothing_refuse_with_the_reason(tmp_path: Path) -> None:
    async def run(system: RunningSystem) -> None:
        async with client() as session:
            answer = await ask(session, system, "detection", IMAGE, JPEG)
            assert answer.status == 503
            assert "no node has the memory for an action that meets the deadline" in answer.body["error"]
            await assert_edge_conserved(session, system)

    with edge_system(edge_file(tmp_path, names="ab", memory_mb=50.0)) as system:
        asyncio.run(run(system))
