"""One scrape for all gateway processes of a port: what adds up, what is the largest, who still lives."""

import asyncio
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gateway.dispatch import DispatchStatistics
from gateway.exposition import LIVES_S, Exposition, merged
from gateway.metrics import BUCKETS_S, GatewayMetrics, Values
from gateway.router import ServiceRouter
from protocol.outcomes import OUTCOMES, Outcome
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
        self.metrics = GatewayMetrics()
        self.exposition = Exposition(
            id, self.metrics, lambda: [self.router], lambda: DispatchStatistics(self.ends, {}), folder
        )

    def told(self) -> dict[tuple[str, ...], float]:
        """Every sample: (name, labels…) -> value."""
        return {
            (sample.name.removeprefix("tidegate_"), *sample.labels.values()): sample.value
            for family in self.exposition.collect()
            for sample in family.samples
        }


def share(process: Process) -> None:
    """What its loop does every second."""

    async def once() -> None:
        async with process.exposition:
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


def test_what_was_counted_up_to_the_end_of_a_process_is_left_to_the_others(tmp_path: Path) -> None:
    """It shares every second, and once more when it ends."""
    one, two = Process("one", tmp_path), Process("two", tmp_path)

    async def life() -> None:
        async with two.exposition:
            await asyncio.sleep(0)
            two.ends = {"a/v": {"OK": 4}}

    asyncio.run(life())
    assert one.told()["attempts_total", "a/v", "OK"] == 4


@pytest.mark.parametrize(("choose", "expected"), [(max, 3.0), (min, 1.0), (lambda a, b: a + b, 6.0)])
def test_merging_is_folding(choose: Callable[[float, float], float], expected: float) -> None:
    parts: list[Values] = [{("a",): 2.0, ("b",): 7.0}, {("a",): 1.0}, {("a",): 3.0}]
    assert merged(choose, parts) == {("a",): expected, ("b",): 7.0}
    assert merged(choose, []) == {}


def test_requests_are_counted_once_in_every_form(tmp_path: Path) -> None:
    """Against prometheus-client's own counter and histogram, fed the same requests; two processes share them."""
    rng = random.Random(4)
    registry = CollectorRegistry()
    requests = Counter("tidegate_requests", "Requests by outcome.", ["service", "outcome"], registry=registry)
    about = "From the request's arrival to its answer, for answered requests."
    seconds = Histogram("tidegate_request_seconds", about, ["service"], buckets=BUCKETS_S, registry=registry)
    answers = Counter("tidegate_answers", "Answers by variant.", ["service", "variant"], registry=registry)
    processes = [Process(id, tmp_path) for id in ("one", "two")]
    for service in ("s", "t"):
        for outcome in Outcome:
            requests.labels(service, outcome.name)
    for number in range(400):
        service, outcome = rng.choice("st"), rng.choice(OUTCOMES)
        variant = rng.choice(("heavy", "light")) if outcome in (Outcome.OK, Outcome.LATE) else None
        took_s = rng.choice((*BUCKETS_S[:-1], rng.expovariate(5.0), 99.0)) if variant else None
        processes[number % 2].metrics.count(service, outcome, took_s, variant)
        requests.labels(service, outcome.name).inc()
        if variant and took_s:
            seconds.labels(service).observe(took_s)
            answers.labels(service, variant).inc()
    for process in processes:
        share(process)

    def samples(text: bytes) -> dict[tuple[object, ...], Any]:
        return {
            (sample.name, *sorted(sample.labels.items())): pytest.approx(sample.value)
            for family in text_string_to_metric_families(text.decode())
            for sample in family.samples
            if "_created" not in sample.name
        }

    expected = samples(generate_latest(registry))
    for process in processes:
        told = samples(process.exposition.text())
        assert {key: value for key, value in told.items() if key in expected} == expected
        assert {str(key[0]) for key in told.keys() - expected.keys()} == {
            "tidegate_instance_length",
            "tidegate_instance_ready",
            "tidegate_deadline_margin",
        }
        assert sum(sum(ends.values()) for ends in process.metrics.outcomes().values()) == process.metrics.ended == 200
