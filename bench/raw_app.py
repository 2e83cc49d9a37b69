"""The floor: a raw ASGI app on uvicorn that reads the body and answers at once, without any hop."""

from typing import Any

BODY = b'{"predictions":[{"label":"0","class_id":0,"score":1.0}]}'
HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Reads the whole body, answers 200."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": BODY})
