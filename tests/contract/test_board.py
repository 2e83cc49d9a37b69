"""The board's promises, over fakeredis' TCP server and over a real redis-server."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from protocol import board as board_module
from protocol.board import BOARD_ERRORS, Board
from protocol.records import (
    DecisionRecord,
    Deployment,
    InstanceRecord,
    InstanceSpec,
    InstanceState,
    PolicyStatus,
    RouterChoice,
    ServiceSpec,
    ShadowRecord,
    Table,
    WorkerSpec,
    WouldBe,
)

RedisServer = Any  # of this folder's conftest.py


def run(board_url: str, scenario: Callable[[Board], Awaitable[None]]) -> None:
    """Run a scenario against the board."""

    async def inside() -> None:
        async with Board(board_url) as board:
            await board.ping()
            await scenario(board)

    asyncio.run(inside())


def record(id: str, state: InstanceState = InstanceState.READY) -> InstanceRecord:
    """A registration."""
    return InstanceRecord(
        id=id, worker="w", address="unix:/x", service="s", variant="v", capacity=15, state=state, epoch="e"
    )


def table(service: str = "s", valid_for_s: float = 5.0) -> Table:
    """A table of one instance."""
    return Table(
        service=service,
        version=0,
        valid_for_s=valid_for_s,
        instances=("w/v",),
        weights=(1.0,),
        policy="p",
        batch_limits={"v": (1, 3)},
    )


DEPLOYMENT = Deployment(
    name="d",
    services={"s": ServiceSpec(variants=("v",), requirement_ms=300)},
    workers=(WorkerSpec(name="w", instances=(InstanceSpec(variant="v", batch=(1, 5)),)),),
)


async def come(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait until what the condition gives is true, at most 5 s."""
    async with asyncio.timeout(5.0):
        while not await condition():  # noqa: ASYNC110 - what is awaited happens in another process
            await asyncio.sleep(0.005)


def test_registrations_come_and_go(board_url: str) -> None:
    """Sorted by id; what is taken back is gone; an unreadable record is left out."""

    async def scenario(board: Board) -> None:
        assert await board.instances() == []
        await board.post_instances([record("w/b"), record("w/a", InstanceState.LOADING)], changed=True)
        assert await board.instances() == [record("w/a", InstanceState.LOADING), record("w/b")]
        await board._redis.set("instance:broken", b"{not json")
        await board.remove_instances(["w/a"])
        await board.remove_instances([])
        assert await board.instances() == [record("w/b")]

    run(board_url, scenario)


