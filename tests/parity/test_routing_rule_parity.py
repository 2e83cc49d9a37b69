"""One rule, two worlds: the compiled simulator sends every request where the plain Python functions would."""

from typing import Any

import numpy as np
import pytest

from policies.routing import estimation
from policies.routing.contract import HOLD
from policies.routing.gateway_views import RULE_NUMBERS
from policies.routing.presets import PAPER_KINDS
from policies.routing.queueing_model import ServiceModel, build, trace_arrivals
from policies.routing.rules import RULES
from policies.routing.simulator import run_rule
from tests.fakes.routing_draws import route_draws


def live(rule: Any, times: list[float], seed: int) -> list[tuple[int, float]]:
    """(instance, finish) per request, with the estimation of the live gateway and lists throughout."""
    draw = route_draws(seed)
    n = len(PAPER_KINDS)
    service_s = [k.service_s for k in PAPER_KINDS]
    rank, capacity = [k.rank for k in PAPER_KINDS], [k.capacity for k in PAPER_KINDS]
    length, clear_s, margin = [0] * n, [0.0] * n, [0.7, 0.02, 4.0, 1.0]
    queues: list[list[int]] = [[] for _ in range(n)]
    finish_s = [float("inf")] * n
    central: list[int] = []
    result: list[tuple[int, float]] = [(-1, float("nan"))] * len(times)

    def send(j: int, i: int, now_s: float) -> None:
        estimation.arrive(now_s, i, length, clear_s, service_s)
        if len(queues[i]) >= capacity[i]:
            length[i], clear_s[i] = len(queues[i]), finish_s[i] + (len(queues[i]) - 1) * service_s[i]
            return
        queues[i].append(j)
        if len(queues[i]) == 1:
            finish_s[i] = now_s + service_s[i]

    def advance(until_s: float) -> None:
        while min(finish_s) <= until_s:
            i = finish_s.index(min(finish_s))
            now_s = finish_s[i]
            result[queues[i].pop(0)] = (i, now_s)
            finish_s[i] = now_s + service_s[i] if queues[i] else float("inf")
            estimation.depart(now_s, i, len(queues[i]), length, clear_s, service_s)
            if central and not queues[i]:
                budget_s = times[central[0]] + 0.3 - now_s
                chosen = rule(now_s, budget_s, draw(), length, capacity, clear_s, service_s, rank, margin)
                if chosen >= 0:
                    send(central.pop(0), chosen, now_s)

    for j, now_s in enumerate(times):
        advance(now_s)
        chosen = rule(now_s, 0.3, draw(), length, capacity, clear_s, service_s, rank, margin)
        if chosen == HOLD:
            if len(central) < sum(capacity):
                central.append(j)
        elif chosen >= 0:
            send(j, chosen, now_s)
    advance(times[-1] + 100.0)
    return result


@pytest.mark.parametrize("name", sorted(set(RULES) - {"heavy-expire"}))
def test_rules_decide_alike_in_both_worlds(name: str) -> None:
    rng = np.random.default_rng(8)
    gaps = np.concatenate(
        [rng.exponential(1 / 180, 1500), rng.exponential(1 / 10, 300), rng.exponential(1 / 300, 1200)]
    )
    times = np.cumsum(gaps)
    system, state = build(ServiceModel(PAPER_KINDS), trace_arrivals(times), 1, 21, margin=0.7, log=len(times))
    run_rule(system, state, name, times[-1] + 100.0)
    expected = live(RULES[name], times.tolist(), 21)
    assert np.array_equal(state.log[:, 0], [i for i, _ in expected])
    assert np.allclose(state.log[:, 1], [t for _, t in expected], rtol=0, atol=1e-9, equal_nan=True)


def test_every_rule_has_its_number() -> None:
    assert list(RULE_NUMBERS) == list(RULES)
    assert (RULE_NUMBERS["uniform"], RULE_NUMBERS["light-only"], RULE_NUMBERS["deadline"]) == (0, 1, 6)
    assert (RULE_NUMBERS["single-queue"], RULE_NUMBERS["single-queue-random"]) == (4, 5)
