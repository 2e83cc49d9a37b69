"""Live windows: node statuses in, placements out, held to the environment itself and to sums done by hand."""

import numpy as np
import pytest

from policies.placement.contract import REJECT, IntArray, Slots
from policies.placement.edge_network import EdgeNetwork
from policies.placement.evaluate import build_policy
from policies.placement.graph import eua16
from policies.placement.live import HANDLING_S, Loads, OnTheWay, loads_of, place_window, without_variant
from policies.placement.rules import Sequential
from policies.placement.tables import shipped_tables
from policies.placement.window import Request, window_slots
from policies.placement.workload import Load
from protocol.edge_records import EdgeRequest, NodeStatus, Placement

NETWORK = EdgeNetwork(eua16(), shipped_tables())
RNG = np.random.default_rng(0)
DETECTION = [EdgeRequest("detection", node, 2.0, 2.0 + node / 4) for node in range(6)]


def idle_nodes(node: int = 0, status: NodeStatus | None = None) -> dict[int, NodeStatus]:
    """All sixteen up, with 100 MB in use; one may say something else."""
    statuses = {k: NodeStatus(NETWORK.graph.names[k], memory_used_mb=100.0) for k in range(16)}
    return statuses | ({node: status} if status is not None else {})


def loads(without: dict[int, str] | None = None, node: int = 0, status: NodeStatus | None = None) -> Loads:
    """Of those nodes."""
    return loads_of(NETWORK, idle_nodes(node, status), 4, without or {})


def test_a_window_is_decided_as_the_environment_decides_it() -> None:
    placed = place_window(NETWORK, Sequential(NETWORK), DETECTION, loads(), 8, RNG)
    asked = [Request(one.service, one.node, one.deadline_s, one.data_mb) for one in DETECTION]
    slots = window_slots(NETWORK, asked, np.zeros(16), np.full(16, 100.0))
    decided = Sequential(NETWORK).decide(slots, RNG)
    outcome = NETWORK.evaluate(slots, decided)
    for u, placement in enumerate(placed):
        assert (placement.configuration, placement.variant, placement.node) == tuple(decided[0, u])
        assert placement.accuracy == pytest.approx(outcome.accuracy[0, u], abs=1e-12)
        delay_s = placement.access_s + placement.transmission_s + placement.compute_s
        assert delay_s == pytest.approx(outcome.delay_s[0, u], abs=1e-12)
        assert placement.cost_usd == pytest.approx(outcome.cost_usd[0, u], abs=1e-12)


def test_further_waves_see_what_the_earlier_ones_left() -> None:
    """`sequential` sees earlier requests in any case: waves of one must decide just as one wave of six."""
    whole = place_window(NETWORK, Sequential(NETWORK), DETECTION, loads(), 8, RNG)
    assert place_window(NETWORK, Sequential(NETWORK), DETECTION, loads(), 1, RNG) == whole
    # `heuristic` is blind within a wave: in one wave later requests ignore the earlier, in six they do not.
    heuristic = build_policy("heuristic", NETWORK, Load())
    crowd = [replace_deadline(1.0)] * 6
    whole = place_window(NETWORK, Sequential(NETWORK), crowd, loads(), 8, RNG)
    assert place_window(NETWORK, heuristic, crowd, loads(), 1, RNG) == whole
    assert place_window(NETWORK, heuristic, crowd, loads(), 8, RNG) != whole


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (None, "is not there"),
        (NodeStatus("n", draining=True), "is draining"),
        (NodeStatus("n", length=4), "has a full queue"),
        (NodeStatus("n", length=3), ""),
    ],
)
def test_closed_nodes_are_not_chosen(status: NodeStatus | None, why: str) -> None:
    statuses = idle_nodes()
    chosen = place_window(NETWORK, Sequential(NETWORK), DETECTION[:1], loads(), 8, RNG)[0].node
    del statuses[chosen]
    if status is not None:
        statuses[chosen] = status
    here = loads_of(NETWORK, statuses, 4, {})
    assert here.closed == ({chosen: why} if why else {})
    again = place_window(NETWORK, Sequential(NETWORK), DETECTION[:1], here, 8, RNG)[0]
    assert (again.node == chosen) == (not why)
    assert again.node != REJECT


def test_nodes_to_avoid_are_closed_by_name() -> None:
    assert loads({2: "is away", 5: "is dull"}).closed == {2: "is away", 5: "is dull"}


def test_refusals_say_why_and_whether_time_lacked() -> None:
    late, missing = (
        place_window(NETWORK, Sequential(NETWORK), [replace_deadline(0.01)], here, 4, RNG)[0]
        for here in (loads(), loads_of(NETWORK, {}, 4, {}))
    )
    assert late.late
    assert "deadline of 0.01 s" in late.reason
    assert (late.configuration, late.variant, late.node) == (REJECT, REJECT, REJECT)
    assert "16 of 16 nodes cannot be chosen" in missing.reason
    nowhere = place_window(NETWORK, Sequential(NETWORK), DETECTION[:1], loads_of(NETWORK, {}, 4, {}), 4, RNG)[0]
    assert not nowhere.late
    assert "memory" in nowhere.reason


