"""The vectorised edge network against a slow one written formula by formula, and by properties."""

from dataclasses import replace

import numpy as np
import pytest

from policies.placement.contract import ABSENT, REJECT, IntArray, Slots
from policies.placement.edge_network import ACCEPTED, EdgeNetwork, NodeState, PlacementError, Prices
from policies.placement.graph import EdgeGraph, eua16
from policies.placement.tables import shipped_tables
from policies.placement.workload import Load, draw_slots

TABLES = shipped_tables()
GRAPH = eua16()
NETWORK = EdgeNetwork(GRAPH, TABLES)


def random_placements(slots: Slots, rng: np.random.Generator, nodes: int = 16) -> IntArray:
    """Random joint actions; few nodes make collisions and sharing common."""
    shape = slots.service.shape
    variants = np.where(slots.service == 0, 4, 3)
    placements = np.stack(
        [
            rng.integers(16, size=shape),
            (rng.random(shape) * variants).astype(np.int64),
            rng.integers(nodes, size=shape),
        ],
        axis=2,
    )
    placements[rng.random(shape) < 0.03] = REJECT
    return placements


def shortest_path(graph: EdgeGraph, start: int, end: int) -> list[tuple[int, int]]:
    """Links of the path with the least sum of 1/bandwidth (Bellman and Ford on scalars)."""
    width = {}
    for (a, b), w in zip(graph.links.tolist(), graph.bandwidth_mbps.tolist(), strict=True):
        width[a, b] = width[b, a] = w
    best: dict[int, tuple[float, list[tuple[int, int]]]] = {start: (0.0, [])}
    for _ in range(graph.nodes):
        for (a, b), w in width.items():
            if a not in best:
                continue
            seconds, links = best[a][0] + 1.0 / w, [*best[a][1], (a, b)]
            known = best.get(b, (np.inf, []))
            fewer = abs(seconds - known[0]) <= 1e-13 and len(links) < len(known[1])
            if seconds < known[0] - 1e-13 or fewer:
                best[b] = (seconds, links)
    return best[end][1]


PATHS = {(v, k): shortest_path(GRAPH, v, k) for v in range(16) for k in range(16)}
WIDTH = {frozenset(link): w for link, w in zip(GRAPH.links.tolist(), GRAPH.bandwidth_mbps.tolist(), strict=True)}


def slow_slot(slots: Slots, e: int, placements: IntArray, bill_inferences: bool) -> dict[str, list[float]]:
    """One slot by the paper's formulas, one request after another, in plain Python."""
    psi_comp, psi_mem, psi_rou = 0.0003, 0.016 / 1024, 0.002
    h_sys = slots.system_tflop[e].tolist()
    h_req = [0.0] * 16
    used = slots.memory_used_mb[e].tolist()
    deployed: set[tuple[int, int, int]] = set()
    found: dict[str, list[float]] = {"accuracy": [], "delay": [], "cost": [], "accepted": []}
    for u in range(slots.requests):
        s = int(slots.service[e, u])
        i, j, k = (int(x) for x in placements[e, u])
        if s == ABSENT:
            for values in found.values():
                values.append(0.0)
            continue
        if k == REJECT:
            figures = (-100.0, 0.0, 0.0, 0.0)
        else:
            table, v = TABLES[s], int(slots.local[e, u])
            d_mb = float(table.size_factor[i] * slots.data_mb[e, u])  # Eq. 2
            d_megabit = 8.0 * d_mb
            access = d_megabit / float(GRAPH.uplink_mbps[v])  # Eq. 3
            transmission = sum(d_megabit / WIDTH[frozenset(link)] for link in PATHS[v, k])  # Eq. 4
            work = float(table.tflop[j]) * int(table.inferences[i])
            compute = (work + h_req[k] + h_sys[k]) / float(GRAPH.tflops[k])  # Eq. 5
            delay = access + transmission + compute  # Eq. 6
            memory = 0.0 if (s, j, k) in deployed else float(table.memory_mb[j])
            routing = sum(psi_rou * d_megabit for _ in PATHS[v, k])  # Eq. 8
            billed = work if bill_inferences else float(table.tflop[j])
            computing = psi_comp * billed / float(GRAPH.tflops[k]) + psi_mem * d_mb  # Eq. 10
            fits = used[k] + memory + d_mb <= float(GRAPH.memory_mb[k])  # Eq. 14
            if delay <= float(slots.deadline_s[e, u]) and fits:  # Eq. 15
                low, high = float(table.accuracy.min()), float(table.accuracy.max())
                standard = (float(table.accuracy[i, j]) - low) / (high - low)  # Eq. 19
                figures = (standard, delay, routing + computing + psi_mem * memory, 1.0)  # Eqs. 9 and 11
                h_req[k] += work
                used[k] += memory + d_mb
                deployed.add((s, j, k))
            else:
                figures = (-100.0, 0.0, 0.0, 0.0)  # Eq. 20
        for values, figure in zip(found.values(), figures, strict=True):
            values.append(figure)
    return found


