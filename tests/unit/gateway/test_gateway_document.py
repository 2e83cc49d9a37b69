"""What a stranger reads: the index, the document behind `/docs`, and that it is whole."""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.app import TidegateApp
from gateway.config import GatewayConfig
from gateway.handle import Gateway
from gateway.router import ServiceRouter
from protocol.board import Board
from protocol.records import ServiceSpec


def ask(path: str, method: str = "GET", body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body from a gateway with the service `pets`."""
    gateway = Gateway(GatewayConfig(board_url="redis://127.0.0.1:1/0"), Board("redis://127.0.0.1:1/0"))
    gateway.fleet.services["pets"] = ServiceRouter("pets", ServiceSpec(variants=("big",), requirement_ms=250))
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    given = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": given}
    asyncio.run(TidegateApp(gateway)(scope, receive, send))
    start, *bodies = sent
    answered = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], answered, b"".join(message.get("body", b"") for message in bodies)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The OpenAPI document."""
    found: dict[str, Any] = json.loads(ask("/openapi.json")[2])
    return found


def test_the_index_leads_on() -> None:
    status, _, body = ask("/", accept="*/*")
    told = json.loads(body)
    assert status == 200
    assert told["ask"] == {"pets": "POST an image to /v1/pets"}
    for path in (told["docs"], told["state"], told["ready"], told["metrics"]):
        assert ask(path)[0] in (200, 503), path
    status, headers, _ = ask("/", accept="text/html,application/xhtml+xml")
    assert (status, headers["location"]) == (307, "/docs"), "a browser"


def test_head_is_answered_as_get_is_and_what_is_not_there_leads_to_the_document() -> None:
    for path in ("/", "/healthz", "/readyz", "/state", "/metrics", "/docs", "/v2", "/v2/health/live"):
        assert ask(path, "HEAD")[0] == ask(path)[0] != 405, path
    for path, method, status in (("/v3", "GET", 404), ("/state", "DELETE", 405)):
        got, _, body = ask(path, method)
        assert got == status
        assert f"{method} {path}; /docs tells" in json.loads(body)["error"]


def references(part: Any) -> Iterator[str]:
    """Every $ref below."""
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for one in part.values():
            yield from references(one)
    elif isinstance(part, list):
        for one in part:
            yield from references(one)


def test_the_document_is_whole(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    used = {reference.removeprefix("#/components/schemas/") for reference in references(document)}
    assert used == schemas.keys(), "every reference leads somewhere, and nothing lies about unused"
    assert not any("Validation" in name for name in schemas)
    described = {tag["name"] for tag in document["tags"]}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert set(operation["tags"]) <= described, path
            assert operation["summary"]
            if method == "put":
                assert operation["requestBody"]["content"]["application/json"]["schema"], path
            assert "422" not in operation["responses"] or path.startswith(("/v1/", "/v2/")), path


def test_the_introduction_teaches_what_the_handler_does(document: dict[str, Any]) -> None:
    text = document["info"]["description"]
    for word in ("X-Deadline-Ms", "X-Request-Id", "Retry-After", "X-Tidegate-Late"):
        assert word in text
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)*\b", text)) & {
        "OK",
        "LATE",
        "QUEUE_FULL",
        "EXPIRED",
        "INVALID",
        "FAILED",
    }
    assert len(named) == 6
    example = re.search(r"-H '([^']+)' (http\S+)", text)
    assert example is not None
    assert example[1] == "Content-Type: image/png"


def test_the_deployment_is_described_with_its_keys(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert {"router", "requirement_ms", "max_body_bytes"} <= schemas["ServiceSpec"]["properties"].keys()
    assert {"variant", "capacity"} <= schemas["InstanceSpec"]["properties"].keys()
    answer = document["paths"]["/state"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer == {"$ref": "#/components/schemas/GatewayStatistics"}
