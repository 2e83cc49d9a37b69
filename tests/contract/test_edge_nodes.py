"""Real node processes: requests enter, travel, are computed and come back; and what happens where they cannot."""

import asyncio
import itertools
import signal
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from models.clips import write_mjpeg
from protocol.edge_records import EdgeInfer, EdgeRun, Emulation
from protocol.frames import Kind, encode_head
from protocol.link import Connection, connect
from protocol.outcomes import Attempt
from protocol.records import Deployment
from tests.fakes.edge_models import bright_deployment, picture
from tests.fakes.edge_rig import Answer, EdgeRig, answer, edge_rig
from tests.fakes.finder_network import write_finder

RedisServer = Any  # of this folder's conftest.py, which importlib mode does not let tests import
COMPUTE_ONLY = Emulation(uplink=False, links=False)


async def linked(rig: EdgeRig, at: str, to: str) -> Answer:
    """The answer to a request once the links on its way are up."""

    async def look() -> Answer | None:
        found = await rig.ask(at, to, picture())
        return found if found.attempt == Attempt.OK else None

    return await rig.until(look)


async def check_the_books(rig: EdgeRig, *nodes: str) -> None:
    """arrived = sum of counts + length, and nobody keeps anything."""
    for node in nodes:

        async def empty(node: str = node) -> bool | None:
            status = await rig.status(node)
            assert status.arrived == sum(status.counts) + status.length
            return status.length == 0 or None

        await rig.until(empty)


def test_a_request_is_answered_at_its_own_node_and_two_links_away(tmp_path: Path, board_url: str) -> None:
    """What is found is where it was put, in the original's pixels; the figures are those of Eqs. 3 to 5."""

    async def scenario() -> None:
        async with edge_rig(tmp_path, board_url, bright_deployment(tmp_path)) as rig:
            here = await rig.ask("a", "a", picture())
            assert here.attempt == Attempt.OK, here.reply
            (found,) = here.json["detections"]
            assert (found["label"], found["class"], found["score"]) == ("bright", 0, 0.9)
            assert found["box"] == pytest.approx([32, 16, 32, 32], abs=1.5)
            assert here.reply.new_instance
            assert here.reply.status.node == "a"

            await linked(rig, "a", "c")
            there = await rig.ask("a", "c", picture(), configuration=1)
            assert there.attempt == Attempt.OK, there.reply
            assert there.json["detections"][0]["box"] == pytest.approx([32, 16, 32, 32], abs=2.5)
            assert there.reply.status.node == "c"
            assert not there.reply.new_instance
            megabits = 8 * there.reply.adapted_mb
            spent = there.reply.spent
            assert spent.emulated_access_s == pytest.approx(megabits / 100, rel=1e-9)
            assert spent.emulated_transmission_s == pytest.approx(2 * megabits / 100, rel=1e-9)
            assert spent.emulated_compute_s == pytest.approx(0.01, rel=1e-9)
            assert min(spent.decode_s, spent.adapt_s, spent.forward_s, spent.wait_s) > 0.0
            record = await rig.record("c")
            assert (record.worker, record.address) == ("w-c", rig.address("c"))
            assert record.memory_mb == 400.0
            await check_the_books(rig, "a", "b", "c")

    asyncio.run(scenario())


def test_real_times_add_up_to_what_the_client_waited(tmp_path: Path, fake_redis_url: str) -> None:
    """Every second between question and answer is in one of the fields; with 0.3 s of computing and 0.4 s of links."""

    async def scenario() -> None:
        deployment = bright_deployment(tmp_path, uplink_mbps=0.04, bandwidth_mbps=0.08)
        async with edge_rig(tmp_path, fake_redis_url, deployment) as rig:
            await linked(rig, "a", "c")
            await rig.ask("c", "c", picture(), variant="slow")
            loop = asyncio.get_running_loop()
            begun_s = loop.time()
            ended = await rig.ask("a", "c", picture(), variant="slow")
            took_s = loop.time() - begun_s
            spent = ended.reply.spent
            on_links_s = spent.emulated_access_s + spent.emulated_transmission_s
            real_s = sum(
                getattr(spent, f"{name}_s") for name in ("decode", "adapt", "forward", "load", "wait", "compute")
            )
            assert on_links_s > 0.3
            assert 0.3 <= spent.compute_s < 1.0
            assert took_s == pytest.approx(real_s + on_links_s, abs=0.2)

    asyncio.run(scenario())


