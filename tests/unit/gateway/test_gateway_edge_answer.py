"""The environment's figures of one answered request, by hand from Huang's equations and what the node reported."""

import json

import numpy as np
import pytest

from gateway.edge_answer import account_of, edge_answer, environment_on
from gateway.edge_request import Choice, EdgeAnswered, EdgeRequest, Net
from policies.placement.deployed import network_of
from protocol.edge_records import EdgeReply, NodeStatus, Placement
from protocol.outcomes import Attempt, Outcome
from tests.fakes.edge_gateway import edge_spec

ADAPTED_MB, WAITING_TFLOP = 0.4, 3.0


@pytest.mark.parametrize("new_instance", [True, False])
def test_figures_follow_from_the_adapted_size_the_work_ahead_and_the_load(new_instance: bool) -> None:
    """From north by way of middle to south, under a configuration that keeps less than the whole."""
    net = Net(edge_spec(), network_of(edge_spec()))
    service = net.service_of["detection"]
    table, graph = net.network.tables[service], net.network.graph
    configuration, variant = min(
        (float(table.size_factor[i]), int(i), int(j)) for i, j in np.argwhere(net.network.valid[service])
    )[1:]
    assert table.size_factor[configuration] < 1.0
    request = EdgeRequest("1", net, "detection", 0, 0.0, 9.0, [b"x" * 1000], "image/jpeg")
    choice = Choice(Placement(configuration, variant, 2), 0, "beam", "scheduler", second=False)
    reply = EdgeReply(
        Attempt.OK,
        NodeStatus("south"),
        adapted_mb=ADAPTED_MB,
        waiting_tflop=WAITING_TFLOP,
        new_instance=new_instance,
    )
    figures = environment_on(request, choice, reply)
    megabits, tflops = 8.0 * ADAPTED_MB, float(graph.tflops[2])
    assert float(figures.access_s[0, 0]) == pytest.approx(megabits / graph.uplink_mbps[0])
    assert float(figures.transmission_s[0, 0]) == pytest.approx(megabits / 400.0 + megabits / 200.0)
    work_tflop = table.inferences[configuration] * table.tflop[variant]
    assert float(figures.compute_s[0, 0]) == pytest.approx((WAITING_TFLOP + work_tflop) / tflops)
    account, per_mb = account_of(EdgeAnswered(request, choice, reply, b"{}")), 0.016 / 1024
    assert account.accuracy == table.accuracy[configuration, variant]
    assert account.routing_usd == pytest.approx(megabits * 0.002 * 2)
    assert account.memory_usd == pytest.approx(per_mb * table.memory_mb[variant] if new_instance else 0.0)
    assert account.compute_usd == pytest.approx(0.0003 * table.tflop[variant] / tflops + per_mb * ADAPTED_MB)


@pytest.mark.parametrize("found", [{}, {"detections": []}])
def test_the_nodes_answer_and_its_story_are_one_object(found: dict[str, object]) -> None:
    net = Net(edge_spec(), network_of(edge_spec()))
    request = EdgeRequest("1", net, "detection", 0, 0.0, 9.0, [b"x"], "image/jpeg")
    choice = Choice(Placement(0, 0, 2), 0, "beam", "scheduler", second=False)
    reply = EdgeReply(Attempt.OK, NodeStatus("south"), adapted_mb=0.1)
    answered = EdgeAnswered(request, choice, reply, json.dumps(found).encode())
    told = json.loads(edge_answer(answered, Outcome.LATE, account_of(answered), 0.5))
    assert found.items() <= told.items()
    assert (told["request_id"], told["outcome"], told["delay_s"]["real"]["total"]) == ("1", "LATE", 0.5)
