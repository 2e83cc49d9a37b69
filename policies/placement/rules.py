"""Placement rules: deciders that nobody trained.

`random` and `heuristic` are Huang's comparison algorithms (Section VI-C). `convention` is the bar for agents that
cannot see each other: every agent owns a share of the nodes and is greedy within it. `sequential` is greedy in
arrival order and sees what was placed before; `beam` keeps several such partial placements and looks ahead;
`two-tier` does so for one service after the other.
"""

from dataclasses import dataclass, replace

import numpy as np

from policies.placement.contract import ABSENT, REJECT, FloatArray, IntArray, Slots
from policies.placement.edge_network import EdgeNetwork, NodeState, Options
from policies.placement.workload import Load, draw_slots

# Slots are handled in blocks of this many, so that the option tables stay in the cache.
BLOCK = 32


def best_options(options: Options, allowed: FloatArray | None = None) -> tuple[IntArray, FloatArray]:
    """The best feasible action per slot: placements (E, 3), REJECT where there is none, and their values (E,).

    `allowed` (E, K) is added to the values by node: 0 or -inf for a mask, or a price.
    """
    value = np.where(options.feasible, options.value, -np.inf)
    if allowed is not None:
        value = value + allowed[:, None, None, :]
    flat = value.reshape(len(value), -1)
    best = flat.argmax(axis=1)
    top = flat[np.arange(len(flat)), best]
    placements = np.stack(np.unravel_index(best, value.shape[1:]), axis=1)
    placements[~np.isfinite(top)] = REJECT
    return placements.astype(np.int64), top


class RandomRule:
    """`random`: every sub-action drawn uniformly from those that the request's service has."""

    name = "random"

    def __init__(self, network: EdgeNetwork) -> None:
        """Keep the network; nothing else is needed."""
        self.network = network

    def decide(self, slots: Slots, rng: np.random.Generator) -> IntArray:
        """Random placements (E, U, 3)."""
        services = np.maximum(slots.service, 0)
        configurations = self.network.valid.any(axis=2).sum(axis=1)[services]
        variants = self.network.valid.any(axis=1).sum(axis=1)[services]
        drawn = rng.random((*slots.service.shape, 3))
        limits = np.stack([configurations, variants, np.full_like(services, self.network.nodes)], axis=2)
        return np.where((slots.service == ABSENT)[..., None], REJECT, (drawn * limits).astype(np.int64))


class Heuristic:
    """`heuristic`: each agent takes the action with the highest reward for itself, blind to the others."""

    name = "heuristic"

    def __init__(self, network: EdgeNetwork) -> None:
        """Keep the network."""
        self.network = network

    def decide(self, slots: Slots, rng: np.random.Generator) -> IntArray:
        """Independent best placements (E, U, 3)."""
        placements = np.empty((*slots.service.shape, 3), dtype=np.int64)
        for first in range(0, slots.slots, BLOCK):
            block = slots.take(slice(first, first + BLOCK))
            state = self.network.start(block)
            for u in range(slots.requests):
                placements[first : first + BLOCK, u] = best_options(self.network.options(state, block, u))[0]
        return placements


class Sequential:
    """`sequential`: requests in arrival order, each greedy, each seeing what was placed before."""

    name = "sequential"

    def __init__(self, network: EdgeNetwork) -> None:
        """Keep the network."""
        self.network = network

    def decide(self, slots: Slots, rng: np.random.Generator) -> IntArray:
        """Greedy placements (E, U, 3)."""
        placements = np.empty((*slots.service.shape, 3), dtype=np.int64)
        for first in range(0, slots.slots, BLOCK):
            block = slots.take(slice(first, first + BLOCK))
            state = self.network.start(block)
            for u in range(slots.requests):
                chosen, _ = best_options(self.network.options(state, block, u))
                placements[first : first + BLOCK, u] = chosen
                self.network.place(state, block, u, chosen)
        return placements


