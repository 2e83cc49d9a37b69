"""The Open Inference Protocol's operations for the OpenAPI document, by hand: their handler is raw ASGI (`oip.py`)."""

from typing import Any, Final

_TEXT: Final = {"type": "string"}
_OBJECT: Final = {"type": "object"}


def _parameter(name: str, where: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path", "schema": _TEXT, "description": description}


_NAME = _parameter("name", "path", "A service, or a variant of one (which pins the request to its instances)")
_VERSION = _parameter("version", "path", "1: the only version that models here have")


def _error(description: str) -> dict[str, Any]:
    schema = {"type": "object", "required": ["error"], "properties": {"error": _TEXT, "code": _TEXT, "id": _TEXT}}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _operation(id: str, summary: str, errors: dict[str, str], path: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {
        "tags": ["open inference protocol"],
        "operationId": id,
        "summary": summary,
        "parameters": list(path),
        "responses": {
            "200": {"description": "As the protocol describes", "content": {"application/json": {"schema": _OBJECT}}},
            **{status: _error(description) for status, description in errors.items()},
        },
    }


_UNKNOWN = {"404": "no such model or version"}
_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": _TEXT,
        "shape": {"type": "array", "items": {"type": "integer"}},
        "datatype": {"type": "string", "enum": ["BYTES", "FP32", "FP16"]},
        "parameters": _OBJECT,
        "data": {"type": "array", "items": {}},
    },
}
_INFER_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {
                    "id": _TEXT,
                    "parameters": {
                        "type": "object",
                        "description": "timeout (microseconds), priority (accepted, no effect), binary_data_output",
                    },
                    "inputs": {"type": "array", "items": _TENSOR},
                    "outputs": {"type": "array", "items": {"type": "object", "properties": {"name": _TEXT}}},
                },
            },
            "example": {
                "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["BASE64 OF A JPEG OR PNG"]}]
            },
        },
        "application/octet-stream": {
            "schema": {"type": "string", "format": "binary"},
        },
        "image/jpeg": {"schema": {"type": "string", "format": "binary"}},
        "image/png": {"schema": {"type": "string", "format": "binary"}},
        "application/x-tidegate-tensor": {"schema": {"type": "string", "format": "binary"}},
    },
}


def _infer(id: str, path: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    errors = {
        "400": "INVALID: not a request of this protocol, or not of this model; the error says which part",
        "404": "INVALID: no such model or version",
        "413": "INVALID: too many bytes",
        "415": "INVALID: content encoding not accepted",
        "429": "QUEUE_FULL: retry after the header Retry-After",
        "500": "FAILED: the model raised",
        "503": "UNAVAILABLE: no ready instance; retry after the header Retry-After",
        "504": "EXPIRED: it could not finish in time (or LATE, with X-Tidegate-Late: 1, where that is an error)",
    }
    length = _parameter(
        "Inference-Header-Content-Length",
        "header",
        "Bytes of JSON before binary data; 0: no JSON, the body is the input",
    )
    return {**_operation(id, "Infer", errors, (*path, length)), "requestBody": _INFER_BODY}


def _of_model(prefix: str, suffix: str, path: tuple[dict[str, Any], ...]) -> dict[str, dict[str, Any]]:
    """The operations of one spelling of a model's path."""
    return {
        prefix: {"get": _operation(f"metadata{suffix}", "A model's inputs and outputs", _UNKNOWN, path)},
        f"{prefix}/ready": {
            "get": _operation(f"modelReady{suffix}", "Can it be asked now?", {**_UNKNOWN, "503": "not ready"}, path)
        },
        f"{prefix}/config": {"get": _operation(f"config{suffix}", "A model's configuration", _UNKNOWN, path)},
        f"{prefix}/stats": {"get": _operation(f"stats{suffix}", "A model's counts and times", _UNKNOWN, path)},
        f"{prefix}/infer": {"post": _infer(f"infer{suffix or 'Model'}", path)},
    }


_LOAD_ERRORS = {
    **_UNKNOWN,
    "400": "the deployment places no instance of it, or parameters that are not accepted",
    "401": "the admin token is missing",
    "500": "a worker could not load it; the error says why",
    "503": "the board is away, or it takes longer than two minutes",
}
_SINCE = _parameter("since", "query", "The last answer's next; -1: only arrivals from now on")

OIP_PATHS: Final[dict[str, dict[str, Any]]] = {
    "/v2": {"get": _operation("server", "Server metadata and extensions", {})},
    "/v2/health/live": {"get": _operation("live", "Is this process alive?", {})},
    "/v2/health/ready": {
        "get": _operation("ready", "Can every service be answered now?", {"503": "a service has no ready instance"})
    },
    **_of_model("/v2/models/{name}", "", (_NAME,)),
    **_of_model("/v2/models/{name}/versions/{version}", "Version", (_NAME, _VERSION)),
    "/v2/models/stats": {"get": _operation("statsAll", "All models' counts and times", {})},
    "/v2/repository/index": {"post": _operation("index", "All models and their states", {"400": "not JSON"})},
    "/v2/repository/models/{name}/load": {
        "post": _operation("load", "Load every instance of it that the deployment places", _LOAD_ERRORS, (_NAME,))
    },
    "/v2/repository/models/{name}/unload": {
        "post": _operation("unload", "Unload it; its places in the deployment stay", _LOAD_ERRORS, (_NAME,))
    },
    "/v2/tidegate/arrivals": {
        "get": _operation("arrivals", "The latest arrivals of this gateway process", {"400": "bad since"}, (_SINCE,))
    },
}