def replace_deadline(deadline_s: float) -> EdgeRequest:
    """A detection request with so much time left."""
    return EdgeRequest("detection", 0, deadline_s, 2.0)


class Always:
    """A policy that chooses one thing."""

    name = "always"

    def __init__(self, *placement: int) -> None:
        self.placement = placement

    def decide(self, slots: Slots, rng: np.random.Generator) -> IntArray:
        """The same for all."""
        return np.tile(np.array(self.placement), (slots.slots, slots.requests, 1))


def test_a_policy_that_insists_on_a_closed_node_is_told_so() -> None:
    refused = place_window(NETWORK, Always(0, 0, 7), DETECTION[:1], loads({7: "is shut"}), 4, RNG)[0]
    assert refused.reason == f"node {NETWORK.graph.names[7]}, which the policy chose, is shut"


def test_loaded_variants_cost_no_memory_and_idle_ones_make_room_under_pressure() -> None:
    names, memory_mb = NETWORK.tables[0].variants, NETWORK.variant_mb[0]
    roomy = int(NETWORK.graph.memory_mb.argmax())
    total_mb = float(NETWORK.graph.memory_mb[roomy])
    there = NodeStatus("n", deployed=names[:1], idle=names[:1], memory_used_mb=float(memory_mb[0]))
    relaxed = loads(None, roomy, there)
    assert relaxed.deployed[roomy, 0]
    assert relaxed.memory_used_mb[roomy] == memory_mb[0]
    pressed = loads(None, roomy, replace_memory(there, total_mb - 1.0))
    assert not pressed.deployed[roomy, 0]
    assert pressed.memory_used_mb[roomy] == pytest.approx(total_mb - 1.0 - memory_mb[0])
    pinned = loads(None, roomy, NodeStatus("n", deployed=names[:1], memory_used_mb=total_mb - 1.0))
    assert pinned.deployed[roomy, 0]
    assert pinned.memory_used_mb[roomy] == total_mb - 1.0


def replace_memory(status: NodeStatus, used_mb: float) -> NodeStatus:
    """The same with other memory in use."""
    return NodeStatus(status.node, deployed=status.deployed, idle=status.idle, memory_used_mb=used_mb)


def test_what_is_on_its_way_counts_until_it_has_arrived() -> None:
    moving = OnTheWay(NETWORK)
    request = EdgeRequest("tracking", 4, 9.0, 8.0)
    placement = Placement(2, 1, 6, access_s=0.5, transmission_s=0.25)
    moving.add([request, request, request], [placement, Placement(reason="no"), placement], 10.0)
    before = loads()
    seen = moving.onto(before, 10.7)
    table = NETWORK.tables[1]
    work = 2 * table.tflop[1] * table.inferences[2]
    data_mb = 2 * table.size_factor[2] * 8.0
    assert seen.waiting_tflop[6] == pytest.approx(work)
    assert seen.memory_used_mb[6] == pytest.approx(100.0 + data_mb + table.memory_mb[1])  # the variant once
    assert seen.deployed[6].nonzero()[0].tolist() == [len(NETWORK.tables[0].variants) + 1]
    assert before.waiting_tflop[6] == 0.0
    assert not before.deployed.any()
    elsewhere = np.arange(16) != 6
    assert (seen.waiting_tflop[elsewhere] == 0).all()
    assert moving.onto(before, 10.75 + HANDLING_S + 1e-9) is before


def test_agents_by_position_get_their_own_requests() -> None:
    """`convention`'s agents own nodes by position: each request of a mixed window stays within its own agent's."""
    convention = build_policy("convention", NETWORK, Load(per_service=4))
    window = [
        EdgeRequest("tracking", 3, 25.0, 6.0),
        EdgeRequest("detection", 5, 2.0, 2.0),
        EdgeRequest("tracking", 9, 25.0, 6.0),
    ]
    placed = place_window(NETWORK, convention, window, loads(), 4, RNG)
    owner = convention.owner  # type: ignore[attr-defined]
    assert [int(owner[one.node]) for one in placed if one.node != REJECT] == [
        agent for agent, one in zip((4, 0, 5), placed, strict=True) if one.node != REJECT
    ]
    assert any(one.node != REJECT for one in placed)


def test_deciding_leaves_the_loads_as_they_are() -> None:
    here = loads({2: "is shut"})
    place_window(NETWORK, Sequential(NETWORK), DETECTION, here, 2, RNG)
    assert (here.memory_used_mb == 100.0).all()
    assert (here.waiting_tflop == 0.0).all()
    assert not here.deployed.any()


def test_a_variant_can_be_ruled_out_for_one_service() -> None:
    best = place_window(NETWORK, Sequential(NETWORK), DETECTION[:1], loads(), 4, RNG)[0].variant
    reduced = without_variant(NETWORK, 0, best)
    assert place_window(reduced, Sequential(reduced), DETECTION[:1], loads(), 4, RNG)[0].variant != best
    assert NETWORK.valid[0, :, best].any()
    assert (reduced.valid[1] == NETWORK.valid[1]).all()
