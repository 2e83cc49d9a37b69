"""The bytes that go back: answers spliced from the worker's JSON, and errors that name their cause.

Answer: the worker's ``{"predictions": [...]}`` with the request's story appended. Error: ``{"error", "code"}``.
"""

import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

import msgspec

from gateway.request import Answered, Refused
from protocol.outcomes import HTTP_STATUS, Outcome

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Header = tuple[bytes, bytes]

_JSON: Final[Header] = (b"content-type", b"application/json")
_CLOSE: Final[Header] = (b"connection", b"close")
_ALLOW: Final[Header] = (b"allow", b"POST")
_LATE: Final[Header] = (b"x-tidegate-late", b"1")
_RETRY_LATER: Final = frozenset({Outcome.QUEUE_FULL, Outcome.UNAVAILABLE})


def answer_body(id: str, service: str, outcome: Outcome, answered: Answered, total_s: float) -> bytes:
    """Predictions, who answered, and where the time went (milliseconds)."""
    reply, target = answered.reply, answered.target
    story = (
        f',"id":"{id}","service":"{service}","variant":"{target.record.variant}","instance":"{target.id}",'
        f'"rank":{answered.rank},"outcome":"{outcome.name}","attempts":{answered.attempts},"batch":{reply.batch},'
        f'"timings_ms":{{"total":{total_s * 1e3:.3f},"prepare":{reply.prepare_s * 1e3:.3f},'
        f'"queue":{reply.queue_s * 1e3:.3f},"service":{reply.service_s * 1e3:.3f}}}}}'
    )
    return answered.payload[:-1] + story.encode()


def refusal(id: str, refused: Refused, retry_after_s: float = 1.0) -> tuple[int, list[Header], bytes]:
    """Status, headers and body of the error for a request that ended without an answer."""
    body = msgspec.json.encode({"error": refused.reason, "code": refused.outcome.name, "id": id})
    headers = [_JSON, (b"content-length", b"%d" % len(body)), (b"x-request-id", id.encode())]
    if refused.outcome in _RETRY_LATER:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(retry_after_s))))
    if refused.outcome is Outcome.LATE:  # it tells this 504 from that of a request that was never computed
        headers.append(_LATE)
    status = refused.http_status or HTTP_STATUS[refused.outcome]
    if status == 405:
        headers.append(_ALLOW)
    return status, headers, body


async def send_refusal(send: Send, id: str, refused: Refused, retry_after_s: float = 1.0, close: bool = False) -> None:
    """Sends `refusal` over ASGI. `close` ends the connection (the request's body was not read)."""
    status, headers, body = refusal(id, refused, retry_after_s)
    if close:
        headers.append(_CLOSE)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
