"""A request's way through nodes, in virtual time: emulated figures, switches, queues, deadlines, answers."""

import asyncio
import json
import random
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from models.clips import write_mjpeg
from policies.placement.contract import Slots
from policies.placement.edge_network import ACCEPTED, MEGABITS_PER_MEGABYTE
from protocol.edge_records import EdgeReply, Emulation
from protocol.outcomes import Attempt
from tests.fakes.edge_models import bright_deployment, picture
from tests.fakes.edge_world import World, run_world
from workers.edge_follow import NodeFollower
from workers.edge_journey import Ended

COMPUTE_ONLY = Emulation(uplink=False, links=False)


def attempts(ended: list[Ended]) -> list[Attempt]:
    """How they ended."""
    return [Attempt(one.reply.attempt) for one in ended]


def test_links_and_computation_are_waited_for_and_queued_for(tmp_path: Path) -> None:
    """Three requests at once from a to c: each behind the one before on the uplink, on both links, at the node."""

    async def scenario() -> None:
        world = World(bright_deployment(tmp_path, uplink_mbps=0.005, bandwidth_mbps=0.02, tflops=0.02))
        begun_s = world.clock.now_s()
        ended = await asyncio.gather(*(world.infer("a", "c", picture()) for _ in range(3)))
        assert attempts(ended) == [Attempt.OK] * 3
        megabits = MEGABITS_PER_MEGABYTE * ended[0].reply.adapted_mb
        access_s, link_s, compute_s = megabits / 0.005, megabits / 0.02, 0.02 / 0.02
        assert access_s > compute_s > link_s, "the uplink is the bottleneck, then the node"
        for number, one in enumerate(ended):
            spent = one.reply.spent
            assert spent.emulated_access_s == pytest.approx(access_s, abs=1e-12)
            assert spent.emulated_uplink_queue_s == pytest.approx(number * access_s, abs=1e-9)
            assert spent.emulated_transmission_s == pytest.approx(2 * link_s, abs=1e-12)
            assert spent.emulated_link_queue_s == 0.0
            assert spent.emulated_compute_s == pytest.approx(compute_s, abs=1e-12)
        took_s = world.clock.now_s() - begun_s
        assert took_s == pytest.approx(3 * access_s + 2 * link_s + compute_s, abs=0.02)
        world.check_the_books()

    run_world(scenario())


def test_emulated_figures_are_the_environments(tmp_path: Path) -> None:
    """Two hundred random requests on the paper's graph, many at once: Eqs. 3 to 5 give every figure to 1e-9.

    That is by the sizes, the work ahead and the loads that the replies report.
    """

    async def scenario() -> float:
        rng = random.Random(5)
        world = World(bright_deployment(tmp_path, graph="eua16:3"))
        network, names = world.network, world.network.graph.names
        pictures = [picture((8, 8, 8 + side, 40), 160 + 8 * side) for side in range(8, 90, 20)]
        worst = 0.0

        async def one(at: str, to: str, variant: str, configuration: int, body: bytes) -> float:
            ended = await world.infer(at, to, body, variant=variant, configuration=configuration)
            assert ended.reply.attempt == Attempt.OK
            return difference(ended.reply, names.index(at), names.index(to), variant, configuration)

        def difference(reply: EdgeReply, at: int, to: int, variant: str, configuration: int) -> float:
            column = network.tables[0].variants.index(variant)
            slots = Slots(
                service=np.array([[0]]),
                local=np.array([[at]]),
                deadline_s=np.array([[1e9]]),
                data_mb=np.array([[reply.adapted_mb / network.size_factor[0, configuration]]]),
                system_tflop=np.where(np.arange(network.nodes) == to, reply.waiting_tflop, 0.0)[None],
                memory_used_mb=np.zeros((1, network.nodes)),
                deployed=np.full((1, network.nodes, network.variant_columns), not reply.new_instance),
            )
            outcome = network.evaluate(slots, np.array([[[configuration, column, to]]]))
            assert outcome.reason[0, 0] == ACCEPTED
            spent = reply.spent
            pairs = (
                (outcome.access_s, spent.emulated_access_s),
                (outcome.transmission_s, spent.emulated_transmission_s),
                (outcome.compute_s, spent.emulated_queue_s + spent.emulated_compute_s),
            )
            return max(abs(float(figures[0, 0]) - own) for figures, own in pairs)

        for _ in range(20):
            many = [
                one(rng.choice(names), rng.choice(names), rng.choice(["small", "large"]), rng.randrange(2), body)
                for body in rng.choices(pictures, k=10)
            ]
            worst = max(worst, *await asyncio.gather(*many))
            await asyncio.sleep(rng.uniform(0.0, 0.5))
        world.check_the_books()
        return worst

    assert run_world(scenario()) < 1e-9


