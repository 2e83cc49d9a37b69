"""How requests end at nodes that cannot answer them, in virtual time: with a reason, once, and nothing stays behind."""

import asyncio
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest

from models.clips import write_mjpeg
from protocol.edge_records import EdgeInfer, EdgeLinkSpec, EdgeRun, Emulation
from protocol.outcomes import Attempt
from tests.fakes.edge_models import bright_deployment, picture
from tests.fakes.edge_world import World, run_world
from workers import edge_books
from workers.edge_follow import NodeFollower, drain
from workers.edge_journey import Body, Ended

COMPUTE_ONLY = Emulation(uplink=False, links=False)


def attempts(ended: list[Ended]) -> list[Attempt]:
    """How they ended."""
    return [Attempt(one.reply.attempt) for one in ended]


@pytest.mark.parametrize(
    ("variant", "attempt", "reason"),
    [
        ("broken", Attempt.UNAVAILABLE, "broken.onnx is cut off"),
        ("raising", Attempt.FAILED, "the network broke"),
    ],
)
def test_a_bad_variant_ends_its_requests_only(tmp_path: Path, variant: str, attempt: Attempt, reason: str) -> None:
    """With the reason, also two links away; others are served on, and a load is tried again for the next request."""

    async def scenario() -> None:
        world = World(bright_deployment(tmp_path, emulate=COMPUTE_ONLY))
        for _ in range(2):
            bad, good = await asyncio.gather(
                world.infer("a", "c", picture(), variant=variant), world.infer("a", "c", picture())
            )
            assert (bad.reply.attempt, good.reply.attempt) == (attempt, Attempt.OK)
            assert reason in bad.reply.reason
        assert world.nodes["c"].status().waiting_tflop == pytest.approx(0.0, abs=0.05)
        world.check_the_books()

    run_world(scenario())


@pytest.mark.parametrize(
    ("settings", "body", "http_status"),
    [
        ({}, b"no picture", 400),
        ({}, picture()[:300], 400),
        ({}, b"", 400),
        ({"content_type": "text/plain"}, picture(), 415),
        ({"content_type": "video/x-motion-jpeg"}, write_mjpeg([np.zeros((32, 32, 3), np.uint8)] * 3), 415),
        ({"content_type": "video/x-motion-jpeg", "service": "tracking", "variant": "follower"}, b"", 400),
        (
            {"content_type": "video/x-motion-jpeg", "service": "tracking", "variant": "follower"},
            write_mjpeg([np.zeros((16, 16, 3), np.uint8)] * 101),
            413,
        ),
    ],
)
def test_what_is_no_image_or_clip_is_the_clients_fault(
    tmp_path: Path, settings: dict[str, str], body: bytes, http_status: int
) -> None:
    """INVALID, with the status that says more; a clip for a detector is found out where it is computed."""

    async def scenario() -> None:
        world = World(bright_deployment(tmp_path, emulate=COMPUTE_ONLY))
        ended = await world.infer("a", "b", body, **settings)  # type: ignore[arg-type]
        assert (ended.reply.attempt, ended.reply.http_status) == (Attempt.INVALID, http_status)
        assert ended.reply.reason
        world.check_the_books()

    run_world(scenario())


def test_a_dead_or_silent_neighbour_is_named(tmp_path: Path) -> None:
    """No link, a link that breaks with the request on it, one that never answers: UNAVAILABLE, and nothing stays."""

    async def scenario() -> None:
        world = World(bright_deployment(tmp_path, tflops=0.01, emulate=COMPUTE_ONLY))
        await world.infer("a", "c", picture())
        under_way = asyncio.create_task(world.infer("a", "c", picture()))
        await asyncio.sleep(0.1)
        world.peers["b", "c"].kill()
        lost = await under_way
        assert (lost.reply.attempt, lost.reply.status.node) == (Attempt.UNAVAILABLE, "b")
        assert "node c was lost with the request" in lost.reply.reason
        gone = await world.infer("a", "c", picture())
        assert gone.reply.attempt == Attempt.UNAVAILABLE
        assert "node c is gone" in gone.reply.reason
        world.peers["a", "b"].mute = True
        begun_s = world.clock.now_s()
        silent = await world.infer("a", "b", picture(), budget_s=5.0)
        assert silent.reply.attempt == Attempt.UNAVAILABLE
        assert "node b does not answer" in silent.reply.reason
        assert world.clock.now_s() - begun_s == pytest.approx(35.0, abs=1.0)
        world.check_the_books()
        assert world.nodes["a"].books.held == world.nodes["b"].books.held == 0

    run_world(scenario())


