"""The HTTP surface besides images: FastAPI for people, documents and operators, raw ASGI for /v2.

`TidegateApp` is what uvicorn calls for everything but ``/v1/{service}``, which `connection.py` serves as an `Exchange`.
It hands ``/v2`` to `OpenInference` (a FastAPI endpoint costs two to four times as much per request), and the rest to
FastAPI. Raw operations are declared in the OpenAPI document by hand (`document.py`). Nobody else imports fastapi.
"""

import contextlib
import hmac
from collections.abc import Awaitable
from typing import Any, Final, TypeVar

import msgspec
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException as AnyHTTPException

from gateway.admission import Receive, Scope, check_length, read_body
from gateway.document import INTRODUCTION, TAGS, complete
from gateway.edge_view import network_fault
from gateway.handle import Gateway, GatewayStatistics
from gateway.oip import OpenInference
from gateway.request import ClientGone, Refused
from gateway.responses import Send
from gateway.router import ROUTERS
from protocol.board import BOARD_ERRORS
from protocol.deployment import check_deployment, did_you_mean, few_of
from protocol.records import ONE_GATEWAY_ROUTERS, Deployment, RouterChoice

T = TypeVar("T")
VERSION = "0.1.0"
LARGEST_ADMIN_BYTES = 1 << 20


class TidegateApp:
    """The ASGI application of one gateway process."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.api = build_api(gateway)
        self._open_inference = OpenInference(gateway, VERSION)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point."""
        if scope.get("method") == "HEAD":  # answered as GET is; the connection leaves the body out
            scope = {**scope, "method": "GET"}
        if scope["type"] == "http" and f"{scope['path']}/".startswith("/v2/"):
            await self._open_inference(scope, receive, send)
        else:
            await self.api(scope, receive, send)


class RouterChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of `PUT /admin/services/{service}/router` and `/shadow`. Without `policy_file` the service keeps its own."""

    router: str
    policy_file: str | None = None


class DeploymentBody(Deployment, frozen=True, forbid_unknown_fields=True):
    """Body of `PUT /admin/deployment`. Unlike a reader of the board, it refuses keys that it does not know."""


BODIES: Final = {
    ("/admin/deployment", "put"): DeploymentBody,
    ("/admin/services/{service}/router", "put"): RouterChange,
    ("/admin/services/{service}/shadow", "put"): RouterChange,
}
ANSWERS: Final = {
    ("/state", "get"): GatewayStatistics,
    ("/admin/deployment", "get"): Deployment,
    ("/admin/deployment", "put"): Deployment,
    ("/admin/services/{service}/router", "put"): Deployment,
    ("/admin/services/{service}/rollback", "post"): Deployment,
}


def build_api(gateway: Gateway) -> FastAPI:
    """Everything but the infer path."""
    api = FastAPIOffline(title="Tidegate", version=VERSION, redoc_url=None)

    @api.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return RedirectResponse("/docs")
        return _json(
            {
                "tidegate": VERSION,
                "ask": {name: f"POST an image to /v1/{name}" for name in few_of(gateway.fleet.services)}
                | {name: f"POST an image or a clip to /v1/{name}" for name in few_of(gateway.edge_view.services)},
                "docs": "/docs",
                "state": "/state",
                "ready": "/readyz",
                "metrics": "/metrics",
                "open_inference_protocol": "/v2",
            }
        )

    @api.get("/healthz", summary="Is this process alive?", tags=["health"])
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @api.get("/readyz", summary="Can every service be answered now?", tags=["health"])
    async def readyz() -> JSONResponse:
        fleet = gateway.fleet
        reasons = few_of(f"no instance of {name} is ready" + fleet.failures(name) for name in fleet.missing())
        reasons += gateway.edge_view.missing()
        if fleet.deployment is None:
            reasons = ["no deployment is posted on the board"]
            if not fleet.board_seen:
                reasons = ["the board (Redis) has not been reached yet"]
        if gateway.draining:
            reasons = ["draining"]
        told = {
            "ready": not reasons,
            "reasons": reasons,
            "notices": few_of([*fleet.notices(), *gateway.edge_view.notices()]),
        }
        return JSONResponse(told, status_code=503 if reasons else 200)

    @api.get("/metrics", summary="Prometheus metrics", tags=["operating"], response_class=Response)
    async def metrics() -> Response:
        return Response(gateway.exposition.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @api.get("/state", summary="Instances, routers and counts as this gateway sees them", tags=["operating"])
    async def state() -> Response:
        return _json(gateway.statistics())

    @api.get("/admin/deployment", summary="The desired state", tags=["admin"], dependencies=[Depends(_admin(gateway))])
    async def read_deployment() -> Response:
        deployment = gateway.fleet.deployment
        with contextlib.suppress(*BOARD_ERRORS):  # who has just changed it must see the change; news take a moment
            deployment = await gateway.fleet.board.deployment() or deployment
        if deployment is None:
            raise HTTPException(404, "no deployment is posted")
        return _json(deployment)

    @api.put("/admin/deployment", summary="Replace it", tags=["admin"], dependencies=[Depends(_admin(gateway))])
    async def replace_deployment(request: Request) -> Response:
        deployment = _decode(await _body(gateway, request), DeploymentBody, "deployment")
        if fault := check_deployment(deployment) or await network_fault(deployment.edge):
            raise HTTPException(400, fault)
        for name, spec in deployment.services.items():
            await _check_router(gateway, spec.router, f"services.{name}.")
        known = gateway.fleet.deployment  # the version is ours to give, also to a board that has lost its memory
        deployment = msgspec.structs.replace(deployment, version=known.version if known is not None else 0)
        return _json(await _reached(gateway.fleet.board.put_deployment(deployment)))

    @api.put(
        "/admin/services/{service}/router",
        summary="Change a service's router without losing a request",
        tags=["admin"],
        dependencies=[Depends(_admin(gateway))],
    )
    async def change_router(service: str, request: Request) -> Response:
        return await switch(service, _decode(await _body(gateway, request), RouterChange, "change of router"))

    async def switch(service: str, change: RouterChange, *, remember: bool = True) -> Response:
        await _check_router(gateway, change.router)
        replaced = RouterChoice(router="")

        def changed(deployment: Deployment) -> Deployment:
            nonlocal replaced
            if service not in deployment.services:
                raise HTTPException(404, f"no service {service!r} is deployed")
            before = deployment.services[service]
            replaced = RouterChoice(router=before.router, policy_file=before.policy_file)
            file = before.policy_file if change.policy_file is None else change.policy_file
            spec = msgspec.structs.replace(before, router=change.router, policy_file=file)
            return msgspec.structs.replace(deployment, services={**deployment.services, service: spec})

        deployment = await _reached(gateway.fleet.board.change_deployment(changed, gateway.fleet.deployment))
        if deployment is None:
            raise HTTPException(404, "no deployment is posted")
        spec = deployment.services[service]
        if remember and replaced != RouterChoice(router=spec.router, policy_file=spec.policy_file):
            await _reached(gateway.fleet.board.push_former(service, replaced))
        return _json(deployment)

    @api.post(
        "/admin/services/{service}/rollback",
        summary="Take the last change of a service's router back",
        tags=["admin"],
        dependencies=[Depends(_admin(gateway))],
    )
    async def roll_back(service: str) -> Response:
        former = await _reached(gateway.fleet.board.pop_former(service))
        if former is None:
            raise HTTPException(409, f"the router of {service!r} has not been changed: nothing to roll back to")
        return await switch(service, RouterChange(former.router, former.policy_file), remember=False)

    @api.put(
        "/admin/services/{service}/shadow",
        summary="Let a router decide beside the real one without acting; an empty name ends that",
        tags=["admin"],
        dependencies=[Depends(_admin(gateway))],
    )
    async def put_shadow(service: str, request: Request) -> Response:
        change = _decode(await _body(gateway, request), RouterChange, "choice of a router")
        if service not in gateway.fleet.services:
            raise HTTPException(404, f"no service {service!r} is deployed")
        if change.router:
            await _check_router(gateway, change.router)
        choice = RouterChoice(router=change.router, policy_file=change.policy_file or "")
        await _reached(gateway.fleet.board.put_shadow_choice(service, choice))
        return _json(choice)

    @api.get(
        "/admin/services/{service}/shadow",
        summary="How the router that looks on would have done, beside the one that acts",
        tags=["admin"],
        dependencies=[Depends(_admin(gateway))],
    )
    async def read_shadow(service: str) -> Response:
        record = await _reached(gateway.fleet.board.shadow(service))
        if record is None:
            raise HTTPException(404, f"no router looks on at {service!r}, or its first slot is not over yet")
        return _json(record)

    @api.exception_handler(AnyHTTPException)
    async def as_error(request: Request, error: AnyHTTPException) -> JSONResponse:
        code = "UNAVAILABLE" if error.status_code == 503 else "INVALID"
        said = error.detail
        if said in ("Not Found", "Method Not Allowed"):
            said = f"{said.lower()}: {request.method} {request.url.path[:200]}; /docs tells what there is"
        return JSONResponse({"error": said, "code": code}, error.status_code, error.headers)

    @api.exception_handler(Exception)
    async def as_failure(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "internal error: the gateway's log has the details", "code": "FAILED"}, 500)

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            document = get_openapi(
                title=api.title, version=api.version, description=INTRODUCTION, tags=TAGS, routes=api.routes
            )
            complete(document, BODIES, ANSWERS)
            api.openapi_schema = document
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]
    return api


async def _reached(call: Awaitable[T]) -> T:
    """What a call to the board gives; 503 if the board is away."""
    try:
        return await call
    except BOARD_ERRORS as error:
        raise HTTPException(503, f"the board (Redis) cannot be reached: {error}") from error


def _admin(gateway: Gateway) -> Any:
    token = gateway.config.admin_token

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "admin calls need the header Authorization: Bearer TOKEN")

    return check


async def _check_router(gateway: Gateway, router: str, where: str = "") -> None:
    if router not in ROUTERS:
        meant = did_you_mean(router, ROUTERS)
        raise HTTPException(400, f"{where}router = {router[:80]!r}: must be one of {', '.join(ROUTERS)}{meant}")
    if router in ONE_GATEWAY_ROUTERS:
        others = len(set(await _reached(gateway.fleet.board.gateways())) - {gateway.fleet.id})
        if others:
            remedy = "end the others (gateway.processes = 1), or choose another router"
            raise HTTPException(409, f"{where}router = {router!r} needs one gateway, {others + 1} are there: {remedy}")


async def _body(gateway: Gateway, request: Request) -> bytes:
    """An admin call's body, under the same guards as an image."""
    try:
        given = request.headers.get("content-length")
        check_length(given.encode() if given is not None else None, LARGEST_ADMIN_BYTES)
        return await read_body(request.receive, LARGEST_ADMIN_BYTES, gateway.config.body_timeout_s, gateway.uploads)
    except Refused as error:
        raise HTTPException(error.http_status, error.reason, {"connection": "close"}) from error
    except ClientGone:
        raise HTTPException(400, "the client left before its body was complete") from None


def _decode(body: bytes, type_: Any, what: str) -> Any:
    try:
        return msgspec.json.decode(body, type=type_)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise HTTPException(400, f"the body is not a {what}: {error}") from error


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
