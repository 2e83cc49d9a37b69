"""Lets a request in, or refuses it with the reason: service, method, type, size, deadline, id.

Everything that comes from outside is judged here, before a place is taken. The body is read under two limits (bytes
and time); what the bytes mean is the worker's to judge.
"""

import asyncio
import itertools
import math
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from gateway.multipart import first_file
from gateway.request import ClientGone, Refused
from gateway.router import ServiceRouter
from protocol.outcomes import Outcome

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

ACCEPTED_TYPES: Final = frozenset(
    {"image/jpeg", "image/png", "application/octet-stream", "application/x-tidegate-tensor"}
)
LONGEST_DEADLINE_MS: Final = 600_000.0
_ID_PREFIX: Final = os.urandom(4).hex()
_numbers = itertools.count(1)


def request_id(headers: dict[bytes, bytes]) -> str:
    """The client's `X-Request-Id` if it is 1 to 128 plain characters, else a fresh one."""
    given = headers.get(b"x-request-id")
    if given and len(given) <= 128 and given.isascii():
        text = given.decode("ascii")
        if text.isprintable() and '"' not in text and "\\" not in text:
            return text
    return f"{_ID_PREFIX}-{next(_numbers):x}"


def check_head(
    router: ServiceRouter | None, path: str, method: str, headers: dict[bytes, bytes]
) -> tuple[ServiceRouter, str, float]:
    """The service, the content type and the budget in seconds, from the head alone. Raises `Refused` (INVALID)."""
    if router is None:
        raise Refused(Outcome.INVALID, f"no service of this name: {path[:200]}; see /state", 404)
    if method != "POST":
        raise Refused(Outcome.INVALID, f"{method} is not allowed here: POST the image as the body", 405)
    content_type = _content_type(headers)
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise Refused(Outcome.INVALID, "Content-Encoding is not accepted here: send the image's own bytes", 415)
    budget_s = budget_ms(headers, router.spec.requirement_ms) / 1000.0
    check_length(headers.get(b"content-length"), router.spec.max_body_bytes)
    return router, content_type, budget_s


def image_of(body: bytes, content_type: str, headers: dict[bytes, bytes]) -> tuple[bytes, str]:
    """The encoded image in a whole body, and its type. Raises `Refused` (INVALID)."""
    if content_type == "multipart/form-data":
        content_type, body = first_file(headers[b"content-type"], body)
        if content_type not in ACCEPTED_TYPES:
            raise Refused(Outcome.INVALID, _unsupported(content_type), 415)
    if not body:
        raise Refused(Outcome.INVALID, "the body is empty: POST the encoded image as the body", 400)
    return body, content_type


class Uploads:
    """What all bodies that are still arriving take in memory, in bytes: `held` now, at most `limit`."""

    __slots__ = ("held", "limit")

    def __init__(self, limit: int) -> None:
        self.held = 0
        self.limit = limit

    def full(self) -> Refused:
        """The refusal of a body for which there is no memory left."""
        reason = f"other uploads fill the {self.limit >> 20} MiB that bodies may take: come again"
        return Refused(Outcome.UNAVAILABLE, reason)


def too_large(limit: int) -> Refused:
    """The refusal of a body beyond `limit` bytes."""
    return Refused(Outcome.INVALID, f"the body is larger than {limit} bytes", 413)


def too_slow() -> Refused:
    """The refusal of a body that drips."""
    return Refused(Outcome.INVALID, "the body did not arrive in time", 408)


def _content_type(headers: dict[bytes, bytes]) -> str:
    given = headers.get(b"content-type", b"application/octet-stream")
    name = given.partition(b";")[0].strip().lower().decode("latin-1")
    if name not in ACCEPTED_TYPES and name != "multipart/form-data":
        raise Refused(Outcome.INVALID, _unsupported(name), 415)
    return name


def _unsupported(name: str) -> str:
    accepted = f"{', '.join(sorted(ACCEPTED_TYPES))} or multipart/form-data"
    return (
        f"content type {name[:80]!r} is not accepted: name the body's, as curl -H 'Content-Type: image/png'; {accepted}"
    )


def budget_ms(headers: dict[bytes, bytes], requirement_ms: float) -> float:
    """What `X-Deadline-Ms` says, else the service's requirement. Raises `Refused` (INVALID)."""
    given = headers.get(b"x-deadline-ms")
    if given is None:
        return requirement_ms
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if b"_" in given:  # Python's own
        value = math.nan
    if not 0.0 < value <= LONGEST_DEADLINE_MS:
        shown = given[:40].decode("latin-1")
        raise Refused(
            Outcome.INVALID,
            f"X-Deadline-Ms = {shown!r}: must be milliseconds, above 0 and at most {LONGEST_DEADLINE_MS:.0f}",
            400,
        )
    return value


def check_length(given: bytes | None, limit: int) -> None:
    """Raises `Refused` if a `Content-Length` announces more than `limit` bytes, or no number."""
    if given is None:
        return
    if not given.isdigit():
        raise Refused(Outcome.INVALID, "Content-Length is not a number", 400)
    if len(given) > 18 or int(given) > limit:
        raise too_large(limit)


async def read_body(receive: Receive, limit: int, timeout_s: float, uploads: Uploads) -> bytes:
    """The whole body. Raises `Refused` (413 beyond `limit` bytes, 408 after `timeout_s`, 503) or `ClientGone`."""
    parts: list[bytes] = []
    size = 0
    limit_s = _TimeLimit(timeout_s)
    try:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part: bytes = message.get("body", b"")
            size += len(part)
            uploads.held += len(part)
            if size > limit:
                raise too_large(limit)
            if uploads.held > uploads.limit:
                raise uploads.full()
            if not message.get("more_body", False):
                return b"".join((*parts, part)) if parts else part
            parts.append(part)
    except asyncio.CancelledError:
        if not limit_s.expired:
            raise
        raise too_slow() from None
    finally:
        uploads.held -= size
        limit_s.stop()


class _TimeLimit:
    """Cancels the present task after a time: `asyncio.timeout` at a third of its cost, which every request pays."""

    __slots__ = ("_task", "_timer", "expired")

    def __init__(self, seconds: float) -> None:
        task = asyncio.current_task()
        assert task is not None, "a request is handled in a task"
        self._task = task
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)
        self.expired = False

    def _expire(self) -> None:
        self.expired = True
        self._task.cancel()

    def stop(self) -> None:
        """The time no longer counts."""
        self._timer.cancel()
        if self.expired:
            self._task.uncancel()
