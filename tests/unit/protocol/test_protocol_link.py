"""Links over real sockets: many requests in flight, and every way in which a connection ends."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol.frames import Frame, Kind, encode_head
from protocol.link import Connection, LinkClosed, address_fault, connect, serve
from protocol.peer import Peer
from protocol.records import Goodbye, Infer, Reply, Status
from tests.fakes.virtual_time import run as run_in_virtual_time


class Server:
    """Keeps what comes; answers only what the test tells it to."""

    def __init__(self) -> None:
        self.frames: list[tuple[Connection, Frame]] = []
        self.reasons: list[str] = []
        self.connections: list[Connection] = []

    def make(self) -> Connection:
        """A connection for one client."""
        connection = Connection(
            lambda connection, frame: self.frames.append((connection, frame)),
            lambda connection, reason: self.reasons.append(reason),
            max_payload_bytes=1 << 20,
        )
        self.connections.append(connection)
        return connection


@asynccontextmanager
async def serving(address: str) -> AsyncIterator[Server]:
    """A server on `address`."""
    server = Server()
    listener = await serve(address, server.make)
    try:
        yield server
    finally:
        listener.close()
        for connection in server.connections:
            connection.close("the test is over")
        await come(lambda: len(server.reasons) == len(server.connections))


async def come(condition: Callable[[], Any]) -> None:
    """Let the loop run until the condition holds, at most 5 s."""
    end_s = asyncio.get_running_loop().time() + 5.0
    while not condition():
        assert asyncio.get_running_loop().time() < end_s, "it never came"
        await asyncio.sleep(0)


def run(tmp_path: Path, scenario: Callable[[Server, str], Any]) -> None:
    """Run a scenario with a server on a unix socket."""

    async def inside() -> None:
        address = f"unix:{tmp_path}/link.sock"
        async with serving(address) as server:
            await scenario(server, address)

    asyncio.run(inside())


async def client_of(address: str, reasons: list[str] | None = None) -> Connection:
    """A client connection that notes why it was closed."""
    return await connect(address, lambda: Connection(lambda *_: None, lambda _, reason: (reasons or []).append(reason)))


def test_many_in_flight_answered_in_any_order(tmp_path: Path) -> None:
    """200 requests on one connection, answered backwards: each future gets its own reply."""

    async def scenario(server: Server, address: str) -> None:
        client = await client_of(address)
        futures = [client.request(Kind.INFER, Infer(str(number), 1.0), b"x" * number)[1] for number in range(200)]
        assert client.in_flight == 200
        await come(lambda: len(server.frames) == 200)
        for connection, frame in reversed(server.frames):
            asked = msgspec.msgpack.decode(frame.meta, type=Infer)
            connection.send(Kind.REPLY, frame.request_id, Reply(0, Status(asked.instance)), frame.payload)
        for number, future in enumerate(futures):
            frame = await future
            assert msgspec.msgpack.decode(frame.meta, type=Reply).status.instance == str(number)
            assert len(frame.payload) == number
        assert client.in_flight == 0
        client.close("done")

    run(tmp_path, scenario)


def test_large_payloads_both_ways(tmp_path: Path) -> None:
    """Beyond the size up to which head and payload are joined, in many chunks."""

    async def scenario(server: Server, address: str) -> None:
        client = await client_of(address)
        payload = bytes(range(256)) * 4000
        future = client.request(Kind.INFER, Infer("a", 1.0), payload)[1]
        await come(lambda: server.frames)
        connection, frame = server.frames[0]
        assert frame.payload == payload
        connection.send(Kind.REPLY, frame.request_id, None, payload)
        assert (await future).payload == payload
        client.close("done")

    run(tmp_path, scenario)


def test_a_close_fails_all_futures(tmp_path: Path) -> None:
    """With the reason that the other side gave; what is asked afterwards fails at once."""

    async def scenario(server: Server, address: str) -> None:
        reasons: list[str] = [""]
        client = await client_of(address, reasons)
        futures = [client.request(Kind.INFER, Infer("a", 1.0))[1] for _ in range(10)]
        await come(lambda: len(server.frames) == 10)
        server.connections[0].close("maintenance")
        for future in futures:
            with pytest.raises(LinkClosed, match="maintenance"):
                await future
        assert client.closed
        assert reasons == ["", "maintenance"], "told once"
        with pytest.raises(LinkClosed, match="maintenance"):
            client.request(Kind.INFER, Infer("a", 1.0))
        assert client.in_flight == 0

    run(tmp_path, scenario)


def test_a_forgotten_request_leaves_the_others_alone(tmp_path: Path) -> None:
    """Its late reply is dropped, its future cancelled."""

    async def scenario(server: Server, address: str) -> None:
        client = await client_of(address)
        forgotten_id, forgotten = client.request(Kind.INFER, Infer("a", 1.0))
        _, kept = client.request(Kind.INFER, Infer("a", 1.0))
        client.forget(forgotten_id)
        await come(lambda: len(server.frames) == 2)
        for connection, frame in server.frames:
            connection.send(Kind.REPLY, frame.request_id, None, b"answer")
        assert (await kept).payload == b"answer"
        assert not forgotten.done(), "nobody waits for it any more"
        client.close("done")

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n", "frame version 71"),
        (encode_head(Kind.INFER, 1, b"", (1 << 20) + 1), "payload of 1048577 bytes exceeds 1048576"),
        (b"\x01\x63" + bytes(18), "unknown frame kind 99"),
    ],
)
def test_nonsense_closes_the_connection_with_a_reason(tmp_path: Path, sent: bytes, reason: str) -> None:
    """Both sides know it; other connections live on."""

    async def scenario(server: Server, address: str) -> None:
        bystander, client = await client_of(address), await client_of(address)
        _, waiting = client.request(Kind.STATUS_REQUEST)
        assert client._transport is not None
        client._transport.write(sent)
        with pytest.raises(LinkClosed, match=reason):
            await waiting
        await come(lambda: server.reasons)
        assert reason in server.reasons[0]
        bystander.send(Kind.CANCEL, 5)
        await come(lambda: any(frame.request_id == 5 for _, frame in server.frames))
        bystander.close("done")

    run(tmp_path, scenario)


def test_a_frame_cut_off_by_the_end_of_the_connection(tmp_path: Path) -> None:
    """The reason tells it from an orderly end, and no half frame is delivered."""

    async def scenario(server: Server, address: str) -> None:
        client = await client_of(address)
        assert client._transport is not None
        client._transport.write(encode_head(Kind.INFER, 1, b"", 100) + b"only this")
        client._transport.close()
        await come(lambda: server.reasons)
        assert "in the middle of a frame" in server.reasons[0]
        assert server.frames == []

    run(tmp_path, scenario)


def test_goodbye_is_sent_before_the_end(tmp_path: Path) -> None:
    """As a frame of its own, so that any implementation can read the reason."""

    async def scenario(server: Server, address: str) -> None:
        reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
        await come(lambda: server.connections and server.connections[0]._transport)
        server.connections[0].close("no more")
        server.connections[0].close("twice changes nothing")
        data = await reader.read()
        meta = msgspec.msgpack.encode(Goodbye("no more"))
        assert data == encode_head(Kind.GOODBYE, 0, meta, 0)
        writer.close()
        await writer.wait_closed()

    run(tmp_path, scenario)


def test_tcp_and_bad_addresses() -> None:
    """The same over TCP; an address of no known form names what would be right."""

    async def scenario() -> None:
        listener = await serve("tcp:127.0.0.1:0", Server().make)
        port = listener.sockets[0].getsockname()[1]
        client = await client_of(f"tcp:127.0.0.1:{port}")
        client.close("done")
        await come(lambda: client.closed)
        listener.close()
        for address in ("here", "tcp:host", "unix:", "tcp::1"):
            with pytest.raises(ValueError, match="expected unix:/path or tcp:host:port"):
                await client_of(address)

    asyncio.run(scenario())


def test_a_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    """What a killed process left behind does not keep the next one from starting."""

    async def scenario() -> None:
        (tmp_path / "link.sock").touch()
        async with serving(f"unix:{tmp_path}/link.sock"):
            client = await client_of(f"unix:{tmp_path}/link.sock")
            client.close("done")
            await come(lambda: client.closed)

    asyncio.run(scenario())


def test_a_peer_comes_back_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down: refused at once. Up, lost, up again: told each time; and it ends when cancelled."""
    monkeypatch.setattr("protocol.peer.FIRST_PAUSE_S", 0.001)
    address = f"unix:{tmp_path}/link.sock"

    async def scenario() -> None:
        changes: list[bool] = []
        peer = Peer(address, lambda peer: changes.append(peer.up))
        running = asyncio.create_task(peer.run())
        with pytest.raises(LinkClosed):
            peer.request(Kind.STATUS_REQUEST)
        async with serving(address) as server:
            await come(lambda: peer.up)
            request_id, future = peer.request(Kind.INFER, Infer("a", 1.0))
            await come(lambda: server.frames)
            peer.cancel(request_id)
            await come(lambda: len(server.frames) == 2)
            assert (server.frames[1][1].kind, server.frames[1][1].request_id) == (Kind.CANCEL, request_id)
            assert not future.done(), "nobody waits for it any more"
            assert peer.in_flight == 0
            _, lost = peer.request(Kind.INFER, Infer("a", 1.0))
            server.connections[0].close("restarting")
            with pytest.raises(LinkClosed, match="restarting"):
                await lost
            await come(lambda: len(server.connections) == 2 and peer.up)
            assert changes == [True, False, True]
            peer.hurry()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            await come(lambda: not peer.up)

    asyncio.run(scenario())