def test_hostile_frames_harm_nobody_else(tmp_path: Path, fake_redis_url: str) -> None:
    """Wrong indices, no image, nonsense, frames that are cut off: refused with a reason; the node serves on."""

    async def scenario() -> None:
        async with edge_rig(tmp_path, fake_redis_url, bright_deployment(tmp_path, emulate=COMPUTE_ONLY)) as rig:
            assert rig.resident_mb("a") < 120, "sixteen idle nodes have to fit on a laptop"
            good = rig.asked("a")
            bad_indices: tuple[tuple[dict[str, Any], str], ...] = (
                ({"variant": 99}, "variant 99 of detection"),
                ({"configuration": -1}, "configuration -1"),
                ({"configuration": 2**40}, "configuration 1099511627776"),
                ({"node": 3}, "node 3"),
                ({"service": "x" * 5000}, "service 'xxx"),
            )
            for changes, reason in bad_indices:
                asked = msgspec.structs.replace(good, **changes)
                ended = await answer((await rig.link("a")).request(Kind.EDGE_INFER, asked, picture())[1])
                assert ended.attempt == Attempt.UNAVAILABLE
                assert reason in ended.reply.reason
            for body, content_type, status in (
                (b"", "image/jpeg", 400),
                (b"no picture", "image/png", 400),
                (picture()[:500], "image/jpeg", 400),
                (picture(), "text/html", 415),
                (b"\xff\xd8\xff" * 1000, "video/x-motion-jpeg", 400),
                (b"\0\0\0\x18ftypmp42" + b"\0" * 100, "video/mp4", 400),
            ):
                ended = await rig.ask("a", "a", body, content_type=content_type)
                assert (ended.attempt, ended.reply.http_status) == (Attempt.INVALID, status), ended.reply
                assert ended.reply.reason
            run = EdgeRun("detection", 0, 0, 0, 5.0, 160, 120, 1.0, 0.0, (1,), 0.001)
            assert (await rig.run("a", run, picture())).attempt == Attempt.OK
            bad_runs: tuple[tuple[dict[str, Any], bytes], ...] = (
                ({"scale": -1.0}, picture()),
                ({"frame_numbers": ()}, picture()),
                ({}, b"\xff\xd8\xffcut"),
                ({}, b""),
            )
            for changes, body in bad_runs:
                ended = await rig.run("a", msgspec.structs.replace(run, **changes), body)
                assert ended.attempt == Attempt.INVALID
            meta = msgspec.msgpack.encode(good)
            whole = encode_head(Kind.EDGE_INFER, 1, meta, len(picture())) + picture()
            for cut in (1, 19, 20, len(whole) - len(picture()), len(whole) - 1):
                _, writer = await asyncio.open_unix_connection(rig.address("a").removeprefix("unix:"))
                writer.write(whole[:cut])
                await writer.drain()
                writer.close()
            for bad in (b"GET / HTTP/1.1\r\n\r\n" * 10, encode_head(Kind.EDGE_RUN, 1, b"\xc1" * 50, 0)):
                reader, writer = await asyncio.open_unix_connection(rig.address("a").removeprefix("unix:"))
                writer.write(bad)
                async with asyncio.timeout(5.0):
                    assert await reader.read(), "a goodbye with the reason, then the end"
                writer.close()
            assert (await rig.ask("a", "a", picture())).attempt == Attempt.OK
            await check_the_books(rig, "a")
            assert rig.log("a").count('"level": "ERROR"') == 0

    asyncio.run(scenario())


