"""A shadow's replica against the compiled simulator: the same arrivals and decisions, request by request.

The replica serves by the worker's own queue and the gateway's own forecasts, so this holds those to the simulator too.
"""

from dataclasses import replace

import numpy as np
import pytest

from policies.routing.contract import Action, FloatArray, InstanceKind
from policies.routing.environment import SlotEnvironments
from policies.routing.estimation import SERVICE_RATE
from policies.routing.features import features
from policies.routing.learned import PAIRS, load_policy
from policies.routing.presets import PAPER_KINDS
from policies.routing.queueing_model import LENGTH, SERVING, ServiceModel, State, System, build, trace_arrivals
from policies.routing.replica import Counts, Replica
from policies.routing.rules import RULES
from policies.routing.scores import scores_of
from policies.routing.simulator import run_rule, run_tables
from protocol.outcomes import Attempt
from tests.fakes.routing_draws import route_draws

BATCHING = tuple(
    replace(kind, batch=(1, 5), batch_s=(kind.service_s, 2.2 * kind.service_s, 3.4 * kind.service_s))
    for kind in PAPER_KINDS
)
ONE_OF_EACH = BATCHING[::2]
REQUIREMENT_S = 0.3
SEED = 21


class Listening(Replica):
    """Keeps instance and finish of every request that was served, by arrival."""

    def listen(self) -> "Listening":
        """Starts to."""
        self.served: dict[float, tuple[int, float]] = {}
        return self

    def _count(self, i: int, arrived_s: float, attempt: Attempt, now_s: float) -> None:
        super()._count(i, arrived_s, attempt, now_s)
        if attempt is Attempt.OK or attempt is Attempt.LATE:
            self.served[arrived_s] = i, now_s


def trace(rate: float, seed: int = 8) -> FloatArray:
    """A burst, calm, and half a burst; 20 to 40 s of each."""
    rng = np.random.default_rng(seed)
    gaps = [rng.exponential(1 / r, int(r * seconds)) for r, seconds in ((rate, 20), (10, 40), (rate / 2, 20))]
    return np.asarray(np.cumsum(np.concatenate(gaps)))


def simulated(
    kinds: tuple[InstanceKind, ...], times_s: FloatArray, expire: bool, **how: object
) -> tuple[System, State]:
    """The simulator with this trace and one gateway."""
    service = ServiceModel(kinds, REQUIREMENT_S, expire=expire)
    return build(service, trace_arrivals(times_s), 1, SEED, log=len(times_s), **how)  # type: ignore[arg-type]


def same(state: State, replica: Listening, times_s: FloatArray) -> int:
    """Asserts that every request went the same way; how many ended together with another."""
    found = [replica.served.get(at_s, (-1, np.nan)) for at_s in times_s.tolist()]
    assert np.array_equal(state.log[:, 0], [i for i, _ in found])
    assert np.allclose(state.log[:, 1], [end_s for _, end_s in found], rtol=0, atol=1e-9, equal_nan=True)
    served = state.log[state.log[:, 0] >= 0]
    return len(served) - len(np.unique(served, axis=0))


def same_counts(state: State, counts: Counts) -> None:
    """Asserts that both counted the same ends."""
    known = scores_of(state.tally.sum(axis=0), ("all",))["overall"]
    assert counts.requests == known.requests
    for ratio in ("goodput_ratio", "violation_ratio", "heavy_ratio"):
        assert getattr(counts, ratio) == pytest.approx(getattr(known, ratio), abs=1e-12)


@pytest.mark.parametrize("expire", [False, True])
@pytest.mark.parametrize("rate", [180.0, 330.0])
def test_tables_with_batch_limits(rate: float, expire: bool) -> None:
    """Shares and limits drawn anew every slot, also such as wait for company; what a policy sees is the same, too."""
    times_s = trace(rate)
    system, state = simulated(PAPER_KINDS, times_s, expire, batching=True)
    replica, draw = Listening(BATCHING, REQUIREMENT_S, expire=expire).listen(), route_draws(SEED)
    rng, total = np.random.default_rng(5), Counts()
    for slot in range(int(times_s[-1]) + 5):
        weights = rng.dirichlet(np.full(4, 2.0))
        low, high = np.array(PAIRS)[rng.integers(0, len(PAIRS), 2)].T
        if slot > times_s[-1]:
            low, high = np.ones(2, dtype=np.int64), np.full(2, 5)  # whoever still waits for company is served
        run_tables(system, state, weights[None], slot + 1.0, low[None], high[None])
        replica.set_table(Action(weights, tuple(low.tolist()), tuple(high.tolist())))
        here = times_s[(times_s >= slot) & (times_s < slot + 1.0)]
        total = total + replica.serve(here.tolist(), slot + 1.0, draw)
        seen = replica.observe()
        assert seen.length.tolist() == state.queue[0, :, LENGTH].tolist()
        assert seen.in_service.tolist() == state.queue[0, :, SERVING].tolist()
    assert same(state, replica, times_s) > 1000
    same_counts(state, total)