def test_a_peer_tries_again_ever_later_and_soon_again_once_it_was_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.05 s, doubled up to 1 s; a connection that is lost after all begins with no pause, then with the shortest."""
    tries_s: list[float] = []

    async def scenario() -> None:
        async def connecting(address: str, make: Callable[[], Connection]) -> Connection:
            tries_s.append(asyncio.get_running_loop().time())
            if len(tries_s) != 8:
                raise ConnectionRefusedError
            return make()

        monkeypatch.setattr("protocol.peer.connect", connecting)
        peer = Peer("unix:/nowhere", lambda peer: None)
        running = asyncio.create_task(peer.run())
        await asyncio.sleep(10.0)
        assert peer._connection is not None
        peer._connection.connection_lost(None)
        await asyncio.sleep(0.1)
        running.cancel()
        await asyncio.wait([running])

    run_in_virtual_time(scenario())
    pauses_s = [later - earlier for earlier, later in pairwise(tries_s)]
    assert pauses_s[:7] == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    assert tries_s[8:] == pytest.approx([10.0, 10.05])


def test_a_payload_in_pieces_arrives_whole(tmp_path: Path) -> None:
    """As it came from a client: nobody joins the pieces before they are sent."""

    async def scenario(server: Server, address: str) -> None:
        client = await client_of(address)
        client.send(Kind.CANCEL, 1, None, [b"one", bytearray(b"two"), b"three"])
        client.send(Kind.CANCEL, 2, None, ())
        await come(lambda: len(server.frames) == 2)
        assert [frame.payload for _, frame in server.frames] == [b"onetwothree", b""]
        client.close("done")

    run(tmp_path, scenario)


def test_who_waits_is_told_why_a_connection_was_cut(tmp_path: Path) -> None:
    """A cut says no goodbye: this side's reason is all that there is."""

    async def scenario(server: Server, address: str) -> None:
        client = await client_of(address)
        _, waiting = client.request(Kind.STATUS_REQUEST)
        client.abort("it hangs")
        with pytest.raises(LinkClosed, match="it hangs"):
            await waiting
        await come(lambda: server.reasons)
        assert "it hangs" not in server.reasons[0]

    run(tmp_path, scenario)


def test_a_sockets_path_is_measured_in_bytes() -> None:
    """107 of them fit into the system's address, however many characters they are."""
    folder = "/" + "é" * 50  # 101 bytes
    assert address_fault(f"unix:{folder}/54321") == ""
    assert "at most 107 bytes" in address_fault(f"unix:{folder}/654321")
