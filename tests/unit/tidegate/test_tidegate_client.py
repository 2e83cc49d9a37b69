"""The client's connections, scripted: when one is used again, when it is replaced, how long it may take."""

import json
import threading

import pytest

from tidegate import client as client_module
from tidegate.client import LONGEST_IDLE_S, Client, ConnectionFailed

GOOD = {
    "predictions": [{"label": "a", "class_id": 0, "score": 1.0}],
    "service": "s",
    "variant": "v",
    "instance": "w/v",
    "id": "1",
    "outcome": "OK",
    "timings_ms": {},
}


class Socket:
    """Keeps its time limit."""

    def __init__(self) -> None:
        self.timeout_s = 0.0

    def settimeout(self, seconds: float) -> None:
        """As a socket's."""
        self.timeout_s = seconds


class Response:
    """A good answer."""

    status = 200

    def getheaders(self) -> list[tuple[str, str]]:
        """None."""
        return []

    def read(self) -> bytes:
        """The body."""
        return json.dumps(GOOD).encode()


class Connection:
    """Stands in for `http.client.HTTPConnection`."""

    def __init__(self, host: str, port: int | None, timeout: float) -> None:
        self.sock: Socket | None = None
        self.requests = 0
        self.closed = False
        self.breaks = False
        made.append(self)

    def connect(self) -> None:
        """At once."""
        self.sock = Socket()

    def request(self, *_: object) -> None:
        """Taken, or the connection has broken."""
        if self.breaks:
            raise ConnectionResetError
        self.requests += 1

    def getresponse(self) -> Response:
        """At once."""
        return Response()

    def close(self) -> None:
        """Done."""
        self.closed = True


made: list[Connection] = []


class Clock:
    """Time as the test says."""

    now_s = 0.0

    @classmethod
    def monotonic(cls) -> float:
        """The time."""
        return cls.now_s


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    """One over scripted connections, at time 0."""
    made.clear()
    Clock.now_s = 0.0
    monkeypatch.setattr(client_module, "time", Clock)
    monkeypatch.setattr(client_module, "_quiet", lambda connection: True)
    one = Client("http://nobody:1")
    one._make = Connection  # type: ignore[assignment]
    return one


def test_a_connection_is_used_again_as_long_as_it_is_used_often(client: Client) -> None:
    """Idle time counts from its last answer; one that the server may have closed is closed here, too."""
    for seconds in (0.0, 20.0, 40.0, 60.0):
        Clock.now_s = seconds
        client.infer("s", b"x")
    assert [one.requests for one in made] == [4]
    Clock.now_s = 60.0 + LONGEST_IDLE_S
    client.infer("s", b"x")
    assert [one.requests for one in made] == [4, 1]
    assert [one.closed for one in made] == [True, False]
    assert len(client._open) == 1
    client.close()
    assert made[1].closed


def test_a_connection_on_which_something_came_unasked_is_replaced(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has closed it: the request would be lost, and could not be sent again."""
    client.infer("s", b"x")
    monkeypatch.setattr(client_module, "_quiet", lambda connection: connection is not made[0])
    client.infer("s", b"x")
    assert [(one.requests, one.closed) for one in made] == [(1, True), (1, False)]


def test_each_request_sets_its_own_time_limit_on_a_kept_connection(client: Client) -> None:
    for deadline_s in (5.0, 0.5, 2.0):
        client.infer("s", b"x", deadline_s=deadline_s)
        sock = made[0].sock
        assert sock is not None
        assert sock.timeout_s == pytest.approx(deadline_s + client_module.GRACE_S)
    assert len(made) == 1


def test_a_connection_that_broke_is_not_kept(client: Client) -> None:
    client.infer("s", b"x")
    made[0].breaks = True
    with pytest.raises(ConnectionFailed) as caught:
        client.infer("s", b"x")
    assert caught.value.sent, "the server may have seen it: no second try"
    assert made[0].closed
    client.infer("s", b"x")
    assert [one.requests for one in made] == [1, 1]
    assert len(client._open) == 1


def test_threads_do_not_share_a_connection(client: Client) -> None:
    client.infer("s", b"x")
    thread = threading.Thread(target=client.infer, args=("s", b"x"))
    thread.start()
    thread.join()
    assert [one.requests for one in made] == [1, 1]
    client.close()
    assert all(one.closed for one in made), "of all threads"
