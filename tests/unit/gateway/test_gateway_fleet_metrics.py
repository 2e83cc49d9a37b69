"""One scrape for all gateway processes of a port: what adds up, what is the largest, who still lives."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.dispatch import DispatchStatistics
from gateway.fleet_metrics import LIVES_S, FleetMetrics, Values, merged
from gateway.router import ServiceRouter
from protocol.records import InstanceRecord, InstanceState, ServiceSpec


class Process:
    """One gateway process: a service `s` with the instances `a/v` and `b/v`."""

    def __init__(self, id: str, folder: Path | None) -> None:
        self.router = ServiceRouter("s", ServiceSpec(variants=("v",), requirement_ms=300.0))
        self.ends: dict[str, dict[str, int]] = {}
        records = [
            InstanceRecord(
                id=f"{one}/v", worker=one, address=one, service="s", variant="v", capacity=5,
                state=InstanceState.READY, epoch="1",
            )
            for one in "ab"
        ]  # fmt: skip
        self.router.set_instances(records, {"a", "b"})
        self.metrics = FleetMetrics(id, lambda: [self.router], lambda: DispatchStatistics(self.ends, {}), folder)

    def told(self) -> dict[tuple[str, ...], float]:
        """Every sample: (name, labels…) -> value."""
        return {
            (sample.name.removeprefix("tidegate_"), *sample.labels.values()): sample.value
            for family in self.metrics.collect()
            for sample in family.samples
        }


def share(process: Process) -> None:
    """What its loop does every second."""

    async def once() -> None:
        async with process.metrics:
            await asyncio.sleep(0)

    asyncio.run(once())


def test_a_process_alone_tells_what_it_sees(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        one = Process("one", folder)
        one.router.length[:] = [2, 0]
        one.router.capacity[1] = 0
        one.router.margin[0] = 0.75
        one.ends = {"a/v": {"OK": 3, "LOST": 1}}
        assert one.told() == {
            ("instance_length", "s", "a/v"): 2,
            ("instance_length", "s", "b/v"): 0,
            ("instance_ready", "s", "a/v"): 1,
            ("instance_ready", "s", "b/v"): 0,
            ("deadline_margin", "s"): 0.75,
            ("attempts_total", "a/v", "OK"): 3,
            ("attempts_total", "a/v", "LOST"): 1,
        }
    assert list(tmp_path.iterdir()) == [], "nothing is written by looking"


def test_several_processes_are_one_to_who_asks_any_of_them(tmp_path: Path) -> None:
    one, two = Process("one", tmp_path), Process("two", tmp_path)
    one.router.length[:], two.router.length[:] = [2, 0], [1, 3]
    two.router.capacity[0] = 0
    one.router.margin[0], two.router.margin[0] = 0.9, 0.6
    one.ends, two.ends = {"a/v": {"OK": 3}}, {"a/v": {"OK": 4}, "b/v": {"BOUNCED": 1}}
    share(one)
    share(two)
    told = one.told()
    assert told == two.told()
    assert (told["instance_length", "s", "a/v"], told["instance_length", "s", "b/v"]) == (2, 3)
    assert (told["instance_ready", "s", "a/v"], told["instance_ready", "s", "b/v"]) == (0, 1)
    assert told["deadline_margin", "s"] == 0.6
    assert (told["attempts_total", "a/v", "OK"], told["attempts_total", "b/v", "BOUNCED"]) == (7, 1)
    one.ends["a/v"]["OK"] = 5
    assert one.told()["attempts_total", "a/v", "OK"] == 9, "its own are those of this moment"


def test_a_process_that_has_ended_leaves_its_counts_only(tmp_path: Path) -> None:
    one, two = Process("one", tmp_path), Process("two", tmp_path)
    two.router.length[:], two.ends = [4, 4], {"a/v": {"OK": 4}}
    share(two)
    assert one.told()["instance_length", "s", "a/v"] == 4
    past = time.time() - LIVES_S - 1.0
    os.utime(tmp_path / "two.view", (past, past))
    told = one.told()
    assert told["instance_length", "s", "a/v"] == 0
    assert told["attempts_total", "a/v", "OK"] == 4
    (tmp_path / "two.view").write_bytes(b"torn")
    assert ("attempts_total", "a/v", "OK") not in one.told(), "what cannot be read is left out"


@pytest.mark.parametrize(("choose", "expected"), [(max, 3.0), (min, 1.0), (lambda a, b: a + b, 6.0)])
def test_merging_is_folding(choose: Callable[[float, float], float], expected: float) -> None:
    parts: list[Values] = [{("a",): 2.0, ("b",): 7.0}, {("a",): 1.0}, {("a",): 3.0}]
    assert merged(choose, parts) == {("a",): expected, ("b",): 7.0}
    assert merged(choose, []) == {}
