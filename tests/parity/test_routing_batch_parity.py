"""Batching for `deadline`: the compiled simulator batches and routes as the plain Python functions do."""

from collections.abc import Callable

import numpy as np
import pytest

from gateway.router import ServiceRouter, Target
from policies.routing import estimation
from policies.routing.presets import PAPER_KINDS
from policies.routing.queueing_model import ServiceModel, build, trace_arrivals
from policies.routing.rules import batch_size, deadline, largest_batch
from policies.routing.simulator import run_rule
from protocol.records import InstanceRecord, InstanceState, ServiceSpec
from tests.fakes.routing_draws import route_draws

FACTOR = {1: 1.0, 3: 2.2, 5: 3.4}
BUDGET_S = 0.3


class LiveGateway:
    """One gateway's belief about batching instances, with lists, as the live one keeps it."""

    def __init__(self, margin: float) -> None:
        n = len(PAPER_KINDS)
        self.margin = [margin, 0.02, 4.0, 1.0]
        self.service_s = [k.service_s for k in PAPER_KINDS]
        self.rank, self.capacity = [k.rank for k in PAPER_KINDS], [k.capacity for k in PAPER_KINDS]
        self.length, self.serving, self.clear_s = [0] * n, [0] * n, [0.0] * n
        self.added_s = list(self.service_s)

    def limit(self, i: int, length: int) -> int:
        one = self.service_s[i]
        return largest_batch(one, FACTOR[3] * one, FACTOR[5] * one, length, BUDGET_S, self.margin[0])

    def route(self, now_s: float, draw: float) -> int:
        return deadline(
            now_s, BUDGET_S, draw, self.length, self.capacity, self.clear_s, self.added_s, self.rank, self.margin
        )

    def sent(self, now_s: float, i: int) -> float:
        foreseen_s = max(self.clear_s[i] - now_s, 0.0) + self.added_s[i]
        most = self.limit(i, self.length[i] + 1)
        full_s = FACTOR[most] * self.service_s[i]
        estimation.arrive_batched(now_s, i, most, full_s, self.length, self.clear_s, self.added_s, self.serving)
        return foreseen_s

    def told(self, now_s: float, i: int, length: int, batch: int, left_s: float) -> None:
        most = self.limit(i, length)
        one = self.service_s[i]
        estimation.depart_batched(
            now_s, i, length, batch, left_s, most, one, FACTOR[most] * one,
            self.length, self.clear_s, self.added_s, self.serving,
        )  # fmt: skip


class RealGateway(LiveGateway):
    """The same through the gateway's own `ServiceRouter`, told by registrations and replies."""

    def __init__(self, margin: float) -> None:
        super().__init__(margin)
        spec = ServiceSpec(variants=tuple(dict.fromkeys(k.variant for k in PAPER_KINDS)), requirement_ms=300.0)
        self.router = ServiceRouter("imagenet", spec)
        records = [
            InstanceRecord(
                id=f"{i}/{k.variant}", worker=str(i), address="here", service="imagenet", variant=k.variant,
                capacity=k.capacity, state=InstanceState.READY, epoch="1", service_s=k.service_s,
                batch=(1, 5), batch_s=(k.service_s, FACTOR[3] * k.service_s, FACTOR[5] * k.service_s),
            )
            for i, k in enumerate(PAPER_KINDS)
        ]  # fmt: skip
        self.router.set_instances(records, {"here"})
        self.router.margin = self.margin

    def route(self, now_s: float, draw: float) -> int:
        target = self.router.route(now_s, BUDGET_S, draw)
        assert isinstance(target, Target)
        return target.index

    def sent(self, now_s: float, i: int) -> float:
        return self.router.sent(self.router.targets[i], now_s)

    def told(self, now_s: float, i: int, length: int, batch: int, left_s: float) -> None:
        elapsed_s = FACTOR[batch] * self.service_s[i] - left_s if batch else 0.0
        self.router.answered(self.router.targets[i], now_s, length, 0.0, 0.0, 0, batch, elapsed_s)


def live(times: list[float], draw: Callable[[], float], gateway: LiveGateway) -> list[tuple[int, float]]:
    """(instance, finish) per request of one gateway and its workers, event by event."""
    n = len(PAPER_KINDS)
    line: list[list[tuple[int, float]]] = [[] for _ in range(n)]  # waiting: request and foreseen sojourn
    service: list[list[tuple[int, float]]] = [[] for _ in range(n)]
    ends_s = [float("inf")] * n
    most = [1, 1]  # per variant: the worker's limit, from the last frame that came
    result = [(-1, float("nan"))] * len(times)

    def begin(i: int, now_s: float) -> None:
        size = batch_size(len(line[i]), 1, most[PAPER_KINDS[i].rank])
        service[i], line[i] = line[i][:size], line[i][size:]
        ends_s[i] = now_s + PAPER_KINDS[i].service_s * FACTOR[size] if size else float("inf")

    def advance(until_s: float) -> None:
        while min(ends_s) <= until_s:
            i = ends_s.index(min(ends_s))
            now_s, ended = ends_s[i], service[i]
            begin(i, now_s)
            for j, foreseen_s in ended:
                result[j] = (i, now_s)
                estimation.learn_margin(foreseen_s, now_s - times[j], BUDGET_S, gateway.margin)
                left_s = ends_s[i] - now_s if service[i] else 0.0
                gateway.told(now_s, i, len(line[i]) + len(service[i]), len(service[i]), left_s)

    for j, now_s in enumerate(times):
        advance(now_s)
        i = gateway.route(now_s, draw())
        held = len(line[i]) + len(service[i])
        foreseen_s = gateway.sent(now_s, i)
        most[PAPER_KINDS[i].rank] = gateway.limit(i, held + 1)
        if held >= PAPER_KINDS[i].capacity:
            left_s = ends_s[i] - now_s if service[i] else 0.0
            gateway.told(now_s, i, held, len(service[i]), left_s)
            continue
        line[i].append((j, foreseen_s))
        if not service[i]:
            begin(i, now_s)
    advance(times[-1] + 100.0)
    return result


@pytest.mark.parametrize("world", [LiveGateway, RealGateway])
@pytest.mark.parametrize(("margin", "rate"), [(1.0, 180.0), (0.6, 230.0), (0.3, 330.0)])
def test_deadline_batches_alike_in_both_worlds(margin: float, rate: float, world: type[LiveGateway]) -> None:
    rng = np.random.default_rng(8)
    gaps = np.concatenate([rng.exponential(1 / rate, 3000), rng.exponential(1 / 10, 300), rng.exponential(1 / 60, 600)])
    times = np.cumsum(gaps)
    system, state = build(
        ServiceModel(PAPER_KINDS), trace_arrivals(times), 1, 21,
        batching=True, choose_limits=True, margin=margin, learn_trust=True, log=len(times),
    )  # fmt: skip
    run_rule(system, state, "deadline", times[-1] + 100.0)
    expected = live(times.tolist(), route_draws(21), world(margin))
    assert np.array_equal(state.log[:, 0], [i for i, _ in expected])
    assert np.allclose(state.log[:, 1], [t for _, t in expected], rtol=0, atol=1e-9, equal_nan=True)
    shared = len(times) - len(np.unique(state.log[:, 1]))
    assert shared > 500, "the trace never made a batch: nothing was compared"
