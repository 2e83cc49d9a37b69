"""Measuring a running system, against a gateway that is played by the test."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from aiohttp import web

from gateway.arrivals import Arrivals
from loadgen.payloads import emulated
from policies.routing.contract import RoutingError
from tidegate.live_measuring import measure_instances, recorded_arrivals

HEAVY, LIGHT = "pnasnet5large_t4", "efficientnet_b0_t4"
Handler = Callable[[web.Request], Awaitable[web.Response]]


@asynccontextmanager
async def gateway(*routes: tuple[str, str, Handler]) -> AsyncIterator[str]:
    """A server on loopback with these routes; its URL."""
    app = web.Application()
    for method, path, handler in routes:
        app.router.add_route(method, path, handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


def state(*instances: tuple[str, str, bool]) -> dict[str, Any]:
    """A service's part of `/state`."""
    return {
        "instances": [
            {"id": one, "variant": variant, "ready": ready, "rank": int(variant == LIGHT), "capacity": 15}
            for one, variant, ready in instances
        ]
    }


def test_service_times_come_from_pinned_requests_with_every_instance_busy() -> None:
    under_way: dict[str, int] = {HEAVY: 0, LIGHT: 0}
    most: dict[str, int] = {HEAVY: 0, LIGHT: 0}

    async def infer(request: web.Request) -> web.Response:
        variant = request.match_info["name"]
        assert request.headers["content-type"].startswith("image/")
        under_way[variant] += 1
        most[variant] = max(most[variant], under_way[variant])
        await asyncio.sleep(0.002)
        under_way[variant] -= 1
        told = {"batch": 1, "service_ms": 43.0 if variant == HEAVY else 11.5}
        return web.json_response({"parameters": told})

    async def run() -> None:
        async with gateway(("POST", "/v2/models/{name}/infer", infer)) as url:
            seen = state(("b/l", LIGHT, True), ("a/h", HEAVY, True), ("c/l", LIGHT, True), ("d/h", HEAVY, False))
            found = await measure_instances(url, seen, 0.2, emulated())
        assert found.ids == ("a/h", "b/l", "c/l"), "in the order of their ids, ready ones only"
        assert [rank for _, rank, _ in found.instances] == [0, 1, 1]
        heavy, light = found.instances[0][0], found.instances[1][0]
        assert heavy.mean_s(1) == pytest.approx(0.043)
        assert light.mean_s(1) == pytest.approx(0.0115)
        assert light.co_located == (LIGHT, HEAVY)
        assert heavy.accuracy.value == 0.8278
        assert most == {HEAVY: 2, LIGHT: 4}, "twice as many as instances"

    asyncio.run(run())


def test_what_cannot_be_measured_is_named() -> None:
    async def refuse(request: web.Request) -> web.Response:
        return web.json_response({"error": "no instance is ready"}, status=503)

    async def run() -> None:
        async with gateway(("POST", "/v2/models/{name}/infer", refuse)) as url:
            for seen, named in (
                (state(), "no instance is ready"),
                (state(("a/x", "mine", True)), "accuracy of mine is not known"),
                (state(("a/h", HEAVY, True)), "no request was answered"),
            ):
                with pytest.raises(RoutingError, match=named):
                    await measure_instances(url, seen, 0.1, emulated())

    asyncio.run(run())


def test_arrivals_are_those_remembered_and_those_that_come() -> None:
    async def run() -> None:
        ring = Arrivals("g", start_s=0.0)
        for at_s in (100.0, 103.0, 104.5):
            ring.add(at_s, "x")
        ring.add(104.6, "other")

        async def page(request: web.Request) -> web.Response:
            answer = ring.page(int(request.query["since"]), now_s=110.0)
            return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

        async with gateway(("GET", "/v2/tidegate/arrivals", page)) as url:
            trace = await recorded_arrivals(url, "x", 0.0)
        times = trace.arrivals.time_s
        assert times[:3].tolist() == pytest.approx([0.0, 3.0, 4.5], abs=0.1)
        assert len(times) == 3
        assert trace.arrivals.end_s >= times[-1]
        assert trace.arrivals.end_s == pytest.approx(10.0, abs=0.5), "silence since the last one counts"

    asyncio.run(run())
