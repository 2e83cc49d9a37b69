"""The queueing model that shadows run in, against the compiled simulator and against queueing theory."""

import numpy as np
import pytest

from policies.routing.contract import Action, InstanceKind
from policies.routing.evaluate import evaluate
from policies.routing.presets import PAPER_KINDS, paper_service
from policies.routing.queueing_model import build, markovian
from policies.routing.replica import Counts, Replica
from policies.routing.rules import RULES
from policies.routing.scores import scores_of
from policies.routing.simulator import run_tables


def steady(rate: float):  # type: ignore[no-untyped-def]
    """Poisson arrivals for the simulator."""
    return markovian(np.array([[-rate]]), np.array([[rate]]), ("steady",))


def replayed(replica: Replica, rate: float, seconds: int) -> Counts:
    """Slots of one second with Poisson counts."""
    rng = np.random.default_rng(1)
    total = Counts()
    for second in range(seconds):
        total = total + replica.run(int(rng.poisson(rate)), second + 1.0, rng)
    return total


@pytest.mark.parametrize("router", ["uniform", "deadline", "single-queue", "single-queue-random"])
@pytest.mark.parametrize("rate", [60.0, 180.0])
def test_rules_do_in_it_what_they_do_in_the_simulator(router: str, rate: float) -> None:
    found = replayed(Replica(PAPER_KINDS, 0.3, rule=RULES[router]), rate, 200)
    known = evaluate(router, paper_service(), steady(rate), slots=6_000, seed=1).scores["overall"]
    assert found.requests == pytest.approx(200 * rate, rel=0.05)
    assert found.goodput_ratio == pytest.approx(known.goodput_ratio, abs=0.012)
    assert found.violation_ratio == pytest.approx(known.violation_ratio, abs=0.012)
    assert found.heavy_ratio == pytest.approx(known.heavy_ratio, abs=0.03)


@pytest.mark.parametrize("expire", [False, True])
def test_tables_do_in_it_what_they_do_in_the_simulator(expire: bool) -> None:
    weights = np.array([0.15, 0.15, 0.35, 0.35])
    replica = Replica(PAPER_KINDS, 0.3, expire=expire)
    assert replica.set_table(Action(weights)).tolist() == pytest.approx(weights.tolist())
    found = replayed(replica, 180.0, 300)
    service = paper_service() if not expire else type(paper_service())(PAPER_KINDS, requirement_s=0.3, expire=True)
    system, state = build(service, steady(180.0), 20, 1)
    run_tables(system, state, np.tile(weights, (20, 1)), 300.0)
    known = scores_of(state.tally.sum(axis=0), ("steady",))["overall"]
    assert found.goodput_ratio == pytest.approx(known.goodput_ratio, abs=0.01)
    assert found.violation_ratio == pytest.approx(known.violation_ratio, abs=0.01)


def test_one_instance_waits_as_m_d_1_says() -> None:
    """Pollaczek and Khinchine: the mean wait is rho s / (2 (1 - rho)); here by Little's law from what is queued."""
    service_s, rate = 0.05, 14.0
    replica = Replica((InstanceKind("one", 0, service_s, 1.0, capacity=1000),), 10.0, rule=RULES["uniform"])
    rng = np.random.default_rng(2)
    lengths = []
    for k in range(20_000):
        replica.run(int(rng.poisson(rate * 0.1)), (k + 1) * 0.1, rng)
        lengths.append(int(replica.observe().length[0]))
    rho = rate * service_s
    assert np.mean(lengths) == pytest.approx(rho + rho**2 / (2 * (1 - rho)), rel=0.05)


def test_who_is_not_ready_gets_nothing() -> None:
    replica = Replica(PAPER_KINDS, 0.3)
    replica.learn(PAPER_KINDS, [False, True, True, True])
    weights = replica.set_table(Action(np.array([0.4, 0.2, 0.2, 0.2])))
    assert weights.tolist() == pytest.approx([0.0, 1 / 3, 1 / 3, 1 / 3])
    replica.run(50, 1.0, np.random.default_rng(0))
    seen = replica.observe()
    assert seen.length[0] == 0
    assert not seen.ready[0]
    replica.learn(PAPER_KINDS, [False] * 4)
    replica.set_table(Action(np.full(4, 0.25)))
    replica.run(0, 2.0, np.random.default_rng(0))
    counts = replica.run(10, 3.0, np.random.default_rng(0))
    assert (counts.requests, counts.refused) == (10, 10)


def test_sizes_that_nobody_measured_save_nothing() -> None:
    """As the worker takes them until it has made one: three take three times as long as one."""
    replica = Replica((InstanceKind("one", 0, 0.1, 1.0, batch=(3, 3)),), 10.0, rule=RULES["uniform"])
    assert replica.serve([0.0, 0.0, 0.0], 0.29, lambda: 0.0).requests == 0
    assert replica.serve([], 0.31, lambda: 0.0).requests == 3


def test_what_it_shows_is_what_a_worker_would_report() -> None:
    replica = Replica(PAPER_KINDS[:1], 0.3, rule=RULES["uniform"])
    replica.run(3, 0.02, np.random.default_rng(0))
    seen = replica.observe()
    assert seen.length.tolist() == [3]
    assert seen.in_service.tolist() == [1]
    ages = seen.ages_s[0, :3]
    assert (np.diff(ages) <= 0).all(), "oldest first"
    assert seen.elapsed_s[0] == pytest.approx(ages[0]), "the first found it idle"
