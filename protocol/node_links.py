"""One lasting link to every edge node that the board knows, for those who ask nodes how they are: gateways, schedulers.

Nodes among themselves keep links to their neighbours only (`wants`). The board says who there is (subscribed to, and
read again every second); the links say how they are. Statuses that come in otherwise, with replies, may be handed in
(`heard`).
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Final, NamedTuple, Self

import msgspec

from protocol.board import BOARD_ERRORS, Board
from protocol.edge_records import NodeRecord, NodeStatus
from protocol.frames import Frame, Kind
from protocol.link import LinkClosed
from protocol.peer import Peer
from protocol.tasks import end_tasks

READ_AGAIN_S: Final = 1.0
FORGET_AFTER_S: Final = 5.0
"""A node that is off the board while its link is up is kept this long: the board may have lost its memory."""
SILENT_S: Final = 5.0
"""A node that has said nothing for so long hangs or cannot be reached: what it holds of ours is given up."""

log = logging.getLogger(__name__)
_decode_status = msgspec.msgpack.Decoder(NodeStatus).decode


class Heard(NamedTuple):
    """What a node said last, and when (monotonic)."""

    status: NodeStatus
    at_s: float


class NodeLinks:
    """Links by node name. `async with` follows the board; `on_change()` is called when a node comes or goes.

    All mutable state: the records with the time of their last sight, the links, and what was heard on them.
    """

    def __init__(
        self,
        board: Board,
        on_change: Callable[[], None] = lambda: None,
        wants: Callable[[str], bool] = lambda node: True,
    ) -> None:
        """`wants(node)`: whether a link to it is wanted; asked at each reading of the board."""
        self.records: dict[str, NodeRecord] = {}
        self.heard_of: dict[str, Heard] = {}
        self.looked = False  # the board has been read
        self._board = board
        self._on_change = on_change
        self._wants = wants
        self._seen_s: dict[str, float] = {}
        self._asked: set[str] = set()
        self._peers: dict[str, Peer] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._loops: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._loops = [
            asyncio.create_task(self._board.follow(self.read, self._on_news), name="nodes.follow"),
            asyncio.create_task(self._read_again(), name="nodes.read_again"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await end_tasks([*self._loops, *self._tasks.values()])

    def peer(self, node: str) -> Peer | None:
        """The link to a node that can be asked now."""
        record = self.records.get(node)
        peer = self._peers.get(record.address) if record is not None else None
        return peer if peer is not None and peer.up else None

    def heard(self, node: str, status: NodeStatus, now_s: float) -> None:
        """A node has said how it is."""
        self.heard_of[node] = Heard(status, now_s)

    def known(self, now_s: float, oldest_s: float) -> dict[str, NodeStatus]:
        """The latest word of every node whose link is up, unless it is more than `oldest_s` old.

        A worker whose registration has no memory is none that could serve: it cannot make sense of its deployment.
        """
        return {
            node: said.status
            for node, said in self.heard_of.items()
            if now_s - said.at_s <= oldest_s and self.peer(node) is not None and self.records[node].memory_mb > 0
        }

    async def ask(self, patience_s: float) -> None:
        """Asks every node how it is, and waits for the answers, at most `patience_s`; later ones still count.

        One that owes an answer from before is busy or hangs: it is neither asked again nor waited for.
        """
        waiting: set[str] = set()
        everybody = asyncio.Event()

        def on_reply(node: str, reply: Frame | LinkClosed) -> None:
            self._asked.discard(node)
            if isinstance(reply, Frame):
                with contextlib.suppress(msgspec.MsgspecError):
                    self.heard(node, _decode_status(reply.meta), time.monotonic())
            waiting.discard(node)
            if not waiting:
                everybody.set()

        for node in self.records.keys() - self._asked:
            peer = self.peer(node)
            if peer is not None:
                with contextlib.suppress(LinkClosed):
                    peer.ask(Kind.NODE_STATUS_REQUEST, None, b"", partial(on_reply, node))
                    self._asked.add(node)
                    waiting.add(node)
        if waiting:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await everybody.wait()

    # the board

    async def read(self) -> None:
        """Reads who there is, and keeps one link to each."""
        now_s = time.monotonic()
        before = set(self.records)
        for record in await self._board.nodes():
            if self._wants(record.node):
                self.records[record.node] = record
                self._seen_s[record.node] = now_s
        for node, seen_s in list(self._seen_s.items()):
            if now_s - seen_s > (FORGET_AFTER_S if self.peer(node) and not self.records[node].draining else 0.0):
                self._forget(node, now_s)
        wanted = {record.address for record in self.records.values()}
        for address in wanted - self._peers.keys():
            peer = self._peers[address] = Peer(address, self._on_link)
            self._tasks[address] = asyncio.create_task(peer.run(), name=f"link to {address}")
        for address in self._peers.keys() & wanted:
            if not self._peers[address].up:
                self._peers[address].hurry()
        for address in self._peers.keys() - wanted:
            if self._peers[address].in_flight == 0:
                del self._peers[address]
                self._tasks.pop(address).cancel()
        self.looked = True
        if before != set(self.records):
            self._on_change()

    def _forget(self, node: str, now_s: float) -> None:
        """A node is off the board for good. If it does not answer either, what waits for it is lost now."""
        record, heard = self.records.pop(node), self.heard_of.pop(node, None)
        del self._seen_s[node]
        peer = self._peers.get(record.address)
        silent = heard is None or now_s - heard.at_s > SILENT_S
        if peer is not None and peer.in_flight and silent and not record.draining:
            peer.cut("it is off the board, and says nothing")

    async def _on_news(self, channel: str, data: bytes) -> None:
        if channel == "news" and data == b"nodes":
            await self.read()

    async def _read_again(self) -> None:
        while True:
            await asyncio.sleep(READ_AGAIN_S)
            with contextlib.suppress(*BOARD_ERRORS):
                await self.read()

    def _on_link(self, peer: Peer) -> None:
        if not peer.up:  # what it said before it went is no longer true
            for node, record in self.records.items():
                if record.address == peer.address:
                    self.heard_of.pop(node, None)
        self._on_change()


class SilenceWatch:
    """Cuts the link to a node that hangs, so that what it holds is lost now and not at the end of all patience.

    One that goes on taking what it is sent does not hang: the question stands behind a large clip.

    State: when each link was last seen to be up or to take bytes, and the bytes that waited for it then.
    """

    def __init__(self) -> None:
        self._moved: dict[str, tuple[float, int]] = {}

    def cut_silent(self, links: NodeLinks, now_s: float) -> None:
        """To be called now and then, after the nodes were asked how they are."""
        for name in list(links.records):
            peer = links.peer(name)
            if peer is None:
                self._moved.pop(name, None)
                continue
            moved_s, waited = self._moved.get(name, (now_s, 0))
            if peer.unsent_bytes < waited:
                moved_s = now_s
            self._moved[name] = moved_s, peer.unsent_bytes
            heard = links.heard_of.get(name)
            if now_s - max(moved_s, heard.at_s if heard is not None else 0.0) > SILENT_S:
                log.warning("a node does not answer", extra={"node": name})
                del self._moved[name]
                peer.cut(f"no word for {SILENT_S:g} s")
