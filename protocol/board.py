"""The board: slow control state in Redis, always spoken to through redis-py.

Keys: ``instance:{id}`` and ``gateway:{id}`` (expire), ``deployment``, ``table:{service}``, ``policy_status:{service}``
(expires), ``version:{service}``, ``decisions`` (bounded stream), ``lease:scheduler``; of routers that are tried
``former:{service}`` (bounded list), ``shadow_choice:{service}``, ``shadow:{service}`` (expires); of edge services see
`edge_board.py`. Channels: ``news`` (``instances``, ``nodes`` or ``deployment`` changed: read again) and
``table:{service}`` (the table itself). Readers subscribe first, then read, so that nothing falls between.

Losing the board must not lose a request: every method raises one of `BOARD_ERRORS` when Redis is away, and the loops
that call them go on with what they last knew. `follow` is the one place that reconnects.
"""

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import redis.asyncio as redis
from redis.exceptions import WatchError

from protocol.edge_board import EdgeRecords
from protocol.records import (
    DecisionRecord,
    Deployment,
    InstanceRecord,
    PolicyStatus,
    RouterChoice,
    ShadowRecord,
    Table,
)
from protocol.redis_calls import BOARD_ERRORS as BOARD_ERRORS
from protocol.redis_calls import cancellable, decoded, keep_cancellation, quietly

INSTANCE_EXPIRES_S: Final = 3.0
LEASE_EXPIRES_S: Final = 3.0
POLICY_STATUS_EXPIRES_S: Final = 10.0
SHADOW_EXPIRES_S: Final = 10.0
DECISIONS_KEPT: Final = 10_000
FORMERS_KEPT: Final = 20

_json = msgspec.json.Encoder().encode


