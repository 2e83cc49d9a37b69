"""Slots in virtual time: boundaries that do not drift, one failure costs one slot, only the leader publishes."""

import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from typing import cast

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from policies.routing.contract import Action, InstanceKind, Observation, SlotPolicy, observation_of
from policies.routing.set_features import SIZE
from policies.routing.set_network import SetPolicy
from protocol.board import Board
from protocol.records import DecisionRecord, Deployment, PolicyStatus, ServiceSpec, Table
from scheduler.config import SchedulerConfig
from scheduler.metrics import SchedulerMetrics
from scheduler.observe import Observer, Seen
from scheduler.slot_loop import LOAD_AGAIN_S, SlotLoop
from tests.fakes.virtual_time import run

SPEC = ServiceSpec(variants=("heavy", "light"), requirement_ms=300.0, router="threshold")


class World:
    """Board, observer and policy in one: what was asked and posted, and when."""

    def __init__(self, slot_s: float = 1.0) -> None:
        self.name, self.slot_s, self.needs_phase = "threshold", slot_s, False
        self.deployment: Deployment | None = Deployment(name="d", services={"s": SPEC}, workers=())
        self.instances: tuple[str, ...] = ("a", "b")
        self.ready = [True, True]
        self.service_s = 0.01
        self.leads = True
        self.observing_s = 0.0
        self.tables: list[tuple[float, Table]] = []
        self.decisions: list[DecisionRecord] = []
        self.made = 0
        self.failures: dict[int, Exception] = {}
        self.happened = asyncio.Event()
        self.asked_for_phases = False
        self.statuses: list[tuple[float, PolicyStatus]] = []
        self.unloadable = ""

    # as the observer

    async def event(self, service: str, *, phases: bool) -> None:
        """Until the test says that something has happened."""
        self.asked_for_phases = phases
        await self.happened.wait()
        self.happened.clear()

    async def observe(self, service: str, spec: ServiceSpec) -> Seen:
        """One instance of each variant."""
        await asyncio.sleep(self.observing_s)
        n = len(self.instances)
        variants = [self.instances[number] and spec.variants[number % 2] for number in range(n)]
        return Seen(
            instances=self.instances,
            kinds=tuple(InstanceKind(one, spec.variants.index(one), self.service_s, 0.8) for one in variants),
            observation=observation_of([3] * n, [0.004] * n, [(0.1, 0.2)] * n, [1] * n, self.ready[:n]),
        )

    # as the board

    async def put_table(self, table: Table) -> Table:
        """Fails where the test says so."""
        if failure := self.failures.pop(len(self.tables), None):
            raise failure
        numbered = msgspec.structs.replace(table, version=len(self.tables) + 1)
        self.tables.append((asyncio.get_running_loop().time(), numbered))
        return numbered

    async def put_policy_status(self, service: str, status: PolicyStatus) -> None:
        """Kept."""
        self.statuses.append((asyncio.get_running_loop().time(), status))

    async def add_decision(self, record: DecisionRecord) -> None:
        """Kept."""
        self.decisions.append(record)

    # as the policy

    def act(self, observation: Observation, rng: np.random.Generator) -> Action:
        """Everything to the first."""
        return Action(np.eye(len(observation.length))[0])

    def make(self, router: str, kinds: Sequence[InstanceKind], spec: ServiceSpec, slot_s: float) -> SlotPolicy | None:
        """The world itself is the policy; `deadline` needs none."""
        self.made += 1
        if self.unloadable:
            raise ValueError(self.unloadable)
        return None if router == "deadline" else self

    def slots(self, seconds: float, *, then: "dict[float, object] | None" = None) -> SlotLoop:
        """Runs the loop for some virtual seconds; `then` maps times to what happens at them."""
        loop = SlotLoop(
            "s",
            cast(Board, self),
            cast(Observer, self),
            self.make,
            SchedulerConfig(board_url="redis://nobody"),
            SchedulerMetrics(),
            leading=lambda: self.leads,
        )

        async def body() -> None:
            task = asyncio.create_task(loop.run())
            for at_s, event in sorted((then or {}).items()):
                await asyncio.sleep(at_s - asyncio.get_running_loop().time())
                event()  # type: ignore[operator]
            await asyncio.sleep(seconds - asyncio.get_running_loop().time())
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

        run(body())
        return loop


def test_tables_come_every_slot_without_drift() -> None:
    world = World()
    world.observing_s = 0.3  # what a slot takes must not push the next one back
    loop = world.slots(1000.5)
    times_s = [at_s for at_s, _ in world.tables]
    assert loop.statistics().published == len(times_s) == pytest.approx(1000, abs=1)
    # The first comes as soon as there is a policy; from then on slots start at whole seconds of the clock.
    assert np.diff(times_s)[1:] == pytest.approx(1.0, abs=1e-6)
    assert np.mod(np.array(times_s)[1:] - world.observing_s + 0.5, 1.0) == pytest.approx(0.5, abs=1e-6)
    assert world.made == 1


def test_a_policy_keeps_its_own_slot_and_its_tables_outlive_lost_ones() -> None:
    world = World(slot_s=0.1)
    world.slots(10.05)
    assert len(world.tables) == pytest.approx(100, abs=2)
    assert [table.valid_for_s for _, table in world.tables] == pytest.approx([0.3] * len(world.tables))