def test_what_this_deployment_does_not_have_is_refused(tmp_path: Path) -> None:
    """Indices out of range come from another deployment: UNAVAILABLE, and what would be right."""

    async def scenario() -> None:
        world = World(bright_deployment(tmp_path))
        node = world.nodes["a"]
        for asked, reason in (
            (EdgeInfer("detection", 2, 0, 0, 1.0), "configuration 2 of detection: node a knows 0 to 1"),
            (EdgeInfer("detection", -1, 0, 0, 1.0), "configuration -1"),
            (EdgeInfer("detection", 0, 9, 0, 1.0), "variant 9"),
            (EdgeInfer("detection", 0, 0, 3, 1.0), "node 3 of detection: node a knows 0 to 2"),
            (EdgeInfer("faces", 0, 0, 0, 1.0), "service 'faces'"),
        ):
            ended = await node.infer(asked, Body(picture()))
            assert ended.reply.attempt == Attempt.UNAVAILABLE
            assert reason in ended.reply.reason
        for scale, width in ((0.0, 10), (float("nan"), 10), (1.0, 0)):
            ended = await node.run(EdgeRun("detection", 0, 0, 0, 1.0, width, 10, scale, 0.0, (1,)), Body(picture()))
            assert ended.reply.attempt == Attempt.INVALID
        ended = await node.run(EdgeRun("detection", 0, 0, 0, 1.0, 10, 10, 1.0, 0.0, (1, 2)), Body(picture()))
        assert ended.reply.attempt == Attempt.INVALID
        assert "1 frames came, and the numbers of 2" in ended.reply.reason
        node.follow("", None)
        ended = await node.infer(EdgeInfer("detection", 0, 0, 0, 1.0), Body(picture()))
        assert ended.reply.attempt == Attempt.UNAVAILABLE
        assert "no edge node" in ended.reply.reason
        world.check_the_books()

    run_world(scenario())


def test_conservation_in_a_storm_of_requests_and_cancellations(tmp_path: Path) -> None:
    """Little memory, few places, tight budgets, clients that leave at any time: every node's books always add up."""

    async def scenario() -> None:
        rng = random.Random(11)
        deployment = bright_deployment(
            tmp_path, memory_mb=330.0, queue_capacity=3, tflops=0.1, uplink_mbps=2.0, bandwidth_mbps=2.0
        )
        world = World(deployment, compute_s=0.05, load_s=0.1)
        tasks: list[asyncio.Task[Ended]] = []
        for _ in range(400):
            body = picture() if rng.random() < 0.9 else b"nonsense"
            task = asyncio.create_task(
                world.infer(
                    rng.choice("abc"),
                    rng.choice("abc"),
                    body,
                    variant=rng.choice(["small", "large", "broken", "raising"]),
                    configuration=rng.randrange(2),
                    budget_s=rng.choice([0.0, 0.05, 0.3, 2.0, 60.0]),
                )
            )
            tasks.append(task)
            await asyncio.sleep(rng.expovariate(30.0))
            if rng.random() < 0.25:
                rng.choice(tasks).cancel()
            world.check_the_books()
        ended = [one for one in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(one, Ended)]
        assert len(ended) < 400
        for node in world.nodes.values():
            await node.books.emptied()
        world.check_the_books()
        counts = np.sum([node.status().counts for node in world.nodes.values()], axis=0)
        assert counts.sum() == 400, "every request was counted at one node"
        seen = {Attempt(one.reply.attempt) for one in ended}
        assert {Attempt.OK, Attempt.QUEUE_FULL, Attempt.EXPIRED, Attempt.INVALID, Attempt.UNAVAILABLE} <= seen
        for attempt in set(Attempt) - {Attempt.CANCELLED}:
            assert counts[attempt] == sum(one.reply.attempt == attempt for one in ended)
        assert all(node.statistics().variants.evictions for node in world.nodes.values())
        assert len([one for one in world.opened if not one.closed]) == sum(
            len(node.status().deployed) for node in world.nodes.values()
        )

    run_world(scenario())