class Board(EdgeRecords):
    """One connection pool to the board at `url` (``redis://host:port/0`` or ``unix:///path/redis.sock``)."""

    def __init__(self, url: str) -> None:
        self.url = url
        pool: Any = redis.from_url(url, socket_connect_timeout=1.0, socket_timeout=2.0, health_check_interval=0)
        super().__init__(pool)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._redis.aclose()

    @cancellable
    async def ping(self) -> None:
        """Raises one of `BOARD_ERRORS` if nobody answers."""
        await self._redis.ping()

    # registrations (written by workers, read by gateways and schedulers)

    @cancellable
    async def post_instances(self, records: list[InstanceRecord], *, changed: bool) -> None:
        """Renews the registrations; with `changed`, tells every follower to read them now."""
        pipeline = self._redis.pipeline(transaction=False)
        for record in records:
            pipeline.set(f"instance:{record.id}", _json(record), px=int(INSTANCE_EXPIRES_S * 1000))
        if changed:
            pipeline.publish("news", "instances")
        await pipeline.execute()

    @cancellable
    async def remove_instances(self, ids: list[str]) -> None:
        """Takes registrations back (an orderly end; a killed worker's expire by themselves)."""
        if ids:
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.delete(*(f"instance:{one}" for one in ids))
            pipeline.publish("news", "instances")
            await pipeline.execute()

    @cancellable
    async def instances(self) -> list[InstanceRecord]:
        """All live registrations, sorted by id. A record that this version cannot read is left out."""
        keys = sorted([key async for key in self._redis.scan_iter(match="instance:*", count=1000)])
        values = await self._redis.mget(keys) if keys else []
        records = [decoded(value, InstanceRecord) for value in values]
        return [record for record in records if record is not None]

    # gateways, which only have to know how many they are

    @cancellable
    async def post_gateway(self, id: str) -> None:
        """Says that this gateway process is there (renewed every second, gone 3 s after its last word)."""
        await self._redis.set(f"gateway:{id}", b"", px=int(INSTANCE_EXPIRES_S * 1000))

    @cancellable
    async def remove_gateway(self, id: str) -> None:
        """An orderly end."""
        await self._redis.delete(f"gateway:{id}")

    @cancellable
    async def gateways(self) -> list[str]:
        """The gateway processes that are there, sorted by id."""
        keys = [key async for key in self._redis.scan_iter(match="gateway:*", count=1000)]
        return sorted(key.decode().partition(":")[2] for key in keys)

    # the desired state (written by operators, read by workers and gateways)

    @cancellable
    async def put_deployment(self, deployment: Deployment) -> Deployment:
        """Replaces the desired state, whatever it is; gives it back with the version that it got.

        That is above the one it came with, also on a board that has lost its memory: else no reader would take it.
        """
        posted = await self._change_deployment(lambda present: deployment)
        assert posted is not None, "this change is never left out"
        return posted

    @cancellable
    async def change_deployment(
        self, change: Callable[[Deployment], Deployment], empty: Deployment | None = None
    ) -> Deployment | None:
        """Applies `change` to the posted deployment (`empty` where none is), and gives back what then stands there.

        In one step: `change` is asked again when somebody else's change came in between, so none is lost. One that
        gives back what it got posts nothing. None if nothing is posted and `empty` is None. What `change` raises, this
        raises, and nothing is posted.
        """

        def applied(posted: Deployment | None) -> Deployment | None:
            present = posted or empty
            wanted = change(present) if present is not None else None
            return None if wanted == posted else wanted

        return await self._change_deployment(applied)

    async def _change_deployment(self, wanted: Callable[[Deployment | None], Deployment | None]) -> Deployment | None:
        """Posts what `wanted` makes of the posted deployment, under the next version; if that is None, nothing.

        Gives back what stands there at that moment.
        """
        async with self._redis.pipeline(transaction=True) as pipeline:
            while True:
                await pipeline.watch("deployment", "version:deployment")
                posted = decoded(await pipeline.get("deployment"), Deployment)
                version = int(await pipeline.get("version:deployment") or 0)
                deployment = wanted(posted)
                if deployment is None:
                    return posted
                numbered = msgspec.structs.replace(deployment, version=max(version, deployment.version) + 1)
                pipeline.multi()
                pipeline.set("deployment", _json(numbered))
                pipeline.set("version:deployment", numbered.version)
                pipeline.publish("news", "deployment")
                try:
                    await pipeline.execute()
                except WatchError:
                    continue
                return numbered

    @cancellable
    async def deployment(self) -> Deployment | None:
        """The desired state, or None if nobody has posted one."""
        return decoded(await self._redis.get("deployment"), Deployment)

    # routing tables (written by the scheduler)

    @cancellable
    async def put_table(self, table: Table) -> Table:
        """Publishes a table under the next version of its service; gives it back with that version."""
        version = int(await self._redis.incr(f"version:{table.service}"))
        numbered = msgspec.structs.replace(table, version=version)
        data = _json(numbered)
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.set(f"table:{table.service}", data, px=max(1, int(table.valid_for_s * 1000)))
        pipeline.publish(f"table:{table.service}", data)
        await pipeline.execute()
        return numbered

    @cancellable
    async def table(self, service: str) -> Table | None:
        """The service's table if it has not expired."""
        return decoded(await self._redis.get(f"table:{service}"), Table)

    @cancellable
    async def put_policy_status(self, service: str, status: PolicyStatus) -> None:
        """Says whether the service's policy sets tables, and why not. Read every second, forgotten after 10 s."""
        await self._redis.set(f"policy_status:{service}", _json(status), px=int(POLICY_STATUS_EXPIRES_S * 1000))

    @cancellable
    async def policy_statuses(self, services: list[str]) -> dict[str, PolicyStatus]:
        """What is known of the policies of those services, by service."""
        values = await self._redis.mget([f"policy_status:{one}" for one in services]) if services else []
        found = {one: decoded(value, PolicyStatus) for one, value in zip(services, values, strict=True)}
        return {one: status for one, status in found.items() if status is not None}

    # changes of router that can be taken back, and routers that only look on (asked for by operators)

    @cancellable
    async def push_former(self, service: str, choice: RouterChoice) -> None:
        """Keeps what a change of the service's router has replaced; the latest 20 of them."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.rpush(f"former:{service}", _json(choice))
        pipeline.ltrim(f"former:{service}", -FORMERS_KEPT, -1)
        await pipeline.execute()

    @cancellable
    async def pop_former(self, service: str) -> RouterChoice | None:
        """What the last change replaced, which is then forgotten, or None if there is none."""
        return decoded(await self._redis.rpop(f"former:{service}"), RouterChoice)

    @cancellable
    async def put_shadow_choice(self, service: str, choice: RouterChoice) -> None:
        """Which router the scheduler should let decide beside the real one; an empty name ends that."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.delete(f"shadow:{service}")
        if choice.router:
            pipeline.set(f"shadow_choice:{service}", _json(choice))
        else:
            pipeline.delete(f"shadow_choice:{service}")
        pipeline.publish("news", "shadow")
        await pipeline.execute()

    @cancellable
    async def shadow_choices(self, services: list[str]) -> dict[str, RouterChoice]:
        """The routers that should look on, by service."""
        values = await self._redis.mget([f"shadow_choice:{one}" for one in services]) if services else []
        found = {one: decoded(value, RouterChoice) for one, value in zip(services, values, strict=True)}
        return {one: choice for one, choice in found.items() if choice is not None}

    @cancellable
    async def put_shadow(self, service: str, record: ShadowRecord) -> None:
        """How the shadowed router would have done so far; forgotten after 10 s."""
        await self._redis.set(f"shadow:{service}", _json(record), px=int(SHADOW_EXPIRES_S * 1000))

    @cancellable
    async def shadow(self, service: str) -> ShadowRecord | None:
        """The latest news of the service's shadowed router, if one is at work."""
        return decoded(await self._redis.get(f"shadow:{service}"), ShadowRecord)

    # the workload's phase, which only an experiment's load generator knows

    async def put_phase(self, service: str, phase: int) -> None:
        """Says which phase the workload of a service is in, for policies that need to be told (10 min at most)."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.set(f"phase:{service}", phase, ex=600)
        pipeline.publish("news", "phase")
        await pipeline.execute()

    async def phases(self, services: list[str]) -> dict[str, int]:
        """The reported phases of those services that have one."""
        values = await self._redis.mget([f"phase:{service}" for service in services]) if services else []
        return {service: int(value) for service, value in zip(services, values, strict=True) if value is not None}

    # the decision log

    @cancellable
    async def add_decision(self, record: DecisionRecord) -> None:
        """Appends to the bounded decision log."""
        await self._redis.xadd("decisions", {"decision": _json(record)}, maxlen=DECISIONS_KEPT, approximate=True)

    @cancellable
    async def decisions(self, count: int = 100) -> list[DecisionRecord]:
        """The newest decisions, newest first."""
        entries = await self._redis.xrevrange("decisions", count=count)
        records = [decoded(fields.get(b"decision"), DecisionRecord) for _, fields in entries]
        return [record for record in records if record is not None]

    @cancellable
    async def hold_lease(self, owner: str) -> bool:
        """Takes or renews the one scheduler lease; False while another holds it."""
        milliseconds = int(LEASE_EXPIRES_S * 1000)
        if await self._redis.set("lease:scheduler", owner, nx=True, px=milliseconds):
            return True
        async with self._redis.pipeline(transaction=True) as pipeline:
            try:
                await pipeline.watch("lease:scheduler")
                if await pipeline.get("lease:scheduler") != owner.encode():
                    return False
                pipeline.multi()
                pipeline.pexpire("lease:scheduler", milliseconds)
                await pipeline.execute()
            except WatchError:
                return False
        return True

    # news

    async def follow(
        self, read_all: Callable[[], Awaitable[None]], on_news: Callable[[str, bytes], Awaitable[None]]
    ) -> None:
        """Subscribes, then calls `read_all`, then `on_news(channel, data)` for each message; for ever.

        When Redis goes away it tries again with back-off (0.1 to 1 s) and starts over, `read_all` included.
        Ends only by cancellation.
        """
        pause_s = 0.1
        while True:
            subscription = self._redis.pubsub()
            try:
                await keep_cancellation(subscription.psubscribe("news", "table:*"))
                await read_all()
                pause_s = 0.1
                while True:
                    message = await keep_cancellation(
                        subscription.get_message(ignore_subscribe_messages=True, timeout=1.0)
                    )
                    if message is not None:
                        await on_news(message["channel"].decode(), message["data"])
            except BOARD_ERRORS:
                await asyncio.sleep(pause_s)
                pause_s = min(1.0, pause_s * 2)
            finally:
                await quietly(subscription.aclose())
