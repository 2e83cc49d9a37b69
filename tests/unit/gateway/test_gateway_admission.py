"""Reading a body over ASGI: its limits, and what its end leaves behind in the task and in the books of uploads."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gateway.admission import Uploads, read_body
from gateway.request import ClientGone, Refused
from protocol.outcomes import Outcome


def receiving(*parts: bytes, more: bool = False, gone: bool = False) -> Callable[[], Awaitable[dict[str, Any]]]:
    """The parts of a body, and then: its end, nothing more that comes (`more`), or a client that has left."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if gone:
        messages.append({"type": "http.disconnect"})
    elif not more:
        messages[-1]["more_body"] = False

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    return receive


def read(receive: Callable[[], Awaitable[dict[str, Any]]], timeout_s: float = 5.0, limit: int = 10) -> bytes:
    """The body; whatever its end, nothing of it counts as an upload, and no cancellation stays with the task."""
    uploads = Uploads(20)
    uploads.held = 5

    async def body() -> bytes:
        task = asyncio.current_task()
        assert task is not None
        try:
            return await read_body(receive, limit, timeout_s, uploads)
        finally:
            assert task.cancelling() == 0
            await asyncio.sleep(0)  # it can go on

    try:
        return asyncio.run(body())
    finally:
        assert uploads.held == 5


def test_a_body_in_parts_is_put_together() -> None:
    assert read(receiving(b"123")) == b"123"
    assert read(receiving(b"123", b"", b"4567890")) == b"1234567890"


@pytest.mark.parametrize(
    ("receive", "limit", "status", "outcome"),
    [
        (receiving(b"12345678901"), 10, 413, Outcome.INVALID),
        (receiving(b"123456", b"78901", more=True), 10, 413, Outcome.INVALID),
        (receiving(b"1234", more=True), 10, 408, Outcome.INVALID),
        (receiving(b"12345678", b"12345678", more=True), 100, 0, Outcome.UNAVAILABLE),
    ],
    ids=["large", "grows", "drips", "no memory"],
)
def test_a_body_that_breaks_a_limit_is_refused(
    receive: Callable[[], Awaitable[dict[str, Any]]], limit: int, status: int, outcome: Outcome
) -> None:
    with pytest.raises(Refused) as caught:
        read(receive, 0.01 if status == 408 else 5.0, limit)
    assert (caught.value.http_status, caught.value.outcome) == (status, outcome)


def test_a_client_that_leaves_in_its_body_is_gone() -> None:
    with pytest.raises(ClientGone):
        read(receiving(b"1234", gone=True))


def test_a_cancellation_from_outside_is_none_of_the_time_limit() -> None:
    async def body() -> None:
        uploads = Uploads(20)
        task = asyncio.create_task(read_body(receiving(b"1234", more=True), 10, 5.0, uploads))
        await asyncio.sleep(0.01)
        assert uploads.held == 4
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert uploads.held == 0

    asyncio.run(body())