def test_switches_turn_each_emulation_off(tmp_path: Path) -> None:
    """Without any, only the real computation takes time, and no emulated figure is reported."""

    async def scenario() -> None:
        off = Emulation(uplink=False, links=False, compute="real")
        deployment = bright_deployment(tmp_path, emulate=off, uplink_mbps=0.001, bandwidth_mbps=0.001, tflops=1e-6)
        world = World(deployment, compute_s=0.25)
        first, second = await asyncio.gather(*(world.infer("a", "c", picture()) for _ in range(2)))
        assert attempts([first, second]) == [Attempt.OK] * 2
        for ended in (first, second):
            spent = ended.reply.spent
            assert spent.compute_s == pytest.approx(0.25, abs=0.05)
            assert (spent.emulated_access_s, spent.emulated_transmission_s) == (0.0, 0.0)
            assert (spent.emulated_queue_s, spent.emulated_compute_s) == (0.0, 0.0)
        assert second.reply.spent.wait_s == pytest.approx(0.25, abs=0.05)
        again = await world.infer("c", "c", picture())
        assert again.reply.waiting_tflop == 0.0
        waiting = [asyncio.create_task(world.infer("c", "c", picture())) for _ in range(3)]
        await asyncio.sleep(0.01)
        ahead_s = world.nodes["c"].status().waiting_tflop / 1e-6
        assert ahead_s == pytest.approx(0.74, abs=0.1), "three known computations, one of which has begun"
        await asyncio.gather(*waiting)

    run_world(scenario())


def test_a_full_queue_says_so_at_once(tmp_path: Path) -> None:
    """Two places of 0.5 s: the third is refused while they are taken, and its time is not wasted."""

    async def scenario() -> None:
        deployment = bright_deployment(tmp_path, queue_capacity=2, tflops=0.04, emulate=COMPUTE_ONLY)
        world = World(deployment)
        waiting = [asyncio.create_task(world.infer("a", "b", picture())) for _ in range(2)]
        await asyncio.sleep(0.1)
        refused = await world.infer("c", "b", picture())
        assert refused.reply.attempt == Attempt.QUEUE_FULL
        assert "node b holds 2" in refused.reply.reason
        assert refused.reply.status.length == 2
        assert world.clock.now_s() < 0.2
        assert attempts(await asyncio.gather(*waiting)) == [Attempt.OK] * 2
        world.check_the_books()
        assert world.nodes["b"].status().counts[Attempt.QUEUE_FULL] == 1

    run_world(scenario())


def test_what_cannot_be_in_time_is_not_computed(tmp_path: Path) -> None:
    """A budget of nothing, an uplink too slow, work ahead at the node, a variant that takes too long to load."""

    async def scenario() -> None:
        world = World(bright_deployment(tmp_path, uplink_mbps=0.1, tflops=0.02), load_s=0.4)
        size_mb = (await world.infer("a", "a", picture())).reply.adapted_mb
        runs = len(world.opened)
        access_s = 8 * size_mb / 0.1
        none = await world.infer("a", "a", picture(), budget_s=0.0)
        uplink = await world.infer("a", "a", picture(), budget_s=0.5 * access_s)
        assert "the uplink has carried the data" in uplink.reply.reason
        node = await world.infer("a", "b", picture(), budget_s=access_s + 0.9)
        assert "node b would be done" in node.reply.reason
        assert attempts([none, uplink, node]) == [Attempt.EXPIRED] * 3
        assert len(world.opened) == runs, "nothing was loaded for them"
        world.check_the_books()
        quick = World(bright_deployment(tmp_path, emulate=COMPUTE_ONLY), load_s=0.4)
        loading = await quick.infer("a", "a", picture(), budget_s=0.2)
        assert loading.reply.attempt == Attempt.EXPIRED
        assert "before the variant was loaded" in loading.reply.reason
        late = await quick.infer("a", "a", picture(), budget_s=0.3)
        assert late.reply.attempt == Attempt.OK, "the load went on, and nobody has to load it again"
        assert not late.reply.new_instance
        quick.check_the_books()

    run_world(scenario())