def test_a_trained_policy_that_batches() -> None:
    """The shipped `learned-po-batch` sees the same features in both worlds, and the same becomes of its requests."""
    policy, times_s = load_policy("learned-po-batch"), trace(180.0)
    world = SlotEnvironments(ServiceModel(PAPER_KINDS, REQUIREMENT_S), trace_arrivals(times_s), 1, SEED, batching=True)
    replica, draw, total = Replica(BATCHING, REQUIREMENT_S), route_draws(SEED), Counts()
    for slot in range(int(times_s[-1]) + 5):
        inputs = world.observe()
        assert features(policy.layout, replica.observe()) == pytest.approx(inputs[0], abs=1e-6)
        tables, low, high = policy.tables(inputs)
        if slot > times_s[-1]:
            low = np.ones_like(low)
        world.step(tables, low, high)
        replica.set_table(Action(tables[0], tuple(low[0].tolist()), tuple(high[0].tolist())))
        here = times_s[(times_s >= slot) & (times_s < slot + 1.0)]
        total = total + replica.serve(here.tolist(), slot + 1.0, draw)
    same_counts(world.state, total)
    assert total.violation_ratio < 0.05


@pytest.mark.parametrize("expire", [False, True])
@pytest.mark.parametrize("rate", [60.0, 120.0, 200.0])
def test_deadline_that_chooses_its_batches(rate: float, expire: bool) -> None:
    """One instance of each variant: in the simulator all instances of a variant share the latest limit, see below."""
    times_s = trace(rate)
    kinds = (PAPER_KINDS[0], PAPER_KINDS[2])
    system, state = simulated(
        kinds, times_s, expire, batching=True, choose_limits=True, learn_trust=True, learn_rate=SERVICE_RATE
    )
    run_rule(system, state, "deadline", times_s[-1] + 5.0)
    replica = Listening(ONE_OF_EACH, REQUIREMENT_S, rule=RULES["deadline"], expire=expire).listen()
    counts = replica.serve(times_s.tolist(), times_s[-1] + 5.0, route_draws(SEED))
    assert same(state, replica, times_s) > (100 if rate > 100.0 else -1)
    same_counts(state, counts)
    assert replica.margin == pytest.approx(state.trust[0, 0].tolist(), abs=1e-9)


@pytest.mark.parametrize("rate", [180.0, 230.0, 300.0])
def test_deadline_with_several_instances_of_a_variant_is_within_what_sharing_the_limit_changes(rate: float) -> None:
    """A worker's limit is its own; the simulator has one per variant. Not request by request, but in sum."""
    times_s = trace(rate)
    system, state = simulated(
        PAPER_KINDS, times_s, False, batching=True, choose_limits=True, learn_trust=True, learn_rate=SERVICE_RATE
    )
    run_rule(system, state, "deadline", times_s[-1] + 5.0)
    replica = Replica(BATCHING, REQUIREMENT_S, rule=RULES["deadline"])
    counts = replica.serve(times_s.tolist(), times_s[-1] + 5.0, route_draws(SEED))
    known = scores_of(state.tally.sum(axis=0), ("all",))["overall"]
    assert counts.goodput_ratio == pytest.approx(known.goodput_ratio, abs=0.002)
    assert counts.violation_ratio == pytest.approx(known.violation_ratio, abs=0.002)


@pytest.mark.parametrize("batching", [False, True])
@pytest.mark.parametrize("router", ["uniform", "light-only", "heavy-only", "single-queue", "single-queue-random"])
def test_other_rules_in_the_deployments_batches_and_one_at_a_time(router: str, batching: bool) -> None:
    times_s = trace(180.0)
    system, state = simulated(PAPER_KINDS, times_s, router == "heavy-only", batching=batching)
    run_rule(system, state, router, times_s[-1] + 5.0)
    kinds = BATCHING if batching else PAPER_KINDS
    replica = Listening(kinds, REQUIREMENT_S, rule=RULES[router], expire=router == "heavy-only").listen()
    counts = replica.serve(times_s.tolist(), times_s[-1] + 5.0, route_draws(SEED))
    shared = same(state, replica, times_s)
    assert (shared > 1000) == (batching and not router.startswith("single-queue"))
    same_counts(state, counts)


@pytest.mark.parametrize("expire", [False, True])
def test_deadline_one_at_a_time(expire: bool) -> None:
    times_s = trace(230.0)
    system, state = simulated(PAPER_KINDS, times_s, expire, learn_trust=True, learn_rate=SERVICE_RATE)
    run_rule(system, state, "deadline", times_s[-1] + 5.0)
    replica = Listening(PAPER_KINDS, REQUIREMENT_S, rule=RULES["deadline"], expire=expire).listen()
    counts = replica.serve(times_s.tolist(), times_s[-1] + 5.0, route_draws(SEED))
    same(state, replica, times_s)
    same_counts(state, counts)