def test_a_node_that_is_killed_or_hangs_is_told_of_and_comes_back(tmp_path: Path, fake_redis_url: str) -> None:
    """Requests on their way through it or at it end UNAVAILABLE and name it, within seconds; restarted it serves on."""

    async def scenario() -> None:
        deployment = bright_deployment(tmp_path, emulate=COMPUTE_ONLY, tflops=0.02)
        async with edge_rig(tmp_path, fake_redis_url, deployment) as rig:
            await linked(rig, "a", "c")
            under_way = [await rig.send("a", to, picture()) for to in ("b", "c", "c")]
            await asyncio.sleep(0.3)
            rig.signal("b", signal.SIGKILL)
            for future in under_way:
                lost = await answer(future)
                assert lost.attempt == Attempt.UNAVAILABLE
                assert "node b was lost with the request" in lost.reply.reason
                assert lost.reply.status.node == "a"
            gone = await rig.ask("a", "c", picture())
            assert gone.attempt == Attempt.UNAVAILABLE
            assert "node b is gone" in gone.reply.reason
            await check_the_books(rig, "a", "c")
            await rig.processes["b"].wait()
            await rig.start("b")
            await linked(rig, "a", "c")

            hanging = await rig.send("a", "c", picture())
            rig.signal("c", signal.SIGSTOP)
            ended = await answer(hanging)
            assert ended.attempt == Attempt.UNAVAILABLE
            assert "no word for 5 s" in ended.reply.reason
            assert ended.reply.status.node == "b"
            rig.signal("c", signal.SIGCONT)
            await linked(rig, "a", "c")
            await check_the_books(rig, "a", "b", "c")

    asyncio.run(scenario())


def test_cancelling_frees_the_place_at_the_other_end(tmp_path: Path, fake_redis_url: str) -> None:
    """By a CANCEL, and by the end of the connection that it came on."""

    async def scenario() -> None:
        deployment = bright_deployment(tmp_path, emulate=COMPUTE_ONLY, tflops=0.02)
        async with edge_rig(tmp_path, fake_redis_url, deployment) as rig:
            await linked(rig, "a", "c")
            link = await rig.other_link("a")
            request_id, future = link.request(Kind.EDGE_INFER, rig.asked("c"), picture())
            for _ in range(2):
                link.request(Kind.EDGE_INFER, rig.asked("c"), picture())

            async def all_there() -> bool | None:
                return (await rig.status("c")).length == 3 or None

            await rig.until(all_there)
            link.send(Kind.CANCEL, request_id)
            assert (await answer(future)).attempt == Attempt.CANCELLED

            async def one_left() -> bool | None:
                return (await rig.status("c")).length == 2 or None

            await rig.until(one_left)
            link.close("the gateway has gone")
            await check_the_books(rig, "a", "b", "c")
            status = await rig.status("c")
            assert status.counts[Attempt.CANCELLED] == 3
            assert status.waiting_tflop < 0.01

    asyncio.run(scenario())


def test_draining_finishes_what_is_there(tmp_path: Path, fake_redis_url: str) -> None:
    """SIGTERM: what is here is answered, what comes is refused, the record goes, and it exits with 0."""

    async def scenario() -> None:
        deployment = bright_deployment(tmp_path, nodes="ab", emulate=COMPUTE_ONLY, tflops=0.02)
        async with edge_rig(tmp_path, fake_redis_url, deployment) as rig:
            await linked(rig, "a", "b")
            last = [await rig.send("a", "b", picture()) for _ in range(2)]
            await asyncio.sleep(0.1)
            rig.signal("b", signal.SIGTERM)

            async def draining() -> bool | None:
                return (await rig.record("b")).draining or None

            await rig.until(draining)
            await asyncio.sleep(0.3)
            late = await rig.ask("a", "b", picture())
            assert late.attempt == Attempt.UNAVAILABLE
            assert "node b is draining" in late.reply.reason
            assert [(await answer(one)).attempt for one in last] == [Attempt.OK, Attempt.OK]
            async with asyncio.timeout(10.0):
                assert await rig.processes["b"].wait() == 0
            assert [record.node for record in await rig.board.nodes()] == ["a"]

    asyncio.run(scenario())