class Convention:
    """`convention`: agent u owns some of the nodes and is greedy within them, so that no two agents collide.

    The split is found at construction by random swaps on slots drawn with the seed: as agents own disjoint nodes,
    a split's mean reward is a sum over agents of the best value among their own nodes.
    """

    name = "convention"

    def __init__(self, network: EdgeNetwork, load: Load, seed: int = 0, swaps: int = 1000, slots: int = 200) -> None:
        """Search the split for slots of this load. Raises PlacementError through `draw_slots`."""
        self.network = network
        rng = np.random.default_rng(seed)
        sample = draw_slots(network, load, slots, rng)
        values = node_values(network, sample)
        values = np.where(np.isfinite(values), values, network.prices.penalty)
        values[sample.service == ABSENT] = 0.0
        agents = sample.requests
        owner = rng.permutation(np.arange(max(network.nodes, agents)) % agents)[: network.nodes]
        score = _split_score(values, owner, network.prices.penalty)
        for _ in range(swaps):
            trial = owner.copy()
            a, b = rng.integers(network.nodes, size=2)
            if rng.random() < 0.5:
                trial[a], trial[b] = owner[b], owner[a]
            else:
                trial[a] = rng.integers(agents)
            trial_score = _split_score(values, trial, network.prices.penalty)
            if trial_score > score:
                owner, score = trial, trial_score
        self.owner = owner

    def decide(self, slots: Slots, rng: np.random.Generator) -> IntArray:
        """Placements (E, U, 3), each within the agent's own nodes; agents beyond the split own none."""
        placements = np.empty((*slots.service.shape, 3), dtype=np.int64)
        for first in range(0, slots.slots, BLOCK):
            block = slots.take(slice(first, first + BLOCK))
            state = self.network.start(block)
            for u in range(slots.requests):
                own = np.where(self.owner == u, 0.0, -np.inf)
                options = self.network.options(state, block, u)
                chosen, _ = best_options(options, np.tile(own, (block.slots, 1)))
                placements[first : first + BLOCK, u] = chosen
        return placements


def _split_score(values: FloatArray, owner: IntArray, penalty: float) -> float:
    agents = values.shape[1]
    mine = owner[None, :] == np.arange(agents)[:, None]  # (U, K)
    return float(np.where(mine, values, penalty).max(axis=2).mean(axis=0).sum())


def node_values(network: EdgeNetwork, slots: Slots) -> FloatArray:
    """(E, U, K) the best value of each request on each node if it were alone; -inf where it cannot run."""
    values = np.empty((*slots.service.shape, network.nodes))
    for first in range(0, slots.slots, BLOCK):
        block = slots.take(slice(first, first + BLOCK))
        state = network.start(block)
        for u in range(slots.requests):
            options = network.options(state, block, u)
            values[first : first + BLOCK, u] = np.where(options.feasible, options.value, -np.inf).max(axis=(1, 2))
    return values


@dataclass(frozen=True)
class _Beam:
    """Partial placements of one slot: B rows that agree on how many requests are placed."""

    state: NodeState
    placements: IntArray  # (B, U, 3)
    score: FloatArray  # (B,)