@pytest.mark.parametrize(("per_service", "bill"), [(4, False), (5, True)])
def test_matches_the_formulas_on_thousands_of_joint_actions(per_service: int, bill: bool) -> None:
    network = EdgeNetwork(GRAPH, TABLES, Prices(bill_inferences=bill))
    rng = np.random.default_rng(per_service)
    load = Load(per_service=per_service, mixed=True, present=0.9)
    outcomes = 0
    for nodes in (3, 16):
        slots = draw_slots(network, load, 1000, rng)
        placements = random_placements(slots, rng, nodes)
        outcome = network.evaluate(slots, placements)
        for e in range(slots.slots):
            slow = slow_slot(slots, e, placements, bill)
            np.testing.assert_allclose(outcome.standard_accuracy[e], slow["accuracy"], rtol=0, atol=1e-9)
            np.testing.assert_allclose(outcome.delay_s[e], slow["delay"], rtol=0, atol=1e-9)
            np.testing.assert_allclose(outcome.cost_usd[e], slow["cost"], rtol=0, atol=1e-9)
            assert outcome.accepted[e].tolist() == [bool(x) for x in slow["accepted"]]
            reward = sum(slow["accuracy"]) - sum(slow["delay"]) - sum(slow["cost"])  # Eq. 21
            assert abs(outcome.reward[e] - reward) < 1e-9
            outcomes += 1
        assert 0.2 < outcome.accepted.mean() < 0.95  # both sides of every constraint were met
    assert outcomes == 2000


def test_options_agree_with_placing() -> None:
    rng = np.random.default_rng(3)
    slots = draw_slots(NETWORK, Load(mixed=True), 200, rng)
    placements = random_placements(slots, rng, nodes=4)
    state = NETWORK.start(slots)
    for u in range(slots.requests):
        options = NETWORK.options(state, slots, u)
        i, j, k = np.maximum(placements[:, u], 0).T
        rows = np.arange(slots.slots)
        columns = NETWORK.place(state, slots, u, placements[:, u])
        accepted = columns[0] == ACCEPTED
        asked = placements[:, u, 2] != REJECT
        assert (options.feasible[rows, i, j, k][asked] == accepted[asked]).all()
        share = columns[2] - sum(columns[3:])
        np.testing.assert_allclose(options.value[rows, i, j, k][accepted], share[accepted], atol=1e-9)


def test_adding_bandwidth_never_increases_a_delay() -> None:
    rng = np.random.default_rng(4)
    slots = draw_slots(NETWORK, Load(), 300, rng)
    slots = replace(slots, deadline_s=np.full_like(slots.deadline_s, 1e6))  # all accepted: delays compare
    placements = np.maximum(random_placements(slots, rng), 0)
    before = NETWORK.evaluate(slots, placements)
    for link in range(0, len(GRAPH.links), 7):
        wider = GRAPH.bandwidth_mbps.copy()
        wider[link] *= 3.0
        after = EdgeNetwork(replace(GRAPH, bandwidth_mbps=wider), TABLES).evaluate(slots, placements)
        both = before.accepted & after.accepted
        assert (after.delay_s[both] <= before.delay_s[both] + 1e-12).all()


