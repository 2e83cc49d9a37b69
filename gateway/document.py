"""What `/docs` shows beside FastAPI's own findings: an introduction that teaches the API, and the infer path.

The infer path is not a FastAPI endpoint, so its operation is declared here by hand, as those of the Open Inference
Protocol are in `oip_document.py`; a test holds document and handlers together.
"""

import inspect
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from gateway.admission import ACCEPTED_TYPES
from gateway.edge_document import STORY, edge_paths
from gateway.oip_document import OIP_PATHS

Operation = tuple[str, str]
"""(path, method in lower case)."""

INTRODUCTION: Final = """
Tidegate answers inference requests within a latency promise, through bursts: it chooses for each request which size of
model answers. `GET /` lists the services that run here.

**Ask.** Send the encoded image as the body and name its type. The answer has the likeliest classes, the variant and
the instance that answered, and where the time went.

```sh
curl --data-binary @digit.png -H 'Content-Type: image/png' http://127.0.0.1:8700/v1/digits
```

`X-Deadline-Ms` says how long the answer may take (the service's requirement if absent); `X-Request-Id` is echoed.

Where the deployment has an edge network, `POST /v1/detection` takes an image and `POST /v1/tracking` a clip:

```sh
curl --data-binary @street.jpg -H 'Content-Type: image/jpeg' -H 'X-Edge-Node: a' http://127.0.0.1:8700/v1/detection
```

**Every request ends in one outcome**, which the status tells:

| outcome | status | do |
|---|---|---|
| OK | 200 | |
| LATE | 200, or 504, with `X-Tidegate-Late: 1` | |
| QUEUE_FULL, UNAVAILABLE | 429, 503 with `Retry-After` | come back after so many seconds: nothing was computed |
| EXPIRED | 504 | it could not have been in time: nothing was computed |
| INVALID | 400 to 422 | correct the request: the error says what is wrong |
| FAILED | 500 | the model raised |

An error is `{"error": "what is wrong", "code": "OUTCOME", "id": "..."}`.

**Other clients.** NVIDIA's `tritonclient[http]` and KServe's client work unchanged under `/v2`; for Python there is
`tidegate/client.py`, too, one file to copy. `/state` shows what this gateway knows,
`/readyz` what is not as it should be. Admin calls need `Authorization: Bearer TOKEN` where a token is set.
"""
TAGS: Final = [
    {"name": "inference", "description": "An image in, its classes out."},
    {"name": "edge", "description": "Images and clips, placed on the nodes of an edge network."},
    {"name": "open inference protocol", "description": "Version 2 of the protocol, for its clients."},
    {"name": "health", "description": "For load balancers and whoever starts processes."},
    {"name": "operating", "description": "What this gateway process has counted and sees."},
    {"name": "admin", "description": "Change what is deployed and which router decides, without losing a request."},
]


def complete(
    document: dict[str, Any], bodies: Mapping[Operation, type], answers: Mapping[Operation, type]
) -> dict[str, Any]:
    """FastAPI's document with the raw operations, and with the structs that its endpoints take and give.

    What FastAPI says of its own validation is taken out: bodies are checked by msgspec, and no endpoint answers so.
    """
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if "admin" in operation["tags"]:
                operation["responses"]["default"] = _error("What is wrong (400, 401, 404, 409, 413, 503)")
    document["paths"]["/v1/{service}"] = {"post": INFER_OPERATION}
    document["paths"].update(edge_paths(_error, _headers))
    document["paths"].update(OIP_PATHS)
    types = list({*bodies.values(), *answers.values(), STORY})
    described, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    for component in components.values():
        if "description" in component:
            component["description"] = inspect.cleandoc(component["description"])
    schemas.update(components)
    content = {one: {"application/json": {"schema": schema}} for one, schema in zip(types, described, strict=True)}
    for (path, method), one in bodies.items():
        document["paths"][path][method]["requestBody"] = {"required": True, "content": content[one]}
    for (path, method), one in answers.items():
        document["paths"][path][method]["responses"]["200"]["content"] = content[one]
    return document


def _headers(**others: str) -> dict[str, Any]:
    """Response headers for the document, by name with _ for -."""
    described = {"X-Request-Id": "The request's, or the one it was given."} | {
        name.replace("_", "-"): text for name, text in others.items()
    }
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in described.items()}


def _error(description: str, **headers: str) -> dict[str, Any]:
    schema = {
        "type": "object",
        "required": ["error", "code"],
        "properties": {"error": {"type": "string"}, "code": {"type": "string"}, "id": {"type": "string"}},
    }
    content = {"application/json": {"schema": schema}}
    return {"description": description, "headers": _headers(**headers), "content": content}


_NUMBER: Final = {"type": "number"}
_RETRY_AFTER: Final = "Seconds until a place may be free."
_LATE: Final = "1 if the answer came after the deadline, else absent."
_ANSWER_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "predictions": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"label": {"type": "string"}, "class_id": {"type": "integer"}, "score": _NUMBER},
            },
        },
        "id": {"type": "string"},
        "service": {"type": "string"},
        "variant": {"type": "string"},
        "instance": {"type": "string"},
        "rank": {"type": "integer", "description": "0 is the heaviest variant of the service"},
        "outcome": {"type": "string", "enum": ["OK", "LATE"]},
        "attempts": {"type": "integer"},
        "batch": {"type": "integer"},
        "timings_ms": {
            "type": "object",
            "properties": {"total": _NUMBER, "prepare": _NUMBER, "queue": _NUMBER, "service": _NUMBER},
        },
    },
}
INFER_OPERATION: Final[dict[str, Any]] = {
    "tags": ["inference"],
    "summary": "Classify an image",
    "operationId": "infer",
    "parameters": [
        {"name": "service", "in": "path", "required": True, "schema": {"type": "string"}},
        {
            "name": "X-Deadline-Ms",
            "in": "header",
            "schema": _NUMBER,
            "description": "Time that the answer may take; the service's latency requirement if absent.",
        },
        {
            "name": "X-Request-Id",
            "in": "header",
            "schema": {"type": "string"},
            "description": "Echoed; made if absent.",
        },
    ],
    "requestBody": {
        "required": True,
        "content": {
            **{one: {"schema": {"type": "string", "format": "binary"}} for one in sorted(ACCEPTED_TYPES)},
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}
            },
        },
    },
    "responses": {
        "200": {
            "description": "OK, or LATE with the header X-Tidegate-Late: 1",
            "headers": _headers(X_Tidegate_Late=_LATE),
            "content": {"application/json": {"schema": _ANSWER_SCHEMA}},
        },
        "400": _error("INVALID: an empty or unreadable image, a bad header"),
        "404": _error("INVALID: no such service"),
        "405": _error("INVALID: only POST", Allow="POST"),
        "408": _error("INVALID: the body came too slowly"),
        "413": _error("INVALID: too many bytes or pixels"),
        "415": _error("INVALID: content type not accepted"),
        "422": _error("INVALID: the tensor does not fit the model"),
        "429": _error("QUEUE_FULL", Retry_After=_RETRY_AFTER),
        "500": _error("FAILED: the model raised"),
        "503": _error("UNAVAILABLE: no ready instance, or no memory for another upload", Retry_After=_RETRY_AFTER),
        "504": _error(
            "EXPIRED: it could not finish in time (or LATE where the service answers lateness with errors)",
            X_Tidegate_Late=_LATE,
        ),
    },
}
