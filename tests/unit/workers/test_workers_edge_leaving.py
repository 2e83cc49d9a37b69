"""Clients that leave and neighbours that are lost, in virtual time: what is freed when, and who counts the request."""

import asyncio
from pathlib import Path

import pytest

from protocol.edge_records import Emulation
from protocol.outcomes import Attempt
from tests.fakes.edge_models import bright_deployment, picture
from tests.fakes.edge_world import World, run_world

COMPUTE_ONLY = Emulation(uplink=False, links=False)


def test_a_variant_is_in_use_until_its_computation_has_ended_for_whomever(tmp_path: Path) -> None:
    """The client leaves after 0.3 s of 1 s: the executor's thread goes on, so the variant must not leave before it."""

    async def scenario() -> None:
        world = World(bright_deployment(tmp_path, emulate=COMPUTE_ONLY), compute_s=1.0)
        node = world.nodes["a"]
        left = asyncio.create_task(world.infer("a", "a", picture()))
        await asyncio.sleep(0.3)
        left.cancel()
        await asyncio.sleep(0.5)
        assert node.status().deployed == ("small",)
        assert node.status().idle == ()
        assert node.books.held == 1
        await asyncio.wait([left])
        assert left.cancelled()
        assert world.clock.now_s() >= 1.0
        assert node.status().idle == ("small",)
        assert node.books.held == 0
        assert node.status().counts[Attempt.CANCELLED] == 1
        world.check_the_books()

    run_world(scenario())


def test_who_leaves_on_a_slow_uplink_gives_back_its_time_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(bright_deployment(tmp_path, uplink_mbps=0.005))
        left = asyncio.create_task(world.infer("a", "a", picture()))
        await asyncio.sleep(0.1)
        left.cancel()
        await asyncio.wait([left])
        begun_s = world.clock.now_s()
        ended = await world.infer("a", "a", picture())
        spent = ended.reply.spent
        assert ended.reply.attempt == Attempt.OK
        assert spent.emulated_uplink_queue_s == pytest.approx(0.0, abs=1e-9)
        assert world.clock.now_s() - begun_s < spent.emulated_access_s + 1.0
        world.check_the_books()

    run_world(scenario())


def test_who_loses_a_request_counts_it_and_forgets_it(tmp_path: Path) -> None:
    """A neighbour that dies with a request on it, or never answers: the node before it has to count the request."""

    async def scenario() -> None:
        world = World(bright_deployment(tmp_path, tflops=0.01, emulate=COMPUTE_ONLY))
        under_way = asyncio.create_task(world.infer("a", "c", picture()))
        await asyncio.sleep(0.1)
        world.peers["b", "c"].kill()
        assert (await under_way).reply.attempt == Attempt.UNAVAILABLE
        counts = {name: world.nodes[name].status().counts for name in "ab"}
        assert (sum(counts["a"]), sum(counts["b"]), counts["b"][Attempt.UNAVAILABLE]) == (0, 1, 1)
        assert world.nodes["a"].statistics().handed_on == 1
        assert world.nodes["b"].statistics().handed_on == 0
        silent = world.peers["a", "b"]
        silent.mute = True
        assert (await world.infer("a", "b", picture(), budget_s=5.0)).reply.attempt == Attempt.UNAVAILABLE
        assert world.nodes["a"].status().counts[Attempt.UNAVAILABLE] == 1
        assert world.nodes["a"].statistics().handed_on == 1
        assert silent.cancelled == [2], "it is told, should it still listen"
        world.check_the_books()

    run_world(scenario())
