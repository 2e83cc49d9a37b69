"""Drives a running gateway over HTTP, as an operator would: its state, its router, its deployment, a replay.

`tidegate compare` and `tidegate demo` are made of this. It needs nothing but the URL (and the admin token, if any).
"""

import asyncio
import contextlib
import os
import time
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlsplit

import aiohttp
import msgspec

from loadgen.figures import RouterRun
from loadgen.payloads import Payload, PayloadSet
from loadgen.score import score
from loadgen.sender import ProgressCallback, SendOptions, replay
from loadgen.traces import Trace
from protocol.deployment import did_you_mean
from protocol.records import Deployment

SAMPLE_EVERY_S: Final = 0.2
PATIENCE_S: Final = 30.0
ROUTER_PATIENCE_S: Final = 6.0
"""How long a router that the gateway says is not in force may take: its first table needs a slot or two."""


class GatewayError(RuntimeError):
    """The gateway cannot be reached or refused: says what to do."""


class NotThere(GatewayError):
    """The gateway has no such service, or nothing to tell of it yet."""


class RouterUnusable(GatewayError):
    """The gateway refuses this router for this service, or it does not come into force: says why."""


class PhaseHint(msgspec.Struct, frozen=True):
    """What a request needs that tells the workload's phase."""

    payload: Payload
    phase: str