def test_registrations_expire(board_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is killed stops renewing, and its records go by themselves."""
    monkeypatch.setattr(board_module, "INSTANCE_EXPIRES_S", 0.2)

    async def scenario(board: Board) -> None:
        await board.post_instances([record("w/a")], changed=True)
        assert len(await board.instances()) == 1

        async def gone() -> bool:
            return not await board.instances()

        await come(gone)

    run(board_url, scenario)


def test_gateways_are_counted_while_they_live(board_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An orderly end counts at once, another one when its word has expired."""

    async def scenario(board: Board) -> None:
        assert await board.gateways() == []
        await board.post_gateway("b")
        await board.post_gateway("a")
        assert await board.gateways() == ["a", "b"]
        await board.remove_gateway("b")
        monkeypatch.setattr(board_module, "INSTANCE_EXPIRES_S", 0.05)
        await board.post_gateway("a")

        async def alone() -> bool:
            return await board.gateways() == []

        await come(alone)

    run(board_url, scenario)


def test_deployment_versions_only_grow(board_url: str) -> None:
    """Each post gets the next version, also when the board has forgotten all and the poster has not."""

    async def scenario(board: Board) -> None:
        assert await board.deployment() is None
        first = await board.put_deployment(DEPLOYMENT)
        second = await board.put_deployment(DEPLOYMENT)
        assert (first.version, second.version) == (1, 2)
        assert await board.deployment() == second
        await board._redis.flushall()
        again = await board.put_deployment(second)
        after = await board.put_deployment(again)
        assert again.version >= second.version
        assert after.version > again.version

    run(board_url, scenario)


def test_changes_of_the_deployment_at_once_are_all_kept(board_url: str) -> None:
    """Four clients add a service at the same moment, each on a connection of its own: nobody's change is lost."""

    def adding(name: str) -> Callable[[Deployment], Deployment]:
        spec = DEPLOYMENT.services["s"]
        return lambda present: msgspec.structs.replace(present, services={**present.services, name: spec})

    async def scenario(board: Board) -> None:
        names = [f"s{number}" for number in range(4)]
        await board.put_deployment(DEPLOYMENT)
        changed = await asyncio.gather(*(board.change_deployment(adding(name)) for name in names))
        posted = await board.deployment()
        assert posted is not None
        assert posted.services.keys() == {"s", *names}
        assert sorted(one.version for one in changed if one) == [2, 3, 4, 5], "one version each"
        assert posted.version == 5

    run(board_url, scenario)


def test_a_change_may_do_nothing_or_fail_or_find_nothing(board_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is posted; an empty board is filled from what the caller knows."""

    async def scenario(board: Board) -> None:
        assert await board.change_deployment(lambda present: present) is None
        assert await board.deployment() is None
        known = msgspec.structs.replace(DEPLOYMENT, version=7)
        filled = await board.change_deployment(lambda present: present, empty=known)
        assert filled is not None
        assert filled.version == 8
        assert await board.change_deployment(lambda present: present, empty=known) == filled

        async def too_late() -> Deployment | None:
            raise AssertionError("what is read a moment later may be somebody else's")

        monkeypatch.setattr(board, "deployment", too_late)
        assert await board.change_deployment(lambda present: present) == filled, "of the moment of the decision"
        monkeypatch.undo()

        def fail(present: Deployment) -> Deployment:
            raise LookupError(present.name)

        with pytest.raises(LookupError):
            await board.change_deployment(fail)
        assert await board.deployment() == filled

    run(board_url, scenario)


def test_tables_are_versioned_per_service_and_expire(board_url: str) -> None:
    """Versions count per service; an expired table is no table."""

    async def scenario(board: Board) -> None:
        versions = [(await board.put_table(table(service))).version for service in ("s", "s", "t")]
        assert versions == [1, 2, 1]
        assert (await board.table("s")) is not None
        await board.put_table(table("s", valid_for_s=0.05))

        async def expired() -> bool:
            return await board.table("s") is None

        await come(expired)
        assert (await board.table("t")) is not None

    run(board_url, scenario)


def test_what_is_said_of_policies_is_kept_by_service_and_expires(
    board_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Services of which nothing is known are left out; a scheduler that has died says nothing any more."""

    async def scenario(board: Board) -> None:
        assert await board.policy_statuses([]) == {}
        misfit = PolicyStatus(policy="learned-po", in_force=False, reason="trained for four instances")
        await board.put_policy_status("s", misfit)
        assert await board.policy_statuses(["s", "t"]) == {"s": misfit}
        monkeypatch.setattr(board_module, "POLICY_STATUS_EXPIRES_S", 0.05)
        await board.put_policy_status("s", PolicyStatus(policy="learned-po", in_force=True))

        async def forgotten() -> bool:
            return not await board.policy_statuses(["s"])

        await come(forgotten)

    run(board_url, scenario)


def test_former_routers_come_back_latest_first_and_only_so_many(board_url: str) -> None:
    """Each change is taken back once; services do not mix."""

    async def scenario(board: Board) -> None:
        assert await board.pop_former("s") is None
        choices = [RouterChoice(router=f"r{number}", policy_file="x") for number in range(25)]
        for choice in choices:
            await board.push_former("s", choice)
        await board.push_former("t", RouterChoice(router="other"))
        taken = [await board.pop_former("s") for _ in range(21)]
        assert taken == [*reversed(choices[5:]), None]

    run(board_url, scenario)


def test_a_shadow_is_asked_for_answers_and_is_ended(board_url: str) -> None:
    """Another choice forgets what was said of the one before."""

    async def scenario(board: Board) -> None:
        choice = RouterChoice(router="learned-po")
        await board.put_shadow_choice("s", choice)
        assert await board.shadow_choices(["s", "t"]) == {"s": choice}
        record = ShadowRecord(choice=choice, active_router="deadline", shadow=WouldBe(requests=3, goodput_ratio=0.5))
        await board.put_shadow("s", record)
        assert await board.shadow("s") == record
        await board.put_shadow_choice("s", RouterChoice(router=""))
        assert await board.shadow_choices(["s"]) == {}
        assert await board.shadow("s") is None

    run(board_url, scenario)


def test_decisions_newest_first(board_url: str) -> None:
    """As many as asked for."""

    async def scenario(board: Board) -> None:
        for slot in range(5):
            decision = DecisionRecord(
                service="s",
                slot=slot,
                policy="p",
                table_version=slot,
                instances=("w/v",),
                weights=(1.0,),
                lengths=(0,),
                elapsed_s=(0.0,),
            )
            await board.add_decision(decision)
        assert [decision.slot for decision in await board.decisions(3)] == [4, 3, 2]

    run(board_url, scenario)


def test_one_scheduler_holds_the_lease(board_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder renews, another is refused, and takes over once it has expired."""
    monkeypatch.setattr(board_module, "LEASE_EXPIRES_S", 0.3)

    async def scenario(board: Board) -> None:
        assert await board.hold_lease("one")
        assert not await board.hold_lease("two")
        assert await board.hold_lease("one")
        await come(lambda: board.hold_lease("two"))
        assert not await board.hold_lease("one")

    run(board_url, scenario)


def test_what_has_to_be_renewed_lives_three_seconds_from_then_on(board_url: str) -> None:
    """Registrations, gateways and the lease; the second time, too."""

    async def scenario(board: Board) -> None:
        for _ in range(2):
            await board.post_instances([record("w/a")], changed=False)
            await board.post_gateway("g")
            assert await board.hold_lease("one")
            for key in ("instance:w/a", "gateway:g", "lease:scheduler"):
                assert 2000 < await board._redis.pttl(key) <= 3000
                await board._redis.pexpire(key, 1500)

    run(board_url, scenario)


class Follower:
    """What `Board.follow` told."""

    def __init__(self, board: Board) -> None:
        self.reads = 0
        self.news: list[tuple[str, bytes]] = []
        self._board = board

    async def __aenter__(self) -> "Follower":
        self._task = asyncio.create_task(self._board.follow(self._read, self._on_news))
        await self.come(lambda: self.reads == 1)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self._task

    async def come(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds, at most 5 s."""

        async def holds() -> bool:
            return condition()

        await come(holds)

    async def _read(self) -> None:
        await self._board.ping()
        self.reads += 1

    async def _on_news(self, channel: str, data: bytes) -> None:
        self.news.append((channel, data))


def test_followers_hear_of_every_change(board_url: str) -> None:
    """Instances (only if changed), deployment, and tables with their content."""

    async def scenario(board: Board) -> None:
        async with Follower(board) as follower:
            await board.post_instances([record("w/a")], changed=True)
            await board.post_instances([record("w/a")], changed=False)
            await board.put_deployment(DEPLOYMENT)
            await board.put_table(table())
            await board.remove_instances(["w/a"])
            await follower.come(lambda: len(follower.news) == 4)
            assert [channel for channel, _ in follower.news] == ["news", "news", "table:s", "news"]
            assert [data for channel, data in follower.news if channel == "news"] == [
                b"instances",
                b"deployment",
                b"instances",
            ]
            assert b'"batch_limits"' in follower.news[2][1]

    run(board_url, scenario)


def test_cancellations_are_kept(board_url: str) -> None:
    """Cancelled at every step of a call: it ends, whatever the client library does with it."""

    async def scenario(board: Board) -> None:
        for steps in range(25):
            calling = asyncio.create_task(_call_for_ever(board))
            for _ in range(steps):
                await asyncio.sleep(0)
            calling.cancel()
            _, pending = await asyncio.wait([calling], timeout=2.0)
            assert not pending, f"cancelled after {steps} steps, and it goes on"

    run(board_url, scenario)


async def _call_for_ever(board: Board) -> None:
    while True:
        await board.ping()
        await asyncio.sleep(60)


@pytest.mark.redis
def test_a_board_that_comes_back_is_read_again(redis_server: RedisServer) -> None:
    """While it is away every call raises one of `BOARD_ERRORS`; then followers subscribe and read anew."""

    async def scenario(board: Board) -> None:
        async with Follower(board) as follower:
            redis_server.kill()
            for call in (board.instances, board.deployment, board.ping):
                with pytest.raises(BOARD_ERRORS):
                    await call()
            redis_server.start()
            await follower.come(lambda: follower.reads == 2)
            await board.post_instances([record("w/a")], changed=True)
            await follower.come(lambda: ("news", b"instances") in follower.news)

    run(redis_server.url, scenario)