def test_draining_finishes_what_is_here_and_cuts_off_what_is_too_slow(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(bright_deployment(tmp_path, tflops=0.02, emulate=COMPUTE_ONLY))
        node = world.nodes["a"]
        await world.infer("a", "a", picture())
        tasks = [asyncio.create_task(world.infer("a", "a", picture())) for _ in range(3)]
        await asyncio.sleep(0.01)

        def cut_off() -> None:
            for task in tasks:
                task.cancel()

        draining = asyncio.create_task(drain(node, 2.5, 0.1, cut_off))
        await asyncio.sleep(0.05)
        assert node.status().draining
        tasks.append(asyncio.create_task(world.infer("a", "b", picture())))  # within the notice
        await asyncio.sleep(0.1)
        refused = await world.infer("a", "a", picture())
        assert refused.reply.attempt == Attempt.UNAVAILABLE
        assert "is draining" in refused.reply.reason
        await draining
        assert node.books.held == 0
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(one, Ended) for one in ended] == [True, True, False, True]
        assert node.taken_back().reply.attempt == Attempt.UNAVAILABLE
        assert node.status().counts[Attempt.UNAVAILABLE] == 2
        assert all(runtime.closed for runtime in world.opened[:1])
        world.check_the_books()

    run_world(scenario())


def test_who_ends_without_an_answer_gives_back_its_time_in_line(tmp_path: Path) -> None:
    """Whoever comes next is not told of work that nobody does."""

    async def scenario() -> None:
        world = World(bright_deployment(tmp_path, tflops=0.02, emulate=COMPUTE_ONLY))
        node = world.nodes["a"]
        failed = await world.infer("a", "a", picture(), variant="raising")
        assert failed.reply.attempt == Attempt.FAILED
        assert node.status().waiting_tflop == 0.0
        await world.infer("a", "a", picture())
        left = asyncio.create_task(world.infer("a", "a", picture()))
        await asyncio.sleep(0.25)
        assert node.status().waiting_tflop > 0.0
        left.cancel()
        await asyncio.wait([left])
        assert node.status().waiting_tflop == pytest.approx(0.0)
        assert node.backlog_s(world.clock.now_s()) == 0.0
        world.check_the_books()

    run_world(scenario())


def test_nodes_that_disagree_do_not_send_a_request_round_and_round(tmp_path: Path) -> None:
    """To c by way of b, says a; by way of a, says b, which follows another deployment."""

    async def scenario() -> None:
        deployment = bright_deployment(tmp_path, emulate=COMPUTE_ONLY)
        assert deployment.edge is not None
        links = tuple(EdgeLinkSpec(between=("a", other), bandwidth_mbps=100.0) for other in "bc")
        other = msgspec.structs.replace(deployment, edge=msgspec.structs.replace(deployment.edge, links=links))
        world = World(deployment)
        NodeFollower("w-b", world.nodes["b"]).follow(other)
        ended = await world.infer("a", "c", picture())
        assert ended.reply.attempt == Attempt.UNAVAILABLE
        assert "nodes disagree" in ended.reply.reason
        world.check_the_books()
        assert [world.nodes[name].statistics().entered for name in "abc"] == [3, 2, 0]

    run_world(scenario())


def test_a_node_holds_a_bounded_number_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies, and adapted data on slow links; what has gone makes room again."""
    body = picture()
    monkeypatch.setattr(edge_books, "MOST_BYTES", 3 * len(body))

    async def scenario() -> None:
        world = World(bright_deployment(tmp_path, uplink_mbps=0.01, tflops=0.05))
        waiting = [asyncio.create_task(world.infer("a", "b", body)) for _ in range(3)]
        await asyncio.sleep(0.1)
        refused = await world.infer("a", "a", body)
        assert refused.reply.attempt == Attempt.QUEUE_FULL
        assert "MiB of data already" in refused.reply.reason
        assert attempts(await asyncio.gather(*waiting)) == [Attempt.OK] * 3
        assert (await world.infer("a", "a", body)).reply.attempt == Attempt.OK
        assert world.nodes["a"].books.bytes == 0
        world.check_the_books()

    run_world(scenario())
