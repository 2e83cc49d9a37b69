"""A stranger's requests against real processes: each gets a clear JSON error, and nothing else is disturbed.

After every test an ordinary request must be answered, the gateway must have counted each request once, and neither
the gateway nor the worker may have grown.
"""

import gzip
import io
import random
import socket
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.fakes.running_system import Answer, RunningSystem, answers, deployment, read_until_closed

GROWTH_MB = 40.0
"""Room for allocators' arenas and lazily imported codecs; a single unfolded bomb is 400 MB."""

SMALL = """
name = "hostile"
[services.digits]
variants = ["digits_light"]
requirement_ms = 5000
max_body_bytes = 300000
[[workers]]
name = "a"
instances = [{ variant = "digits_light" }]
"""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    file = deployment(
        tmp_path_factory.mktemp("hostile") / "hostile.toml", SMALL, body_timeout_s=1.0, header_timeout_s=1.0
    )
    with RunningSystem(file) as running:
        for _ in range(20):  # what is allocated once and kept
            assert post(running, picture("png")).status == 200
            assert post(running, picture("jpeg")).status == 200
        yield running


@pytest.fixture(autouse=True)
def undisturbed(system: RunningSystem) -> Iterator[None]:
    """Nothing else is disturbed, every request is counted once, memory stays flat."""
    before_mb = {name: system.resident_mb(name) for name in ("gateway-0", "worker-a")}
    pids = {child.name: child.statistics().pid for child in system.supervisor.children}
    yield
    assert post(system, picture("png")).status == 200
    state = get(system, "/state")
    ended = sum(sum(outcomes.values()) for outcomes in state["outcomes"].values())
    assert state["arrived"] == ended + state["in_flight"]
    assert state["in_flight"] == 0
    assert pids == {child.name: child.statistics().pid for child in system.supervisor.children}, "a process died"
    for name, resident_mb in before_mb.items():
        assert system.resident_mb(name) < resident_mb + GROWTH_MB, f"{name} grew"


# requests


def picture(kind: str, width: int = 40, height: int = 40) -> bytes:
    """A small picture with structure."""
    pixels = np.add.outer(np.arange(height) * 5, np.arange(width) * 3).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def png(width: int, height: int, *extra: tuple[bytes, bytes], data: bytes = b"") -> bytes:
    """A 1-bit PNG of any size, made by hand; `extra` chunks come before its pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack("!I", len(content)) + name + content + struct.pack("!I", zlib.crc32(name + content))

    head = struct.pack("!IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [chunk(b"IHDR", head), *(chunk(*one) for one in extra), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def bomb(side: int) -> bytes:
    """A complete black PNG of side x side pixels: kilobytes that unfold into side * side bytes."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    return png(side, side, data=b"".join(packer.compress(row) for _ in range(side)) + packer.flush())


def request(body: bytes, *headers: str, path: str = "/v1/digits", method: str = "POST", length: int = -1) -> bytes:
    """The bytes of one HTTP request."""
    lines = [f"{method} {path} HTTP/1.1", "host: test", f"content-length: {length if length >= 0 else len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1") + body


def post(system: RunningSystem, body: bytes, *headers: str, path: str = "/v1/digits") -> Answer:
    """The one answer to a POST on a connection of its own."""
    if not any(header.startswith("content-type") for header in headers):
        headers = ("content-type: image/png", *headers)
    return one(system.say(request(body, "connection: close", *headers, path=path)))


def one(data: bytes) -> Answer:
    """Exactly one response, in JSON, with error and code unless it is an answer."""
    [answer] = list(answers(data))
    assert answer.headers["content-type"] == "application/json"
    if answer.status != 200:
        assert isinstance(answer.json["error"], str)
        assert answer.json["error"]
        assert answer.json["code"] in ("INVALID", "EXPIRED")
    return answer


def get(system: RunningSystem, path: str) -> dict[str, Any]:
    """A JSON document of the gateway."""
    return next(answers(system.say(request(b"", "connection: close", path=path, method="GET")))).json


def outcomes(system: RunningSystem, service: str = "digits") -> Counter[str]:
    """What the gateway has counted."""
    return Counter(get(system, "/state")["outcomes"].get(service, {}))


# bodies


def _multipart(content: bytes, kind: str = "image/jpeg", boundary: str = "xyz") -> bytes:
    head = f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="cat.jpg"\r\ncontent-type: {kind}'
    return head.encode() + b"\r\n\r\n" + content + f"\r\n--{boundary}--\r\n".encode()