class RunningGateway:
    """A gateway at `url`. `async with` owns the connections."""

    def __init__(self, url: str, admin_token: str = "") -> None:
        self.url = whole_url(url)
        self._headers = {"Authorization": f"Bearer {admin_token}"} if admin_token else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10.0), headers=self._headers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def _call(self, method: str, path: str, body: bytes | None = None) -> Any:
        assert self._session is not None
        try:
            async with self._session.request(method, self.url + path, data=body) as response:
                answer = await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise GatewayError(
                f"no gateway answers at {self.url} ({in_words(error)}): start one with tidegate up"
            ) from error
        if response.status != 200:
            with contextlib.suppress(msgspec.MsgspecError, KeyError, TypeError):
                said = str(msgspec.json.decode(answer)["error"])
                if path.endswith("/router") and response.status in (400, 409):
                    raise RouterUnusable(said)
                if response.status == 404:
                    raise NotThere(said)
                if path.startswith("/admin/services/") and response.status in (400, 409, 503):
                    raise GatewayError(said)
                raise GatewayError(f"{path}: {said}")
            raise GatewayError(f"{path}: HTTP {response.status}: is this a Tidegate gateway?")
        return msgspec.json.decode(answer)

    async def state(self) -> dict[str, Any]:
        """What `/state` says."""
        return dict(await self._call("GET", "/state"))

    async def deployment(self) -> Deployment:
        """The desired state."""
        return msgspec.convert(await self._call("GET", "/admin/deployment"), Deployment)

    async def service(self, name: str) -> dict[str, Any]:
        """The state of one service. Raises `GatewayError` naming those that exist."""
        services = (await self.state())["services"]
        if name not in services:
            raise GatewayError(
                f"no service {name!r} at {self.url}: it has {', '.join(sorted(services)) or 'none'}"
                f"{did_you_mean(name, services)}"
            )
        return dict(services[name])

    async def deploy(self, deployment: Deployment) -> None:
        """Replaces the desired state and waits until exactly its instances are ready."""
        await self._call("PUT", "/admin/deployment", msgspec.json.encode(deployment))
        wanted = sorted(
            (worker.name, instance.variant, instance.capacity)
            for worker in deployment.workers
            for instance in worker.instances
            if instance.loaded
        )

        async def arrived() -> bool:
            services = (await self.state())["services"]
            views = [view for service in services.values() for view in service["instances"]]
            ready = sorted(
                (view["id"].split("/")[0], view["variant"], view["capacity"]) for view in views if view["ready"]
            )
            routers = {name: service["router"] for name, service in services.items()}
            return ready == wanted and routers == {name: spec.router for name, spec in deployment.services.items()}

        await self._until(arrived, f"deployment {deployment.name} did not become ready")

    async def ask_for_router(self, service: str, router: str) -> None:
        """Switches the router without waiting for it. Raises `RouterUnusable` if the gateway refuses it."""
        await self._call("PUT", f"/admin/services/{service}/router", msgspec.json.encode({"router": router}))

    async def set_router(self, service: str, router: str, hint: PhaseHint | None = None) -> None:
        """Switches the router and waits until it routes (a table router: until its first table has come).

        A router that has to be told the workload's phase sets no table before it is: `hint` is a first request that
        tells it. Raises `RouterUnusable` with the gateway's reason if it refuses or it does not come into force.
        """
        await self.ask_for_router(service, router)
        gives_up_s = time.monotonic() + ROUTER_PATIENCE_S
        hints = [hint] if hint is not None else []

        async def routing() -> bool:
            state = await self.service(service)
            if state["router"] == router and state["reason"] and hints:
                await self._tell(service, hints.pop())
            if state["router"] == router and state["reason"] and time.monotonic() > gives_up_s:
                raise RouterUnusable(state["reason"])
            return str(state["router"]) == router and not state["reason"]

        await self._until(routing, f"router {router} did not come into force for {service}")

    async def _tell(self, service: str, hint: PhaseHint) -> None:
        assert self._session is not None
        headers = {"Content-Type": hint.payload.content_type, "X-Tidegate-Phase": hint.phase}
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self._session.post(
                f"{self.url}/v1/{service}", data=hint.payload.body, headers=headers
            ) as response:
                await response.read()

    async def until_idle(self, service: str) -> None:
        """Returns once no instance of the service holds a request."""

        async def idle() -> bool:
            return all(view["length"] == 0 for view in (await self.service(service))["instances"])

        await self._until(idle, f"{service} did not become idle")

    async def _until(self, condition: Any, otherwise: str, patience_s: float = PATIENCE_S) -> None:
        ends_s = time.monotonic() + patience_s
        while not await condition():
            if time.monotonic() > ends_s:
                raise GatewayError(f"{otherwise} within {patience_s:g} s: see {self.url}/state and the workers' logs")
            await asyncio.sleep(0.05)

    async def replay(
        self,
        service: str,
        name: str,
        trace: Trace,
        payloads: PayloadSet,
        options: SendOptions,
        on_progress: ProgressCallback | None,
        stop: asyncio.Event,
    ) -> RouterRun:
        """Replays the trace against the service and samples its queue lengths meanwhile; scored."""
        lengths: dict[str, list[tuple[float, float]]] = {}
        sampling = asyncio.create_task(self._sample(service, lengths))
        try:
            record = await replay(f"{self.url}/v1/{service}", trace, payloads, options, on_progress, stop)
        finally:
            sampling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sampling
        return RouterRun(name, record, score(record), lengths)

    async def _sample(self, service: str, lengths: dict[str, list[tuple[float, float]]]) -> None:
        started_s = time.monotonic()
        while True:
            with contextlib.suppress(GatewayError):
                for view in (await self.service(service))["instances"]:
                    if view["ready"]:
                        lengths.setdefault(view["id"], []).append((time.monotonic() - started_s, view["length"]))
            await asyncio.sleep(SAMPLE_EVERY_S)


def in_words(error: Exception) -> str:
    """In a person's words: what the system said, without what aiohttp knows of the connection."""
    if isinstance(error, TimeoutError):
        return "it takes too long"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)  # below 0: of looking up a name
    return str(error)


def whole_url(text: str) -> str:
    """The address of a gateway as a URL: `host:port` means http. Raises `GatewayError` for what is none."""
    url = text if "://" in text else f"http://{text}"
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        port = parts.port  # raises for what is no number
        if parts.scheme in ("http", "https") and parts.hostname and port != 0:
            return url.rstrip("/")
    raise GatewayError(f"{text!r} is no address of a gateway: write it as http://127.0.0.1:8700")
