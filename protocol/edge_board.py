"""Edge services on the board: nodes, who places, and why.

``node:{name}`` and ``controller`` expire 3 s after the last word; ``placements`` is a bounded stream of the latest
windows, for people who want to know why.
"""

from typing import Any, Final

import msgspec

from protocol.edge_records import ControllerRecord, NodeRecord, WindowRecord
from protocol.redis_calls import cancellable, decoded

NODE_EXPIRES_S: Final = 3.0
WINDOWS_KEPT: Final = 1_000

_json = msgspec.json.Encoder().encode


class EdgeRecords:
    """The part of the board that edge nodes and the placement controller write and gateways read."""

    def __init__(self, redis: Any) -> None:
        self._redis: Any = redis

    @cancellable
    async def post_node(self, record: NodeRecord, *, changed: bool) -> None:
        """Renews a node's registration; with `changed`, tells every follower to read again now."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.set(f"node:{record.node}", _json(record), px=int(NODE_EXPIRES_S * 1000))
        if changed:
            pipeline.publish("news", "nodes")
        await pipeline.execute()

    @cancellable
    async def remove_node(self, node: str) -> None:
        """An orderly end; a killed node's registration expires by itself."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.delete(f"node:{node}")
        pipeline.publish("news", "nodes")
        await pipeline.execute()

    @cancellable
    async def nodes(self) -> list[NodeRecord]:
        """All live nodes, sorted by name. A record that this version cannot read is left out."""
        keys = sorted([key async for key in self._redis.scan_iter(match="node:*", count=1000)])
        values = await self._redis.mget(keys) if keys else []
        records = [decoded(value, NodeRecord) for value in values]
        return [record for record in records if record is not None]

    @cancellable
    async def post_controller(self, record: ControllerRecord) -> None:
        """Says where the leading scheduler decides on placements (renewed every second)."""
        await self._redis.set("controller", _json(record), px=int(NODE_EXPIRES_S * 1000))

    @cancellable
    async def controller(self) -> ControllerRecord | None:
        """Where placements are decided, if anywhere."""
        return decoded(await self._redis.get("controller"), ControllerRecord)

    @cancellable
    async def add_window(self, record: WindowRecord) -> None:
        """Appends a decided window to the bounded log."""
        await self._redis.xadd("placements", {"window": _json(record)}, maxlen=WINDOWS_KEPT, approximate=True)

    @cancellable
    async def windows(self, count: int = 100) -> list[WindowRecord]:
        """The latest decided windows, newest first."""
        entries = await self._redis.xrevrange("placements", count=count)
        records = [decoded(fields.get(b"window"), WindowRecord) for _, fields in entries]
        return [record for record in records if record is not None]
