"""Routers of a running system: used, shadowed, rolled back, and kept to the instances that are there, under load."""

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from policies.routing.artifact import write_artifact
from policies.routing.contract import InstanceKind
from policies.routing.features import layout_for
from protocol.board import Board
from protocol.records import RouterChoice, ShadowRecord, Table
from tests.fakes.running_system import (
    Load,
    RunningSystem,
    assert_client_agrees,
    assert_conserved,
    client,
    deployment,
    until,
)
from tidegate.bench_tables import next_table_s
from tidegate.routing_live import Operator
from tidegate.running import GatewayError

PAPER = """
name = "live-routing"
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
H = InstanceKind("pnasnet5large_t4", 0, 0.043, 0.8278)
L = InstanceKind("efficientnet_b0_t4", 1, 0.0115, 0.7769)
A, B, C, D = "a/pnasnet5large_t4", "b/pnasnet5large_t4", "c/efficientnet_b0_t4", "d/efficientnet_b0_t4"


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, embedded: bool) -> Iterator[RunningSystem]:
    file = deployment(tmp_path_factory.mktemp("live") / "live.toml", PAPER)
    with RunningSystem(file, embedded=embedded) as running:
        yield running


def artifact(folder: Path, name: str, kinds: tuple[InstanceKind, ...], shares: tuple[float, ...]) -> Path:
    """A learned-po with an untrained network that gives these shares whatever it sees."""
    layout = layout_for(kinds)
    tensors: dict[str, NDArray[np.float32]] = {}
    for key, size in ((0, (4, layout.size)), (2, (4, 4)), (4, (len(kinds), 4))):
        tensors[f"{key}.weight"] = np.zeros(size, dtype=np.float32)
        tensors[f"{key}.bias"] = np.zeros(size[0], dtype=np.float32)
    tensors["4.bias"][:] = np.log(shares)
    path = write_artifact(folder, "learned-po", layout, tensors, slot_s=1.0, workload="test", training={})
    for suffix in (".json", ".safetensors"):
        path.with_suffix(suffix).rename(folder / f"{name}{suffix}")
    return folder / f"{name}.json"


def test_routers_are_used_and_rolled_back_under_load_without_a_lost_request(
    system: RunningSystem, tmp_path: Path
) -> None:
    path = artifact(tmp_path, "mine", (H, H, L, L), (0.1, 0.1, 0.4, 0.4))

    async def run() -> None:
        async with client() as session, Operator(system.url) as operator, Board(system.supervisor.board_url) as board:
            before = await assert_conserved(system, session)
            async with Load(session, f"{system.url}/v1/imagenet", 60.0) as load:
                await operator.use("imagenet", RouterChoice(router="learned-set"), 10.0)
                table = await board.table("imagenet")
                assert table is not None
                assert table.policy == "learned-set"
                assert sum(table.weights) == pytest.approx(1.0)
                await operator.use("imagenet", RouterChoice(router="threshold"), 10.0)
                await operator.use("imagenet", RouterChoice(router="learned-po"), 10.0)
                await operator.use("imagenet", RouterChoice(router="learned-po", policy_file=str(path)), 10.0)
                table = await board.table("imagenet")
                assert table is not None
                assert table.weights == pytest.approx((0.1, 0.1, 0.4, 0.4), abs=1e-6)
                assert (await operator.roll_back("imagenet", 10.0)) == RouterChoice(router="learned-po")
                assert (await operator.roll_back("imagenet", 10.0)).router == "threshold"
                await operator.use("imagenet", RouterChoice(router="deadline"), 10.0)
            after = await assert_conserved(system, session)
            assert_client_agrees(load, before, after, "imagenet")
            assert set(load.statuses()) == {200}, load.codes()

    asyncio.run(run())


def test_a_table_is_at_the_gateway_soon_after_its_slot_has_started(system: RunningSystem, embedded: bool) -> None:
    """Each slot's within 50 ms on a real Redis and 100 ms on the embedded board (`tidegate bench tables` measures it);
    here the median of a few, for a busy machine's sake."""

    async def run() -> list[float]:
        async with Operator(system.url) as operator:
            await operator.use("imagenet", RouterChoice(router="threshold"), 10.0)
            found = [await next_table_s(operator, "imagenet", system.file.scheduler.slot_s) for _ in range(5)]
            await operator.use("imagenet", RouterChoice(router="deadline"), 10.0)
            return [one for one in found if one is not None]

    delays_s = asyncio.run(run())
    assert len(delays_s) >= 4
    assert statistics.median(delays_s) < (0.1 if embedded else 0.05), delays_s