def one_slot(services: list[int]) -> Slots:
    count = len(services)
    return Slots(
        service=np.array([services]),
        local=np.zeros((1, count), dtype=np.int64),
        deadline_s=np.full((1, count), 30.0),
        data_mb=np.full((1, count), 5.0),
        system_tflop=np.full((1, 16), 0.2),
        memory_used_mb=np.full((1, 16), 100.0),
        deployed=np.zeros((1, 16, 7), dtype=bool),
    )


def test_sharing_a_variant_never_costs_more_memory_than_two() -> None:
    slots = one_slot([0, 0])
    for a in range(4):
        shared = NETWORK.evaluate(slots, np.array([[[3, a, 2], [3, a, 2]]]))
        assert shared.memory_usd[0, 1] == 0.0
        for b in range(4):
            two = NETWORK.evaluate(slots, np.array([[[3, a, 2], [3, b, 2]]]))
            assert shared.memory_usd.sum() <= two.memory_usd.sum() + 1e-15


def test_a_rejected_request_leaves_no_trace() -> None:
    slots = one_slot([0, 1])
    alone = NETWORK.evaluate(slots, np.array([[[REJECT] * 3, [15, 1, 4]]]))
    slots.deadline_s[0, 0] = 1e-3
    missed = NETWORK.evaluate(slots, np.array([[[0, 0, 4], [15, 1, 4]]]))
    assert missed.delay_s[0, 1] == alone.delay_s[0, 1]
    assert missed.cost_usd[0, 0] == 0.0
    assert missed.reward[0] == pytest.approx(-100.0 + missed.standard_accuracy[0, 1] - missed.delay_s[0, 1], abs=0.2)


def test_deployed_variants_of_earlier_waves_are_shared() -> None:
    slots = one_slot([1])
    slots.deployed[0, 4, 4 + 1] = True
    assert NETWORK.evaluate(slots, np.array([[[15, 1, 4]]])).memory_usd[0, 0] == 0.0
    assert NETWORK.evaluate(slots, np.array([[[15, 2, 4]]])).memory_usd[0, 0] > 0.0


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("data_mb", np.nan, "data_mb"),
        ("data_mb", np.inf, "data_mb"),
        ("data_mb", 0.0, "data_mb"),
        ("deadline_s", -1.0, "deadline_s"),
        ("service", 2, "service"),
        ("local", 16, "local"),
        ("system_tflop", np.nan, "system_tflop"),
        ("memory_used_mb", -1.0, "memory_used_mb"),
    ],
)
def test_nonsense_is_refused_by_name(key: str, value: float, says: str) -> None:
    slots = one_slot([0])
    getattr(slots, key)[0, 0] = value
    with pytest.raises(PlacementError, match=says):
        NETWORK.evaluate(slots, np.array([[[0, 0, 0]]]))


@pytest.mark.parametrize("placement", [[16, 0, 0], [0, 4, 0], [0, 0, 16], [0, -2, 0]])
def test_placements_that_do_not_exist_are_refused(placement: list[int]) -> None:
    with pytest.raises(PlacementError, match="placements"):
        NETWORK.evaluate(one_slot([0]), np.array([[placement]]))


def test_a_variant_of_the_other_service_is_refused() -> None:
    with pytest.raises(PlacementError, match="service does not have"):
        NETWORK.evaluate(one_slot([1]), np.array([[[0, 3, 0]]]))


def test_state_is_not_shared_with_the_slots() -> None:
    slots = one_slot([0])
    state: NodeState = NETWORK.start(slots)
    NETWORK.place(state, slots, 0, np.array([[3, 0, 0]]))
    assert state.waiting_tflop[0, 0] > slots.system_tflop[0, 0]
    assert not slots.deployed.any()
