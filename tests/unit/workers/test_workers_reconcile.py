"""Desired against actual, the life of an instance, and batch limits that come and go."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from policies.routing.queueing import Entry
from protocol.outcomes import Attempt
from protocol.records import Deployment, InstanceSpec, InstanceState, ServiceSpec, Table, WorkerSpec
from workers.batch_limits import BatchLimits
from workers.instance import Instance
from workers.life import Loading
from workers.reconcile import Reconciler, compare, wanted_on

Bench = Any  # of this folder's conftest.py


def deployment(*instances: InstanceSpec, name: str = "w", threads: int = 1, version: int = 1) -> Deployment:
    """A deployment of one worker; variants `null`, `efficientnet_b0_t4` and `mine` belong to the service `things`."""
    service = ServiceSpec(variants=("efficientnet_b0_t4", "null", "mine"), requirement_ms=300)
    worker = WorkerSpec(name=name, instances=instances, threads=threads)
    return Deployment(name="test", services={"things": service}, workers=(worker,), version=version)


def actual(wanted: Any) -> dict[str, Instance]:
    """The instances that were made for what was wanted."""
    return {one.id: Instance(one.id, one.spec, one.service, one.device, one.threads) for one in wanted}


NULL = InstanceSpec(variant="null")
LIGHT = InstanceSpec(variant="efficientnet_b0_t4", batch=(1, 5))


def test_ids_and_services() -> None:
    """A second instance of a variant gets a number; a variant that no service lists has no service yet."""
    wanted = wanted_on(deployment(NULL, LIGHT, NULL, InstanceSpec(variant="other")), "w")
    assert wanted is not None
    assert [one.id for one in wanted] == ["w/null", "w/efficientnet_b0_t4", "w/null#2", "w/other"]
    assert [one.service for one in wanted] == ["things", "things", "things", ""]
    assert wanted_on(deployment(NULL), "somebody-else") is None


def test_compare_is_idempotent() -> None:
    """What was made as wanted needs nothing."""
    wanted = wanted_on(deployment(NULL, LIGHT), "w")
    assert wanted is not None
    difference = compare(wanted, actual(wanted))
    assert (difference.load, difference.drain) == ((), ())


def test_compare_finds_what_changed() -> None:
    """One less, one more; a new capacity is adjusted in place; other threads mean a reload, drained first."""
    before = wanted_on(deployment(NULL, NULL), "w")
    after = wanted_on(deployment(InstanceSpec(variant="null", capacity=3), LIGHT), "w")
    reload = wanted_on(deployment(NULL, NULL, threads=2), "w")
    assert before is not None
    assert after is not None
    assert reload is not None
    difference = compare(after, actual(before))
    assert [one.id for one in difference.load] == ["w/efficientnet_b0_t4"]
    assert difference.drain == ("w/null#2",)
    assert [(one.id, one.spec.capacity) for one in difference.adjust] == [("w/null", 3)]
    difference = compare(reload, actual(before))
    assert (difference.load, difference.drain) == ((), ("w/null", "w/null#2"))


def test_instances_live_as_the_deployment_says(bench: Bench, eventually: Any, tmp_path: Path) -> None:
    """Load, adjust, reload, drop, refuse nonsense, end: each state as it should be, nothing left over."""
    states: list[dict[str, InstanceState]] = []

    async def scenario() -> None:
        host, up = bench.host, InstanceState.READY

        def on_change() -> None:
            states.append({id: instance.state for id, instance in host.instances.items()})

        reconciler = Reconciler("w", host, Loading((tmp_path,)), on_change, drain_s=0.0)

        async def settled(ready: set[str]) -> None:
            await eventually(lambda: {id: one.state for id, one in host.instances.items()} == dict.fromkeys(ready, up))

        reconciler.follow(None)
        reconciler.follow(deployment(NULL, LIGHT))
        await settled({"w/null", "w/efficientnet_b0_t4"})
        light = host.instances["w/efficientnet_b0_t4"]
        assert light.times.mean_s(1) == pytest.approx(0.0115)
        assert light.runtime is not None

        larger = InstanceSpec(variant="efficientnet_b0_t4", capacity=40, batch=(3, 5))
        reconciler.follow(deployment(NULL, larger, version=2))
        assert host.instances["w/efficientnet_b0_t4"] is light, "adjusted, not reloaded"
        assert (light.queue.capacity, light.queue.minimum, light.queue.maximum) == (40, 3, 5)

        reconciler.follow(deployment(InstanceSpec(variant="null", capacity=-1), version=3))
        await settled({"w/null", "w/efficientnet_b0_t4"})

        reconciler.follow(deployment(larger, threads=2, version=4))
        await settled({"w/efficientnet_b0_t4"})
        assert host.instances["w/efficientnet_b0_t4"] is not light, "other threads: loaded anew"
        assert light.runtime is None
        assert light.queue.arrive(Entry(0.0, 1.0), 0.0, 0.0, 0.0) is Attempt.UNAVAILABLE

        reconciler.follow(deployment(NULL, name="somebody-else", version=5))
        await settled(set())
        reconciler.follow(deployment(NULL, version=6))
        await settled({"w/null"})
        await reconciler.end()
        assert not host.instances
        assert states[-1] == {}, "that it is gone is told, too"
        reconciler.follow(deployment(NULL, LIGHT, version=7))
        assert not host.instances, "ended is ended"

    asyncio.run(scenario())
    seen = {state for one in states for state in one.values()}
    assert seen == {InstanceState.LOADING, InstanceState.WARMING, InstanceState.READY, InstanceState.DRAINING}


MINE = """
name = "mine"
service = "s"
runtime = "emulated"
labels = 2
[accuracy]
value = 1.0
source = "modelled"
[emulated]
service_ms = 1
fixed_share = 0.4
"""


def test_a_failed_load_is_said_and_tried_again(
    bench: Bench,
    eventually: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An unknown variant: FAILED with the reason; once its entry is there, it becomes ready by itself."""
    monkeypatch.setattr("workers.life.FIRST_PAUSE_S", 0.01)
    told: list[tuple[InstanceState, str]] = []

    def on_change() -> None:
        told.extend((one.state, one.reason) for one in bench.host.instances.values())

    async def scenario() -> None:
        reconciler = Reconciler("w", bench.host, Loading((tmp_path,)), on_change, drain_s=0.0)
        reconciler.follow(deployment(InstanceSpec(variant="mine")))
        instance = bench.host.instances["w/mine"]
        await eventually(lambda: instance.state is InstanceState.FAILED)
        assert "mine" in instance.reason
        assert "null" in instance.reason, "it names what there is"
        (tmp_path / "mine.toml").write_text(MINE)
        await eventually(lambda: instance.state is InstanceState.READY)
        assert (instance.loads, instance.reason) == (1, "")
        assert instance.failed_loads >= 1
        assert instance.times.batch_s() == pytest.approx((0.001, 0.0022, 0.0034)), "by its law, batches or not"
        await reconciler.end()

    asyncio.run(scenario())
    assert told[0] == (InstanceState.LOADING, "")
    again = [reason for state, reason in told[1:] if state in (InstanceState.LOADING, InstanceState.WARMING)]
    assert again, "tried again"
    assert all("mine" in reason for reason in again), "what it failed of stays to be seen"
    warned = [one for one in caplog.records if one.levelname == "WARNING" and one.name == "workers.life"]
    assert warned, "a failed load is worth a warning"
    assert "mine" in warned[0].__dict__["reason"]