def test_the_deployment_is_followed(tmp_path: Path, fake_redis_url: str) -> None:
    """Preloads come and go with it; a bad table is a reason on the board, a good one ends it; no node is no node."""

    async def scenario() -> None:
        first = bright_deployment(tmp_path, nodes="a", preload=("small",))
        async with edge_rig(tmp_path, fake_redis_url, first) as rig:

            async def posted(deployment: Deployment, **expected: object) -> None:
                await rig.board.put_deployment(deployment)

                async def so() -> bool | None:
                    record = await rig.record("a")
                    return all(getattr(record, key) == value for key, value in expected.items()) or None

                await rig.until(so)

            await posted(first, deployed=("small",), memory_used_mb=100.0, reason="")
            await posted(bright_deployment(tmp_path, nodes="a", preload=("large",)), deployed=("large", "small"))
            table = tmp_path / "bright-detection.toml"
            text = table.read_text()
            table.write_text(text.replace("tflop = 0.05", "tflop = -1"))
            spoilt = bright_deployment_as_it_is(tmp_path, first)
            await rig.board.put_deployment(spoilt)

            async def told() -> str | None:
                return (await rig.record("a")).reason or None

            assert "tflop is -1" in await rig.until(told)
            refused = await rig.ask("a", "a", picture())
            assert refused.attempt == Attempt.UNAVAILABLE
            assert "tflop is -1" in refused.reply.reason
            await posted(bright_deployment(tmp_path, nodes="a", memory_mb=90.0), memory_mb=90.0, deployed=(), reason="")
            full = await rig.ask("a", "a", picture())
            assert full.attempt == Attempt.UNAVAILABLE
            assert "no memory on node a: small with its data needs" in full.reply.reason
            await rig.board.put_deployment(bright_deployment(tmp_path, nodes="b"))

            async def no_node() -> bool | None:
                return not await rig.board.nodes() or None

            await rig.until(no_node)
            assert "no edge node" in (await rig.ask("a", "a", picture())).reply.reason

    asyncio.run(scenario())


def bright_deployment_as_it_is(folder: Path, like: Deployment) -> Deployment:
    """Another deployment over the tables that lie in the folder now."""
    assert like.edge is not None
    return msgspec.structs.replace(like, edge=msgspec.structs.replace(like.edge, queue_capacity=3))


@pytest.mark.redis
def test_a_lost_board_costs_nothing(tmp_path: Path, redis_server: RedisServer) -> None:
    """Redis killed: requests travel on. Redis back and empty: the nodes are there again, under the same epochs."""

    async def scenario() -> None:
        async with edge_rig(tmp_path, redis_server.url, bright_deployment(tmp_path, nodes="ab")) as rig:
            await linked(rig, "a", "b")
            epoch = (await rig.record("b")).epoch
            redis_server.kill()
            for _ in range(3):
                assert (await rig.ask("a", "b", picture())).attempt == Attempt.OK
                await asyncio.sleep(0.7)
            redis_server.start()
            assert (await rig.record("b")).epoch == epoch
            assert (await rig.ask("a", "b", picture())).attempt == Attempt.OK

    asyncio.run(scenario())


