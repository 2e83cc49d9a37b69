"""What `/docs` shows of edge services: where detection and tracking are asked for, and everything an answer says.

A deployment gives edge services their names; the two of the shipped ones stand here. The story part of an answer is
`EdgeAnswer` itself, so that it cannot be described otherwise than it is written.
"""

from typing import Any, Final

from gateway.edge_answer import EdgeAnswer
from gateway.edge_exchange import CLIP_TYPES, IMAGE_TYPES

STORY: Final = EdgeAnswer
_NUMBER: Final = {"type": "number"}
_BYTES: Final = {"schema": {"type": "string", "format": "binary"}}
_DETECTIONS: Final[dict[str, Any]] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "label": {"type": "string"},
            "class": {"type": "integer"},
            "score": _NUMBER,
            "box": {
                "type": "array",
                "items": _NUMBER,
                "description": "left, top, width, height in pixels of the image that was sent, as COCO has it",
            },
        },
    },
}
_TRACKS: Final[dict[str, Any]] = {
    "type": "array",
    "description": "rows in MOTChallenge's order, in frames and pixels of the clip that was sent",
    "items": {
        "type": "array",
        "items": _NUMBER,
        "description": "frame (from 1), track id, left, top, width, height, score, class",
    },
}
_FOUND: Final[dict[str, dict[str, Any]]] = {
    "detection": {"detections": _DETECTIONS},
    "tracking": {"tracks": _TRACKS, "labels": {"type": "array", "items": {"type": "string"}}},
}
_HEADERS: Final = {
    "X-Edge-Node": ("string", "The node at which the request enters; else the one nearest to X-Position."),
    "X-Position": ("string", "LATITUDE,LONGITUDE in degrees of whoever asks; without both: the first node."),
    "X-Deadline-Ms": ("number", "Time that the answer may take; the service's requirement if absent."),
    "X-Request-Id": ("string", "Echoed; made if absent."),
}
_ERRORS: Final = {
    "400": "INVALID: an unknown node, a bad header, an empty, damaged or unreadable body",
    "404": "INVALID: no such service",
    "405": "INVALID: only POST",
    "408": "INVALID: the body came too slowly",
    "413": "INVALID: too many bytes, frames, pixels or seconds",
    "415": "INVALID: content type not accepted",
    "429": "QUEUE_FULL: at the decided node, and at a second one",
    "500": "FAILED: the model raised, or a node does not answer",
    "503": "UNAVAILABLE: no node, or none that has room; the error says why",
    "504": "EXPIRED: no node can be in time; the error says by how much",
}


def edge_paths(error: Any, headers: Any) -> dict[str, Any]:
    """The operations, made with the document's own `error(description)` and `headers(**them)`."""
    return {f"/v1/{service}": {"post": _operation(service, error, headers)} for service in _FOUND}


def _operation(service: str, error: Any, headers: Any) -> dict[str, Any]:
    detects = service == "detection"
    accepted = IMAGE_TYPES if detects else CLIP_TYPES
    story = {"$ref": f"#/components/schemas/{STORY.__name__}"}
    answer = {"allOf": [{"type": "object", "properties": _FOUND[service]}, story]}
    retry = {"Retry_After": "Seconds until it may be worth while."}
    return {
        "tags": ["edge"],
        "summary": "Find objects in an image, at an edge node" if detects else "Follow objects through a clip",
        "operationId": service,
        "description": (
            "The request waits for its window, is placed together with the others of it (configuration, variant and"
            " node), is re-encoded at its local node and computed at the decided one. The answer has the decision, the"
            " delays (emulated ones by the graph's capacities, real ones measured) and the costs."
        ),
        "parameters": [
            {"name": name, "in": "header", "schema": {"type": kind}, "description": about}
            for name, (kind, about) in _HEADERS.items()
        ],
        "requestBody": {"required": True, "content": dict.fromkeys(accepted, _BYTES)},
        "responses": {
            "200": {
                "description": "OK, or LATE with the header X-Tidegate-Late: 1",
                "headers": headers(X_Tidegate_Late="1 if the answer came after the deadline, else absent."),
                "content": {"application/json": {"schema": answer}},
            },
            **{
                status: error(
                    about, **(retry if status in ("429", "503") else {"Allow": "POST"} if status == "405" else {})
                )
                for status, about in _ERRORS.items()
            },
        },
    }