def test_what_is_no_longer_wanted_is_not_loaded_in_its_turn(bench: Bench, eventually: Any, tmp_path: Path) -> None:
    """One load at a time: of fifty that wait, those that were taken back meanwhile never begin."""
    begun: set[str] = set()

    def on_change() -> None:
        begun.update(one.id for one in bench.host.instances.values() if one.state is InstanceState.WARMING)

    async def scenario() -> None:
        reconciler = Reconciler("w", bench.host, Loading((tmp_path,)), on_change, drain_s=0.0)
        async with bench.host.loading:  # somebody else is at it
            reconciler.follow(deployment(*[NULL] * 50))
            await asyncio.sleep(0)
            assert len(bench.host.instances) == 50
            reconciler.follow(deployment(NULL, version=2))
        await eventually(lambda: list(bench.host.instances) == ["w/null"])
        await eventually(lambda: bench.host.instances["w/null"].state is InstanceState.READY)
        await reconciler.end()

    asyncio.run(scenario())
    assert begun == {"w/null"}


def table(valid_for_s: float, **limits: tuple[int, int]) -> Table:
    """A table of the service `things`."""
    return Table(
        service="things",
        version=1,
        valid_for_s=valid_for_s,
        instances=("a",),
        weights=(1.0,),
        policy="p",
        batch_limits=limits,
    )


def test_a_tables_limits_hold_until_it_expires(make_bench: Callable[..., Bench]) -> None:
    """Then (1, largest of the deployment); a newer table in between takes over whole."""
    bench = make_bench()
    queue = bench.add("a", 1.0, batch=(1, 5)).queue
    other = bench.add("b", 1.0, batch=(1, 1)).queue
    limits = BatchLimits(bench.host)
    limits.take(table(2.0, a=(3, 3)))
    assert (queue.minimum, queue.maximum) == (3, 3)
    assert (other.minimum, other.maximum) == (1, 1)
    bench.clock.advance_to(1.5)
    limits.take(table(2.0, a=(5, 5)))
    bench.clock.advance_to(3.4)
    assert (queue.minimum, queue.maximum) == (5, 5)
    bench.clock.advance_to(3.6)
    assert (queue.minimum, queue.maximum) == (1, 5)
    limits.take(table(2.0, a=(3, 3)))
    limits.take(table(2.0))
    assert (queue.minimum, queue.maximum) == (1, 5)


def test_an_expired_minimum_lets_the_waiting_go(bench: Bench) -> None:
    """Two wait for a third until the table that asked for three expires; then both are served."""
    bench.add("a", 1.0, batch=(1, 1))
    limits = BatchLimits(bench.host)
    limits.take(table(2.0, a=(3, 3)))
    requests = [bench.send("a"), bench.send("a")]
    bench.clock.advance_to(1.9)
    assert not bench.replies
    bench.clock.advance_to(4.5)
    assert [bench.reply_to(request).attempt for request in requests] == [0, 0]


def test_impossible_limits_are_refused(bench: Bench) -> None:
    """They are logged, and the queue keeps what it had."""
    queue = bench.add("a", 1.0, batch=(1, 3)).queue
    BatchLimits(bench.host).take(table(2.0, a=(5, 3)))
    assert (queue.minimum, queue.maximum) == (1, 3)