def test_a_shadow_decides_without_acting_and_its_would_be_results_stand_beside(system: RunningSystem) -> None:
    async def run() -> ShadowRecord:
        async with client() as session, Operator(system.url) as operator:
            await operator.use("imagenet", RouterChoice(router="deadline"), 10.0)
            before = await assert_conserved(system, session)
            async with Load(session, f"{system.url}/v1/imagenet", 100.0) as load:

                async def seen() -> bool:
                    record = await operator.shadow("imagenet")
                    return record is not None and record.shadow.requests > 300

                for _ in range(4):  # a machine that stands still makes a burst of what has waited: once more
                    await operator.shadow_by("imagenet", RouterChoice(router="light-only"))
                    await until(seen, 15.0, "the shadow does not report")
                    record = await operator.shadow("imagenet")
                    assert record is not None
                    if record.shadow.violation_ratio == 0.0:
                        break
                    await operator.shadow_by("imagenet", RouterChoice(router=""))
                assert record is not None
                assert (await system.state(session))["services"]["imagenet"]["routing_by"] == "deadline"
                await operator.shadow_by("imagenet", RouterChoice(router="learned-fo"))

                async def explained() -> bool:
                    record = await operator.shadow("imagenet")
                    return record is not None and "needs the workload's phase" in record.reason

                await until(explained, 10.0, "the shadow does not say why it cannot decide")
                await operator.shadow_by("imagenet", RouterChoice(router=""))
                assert await operator.shadow("imagenet") is None
            after = await assert_conserved(system, session)
            assert_client_agrees(load, before, after, "imagenet")
            variants = {sent.body.get("variant") for sent in load.sent}
            assert H.variant in variants, "light-only looked on, it did not act"
            return record

    record = asyncio.run(run())
    assert record.active_router == "deadline"
    assert record.shadow.goodput_ratio == pytest.approx(L.accuracy, abs=1e-6)
    assert record.shadow.heavy_ratio == 0.0
    assert record.active.goodput_ratio > record.shadow.goodput_ratio + 0.01
    assert record.active.heavy_ratio == pytest.approx(record.observed.heavy_ratio, abs=0.1)
    assert record.observed.requests == pytest.approx(record.active.requests, abs=40)


def test_a_policy_that_cannot_serve_is_named_and_the_former_router_stays(system: RunningSystem, tmp_path: Path) -> None:
    broken = artifact(tmp_path, "broken", (H, H, L, L), (0.25, 0.25, 0.25, float("nan")))
    other = artifact(tmp_path, "other", (H, L), (0.5, 0.5))

    async def run() -> None:
        async with client() as session, Operator(system.url) as operator, Board(system.supervisor.board_url) as board:
            await operator.use("imagenet", RouterChoice(router="threshold"), 10.0)
            before = await assert_conserved(system, session)
            async with Load(session, f"{system.url}/v1/imagenet", 40.0) as load:
                for file, named in (
                    (str(broken), "NaN"),
                    (str(other), f"trained for 1 {L.variant} + 1 {H.variant}, but 2 {L.variant} + 2 {H.variant} exist"),
                    (str(tmp_path / "nothing.json"), "does not exist"),
                ):
                    with pytest.raises(GatewayError) as caught:
                        await operator.use("imagenet", RouterChoice(router="learned-po", policy_file=file), 2.0)
                    assert named in str(caught.value)
                    assert "threshold was put back" in str(caught.value)
                # What did not come into force is nothing to roll back to.
                assert (await operator.roll_back("imagenet", 10.0)).router == "deadline"
                await operator.use("imagenet", RouterChoice(router="threshold"), 10.0)
                # A table for instances that do not exist is refused: the last good one stays.
                await until(lambda: _routed_by(operator, "threshold"), 10.0, "threshold is not back")
                version = (await operator.service("imagenet"))["table_version"]
                unknown = Table(
                    service="imagenet",
                    version=0,
                    valid_for_s=3.0,
                    instances=("x/y",),
                    weights=(1.0,),
                    policy="threshold",
                )
                posted = await board.put_table(unknown)
                await asyncio.sleep(0.2)
                state = await operator.service("imagenet")
                assert state["routing_by"] == "threshold"
                assert state["table_version"] != posted.version
                assert state["table_version"] >= version
                await operator.use("imagenet", RouterChoice(router="deadline"), 10.0)
            after = await assert_conserved(system, session)
            assert_client_agrees(load, before, after, "imagenet")
            assert set(load.statuses()) == {200}, load.codes()

    asyncio.run(run())


async def _routed_by(operator: Operator, router: str) -> bool:
    return str((await operator.service("imagenet"))["routing_by"]) == router


