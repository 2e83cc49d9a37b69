"""What an edge request's answer says: what was found, what was decided, how long each step took and what it cost.

Costs and accuracy are the environment's own figures (Huang, Eqs. 1 and 8 to 10), on what was observed: the adapted
size, and whether the variant had to be loaded. Delays come from the nodes: emulated ones by the graph's capacities,
real ones measured, never in one figure together.
"""

from typing import Final, NamedTuple

import msgspec
import numpy as np

from gateway.edge_request import Choice, EdgeAnswered, EdgeRequest, Net
from policies.placement.edge_network import Outcome as NetworkOutcome
from policies.placement.window import Request, window_slots
from protocol.edge_records import EdgeReply
from protocol.outcomes import Outcome

_NO_DEADLINE_S: Final = 1e9


class ConfigurationView(msgspec.Struct, frozen=True):
    """What the local node made of the bytes: the configuration's name and settings (resolution, jpeg_quality, …)."""

    name: str
    settings: dict[str, float]


class DecisionView(msgspec.Struct, frozen=True):
    """What was decided, by which policy, and where: "scheduler" or, without one and for second choices, "gateway".

    `entry`: the node that took the request in, its local one unless that is dead. The predictions are the environment's
    at that moment (Eqs. 6 and 11); what came of them stands in `delay_s` and `cost_usd` of the answer.
    """

    configuration: ConfigurationView
    variant: str
    node: str
    entry: str
    policy: str
    decided_by: str
    second_choice: bool
    predicted_delay_s: float
    predicted_cost_usd: float


class RealDelay(msgspec.Struct, frozen=True):
    """Measured spans in seconds. `window` and `decide` at the gateway, the others at the nodes; `total`: in all."""

    window: float
    decide: float
    decode: float
    adapt: float
    forward: float
    load: float
    wait: float
    compute: float
    total: float


class DelayView(msgspec.Struct, frozen=True):
    """Emulated delay in seconds (Huang, Eqs. 3 to 6): `total` = access + transmission + queue + compute.

    Waiting for the wireless uplink and for links, which the paper does not have, stands beside.
    """

    access: float
    transmission: float
    queue: float
    compute: float
    total: float
    uplink_queue: float
    link_queue: float
    real: RealDelay


class CostView(msgspec.Struct, frozen=True):
    """US dollars (Huang, Eqs. 8 to 11): memory is paid by the request that had the variant loaded."""

    routing: float
    memory: float
    compute: float
    total: float


class ObservedView(msgspec.Struct, frozen=True):
    """What the environment's figures follow from.

    The bytes that were sent on, the work that was ahead at the decided node when the request came there (H of Eq. 5),
    and whether its variant had to be loaded for it.
    """

    adapted_mb: float
    waiting_tflop: float
    new_instance: bool


class EdgeAnswer(msgspec.Struct, frozen=True):
    """Everything beside the detections or tracks themselves. `emulated`: whether capacities of the graph were."""

    request_id: str
    service: str
    outcome: str
    decision: DecisionView
    delay_s: DelayView
    cost_usd: CostView
    expected_accuracy: float
    observed: ObservedView
    emulated: bool


class Account(NamedTuple):
    """One answered request in the environment's figures."""

    accuracy: float
    routing_usd: float
    memory_usd: float
    compute_usd: float


def account_of(answered: EdgeAnswered) -> Account:
    """Eqs. 1 and 8 to 10 on what was observed."""
    outcome = environment_on(answered.request, answered.choice, answered.reply)
    figures = (outcome.accuracy, outcome.routing_usd, outcome.memory_usd, outcome.compute_usd)
    return Account(*(float(figure[0, 0]) for figure in figures))


def environment_on(request: EdgeRequest, choice: Choice, reply: EdgeReply) -> NetworkOutcome:
    """What the environment says of one placed request, given the adapted size, the backlog and whether it was loaded.

    Its arrays hold one slot with one request.
    """
    network, service = request.net.network, request.net.service_of[request.service]
    i, j, k = choice.placement.configuration, choice.placement.variant, choice.placement.node
    data_mb = reply.adapted_mb / float(network.size_factor[service, i]) or request.data_mb
    waiting, used = np.zeros(network.nodes), np.zeros(network.nodes)
    waiting[k] = reply.waiting_tflop
    deployed = np.zeros((network.nodes, network.variant_columns), dtype=bool)
    deployed[k, int(network.first_variant[service]) + j] = not reply.new_instance
    asked = Request(request.service, choice.entry, _NO_DEADLINE_S, data_mb)
    slots = window_slots(network, [asked], waiting, used, deployed)
    return network.evaluate(slots, np.array([[[i, j, k]]]))


def edge_answer(answered: EdgeAnswered, outcome: Outcome, account: Account, total_s: float) -> bytes:
    """The answer's JSON: the node's own object, with the request's story appended."""
    request, choice, reply = answered.request, answered.choice, answered.reply
    spent, net = reply.spent, request.net
    emulated_s = (
        spent.emulated_access_s,
        spent.emulated_transmission_s,
        spent.emulated_queue_s,
        spent.emulated_compute_s,
    )
    story = EdgeAnswer(
        request_id=request.id,
        service=request.service,
        outcome=outcome.name,
        decision=_decision(net, request.service, choice),
        delay_s=DelayView(
            *emulated_s,
            total=sum(emulated_s),
            uplink_queue=spent.emulated_uplink_queue_s,
            link_queue=spent.emulated_link_queue_s,
            real=RealDelay(
                window=request.window_s,
                decide=request.decide_s,
                decode=spent.decode_s,
                adapt=spent.adapt_s,
                forward=spent.forward_s,
                load=spent.load_s,
                wait=spent.wait_s,
                compute=spent.compute_s,
                total=total_s,
            ),
        ),
        cost_usd=CostView(
            routing=account.routing_usd,
            memory=account.memory_usd,
            compute=account.compute_usd,
            total=account.routing_usd + account.memory_usd + account.compute_usd,
        ),
        expected_accuracy=account.accuracy,
        observed=ObservedView(reply.adapted_mb, reply.waiting_tflop, reply.new_instance),
        emulated=net.edge.emulate.uplink or net.edge.emulate.links or net.edge.emulate.compute == "table",
    )
    told = msgspec.json.encode(story)
    return answered.payload[:-1] + b"," + told[1:] if len(answered.payload) > 2 else told


def _decision(net: Net, service: str, choice: Choice) -> DecisionView:
    table, placement = net.network.tables[net.service_of[service]], choice.placement
    i = placement.configuration
    names = net.network.graph.names
    return DecisionView(
        configuration=ConfigurationView(table.configurations[i], dict(table.settings[i])),
        variant=table.variants[placement.variant],
        node=names[placement.node],
        entry=names[choice.entry],
        policy=choice.policy,
        decided_by=choice.by,
        second_choice=choice.second,
        predicted_delay_s=placement.access_s + placement.transmission_s + placement.compute_s,
        predicted_cost_usd=placement.cost_usd,
    )