FORM = "content-type: multipart/form-data; boundary=xyz"
BAD_BODIES: dict[str, tuple[bytes, str, int]] = {
    "empty": (b"", "content-type: image/jpeg", 400),
    "truncated jpeg": (picture("jpeg")[:200], "content-type: image/jpeg", 400),
    "jpeg of three bytes": (b"\xff\xd8\xff", "content-type: image/jpeg", 400),
    "truncated png": (picture("png")[:60], "content-type: image/png", 400),
    "text as jpeg": (b"these are words, not pixels", "content-type: image/jpeg", 400),
    "text named .jpg in a form": (_multipart(b"these are words, not pixels"), FORM, 400),
    "png bomb": (bomb(20_000), "content-type: image/png", 413),
    "png that claims to be huge": (png(2**31 - 1, 2**31 - 1), "content-type: image/png", 413),
    "png without pixels": (png(0, 7), "content-type: image/png", 400),
    "png with a text bomb": (
        png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000), 9)), data=zlib.compress(bytes(16))),
        "content-type: image/png",
        400,
    ),
    "too many bytes": (bytes(300_001), "content-type: image/png", 413),
    "wrong type": (picture("png"), "content-type: text/html", 415),
    "odd type": (picture("png"), "content-type: \xe9\xff;;==", 415),
    "form without a boundary": (_multipart(picture("jpeg")), "content-type: multipart/form-data", 400),
    "form with an empty boundary": (_multipart(picture("jpeg")), 'content-type: multipart/form-data; boundary=""', 400),
    "form with another boundary": (
        _multipart(picture("jpeg")),
        "content-type: multipart/form-data; boundary=abc",
        400,
    ),
    "form cut off": (_multipart(picture("jpeg"))[:-40], FORM, 400),
    "form without a file": (b"--xyz--\r\n", FORM, 400),
    "form with text": (_multipart(b"hello", "text/plain"), FORM, 415),
    "tensor of the wrong size": (bytes(7), "content-type: application/x-tidegate-tensor", 400),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_refused_with_its_status(system: RunningSystem, name: str) -> None:
    body, content_type, status = BAD_BODIES[name]
    before = outcomes(system)
    answer = post(system, body, content_type)
    assert (answer.status, answer.json["code"]) == (status, "INVALID"), answer.body
    assert outcomes(system) - before == {"INVALID": 1}


def test_a_good_form_is_answered(system: RunningSystem) -> None:
    assert post(system, _multipart(picture("jpeg")), FORM).json["outcome"] == "OK"


def test_twenty_bombs_at_once_leave_memory_flat(system: RunningSystem) -> None:
    bad = request(bomb(20_000), "connection: close", "content-type: image/png")
    connections = [system.raw() for _ in range(20)]
    for connection in connections:
        connection.sendall(bad)
    for connection in connections:
        with connection:
            assert one(read_until_closed(connection)).status == 413


