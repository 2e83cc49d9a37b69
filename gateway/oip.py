"""The Open Inference Protocol V2 over HTTP, under /v2, as raw ASGI: what tritonclient and KServe clients speak.

    GET  v2 | v2/health/live | v2/health/ready
    GET  v2/models/{name}[/versions/{version}] | …/ready | …/config | …/stats        v2/models/stats
    POST v2/models/{name}[/versions/{version}]/infer                                  -> oip_call.py, Gateway.serve
    POST v2/repository/index | v2/repository/models/{name}/load | …/unload            -> oip_repository.py
    GET  v2/tidegate/arrivals?since=N                                                 -> arrivals.py (`tidegate record`)

What a model is: `oip_models.py`. Errors are {"error", "code"}.
"""

import hmac
import logging
import re
import time
from typing import Any, Final, cast
from urllib.parse import parse_qs

import msgspec

from gateway.admission import Receive, Scope, check_length, read_body, request_id
from gateway.handle import Gateway
from gateway.oip_call import OipCall
from gateway.oip_encoding import chosen_coding, compress, decompress
from gateway.oip_models import VERSION, Model, all_models, find_model
from gateway.oip_repository import index, set_loaded
from gateway.oip_tensors import invalid
from gateway.presence import presence_of
from gateway.request import ClientGone, Refused
from gateway.responses import Send, send_refusal
from protocol.deployment import few_of
from protocol.outcomes import Outcome

PREFIX: Final = "/v2"
EXTENSIONS: Final = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "statistics",
)
LARGEST_CONTROL_BYTES: Final = 1 << 16
_NUMBER: Final = re.compile(r"-?[0-9]{1,18}")

log = logging.getLogger("gateway.oip")