def test_a_computation_that_has_begun_is_finished_and_late(tmp_path: Path) -> None:
    """LATE with its answer; one that waits behind it is dropped the moment its time is over."""

    async def scenario() -> None:
        world = World(bright_deployment(tmp_path, emulate=COMPUTE_ONLY), compute_s=2.0)
        await world.infer("a", "a", picture())
        now_s = world.clock.now_s()
        first = asyncio.create_task(world.infer("a", "a", picture(), budget_s=1.0))
        await asyncio.sleep(0.01)
        second = await world.infer("a", "a", picture(), budget_s=0.5)
        assert second.reply.attempt == Attempt.EXPIRED
        assert world.clock.now_s() - now_s == pytest.approx(0.51, abs=0.05)
        late = await first
        assert late.reply.attempt == Attempt.LATE
        assert json.loads(late.payload)["detections"]
        assert late.reply.spent.compute_s == pytest.approx(2.0, abs=0.1)
        world.check_the_books()

    run_world(scenario())


def test_a_clip_is_tracked_in_its_own_pixels_and_frame_numbers(tmp_path: Path) -> None:
    """30 frames/s, 5 kept, half as large: rows name frames 1, 7, 13, ... and the box as it was drawn."""

    async def scenario() -> None:
        frames = []
        for number in range(30):
            frame = np.zeros((96, 128, 3), dtype=np.uint8)
            frame[16:48, 2 * number : 2 * number + 32] = 255
            frames.append(frame)
        world = World(bright_deployment(tmp_path, emulate=COMPUTE_ONLY))
        ended = await world.infer(
            "a", "b", write_mjpeg(frames, 95), service="tracking", variant="follower", configuration=1,
            content_type="video/x-motion-jpeg; fps=30",
        )  # fmt: skip
        assert ended.reply.attempt == Attempt.OK, ended.reply.reason
        answer = json.loads(ended.payload)
        assert answer["labels"] == ["bright"]
        assert [row[0] for row in answer["tracks"]] == [1, 7, 13, 19, 25]
        for frame_number, track, left, top, width, height, score, number in answer["tracks"]:
            assert [left, top, width, height] == pytest.approx([2 * (frame_number - 1), 16, 32, 32], abs=2.5)
            assert (track, score, number) == (1, 0.9, 0)

    run_world(scenario())


def test_a_change_of_preloads_leaves_the_queue_alone(tmp_path: Path) -> None:
    """What waits is still ahead of who comes next; a change of the network begins anew."""

    async def scenario() -> None:
        deployment = bright_deployment(tmp_path, nodes="a", memory_mb=500.0, tflops=0.02, emulate=COMPUTE_ONLY)
        world = World(deployment)
        node = world.nodes["a"]
        follower = NodeFollower("w-a", node)
        follower.follow(deployment)
        waiting = asyncio.create_task(world.infer("a", "a", picture()))
        await asyncio.sleep(0.5)
        ahead = node.status().waiting_tflop
        assert ahead == pytest.approx(0.01)
        follower.follow(msgspec.structs.replace(deployment, version=9))
        follower.follow(
            bright_deployment(
                tmp_path, nodes="a", memory_mb=500.0, tflops=0.02, emulate=COMPUTE_ONLY, preload=("large",)
            )
        )
        assert node.status().waiting_tflop == ahead
        assert set(node.status().deployed + node.status().loading) == {"large", "small"}
        follower.follow(bright_deployment(tmp_path, nodes="a", memory_mb=500.0, tflops=0.04, emulate=COMPUTE_ONLY))
        assert node.status().waiting_tflop == 0.0
        assert node.status().length == 1
        assert (await waiting).reply.attempt == Attempt.OK
        follower.follow(None)
        assert node.name == "a"

    run_world(scenario())


def test_a_table_that_was_mended_is_read_at_the_next_news(tmp_path: Path) -> None:
    """The deployment is the same as before: only a fault makes it worth another look."""

    async def scenario() -> None:
        deployment = bright_deployment(tmp_path, nodes="a", emulate=COMPUTE_ONLY)
        world = World(deployment)
        assert deployment.edge is not None
        table, elsewhere = Path(deployment.edge.services["detection"].table), tmp_path / "elsewhere.toml"
        moved = msgspec.structs.replace(deployment.edge.services["detection"], table=str(elsewhere))
        services = {**deployment.edge.services, "detection": moved}
        edge = msgspec.structs.replace(deployment.edge, services=services)
        follower = NodeFollower("w-a", world.nodes["a"])
        follower.follow(msgspec.structs.replace(deployment, edge=edge))
        refused = await world.infer("a", "a", picture())
        assert refused.reply.attempt == Attempt.UNAVAILABLE
        assert "elsewhere.toml" in refused.reply.reason
        shutil.copy(table, elsewhere)
        follower.follow(msgspec.structs.replace(deployment, edge=edge))
        assert (await world.infer("a", "a", picture())).reply.attempt == Attempt.OK

    run_world(scenario())