def test_damaged_pictures_are_never_the_servers_fault(system: RunningSystem) -> None:
    rng = random.Random(5)
    for number in range(150):
        body = bytearray(picture(("png", "jpeg")[number % 2]))
        for _ in range(rng.randint(1, 8)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        answer = post(system, bytes(body))
        assert answer.status in (200, 400, 413), (number, answer.body)


# headers and paths


@pytest.mark.parametrize(
    "value", ["soon", "", "-5", "0", "nan", "inf", "1e999", "600001", "0x10", "1,5", "1_000", "\xb2"]
)
def test_a_nonsense_deadline_is_refused(system: RunningSystem, value: str) -> None:
    answer = post(system, picture("png"), f"x-deadline-ms: {value}")
    assert answer.status == 400
    assert "X-Deadline-Ms" in answer.json["error"]


@pytest.mark.parametrize("coding", ["gzip", "br", "identity, gzip"])
def test_an_encoded_body_is_415_and_identity_is_none(system: RunningSystem, coding: str) -> None:
    answer = post(system, gzip.compress(picture("png")), f"content-encoding: {coding}")
    assert answer.status == 415
    assert "Content-Encoding" in answer.json["error"]
    assert post(system, picture("png"), "content-encoding: identity").status == 200


def test_a_deadline_that_cannot_be_met_expires(system: RunningSystem) -> None:
    answer = post(system, picture("png"), "x-deadline-ms: 0.001")
    assert (answer.status, answer.json["code"]) == (504, "EXPIRED")


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/", "/v1/digits/", "/v1/%00", "/v1/..%2fdigits", "/v1/%ff%fe"])
def test_an_unknown_service_is_404(system: RunningSystem, path: str) -> None:
    before = outcomes(system, "unknown")
    assert post(system, picture("png"), path=path).status == 404
    assert outcomes(system, "unknown") - before == {"INVALID": 1}


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_another_method_is_405_and_says_which_is_allowed(system: RunningSystem, method: str) -> None:
    answer = one(system.say(request(b"", "connection: close", method=method)))
    assert answer.status == 405
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("given", ["a" * 129, 'quo"te', "back\\slash", "tab\there", "\xe9"])
def test_an_unusable_request_id_is_replaced(system: RunningSystem, given: str) -> None:
    answer = post(system, picture("png"), f"x-request-id: {given}")
    assert answer.status == 200
    assert answer.headers["x-request-id"] == answer.json["id"] != given


def test_a_usable_request_id_is_echoed_in_answer_and_error(system: RunningSystem) -> None:
    assert post(system, picture("png"), "x-request-id: mine 1").json["id"] == "mine 1"
    assert post(system, b"", "x-request-id: mine 2").headers["x-request-id"] == "mine 2"


HEAD = "POST /v1/digits HTTP/1.1\r\nhost: test\r\n"


@pytest.mark.parametrize(
    "head",
    [
        HEAD + f"x-big: {'a' * 20_000}\r\ncontent-length: 3\r\n\r\nabc",
        HEAD + "".join(f"x-{n}: {'a' * 100}\r\n" for n in range(300)) + "content-length: 3\r\n\r\nabc",
        HEAD + "x-endless: " + "a" * 400_000,
        HEAD + "".join(f"x-{n}: y\r\n" for n in range(40_000)),
        f"GET /{'a' * 100_000} HTTP/1.1\r\n\r\n",
    ],
    ids=["one big", "many", "endless", "endlessly many", "long path"],
)
def test_oversized_heads_are_431(system: RunningSystem, head: str) -> None:
    assert one(system.say(head.encode())).status == 431


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # a TLS client hello
        b"\x00" * 100,
        b"HELO mail.example\r\n\r\n",
        b"POST /v1/digits HTTP/9.9\r\n\r\n",
        b"POST /v1/digits HTTP/1.1\r\ncontent-length: x\r\n\r\n",
        b"POST /v1/digits HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/digits HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        b"POST /v1/digits HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"POST /v1/digits HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nnope\r\n",
        b"POST /v1/digits HTTP/1.1\r\n folded: header\r\n\r\n",
    ],
    ids=["tls", "zeros", "smtp", "version", "length word", "length negative", "two lengths", "length and chunked",
         "chunk size", "folded"],
)  # fmt: skip
def test_what_is_not_http_is_400_in_json(system: RunningSystem, data: bytes) -> None:
    assert one(system.say(data)).status == 400


# sizes and speeds


@pytest.mark.parametrize("size", [10**9, 10**18, 300_001])
def test_a_gigabyte_is_refused_before_it_is_sent(system: RunningSystem, size: int) -> None:
    with system.raw() as connection:
        connection.sendall(request(b"abc", "content-type: image/png", length=size))
        answer = one(read_until_closed(connection))
    assert (answer.status, answer.headers["connection"]) == (413, "close")


def test_a_client_that_goes_on_sending_still_reads_its_413(system: RunningSystem) -> None:
    with system.raw() as connection:
        connection.sendall(request(b"", "content-type: image/png", length=10**9))
        try:
            for _ in range(200):
                connection.sendall(bytes(65_536))
        except ConnectionError:
            pass
        assert one(read_until_closed(connection)).status == 413


def test_an_endless_chunked_body_is_refused(system: RunningSystem) -> None:
    with system.raw() as connection:
        connection.sendall((HEAD + "content-type: image/png\r\ntransfer-encoding: chunked\r\n\r\n").encode())
        try:
            for _ in range(100):
                connection.sendall(b"10000\r\n" + bytes(65_536) + b"\r\n")
        except ConnectionError:
            pass
        assert one(read_until_closed(connection)).status == 413


@pytest.mark.parametrize(("method", "path"), [("PUT", "/admin/deployment"), ("PUT", "/admin/services/digits/router")])
def test_an_admin_body_is_bounded_too(system: RunningSystem, method: str, path: str) -> None:
    with system.raw() as connection:
        connection.sendall(request(b"", path=path, method=method, length=10**9))
        try:
            for _ in range(100):
                connection.sendall(bytes(65_536))
        except ConnectionError:
            pass
        assert one(read_until_closed(connection)).status == 413


def _drip(connection: socket.socket, data: bytes, seconds_apart: float) -> bytes:
    """Sends byte by byte until the other side answers or closes; what it said."""
    connection.settimeout(seconds_apart)
    for number in range(len(data)):
        try:
            connection.sendall(data[number : number + 1])
            if received := connection.recv(65_536):
                return received
            return b""
        except TimeoutError:
            continue
        except ConnectionError:
            return b""
    raise AssertionError("all of it was taken")