class OpenInference:
    """Everything under /v2 of one gateway process. Holds no state of its own."""

    def __init__(self, gateway: Gateway, server_version: str) -> None:
        self._gateway = gateway
        self._server_version = server_version

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        method = cast(str, scope["method"])
        parts = cast(str, scope["path"]).strip("/").split("/")[1:]
        if len(parts) > 2 and parts[0] == "models" and parts[-1] == "infer":
            gateway = self._gateway
            found, timeout_s = self._find(parts[1:-1]), gateway.config.body_timeout_s
            call = OipCall(found, headers, method, timeout_s, gateway.uploads)
            await gateway.serve(call, presence_of(scope), receive, send)
            return
        try:
            body = b""
            if method == "POST":
                check_length(headers.get(b"content-length"), LARGEST_CONTROL_BYTES)
                timeout_s, uploads = self._gateway.config.body_timeout_s, self._gateway.uploads
                body = await read_body(receive, LARGEST_CONTROL_BYTES, timeout_s, uploads)
                body = decompress(body, headers.get(b"content-encoding", b""), LARGEST_CONTROL_BYTES)
            query = cast(bytes, scope.get("query_string", b"")).decode("latin-1")
            status, answer = await self._answer(method, parts, headers, body, query)
        except Refused as error:
            unread = error.http_status in (408, 413) or method not in ("GET", "HEAD", "POST")
            await send_refusal(send, request_id(headers), error, close=unread)
        except ClientGone:
            return
        except Exception:
            log.exception("%s %s failed", method, scope["path"])
            refused = Refused(Outcome.FAILED, "internal error: the gateway's log has the details")
            await send_refusal(send, request_id(headers), refused)
        else:
            await _send_json(send, status, answer, headers)

    async def _answer(
        self, method: str, parts: list[str], headers: dict[bytes, bytes], body: bytes, query: str
    ) -> tuple[int, Any]:
        """Status and JSON of everything but infer."""
        fleet = self._gateway.fleet
        match method, parts:
            case "GET", []:
                return 200, {"name": "tidegate", "version": self._server_version, "extensions": EXTENSIONS}
            case "GET", ["health", "live"]:
                return 200, {"live": True}
            case "GET", ["health", "ready"]:
                ready = not self._gateway.draining and fleet.deployment is not None and not fleet.missing()
                return 200 if ready else 503, {"ready": ready}
            case "GET", ["models", "stats"]:
                return 200, {
                    "model_stats": [self._gateway.inferences.of(one.name) for one in all_models(fleet.services)]
                }
            case "GET", ["models", *rest] if rest:
                return self._about(rest)
            case "POST", ["repository", "index"]:
                return 200, index(fleet, only_ready=_decode(body).get("ready") is True)
            case "POST", ["repository", "models", name, ("load" | "unload") as action]:
                self._check_admin(headers)
                await self._load(name, action == "load", _decode(body))
                return 200, {}
            case "GET", ["tidegate", "arrivals"]:
                given = parse_qs(query).get("since", ["-1"])[0]
                if not _NUMBER.fullmatch(given):
                    raise invalid(f"since = {given[:40]!r}: must be the number that the last answer gave as next")
                return 200, self._gateway.arrivals.page(int(given), time.monotonic())
        raise Refused(Outcome.INVALID, f"no {method} /{'/'.join(['v2', *parts])[:200]}; see /docs", 404)

    def _about(self, rest: list[str]) -> tuple[int, Any]:
        what = rest[-1] if rest[-1] in ("ready", "config", "stats") and len(rest) in (2, 4) else ""
        model = self._known(rest[:-1] if what else rest)
        if what == "ready":
            ready = model.ready and not self._gateway.draining
            return 200 if ready else 503, {"name": model.name, "ready": ready}
        if what == "config":
            return 200, model.config()
        if what == "stats":
            return 200, {"model_stats": [self._gateway.inferences.of(model.name)]}
        return 200, model.metadata()

    def _find(self, name_and_version: list[str]) -> Model | Refused:
        """The model that `[name]` or `[name, "versions", version]` means, or why there is none."""
        services = self._gateway.fleet.services
        name = name_and_version[0]
        match name_and_version[1:]:
            case [] | ["versions", "1"]:
                model = find_model(services, name)
                if model is not None:
                    return model
                known = ", ".join(few_of(one.name for one in all_models(services)))
                reason = f"unknown model {name[:80]!r}: there are {known or 'none'}"
            case ["versions", version]:
                reason = f"model {name[:80]!r} has no version {version[:40]!r}: it has {VERSION!r}"
            case _:
                reason = f"no such path below model {name[:80]!r}; see /docs"
        return Refused(Outcome.INVALID, reason, 404)

    def _known(self, name_and_version: list[str]) -> Model:
        found = self._find(name_and_version)
        if isinstance(found, Refused):
            raise found
        return found

    async def _load(self, name: str, loaded: bool, given: dict[str, Any]) -> None:
        parameters = given.get("parameters") or {}
        if not isinstance(parameters, dict) or set(parameters) - {"unload_dependents"}:
            names = ", ".join(parameters) if isinstance(parameters, dict) else "parameters"
            raise invalid(f"{names[:200]}: cannot be given here; variants are described by the catalog and deployment")
        await set_loaded(self._gateway.fleet, self._known([name]), loaded)

    def _check_admin(self, headers: dict[bytes, bytes]) -> None:
        token = self._gateway.config.admin_token
        if token and not hmac.compare_digest(headers.get(b"authorization", b""), f"Bearer {token}".encode()):
            raise Refused(Outcome.INVALID, "admin calls need the header Authorization: Bearer TOKEN", 401)


def _decode(body: bytes) -> dict[str, Any]:
    if not body.strip():
        return {}
    try:
        given = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise invalid("the body is not a JSON object")
    return given


async def _send_json(send: Send, status: int, answer: Any, headers: dict[bytes, bytes]) -> None:
    body = msgspec.json.encode(answer)
    sent = [(b"content-type", b"application/json")]
    if coding := chosen_coding(headers.get(b"accept-encoding", b"")):
        body = compress(body, coding)
        sent.append((b"content-encoding", coding))
    sent.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": sent})
    await send({"type": "http.response.body", "body": body})