@pytest.mark.parametrize("sees_phase", [True, False])
def test_an_event_is_decided_at_once_and_the_slots_stay(sees_phase: bool) -> None:
    world = World()
    world.needs_phase = sees_phase
    loop = world.slots(6.0, then={3.45: world.happened.set})
    assert world.asked_for_phases is sees_phase
    times_s = [at_s for at_s, _ in world.tables]
    assert loop.statistics().published == len(times_s)
    assert 3.45 in [pytest.approx(at_s) for at_s in times_s]
    others = [at_s for at_s in times_s if at_s != pytest.approx(3.45)]
    assert np.diff(others)[1:] == pytest.approx(1.0, abs=1e-6), "the boundaries stay where they were"


def test_what_was_seen_and_chosen_is_written_down() -> None:
    world = World()
    world.observing_s = 0.02
    world.slots(1.5)
    [table], [decision] = [table for _, table in world.tables][:1], world.decisions[:1]
    assert (decision.service, decision.policy, decision.table_version) == ("s", "threshold", table.version)
    assert (decision.instances, decision.weights) == (("a", "b"), (1.0, 0.0))
    assert (decision.lengths, decision.elapsed_s) == ((3, 3), (0.004, 0.004))
    assert decision.publish_ms == pytest.approx(20.0, abs=0.1)


@pytest.mark.parametrize("failure", [ConnectionError("the board is away"), TimeoutError(), ValueError("no")])
def test_a_slot_that_fails_costs_that_slot(failure: Exception) -> None:
    world = World()
    world.failures[2] = failure
    loop = world.slots(6.1)
    assert loop.statistics().failed == 1
    gaps = np.diff([at_s for at_s, _ in world.tables])
    assert sorted(gaps.round(6))[-2:] == [1.0, 2.0]


def test_nobody_ready_is_no_table() -> None:
    world = World()
    world.ready = [False, False]
    assert world.slots(5.0).statistics().published == 0


def test_only_the_leader_publishes() -> None:
    world = World()
    world.leads = False
    world.slots(10.0, then={5.0: lambda: setattr(world, "leads", True)})
    assert world.tables[0][0] >= 5.0
    assert len(world.tables) == pytest.approx(5, abs=1)


def test_a_router_that_needs_no_tables_gets_none_and_a_change_is_taken_soon() -> None:
    world = World()

    def becomes(router: str) -> None:
        spec = msgspec.structs.replace(SPEC, router=router)
        world.deployment = Deployment(name="d", services={"s": spec}, workers=(), version=2)

    becomes("deadline")
    world.slots(20.0, then={10.0: lambda: becomes("threshold"), 15.0: lambda: becomes("deadline")})
    times_s = [at_s for at_s, _ in world.tables]
    assert 10.0 <= times_s[0] <= 10.5
    assert times_s[-1] <= 15.5


def test_a_new_instance_makes_a_new_policy_and_a_new_estimate_does_not() -> None:
    world = World()

    def one_more() -> None:
        world.instances, world.ready = ("a", "b", "c"), [True] * 3

    world.slots(
        6.5,
        then={
            2.5: lambda: setattr(world, "service_s", 0.0101),
            4.5: one_more,
        },
    )
    assert world.made == 2
    assert {len(table.weights) for _, table in world.tables} == {2, 3}


def test_no_deployment_is_no_slot() -> None:
    world = World()
    world.deployment = None
    assert world.slots(5.0).statistics().published == 0


def test_the_policys_status_is_said_on_change_and_renewed() -> None:
    world = World()
    world.failures[5] = ValueError("no")
    world.slots(20.5)
    said = [(at_s, status.in_force, status.reason) for at_s, status in world.statuses]
    changes = [said[0], *(b for a, b in itertools.pairwise(said) if a[1:] != b[1:])]
    assert [one[1:] for one in changes] == [(True, ""), (False, "no"), (True, "")]
    assert max(np.diff([*(at_s for at_s, *_ in said), 20.5])) < 5.0, "it expires after 10 s"
    assert len(said) <= 10, "not at every slot"
    assert all(status.policy == "threshold" for _, status in world.statuses)


def test_a_policy_that_cannot_be_loaded_says_why_until_it_can() -> None:
    world = World()
    world.unloadable = "artifact x: tensor 0.bias holds NaN"
    world.slots(20.0, then={8.0: lambda: setattr(world, "unloadable", "")})
    assert {status.reason for at_s, status in world.statuses if at_s < 8.0} == {"artifact x: tensor 0.bias holds NaN"}
    assert 8.0 <= world.tables[0][0] <= 8.0 + LOAD_AGAIN_S + 0.5
    assert world.made <= 4, "a broken file is not read every slot"
    assert world.statuses[-1][1].in_force


def test_a_missing_instance_is_remarked_on_where_the_policy_knows_of_it() -> None:
    world = World()
    shapes = {
        "0.weight": [2, SIZE],
        "2.weight": [2, 2],
        "4.weight": [2, 2],
        "0.bias": [2],
        "2.bias": [2],
        "4.bias": [2],
    }
    zeros: dict[str, NDArray[np.float32]] = {key: np.zeros(shape, dtype=np.float32) for key, shape in shapes.items()}
    world.make = lambda router, kinds, spec, slot_s: SetPolicy(zeros, kinds)  # type: ignore[method-assign]
    world.slots(10.5, then={5.2: lambda: setattr(world, "ready", [True, False])})
    assert world.statuses[0][1].reason == ""
    assert world.statuses[-1][1].reason == "1 of 2 instances are ready: learned-set counts those alone"
    assert world.tables[0][1].weights == (0.5, 0.5)
    assert world.tables[-1][1].weights == (1.0, 0.0)


def test_a_router_without_tables_has_no_status() -> None:
    world = World()
    spec = msgspec.structs.replace(SPEC, router="deadline")
    world.deployment = Deployment(name="d", services={"s": spec}, workers=(), version=2)
    world.slots(10.0)
    assert world.statuses == []
