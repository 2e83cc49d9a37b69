"""Changes while requests come: routers, deployments, clients that leave, too much load, a death in the middle of it."""

import asyncio
import json
import os
import random
import signal
from collections.abc import Iterator

import aiohttp
import pytest

from tests.fakes.running_system import (
    IMAGENET,
    LABEL,
    Load,
    RunningSystem,
    assert_client_agrees,
    assert_conserved,
    client,
    deployment,
    until,
)

PAPER = """
name = "changes"
[services.imagenet]
variants = ["pnasnet5large_t4", "efficientnet_b0_t4"]
requirement_ms = 300
router = "deadline"
[[workers]]
name = "a"
instances = [{ variant = "pnasnet5large_t4" }]
[[workers]]
name = "b"
instances = [{ variant = "pnasnet5large_t4" }]
[[workers]]
name = "c"
instances = [{ variant = "efficientnet_b0_t4" }]
[[workers]]
name = "d"
instances = [{ variant = "efficientnet_b0_t4" }]
"""
ROUTERS = ("uniform", "light-only", "single-queue", "heavy-expire", "threshold", "single-queue-random", "deadline")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    file = deployment(tmp_path_factory.mktemp("changes") / "changes.toml", PAPER)
    with RunningSystem(file) as running:
        yield running


async def _change_router(session: aiohttp.ClientSession, system: RunningSystem, router: str) -> None:
    url = f"{system.url}/admin/services/imagenet/router"
    async with session.put(url, json={"router": router}) as response:
        assert response.status == 200, await response.text()


async def _routed_by(session: aiohttp.ClientSession, system: RunningSystem, router: str) -> None:
    async def taken() -> bool:
        service = (await system.state(session))["services"]["imagenet"]
        return bool(service["router"] == router == service["routing_by"])

    await until(taken, 10.0, f"{router} does not route")