def test_requests_are_conserved_between_nodes_in_a_storm(tmp_path: Path, fake_redis_url: str) -> None:
    """Requests, cancellations and nonsense on several connections: each is counted at one node, as it was answered."""

    async def scenario() -> None:
        deployment = bright_deployment(tmp_path, tflops=2.0, memory_mb=350.0, queue_capacity=8)
        async with edge_rig(tmp_path, fake_redis_url, deployment) as rig:
            await linked(rig, "a", "c")
            await linked(rig, "c", "a")
            before = [(await rig.status(node)).counts for node in "abc"]
            links = {node: await connect(rig.address(node), lambda: Connection(lambda *_: None)) for node in "abc"}
            futures = []
            for number, (at, to) in enumerate(itertools.islice(itertools.cycle(itertools.product("abc", "abc")), 180)):
                variant = ("small", "large", "raising", "broken", "small")[number % 5]
                asked: EdgeInfer = rig.asked(
                    to, variant, configuration=number % 2, budget_s=(0.01, 0.5, 20.0, 20.0)[number % 4]
                )
                body = b"nonsense" if number % 11 == 0 else picture()
                request_id, future = links[at].request(Kind.EDGE_INFER, asked, body)
                futures.append(future)
                if number % 7 == 0:
                    links[at].send(Kind.CANCEL, request_id)
                if number % 10 == 0:
                    await asyncio.sleep(0.1)
            ended = [await answer(future) for future in futures]
            await check_the_books(rig, *"abc")
            counted = [0] * len(Attempt)
            for node, old in zip("abc", before, strict=True):
                for attempt, (now, then) in enumerate(zip((await rig.status(node)).counts, old, strict=True)):
                    counted[attempt] += now - then
            assert sum(counted) == 180
            assert counted == [sum(one.attempt == attempt for one in ended) for attempt in range(len(Attempt))]
            assert min(counted[one] for one in (Attempt.OK, Attempt.INVALID, Attempt.UNAVAILABLE)) >= 10, counted

    asyncio.run(scenario())


ENTRY = """
name = "{name}"
service = "{service}"
tracker = "{tracker}"
path = "finder.onnx"
labels = ["thing"]
short_side = 120
long_side = 160
memory_mb = 10
tflop = 0.001
weights = "random"
"""


def test_a_real_network_on_a_real_worker(tmp_path: Path, fake_redis_url: str) -> None:
    """`python -m workers` with a user's own ONNX file: an image and a clip, through onnxruntime and SORT, two nodes."""
    catalog = tmp_path / "catalog"
    (catalog / "edge").mkdir(parents=True)
    write_finder(catalog / "edge" / "finder.onnx")
    for name, service, tracker in (("finder", "detection", ""), ("finder_sort", "tracking", "sort")):
        entry = ENTRY.format(name=name, service=service, tracker=tracker)
        (catalog / "edge" / f"{name}.toml").write_text(entry)
    deployment = bright_deployment(tmp_path, nodes="ab", emulate=COMPUTE_ONLY)
    for table, old, new in (("detection", "small", "finder"), ("tracking", '"follower"', '"finder_sort"')):
        path = tmp_path / f"bright-{table}.toml"
        path.write_text(path.read_text().replace(old, new))

    async def scenario() -> None:
        async with edge_rig(tmp_path, fake_redis_url, deployment, catalog) as rig:

            async def linked_by_finder() -> Answer | None:
                found = await rig.ask("a", "b", picture(), variant="finder")
                return found if found.attempt == Attempt.OK else None

            image = await rig.until(linked_by_finder)
            (found,) = image.json["detections"]
            left, top, width, height = found["box"]
            assert (found["label"], width, height) == ("thing", 16.0, 16.0)
            assert 30 <= left <= 50
            assert 14 <= top <= 34
            frames = []
            for number in range(10):
                frame = np.zeros((120, 160, 3), dtype=np.uint8)
                frame[40:56, 10 + 4 * number : 26 + 4 * number] = 255
                frames.append(frame)
            clip = await rig.ask(
                "a", "b", write_mjpeg(frames, 95), service="tracking", variant="finder_sort",
                content_type="video/x-motion-jpeg; fps=5",
            )  # fmt: skip
            assert clip.attempt == Attempt.OK, clip.reply.reason
            tracks = clip.json["tracks"]
            assert len(tracks) >= 7
            assert len({row[1] for row in tracks}) == 1, "one thing, one track"
            for row in tracks:
                assert row[2] == pytest.approx(10 + 4 * (row[0] - 1), abs=3)
                assert row[3] == pytest.approx(40, abs=3)
            status = await rig.status("b")
            assert set(status.deployed) == {"finder", "finder_sort"}
            assert rig.resident_mb("a") < 120, "idle"
            assert rig.resident_mb("b") < 300, "with two small networks and what trackers import"

    asyncio.run(scenario())
