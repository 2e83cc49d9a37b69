"""The true value of every action of one agent, the others' actions held fixed or answering.

As nothing carries over from slot to slot, Eq. 26's soft Q-function is the slot's reward, which the network model
computes exactly. Training that uses it instead of a critic (`guided.py`) has no approximation error and no sampling
noise in the agent's own action: all C x M x K of them are valued at once.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np

from policies.placement.contract import REJECT, BoolArray, FloatArray, IntArray, Slots
from policies.placement.edge_network import EdgeNetwork, NodeState, Options


@dataclass(frozen=True)
class Later:
    """What a later request looked at when it decided: its best value per node, in the sampled course of the slot."""

    values: FloatArray  # (E, K), a large negative number where it cannot run


def with_others_fixed(network: EdgeNetwork, slots: Slots, placements: IntArray, agent: int) -> FloatArray:
    """(E, C, M, K) the slot's reward (Eq. 21) for every action of `agent`, all other placements as given.

    An infeasible action counts as the penalty, as Eq. 20 has it. Earlier requests are not touched by the agent's
    action; a later one is only if it sits on the same node, so that only that node's column is played through again.
    """
    state = network.start(slots)
    rows = np.arange(slots.slots)
    earlier = np.zeros(slots.slots)
    for u in range(agent):
        earlier += _reward(network.place(state, slots, u, placements[:, u]))
    options = network.options(state, slots, agent)
    total = np.where(options.feasible, options.value, network.prices.penalty) + earlier[:, None, None, None]
    service = np.maximum(slots.service[:, agent], 0)
    # What the agent's action leaves on its node, by action: work, memory, and (through `own`) its variant.
    work = np.where(options.feasible, network.work_tflop[service][..., None], 0.0)
    columns = np.minimum(
        network.first_variant[service][:, None] + np.arange(network.variants), network.variant_columns - 1
    )
    there = state.deployed[rows[:, None], :, columns]  # (E, M, K)
    data_mb = network.size_factor[service] * slots.data_mb[:, agent, None]
    memory = np.where(there, 0.0, network.variant_mb[service][:, :, None])[:, None] + data_mb[:, :, None, None]
    memory = np.where(options.feasible, memory, 0.0)
    own = columns[:, :, None] == np.arange(network.variant_columns)  # (E, M, V)
    deployed = np.broadcast_to(
        own[:, None, :, None, :] & options.feasible[..., None], (*total.shape, network.variant_columns)
    ).copy()
    for u in range(agent + 1, slots.requests):
        k = np.maximum(placements[:, u, 2], 0)
        # The node of request u, once per action of the agent (E, C, M), as nodes of its own.
        wait = state.waiting_tflop[rows, k][:, None, None] + work[rows, :, :, k]
        used = state.memory_used_mb[rows, k][:, None, None] + memory[rows, :, :, k]
        have = state.deployed[rows, k][:, None, None, :] | deployed[rows, :, :, k]
        changed = _replay(network, slots, u, placements[:, u], wait, used, have)
        work[rows, :, :, k] = changed.wait - state.waiting_tflop[rows, k][:, None, None]
        memory[rows, :, :, k] = changed.used - state.memory_used_mb[rows, k][:, None, None]
        deployed[rows, :, :, k] = changed.have
        base_wait, base_used = state.waiting_tflop[rows, k].copy(), state.memory_used_mb[rows, k].copy()
        base = _reward(network.place(state, slots, u, placements[:, u]))
        # The baseline state moved on: the columns hold differences to it.
        work[rows, :, :, k] -= (state.waiting_tflop[rows, k] - base_wait)[:, None, None]
        memory[rows, :, :, k] -= (state.memory_used_mb[rows, k] - base_used)[:, None, None]
        total += base[:, None, None, None]
        total[rows, :, :, k] += changed.reward - base[:, None, None]
    return total


@dataclass(frozen=True)
class _Changed:
    reward: FloatArray
    wait: FloatArray
    used: FloatArray
    have: BoolArray


def _replay(
    network: EdgeNetwork,
    slots: Slots,
    u: int,
    placement: IntArray,
    wait: FloatArray,
    used: FloatArray,
    have: FloatArray,
) -> _Changed:
    """Place request u once per action of another agent: nodes' figures come as (E, C, M), a virtual slot each."""
    shape = wait.shape
    repeat = np.repeat(np.arange(slots.slots), shape[1] * shape[2])
    k = np.maximum(placement[:, 2], 0)[repeat]
    flat = np.arange(len(repeat))
    state = NodeState(
        np.zeros((len(repeat), network.nodes)),
        np.zeros((len(repeat), network.nodes)),
        np.zeros((len(repeat), network.nodes, network.variant_columns), dtype=bool),
    )
    state.waiting_tflop[flat, k], state.memory_used_mb[flat, k] = wait.ravel(), used.ravel()
    state.deployed[flat, k] = have.reshape(len(repeat), -1)
    part = slots.columns(u, u + 1).take(repeat)
    reward = _reward(network.place(state, part, 0, placement[repeat]))
    return _Changed(
        reward.reshape(shape),
        state.waiting_tflop[flat, k].reshape(shape),
        state.memory_used_mb[flat, k].reshape(shape),
        state.deployed[flat, k].reshape(*shape, -1),
    )


def _reward(columns: tuple[IntArray | FloatArray, ...]) -> FloatArray:
    """One request's share of Eq. 21 from `EdgeNetwork.place`'s columns."""
    return cast(FloatArray, columns[2] - sum(columns[3:]))


def with_others_answering(
    network: EdgeNetwork, slots: Slots, agent: int, placement: IntArray, options: Options, later: list[Later]
) -> FloatArray:
    """(E, C, M, K) own value plus what later requests lose, if each answers with its best remaining node.

    First order: a later request's values are those it had in the sampled course, given back the agent's sampled work
    and charged with the alternative's; later requests do not answer each other again, and memory is left out.
    """
    rows = np.arange(slots.slots)
    service = np.maximum(slots.service[:, agent], 0)
    total = np.where(options.feasible, options.value, network.prices.penalty)
    work_s = network.work_tflop[service][..., None] / network.graph.tflops
    k = np.maximum(placement[:, 2], 0)
    placed = placement[:, 2] != REJECT
    own_s = np.where(placed, work_s[rows, np.maximum(placement[:, 0], 0), np.maximum(placement[:, 1], 0), k], 0.0)
    for other in later:
        without = other.values.copy()
        without[rows, k] += own_s
        order = np.argsort(without, axis=1)
        best, second = without[rows, order[:, -1]], without[rows, order[:, -2]]
        elsewhere = np.where(order[:, -1:] == np.arange(network.nodes), second[:, None], best[:, None])
        left = np.maximum(elsewhere[:, None, None, :], without[:, None, None, :] - work_s)
        total += np.where(options.feasible, left - best[:, None, None, None], 0.0)
    return cast(FloatArray, total)