def test_router_switches_lose_nothing(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            before = await assert_conserved(system, session)
            async with Load(session, f"{system.url}/v1/imagenet", 60.0) as load:
                for router in ROUTERS:
                    await _change_router(session, system, router)
                    await _routed_by(session, system, router)
                    await asyncio.sleep(0.4)
            after = await assert_conserved(system, session)
            assert_client_agrees(load, before, after, "imagenet")
            # 60/s is within everybody's capacity but heavy-expire's two instances of 46/s in a burst of catching up.
            assert load.statuses()[200] >= len(load.sent) - 3

    asyncio.run(run())


def test_a_scheduler_that_hangs_gives_way_to_deadline_and_takes_over_again(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            before = await assert_conserved(system, session)
            async with Load(session, f"{system.url}/v1/imagenet", 40.0) as load:
                await _change_router(session, system, "threshold")
                await _routed_by(session, system, "threshold")
                hung = system.pid("scheduler")
                os.kill(hung, signal.SIGSTOP)
                try:

                    async def fallen_back() -> bool:
                        service = (await system.state(session))["services"]["imagenet"]
                        return bool(service["routing_by"] == "deadline")

                    await until(fallen_back, 10.0, "an expired table still routes")
                finally:
                    os.kill(hung, signal.SIGCONT)
                await _routed_by(session, system, "threshold")
                await _change_router(session, system, "deadline")
                await _routed_by(session, system, "deadline")
            after = await assert_conserved(system, session)
            assert_client_agrees(load, before, after, "imagenet")
            # A drawn instance may be full in a burst of catching up; nothing else may go wrong, and most is answered.
            assert set(load.statuses()) <= {200, 429}, load.codes()
            assert load.statuses()[200] > len(load.sent) / 2, load.codes()

    asyncio.run(run())


def test_an_unknown_router_is_refused_and_changes_nothing(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            for service, router, status in (("imagenet", "best", 400), ("nothing", "uniform", 404)):
                url = f"{system.url}/admin/services/{service}/router"
                async with session.put(url, json={"router": router}) as response:
                    answer = await response.json()
                    assert response.status == status
                    assert router in answer["error"] or service in answer["error"]
            for body in (b"", b"{", b"[]", b'{"router": 3}', b'{"router": "uniform", "x": 1}', b"\xff\xfe"):
                async with session.put(f"{system.url}/admin/services/imagenet/router", data=body) as response:
                    assert response.status == 400
                    assert (await response.json())["code"] == "INVALID"
            assert (await system.state(session))["services"]["imagenet"]["router"] == "deadline"

    asyncio.run(run())


def test_a_deployment_switch_loses_nothing_but_what_nobody_could_serve(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            url = f"{system.url}/admin/deployment"
            async with session.get(url) as response:
                mixed = await response.json()
            before = await assert_conserved(system, session)
            light = {**mixed, "workers": [dict(worker) for worker in mixed["workers"]]}
            for worker in light["workers"]:
                worker["instances"] = [{"variant": "efficientnet_b0_t4"}]
            async with Load(session, f"{system.url}/v1/imagenet", 60.0) as load:
                await asyncio.sleep(0.3)
                for wanted in (light, mixed):
                    async with session.put(url, json=wanted) as response:
                        assert response.status == 200, await response.text()
                    ids = {f"{one['name']}/{one['instances'][0]['variant']}" for one in wanted["workers"]}

                    async def there(ids: set[str] = ids) -> bool:
                        views = (await system.state(session))["services"]["imagenet"]["instances"]
                        return {view["id"] for view in views if view["ready"]} == ids

                    await until(there, 15.0, f"the instances did not become {ids}")
                    await asyncio.sleep(0.5)
            state = await system.state(session)
            after = await assert_conserved(system, session, restarted=("a", "b"))
            assert_client_agrees(load, before, after, "imagenet")
            # The light instances of c and d were there all along.
            assert set(load.statuses()) == {200}, load.codes()
            assert state["arrived"] > before["arrived"] + 50

    asyncio.run(run())


def test_models_loaded_and_unloaded_at_once_are_all_heard(system: RunningSystem) -> None:
    """Each call changes the same deployment: none may overwrite another. Contradictions end, and say so."""

    async def run() -> None:
        async with client() as session:

            async def ask(variant: str, action: str) -> tuple[int, str]:
                url = f"{system.url}/v2/repository/models/{variant}/{action}"
                async with session.post(url, json={}) as response:
                    return response.status, (await response.json()).get("error", "")

            async def wanted() -> list[bool]:
                async with session.get(f"{system.url}/admin/deployment") as response:
                    workers = (await response.json())["workers"]
                return [one["instances"][0]["loaded"] for one in workers]

            both = ("pnasnet5large_t4", "efficientnet_b0_t4")
            for _ in range(3):
                for action in ("unload", "load"):
                    assert await asyncio.gather(*(ask(one, action) for one in both)) == [(200, "")] * 2
                    assert await wanted() == [action == "load"] * 4
            async with asyncio.timeout(20.0):
                ended = await asyncio.gather(*(ask(both[1], one) for one in ("unload", "load") * 3))
            assert {status for status, _ in ended} <= {200, 409}
            assert all("meanwhile" in error for status, error in ended if status == 409)
            assert await ask(both[1], "load") == (200, "")
            await assert_conserved(system, session, restarted=("a", "b", "c", "d"))

    asyncio.run(run())


def test_a_bad_deployment_is_refused_and_changes_nothing(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            url = f"{system.url}/admin/deployment"
            async with session.get(url) as response:
                good = await response.json()
            spec = good["services"]["imagenet"]
            for bad, named in (
                ({**good, "frobs": 1}, "frobs"),
                ({**good, "services": {}}, "services"),
                ({**good, "workers": []}, "workers"),
                ({**good, "services": {"imagenet": {**spec, "router": "best"}}}, "router = 'best'"),
                ({**good, "services": {"imagenet": {**spec, "percentile": 98}}}, "percentile = 98"),
                ({**good, "services": {"imagenet": {**spec, "requirement_ms": "soon"}}}, "requirement_ms"),
                ({**good, "services": {'qu"ote': spec}}, 'qu"ote'),
                (
                    {**good, "services": {"imagenet": spec, "more": {**spec, "variants": ["x"]}}},
                    "services.more.variants",
                ),
                ({**good, "services": {"imagenet": spec, "more": spec}}, "services.imagenet.variants too"),
                ({**good, "services": {f"s{n}": {**spec, "variants": [f"v{n}"]} for n in range(3_000)}}, "services.s0"),
            ):
                async with session.put(url, json=bad) as response:
                    assert response.status == 400, await response.text()
                    error = (await response.json())["error"]
                    assert named in error
                    assert len(error) < 500
            async with session.get(url) as response:
                assert await response.json() == good

    asyncio.run(run())


def test_an_instance_that_cannot_load_and_a_policy_that_does_not_fit_say_so(system: RunningSystem) -> None:
    """The service stays ready, by its other instances and by `deadline`; /readyz and /state tell why it is these."""

    async def run() -> None:
        async with client() as session:
            url = f"{system.url}/admin/deployment"
            async with session.get(url) as response:
                good = await response.json()
            bad = json.loads(json.dumps(good))
            bad["services"]["imagenet"]["variants"].insert(0, "no_such_model")
            bad["services"]["imagenet"]["router"] = "learned-fo"
            bad["workers"][3]["instances"] = [{"variant": "no_such_model"}]
            before = await assert_conserved(system, session)
            async with Load(session, f"{system.url}/v1/imagenet", 30.0) as load:
                async with session.put(url, json=bad) as response:
                    assert response.status == 200, await response.text()

                async def told() -> bool:
                    async with session.get(f"{system.url}/readyz") as response:
                        assert response.status == 200
                        notices = " | ".join((await response.json())["notices"])
                    service = (await system.state(session))["services"]["imagenet"]
                    reasons = {view["id"]: view["reason"] for view in service["instances"]}
                    return (
                        "no such variant in the catalog" in reasons.get("d/no_such_model", "")
                        and reasons["d/no_such_model"] in notices
                        and service["routing_by"] == "deadline"
                        and "learned-fo" in service["reason"]
                        and service["reason"] in notices
                        and "trained" in notices
                    )

                await until(told, 10.0, "nobody says what is wrong")
                async with session.put(url, json=good) as response:
                    assert response.status == 200, await response.text()

                async def over() -> bool:
                    async with session.get(f"{system.url}/readyz") as response:
                        return bool((await response.json())["notices"] == [])

                await until(over, 10.0, "what was wrong is told for ever")
                await until(lambda: _whole(system, session), 10.0, "not everything came back")
            after = await assert_conserved(system, session, restarted=("d",))
            assert_client_agrees(load, before, after, "imagenet")
            assert set(load.statuses()) == {200}, load.codes()
            log = system.child("worker-d").log_file.read_text()
            assert '"level": "WARNING"' in log
            assert "no_such_model" in log

    asyncio.run(run())


def test_clients_that_leave_free_their_places_and_nothing_is_computed_for_them(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            await _change_router(session, system, "heavy-only")
            await _routed_by(session, system, "heavy-only")
            before = await assert_conserved(system, session)
            computed = _computed(await system.worker_statuses())
            url = f"{system.url}/v1/imagenet"
            headers = {**IMAGENET, "x-deadline-ms": "5000"}
            tasks = [asyncio.create_task(_give_up(session, url, headers, 0.03)) for _ in range(14)]
            await asyncio.gather(*tasks)
            after = await assert_conserved(system, session)
            cancelled = [state["outcomes"].get("imagenet", {}).get("CANCELLED", 0) for state in (before, after)]
            assert cancelled[1] - cancelled[0] == 14
            # Two instances of 43 ms: at most the one in service at each when the clients left, and its successor.
            assert _computed(await system.worker_statuses()) - computed <= 4
            await _change_router(session, system, "deadline")
            await _routed_by(session, system, "deadline")

    asyncio.run(run())


def test_a_pipelining_client_that_leaves_cancels_the_request_that_is_served(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            before = await assert_conserved(system, session)
            one = b"POST /v1/imagenet HTTP/1.1\r\nhost: t\r\nx-deadline-ms: 5000\r\ncontent-type: image/png\r\n"
            one += b"content-length: %d\r\n\r\n" % len(LABEL) + LABEL
            for _ in range(6):
                connection = system.raw()
                connection.sendall(one * 3)
                await asyncio.sleep(0.02)
                connection.close()
            after = await assert_conserved(system, session)
            ended = _difference(before, after)
            # Each connection's first was in service (43 ms); those behind it never became requests.
            assert sum(ended.values()) <= 12
            assert ended.get("CANCELLED", 0) >= 5, ended
            assert "Traceback" not in system.child("gateway-0").log_file.read_text()

    asyncio.run(run())


def _computed(statuses: dict) -> int:  # type: ignore[type-arg]
    """Answers that workers have made."""
    return sum(status.counts[0] + status.counts[1] for status in statuses.values())


def _difference(before: dict, after: dict) -> dict[str, int]:  # type: ignore[type-arg]
    was = before["outcomes"].get("imagenet", {})
    return {name: number - was.get(name, 0) for name, number in after["outcomes"]["imagenet"].items()}


async def _give_up(session: aiohttp.ClientSession, url: str, headers: dict[str, str], after_s: float) -> None:
    try:
        async with asyncio.timeout(after_s), session.post(url, data=LABEL, headers=headers) as response:
            await response.read()
    except TimeoutError:
        return
    raise AssertionError(f"answered within {after_s} s: {response.status}")


def test_everything_at_once_is_conserved(system: RunningSystem) -> None:
    """Twice the capacity, half of the clients impatient, routers changing, a worker killed in the middle."""

    async def run() -> None:
        rng = random.Random(7)
        async with client() as session:
            before = await assert_conserved(system, session)
            url = f"{system.url}/v1/imagenet"
            leaving: list[asyncio.Task[None]] = []

            async def impatient() -> None:
                try:
                    async with asyncio.timeout(rng.uniform(0.0, 0.2)), session.post(url, data=LABEL, headers=IMAGENET):
                        pass
                except (TimeoutError, aiohttp.ClientError):
                    pass

            async with Load(session, url, 250.0, deadline_ms=200.0) as load:
                for step in range(25):
                    leaving += [asyncio.create_task(impatient()) for _ in range(10)]
                    if step % 5 == 2:
                        await _change_router(session, system, ROUTERS[step // 5])
                    if step == 12:
                        os.kill(system.pid("worker-c"), signal.SIGKILL)
                    await asyncio.sleep(0.1)
                await asyncio.gather(*leaving)
                await _change_router(session, system, "deadline")
            await until(lambda: _whole(system, session), 20.0, "not all of the 4 instances came back")
            after = await assert_conserved(system, session, restarted=("c",))
            assert all(sent.answers == 1 for sent in load.sent)
            ended = _difference(before, after)
            told = load.codes()
            for outcome, number in told.items():
                assert ended[outcome] >= number, (outcome, ended, told)
            assert sum(ended.values()) <= len(load.sent) + len(leaving)
            assert ended.get("CANCELLED", 0) <= len(leaving)
            assert ended.get("FAILED", 0) == 0

    asyncio.run(run())


def test_a_worker_that_hangs_costs_its_requests_seconds_not_half_a_minute(system: RunningSystem) -> None:
    """It is stopped, not killed: its link stays up and takes requests, but nothing comes back."""

    async def run() -> None:
        async with client() as session:
            before = await assert_conserved(system, session)
            hung = system.pid("worker-a")
            async with Load(session, f"{system.url}/v1/imagenet", 60.0, deadline_ms=300.0) as load:
                await asyncio.sleep(0.3)
                os.kill(hung, signal.SIGSTOP)
                try:

                    async def noticed() -> bool:
                        views = (await system.state(session))["services"]["imagenet"]["instances"]
                        return not any(view["ready"] for view in views if view["id"].startswith("a/"))

                    await until(noticed, 15.0, "a worker that hangs is still routed to")
                    await asyncio.sleep(0.5)
                    assert (await system.state(session))["in_flight"] <= 15, "nobody waits for it any more"
                finally:
                    os.kill(hung, signal.SIGCONT)
                await asyncio.sleep(0.5)
            assert all(sent.answers == 1 for sent in load.sent)
            assert max(sent.ended_s - sent.at_s for sent in load.sent) < 12.0
            unserved = len(load.sent) - load.statuses()[200]
            assert unserved <= 2 * 15, "at most what it had taken, and what its absence made late"

            await until(lambda: _whole(system, session), 15.0, "it did not come back")
            await until(lambda: _rest(system, session), 10.0, "requests are left over")
            after = await system.state(session)
            ended = sum(_difference(before, after).values())
            assert ended == len(load.sent) == after["arrived"] - before["arrived"]

    asyncio.run(run())


async def _whole(system: RunningSystem, session: aiohttp.ClientSession) -> bool:
    views = (await system.state(session))["services"]["imagenet"]["instances"]
    return bool(sum(view["ready"] for view in views) == 4)


async def _rest(system: RunningSystem, session: aiohttp.ClientSession) -> bool:
    return bool((await system.state(session))["in_flight"] == 0)