def test_a_dead_workers_share_goes_to_the_policy_trained_for_those_left_else_it_is_masked(
    system: RunningSystem, tmp_path: Path
) -> None:
    path = artifact(tmp_path, "whole", (H, H, L, L), (0.3, 0.3, 0.3, 0.1))
    artifact(tmp_path / "whole", "one-heavy", (H, L, L), (0.2, 0.4, 0.4))

    async def run() -> None:
        async with client() as session, Operator(system.url) as operator, Board(system.supervisor.board_url) as board:
            await operator.use("imagenet", RouterChoice(router="learned-po", policy_file=str(path)), 10.0)
            before = await assert_conserved(system, session)
            async with Load(session, f"{system.url}/v1/imagenet", 60.0) as load:
                for worker, remark, expected in (
                    ("a", "exactly them", {A: 0.0, B: 0.2, C: 0.4, D: 0.4}),
                    ("d", "masked", {A: 1 / 3, B: 1 / 3, C: 1 / 3, D: 0.0}),
                ):
                    await asyncio.sleep(0.5)
                    killed_s = time.monotonic()
                    os.kill(system.pid(f"worker-{worker}"), signal.SIGKILL)
                    statuses: set[str] = set()

                    async def replaced(expected: dict[str, float] = expected, statuses: set[str] = statuses) -> bool:
                        status = (await board.policy_statuses(["imagenet"])).get("imagenet")
                        statuses.add(status.reason if status is not None else "")
                        table = await board.table("imagenet")
                        weights = dict(zip(table.instances, table.weights, strict=True)) if table is not None else {}
                        return bool(weights == pytest.approx(expected, abs=1e-6))

                    await until(replaced, 5.0, f"no table without {worker}")
                    assert time.monotonic() - killed_s < 0.9, "a death does not wait for the slot's end"

                    async def said(remark: str = remark) -> bool:
                        status = (await board.policy_statuses(["imagenet"])).get("imagenet")
                        return bool(status is not None and status.in_force and remark in status.reason)

                    await until(said, 5.0, f"nobody says that the policy for others acts: {statuses}")

                    async def whole() -> bool:
                        views = (await operator.service("imagenet"))["instances"]
                        return bool(sum(view["ready"] for view in views) == 4)

                    await until(whole, 20.0, "the worker did not come back")
            after = await assert_conserved(system, session, restarted=("a", "d"))
            assert_client_agrees(load, before, after, "imagenet")
            lost = len(load.sent) - load.statuses()[200]
            assert lost <= 3, load.codes()  # in service at the dead worker and too late for a second attempt
            await operator.use("imagenet", RouterChoice(router="deadline"), 10.0)

    asyncio.run(run())


def _command(*arguments: str) -> dict[str, Any]:
    """What a `tidegate routing` command prints as JSON."""
    command = [sys.executable, "-m", "tidegate.main", "routing", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.slow
def test_a_router_is_learned_from_the_running_system_and_installed(system: RunningSystem, tmp_path: Path) -> None:
    options = ["--record-s", "1", "--measure-s", "2", "--minutes", "0.05", "--threads", "1", "--survivors"]

    async def traffic() -> None:
        async with client() as session, Operator(system.url) as operator:
            await operator.use("imagenet", RouterChoice(router="uniform"), 10.0)
            async with Load(session, f"{system.url}/v1/imagenet", 100.0):
                await asyncio.sleep(6.0)

    async def routed_by() -> str:
        async with Operator(system.url) as operator:
            return str((await operator.service("imagenet"))["routing_by"])

    asyncio.run(traffic())
    dry = _command("learn", "--from", system.url, "--dry-run", "--out", str(tmp_path / "dry"), *options)
    assert dry["installed"] is None
    assert asyncio.run(routed_by()) == "uniform"
    told = _command("learn", "--from", system.url, "--out", str(tmp_path / "real"), *options)
    assert told["service_ms"] == pytest.approx({H.variant: 43.0, L.variant: 11.5}, rel=0.1)
    assert told["instances"] == [A, B, C, D]
    assert told["winner"] == told["installed"] == asyncio.run(routed_by())
    scores = {router: found["overall"] for router, found in told["results"].items()}
    assert {"deadline", "threshold", "learned-po", "single-queue", "uniform"} <= scores.keys()
    kept = {router: one["goodput_ratio"] for router, one in scores.items() if one["violation_ratio"] <= 0.02}
    assert told["winner"] == max(kept, key=kept.__getitem__)
    assert Path(told["artifact"]).with_suffix("").is_dir(), "the policies for one instance fewer lie beside it"

    async def rolled_back() -> str:
        async with Operator(system.url) as operator:
            return (await operator.roll_back("imagenet", 10.0)).router

    assert asyncio.run(rolled_back()) == "uniform"


@pytest.mark.slow
def test_a_short_live_run_is_what_the_simulator_says() -> None:
    told = _command(
        "sim-equals-live", "--workload", "poisson:100", "--duration-s", "15", "--routers", "uniform,deadline",
        "--repetitions", "10",
    )  # fmt: skip
    for found in told["routers"]:
        spread = found["spread"]["overall"]["goodput_ratio"]
        assert abs(found["goodput_gap"]) < 0.02 + 3.0 * spread, found
        assert abs(found["violation_gap"]) < 0.02 + 3.0 * found["spread"]["overall"]["violation_ratio"], found