class Beam:
    """`beam`: the best `width` partial placements, ranked by reward so far plus an optimistic rest.

    The rest is, for every later request, its best node alone less the waiting that the placed requests add there
    (an upper bound apart from shared memory cost and conflicts among the later ones).
    """

    name = "beam"

    def __init__(self, network: EdgeNetwork, width: int = 32) -> None:
        """Keep the network and the width."""
        self.network, self.width = network, width

    def decide(self, slots: Slots, rng: np.random.Generator) -> IntArray:
        """Placements (E, U, 3), slot by slot."""
        return np.stack([self.decide_one(slots.take(slice(e, e + 1))) for e in range(slots.slots)])

    def decide_one(self, slot: Slots) -> IntArray:
        """Placements (U, 3) of one slot (E = 1)."""
        network, requests = self.network, slot.requests
        alone = np.maximum(node_values(network, slot)[0], network.prices.penalty)  # (U, K)
        alone[slot.service[0] == ABSENT] = 0.0
        beam = _Beam(network.start(slot), np.full((1, requests, 3), REJECT, dtype=np.int64), np.zeros(1))
        rows = slot.take(np.zeros(self.width, dtype=np.int64))
        for u in range(requests):
            if slot.service[0, u] == ABSENT:
                continue
            beam = self._extend(beam, slot, rows.take(slice(0, len(beam.score))), u, alone[u + 1 :])
        best: IntArray = beam.placements[int(beam.score.argmax())]
        return best

    def _extend(self, beam: _Beam, slot: Slots, rows: Slots, u: int, later: FloatArray) -> _Beam:
        """Place request u in every row in the most promising ways and keep the best rows."""
        network = self.network
        options = network.options(beam.state, rows, u)
        value = np.where(options.feasible, options.value, -np.inf)
        work_s = network.work_tflop[slot.service[0, u]][..., None] / network.graph.tflops  # (C, M, K)
        count, nodes = len(beam.score), network.nodes
        # Per row and node: the best action for itself, and the best one that also counts what it makes one later
        # request wait; and once per row the rejection.
        flats = [(value - weight * work_s).reshape(count, -1, nodes).argmax(axis=1) for weight in (0.0, 1.0)]
        action = np.concatenate([*flats, np.zeros((count, 1), dtype=np.int64)], axis=1)  # (B, 2K + 1)
        node = np.concatenate([np.arange(nodes), np.arange(nodes), [0]])
        own = value.reshape(count, -1, nodes)[np.arange(count)[:, None], action, node[None, :]]
        own[:, -1] = network.prices.penalty
        own[:, nodes : 2 * nodes][flats[0] == flats[1]] = -np.inf  # the same action twice
        added_s = work_s.reshape(-1, nodes)[action, node[None, :]]
        added_s[:, -1] = 0.0
        waiting_s = (beam.state.waiting_tflop - slot.system_tflop) / network.graph.tflops  # (B, K)
        rest = _optimistic_rest(later, waiting_s, node, added_s)
        total = (beam.score[:, None] + own + rest).ravel()
        keep = np.argsort(-total, kind="stable")[: self.width]
        keep = keep[np.isfinite(total[keep])]
        parent, choice = np.divmod(keep, action.shape[1])
        chosen = np.stack(
            [*np.divmod(action[parent, choice], network.variants), np.broadcast_to(node[choice], keep.shape)], axis=1
        )
        chosen[choice == 2 * nodes] = REJECT
        placements = beam.placements[parent]
        placements[:, u] = chosen
        old = beam.state
        state = NodeState(old.waiting_tflop[parent], old.memory_used_mb[parent], old.deployed[parent])
        network.place(state, slot.take(np.zeros(len(keep), dtype=np.int64)), u, chosen)
        return _Beam(state, placements, beam.score[parent] + own.ravel()[keep])


class TwoTier:
    """`two-tier`: one agent per service allots all of its service's requests (the paper's other future work).

    The services' agents act in turn: each searches its own requests' joint placement by `beam`, seeing the nodes as
    the agents before it leave them and nothing of the services after it.
    """

    name = "two-tier"

    def __init__(self, network: EdgeNetwork, width: int = 4) -> None:
        """Keep the network; `width` is the agents' beam."""
        self.network, self.beam = network, Beam(network, width)

    def decide(self, slots: Slots, rng: np.random.Generator) -> IntArray:
        """Placements (E, U, 3), slot by slot."""
        return np.stack([self.decide_one(slots.take(slice(e, e + 1))) for e in range(slots.slots)])

    def decide_one(self, slot: Slots) -> IntArray:
        """Placements (U, 3) of one slot (E = 1)."""
        state = self.network.start(slot)
        placements = np.full((slot.requests, 3), REJECT, dtype=np.int64)
        for service in np.unique(slot.service[slot.service != ABSENT]):
            mine = slot.service == service
            part = replace(
                slot,
                service=np.where(mine, service, ABSENT),
                system_tflop=state.waiting_tflop.copy(),
                memory_used_mb=state.memory_used_mb.copy(),
                deployed=state.deployed.copy(),
            )
            placements[mine[0]] = self.beam.decide_one(part)[mine[0]]
            for u in np.flatnonzero(mine[0]):
                self.network.place(state, slot, int(u), placements[None, u])
        return placements


def _optimistic_rest(later: FloatArray, waiting_s: FloatArray, node: IntArray, added_s: FloatArray) -> FloatArray:
    """(B, J) sum over later requests of their best value if candidate j adds `added_s` on its node."""
    if not len(later):
        return np.zeros_like(added_s)
    now = later[None] - waiting_s[:, None, :]  # (B, L, K)
    # Adding work to one node lowers only that node's value: the new best is the best elsewhere or that node's.
    order = np.argsort(now, axis=2)
    first = np.take_along_axis(now, order[:, :, -1:], 2)
    second = np.take_along_axis(now, order[:, :, -2:-1], 2) if now.shape[2] > 1 else np.full_like(first, -np.inf)
    elsewhere = np.where(order[:, :, -1:] == node, second, first)  # (B, L, J)
    rest: FloatArray = np.maximum(elsewhere, now[:, :, node] - added_s[:, None, :]).sum(axis=1)
    return rest