def test_a_head_that_drips_is_cut_off(system: RunningSystem) -> None:
    started_s = time.monotonic()
    with system.raw() as connection:
        said = _drip(connection, request(picture("png")), 0.2)
    assert one(said).status == 408
    assert 0.9 < time.monotonic() - started_s < 5.0


def test_a_body_that_drips_is_cut_off(system: RunningSystem) -> None:
    before = outcomes(system)
    started_s = time.monotonic()
    with system.raw() as connection:
        connection.sendall(request(b"", "content-type: image/png", length=1000))
        said = _drip(connection, picture("png"), 0.2)
    assert one(said).status == 408
    assert 0.9 < time.monotonic() - started_s < 5.0
    assert outcomes(system) - before == {"INVALID": 1}


def test_a_silent_connection_is_closed(system: RunningSystem) -> None:
    with system.raw() as connection:
        assert one(read_until_closed(connection)).status == 408


def test_a_hundred_slow_clients_do_not_slow_others(system: RunningSystem) -> None:
    connections = [system.raw() for _ in range(100)]
    for number, connection in enumerate(connections):
        connection.sendall(
            request(b"x" if number % 2 else b"", "content-type: image/png", length=1000)[: -(number % 7)]
        )
    started_s = time.monotonic()
    assert post(system, picture("png")).status == 200
    assert time.monotonic() - started_s < 1.0
    for connection in connections:
        with connection:
            read_until_closed(connection)


# connections


def test_a_client_that_leaves_in_its_body_is_cancelled(system: RunningSystem) -> None:
    before = outcomes(system)
    with system.raw() as connection:
        connection.sendall(request(b"abc", "content-type: image/png", length=1000))
        time.sleep(0.1)
    wait_until(lambda: outcomes(system) - before == {"CANCELLED": 1})


def test_pipelined_requests_are_answered_in_order(system: RunningSystem) -> None:
    with system.raw() as connection:
        requests = [
            request(picture("png") if number % 3 else b"", "content-type: image/png", f"x-request-id: {number}")
            for number in range(30)
        ]
        last = request(picture("png"), "content-type: image/png", "x-request-id: 30", "connection: close")
        connection.sendall(b"".join([requests[number] for number in range(30) if number % 3] + [last]))
        got = list(answers(read_until_closed(connection)))
    assert [answer.json["id"] for answer in got] == [str(number) for number in range(31) if number % 3 or number == 30]
    assert {answer.status for answer in got} == {200}


def test_pipelined_bodies_beyond_the_head_limit_are_no_heads(system: RunningSystem) -> None:
    large = picture("png") + bytes(60_000)
    with system.raw() as connection:
        many = [request(large, "content-type: image/png", f"x-request-id: {number}") for number in range(12)]
        whole = b"".join(many) + request(large, "content-type: image/png", "connection: close", "x-request-id: 12")
        # Cut so that each piece ends inside a head: the body before it must not count as that head.
        for start in range(0, len(whole), len(many[0])):
            connection.sendall(whole[max(0, start - len(many[0]) + 30) : start + 30])
            time.sleep(0.01)
        connection.sendall(whole[start + 30 :])
        got = list(answers(read_until_closed(connection)))
    assert [answer.json["id"] for answer in got] == [str(number) for number in range(13)]
    assert {answer.status for answer in got} == {200}


def test_keep_alive_survives_an_error_whose_body_was_read(system: RunningSystem) -> None:
    with system.raw() as connection:
        connection.sendall(request(b"no picture", "content-type: image/png"))
        connection.sendall(request(picture("png"), "content-type: image/png", "connection: close"))
        assert [answer.status for answer in answers(read_until_closed(connection))] == [400, 200]


def test_expect_100_continue_is_refused_without_asking_for_the_body(system: RunningSystem) -> None:
    with system.raw() as connection:
        connection.sendall(request(b"", "content-type: image/png", "expect: 100-continue", length=10**9))
        assert one(read_until_closed(connection)).status == 413


def wait_until(condition: Callable[[], bool], patience_s: float = 10.0) -> None:
    """Fails if the condition does not come true."""
    ends_s = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < ends_s, "it did not happen"
        time.sleep(0.05)


def test_the_log_holds_no_traceback(system: RunningSystem, tmp_path: Path) -> None:
    """Runs last: nothing that a client did above was a surprise to the code."""
    for child in system.supervisor.children:
        assert "Traceback" not in child.log_file.read_text(), child.log_file.read_text()[-3000:]
