"""Blind agents that learn what their actions cost: expected prices by annealed best response.

Beyond the paper. Agents that cannot see each other meet on nodes, so an action's worth is its own formula value
less two expectations over what the others do: what the agent itself loses where earlier requests stand before it
(waiting, a missed deadline, no memory left), and what later requests lose where it stands before them. The others'
requests are independent of the agent's own, so both are averages over their behaviour, taken here as tables of the
agent's slack, work and memory per node, for each level of that node's system workload (which everyone sees).

`learn_prices` is Eq. 28's policy iteration with these tables as the Q-function: agents in random order, each
answering the others as updated (Eq. 33's order); a falling temperature settles who takes which node. It starts from
nothing (every agent greedy, as `heuristic`) or from `convention`'s split.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from policies.placement.contract import REJECT, ArtifactError, FloatArray, IntArray, Slots
from policies.placement.edge_network import ACCEPTED, EdgeNetwork, Options
from policies.placement.rules import BLOCK, Convention
from policies.placement.workload import Load, draw_slots

LEVELS = 4  # of a node's system workload
SECONDS = np.concatenate([[0.0], np.geomspace(0.02, 30.0, 60)])
MEGABYTES = np.arange(0.0, 4097.0, 32.0)
# An action that cannot run counts as this value; a lost request costs the penalty and about what it would have given.
IMPOSSIBLE, LOSS = -1000.0, 100.5


@dataclass(frozen=True)
class Prices:
    """Expected costs by agent (U), level, grid point and node (K)."""

    edges: FloatArray  # (LEVELS - 1,) system workload at which the levels change
    waiting: FloatArray  # (U, LEVELS, SECONDS, K) own loss at that slack, from earlier requests' work
    delaying: FloatArray  # (U, LEVELS, SECONDS, K) later requests' loss if made to wait that long
    crowded: FloatArray  # (U, MEGABYTES, K) own loss with that much memory to spare
    crowding: FloatArray  # (U, MEGABYTES, K) later requests' loss if that much memory is taken

    def less(self, network: EdgeNetwork, slots: Slots, u: int, options: Options, agent: int) -> Options:
        """Request u's options with the agent's prices taken off their values."""
        price = self.of(network, slots, u, options, agent)
        return Options(options.value - price, options.delay_s, options.feasible)

    def of(self, network: EdgeNetwork, slots: Slots, u: int, options: Options, agent: int | None = None) -> FloatArray:
        """(E, C, M, K) what request u's agent (by default the u-th) has to expect on top of the formula values."""
        agent = u if agent is None else agent
        s = np.maximum(slots.service[:, u], 0)
        node = np.arange(network.nodes)
        level = np.searchsorted(self.edges, slots.system_tflop)[:, None, None, :]
        slack_s = slots.deadline_s[:, u, None, None, None] - options.delay_s
        work_s = network.work_tflop[s][..., None] / network.graph.tflops
        slack, work = _below(SECONDS, slack_s), _above(SECONDS, work_s)
        need_mb = (network.size_factor[s] * slots.data_mb[:, u, None])[..., None] + network.variant_mb[s][:, None]
        free_mb = network.graph.memory_mb - slots.memory_used_mb
        spare_mb = free_mb[:, None, None, :] - need_mb[..., None]
        spare, need = _below(MEGABYTES, spare_mb), _above(MEGABYTES, need_mb)[..., None]
        price: FloatArray = self.waiting[agent][level, slack, node] + self.delaying[agent][level, work, node]
        price += self.crowded[agent][spare, node] + self.crowding[agent][need, node]
        return price


def _below(grid: FloatArray, values: FloatArray) -> IntArray:
    return np.clip(np.searchsorted(grid, values, side="right") - 1, 0, len(grid) - 1)


def _above(grid: FloatArray, values: FloatArray) -> IntArray:
    return np.minimum(np.searchsorted(grid, values), len(grid) - 1)


class PricedAgents:
    """`prices`: every agent takes its best formula value less its learned prices, blind to the others."""

    def __init__(self, network: EdgeNetwork, prices: Prices, name: str = "prices") -> None:
        """Keep them."""
        self.network, self.prices, self.name = network, prices, name

    def scores(self, slots: Slots, u: int) -> tuple[FloatArray, Options]:
        """(E, C, M, K) values less prices of request u before anything is placed, IMPOSSIBLE where it cannot run."""
        options = self.network.options(self.network.start(slots), slots, u)
        scores = options.value - self.prices.of(self.network, slots, u, options)
        return np.where(options.feasible, scores, IMPOSSIBLE), options

    def decide(self, slots: Slots, rng: np.random.Generator) -> IntArray:
        """Independent placements (E, U, 3); REJECT where nothing can run."""
        placements = np.empty((*slots.service.shape, 3), dtype=np.int64)
        for first in range(0, slots.slots, BLOCK):
            block = slots.take(slice(first, first + BLOCK))
            for u in range(slots.requests):
                placements[first : first + BLOCK, u] = _best(self.scores(block, u)[0])
        return placements


def _best(scores: FloatArray) -> IntArray:
    flat = scores.reshape(len(scores), -1)
    best = flat.argmax(axis=1)
    placements = np.stack(np.unravel_index(best, scores.shape[1:]), axis=1).astype(np.int64)
    placements[flat[np.arange(len(flat)), best] <= IMPOSSIBLE / 2] = REJECT
    return placements


def save_prices(path: Path, prices: Prices, network: EdgeNetwork, text: Mapping[str, Any]) -> None:
    """Write `path`.safetensors (tables) and `path`.json (what they were learned for, and `text`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.astype(np.float32) for k, v in asdict(prices).items()}, path.with_suffix(".safetensors"))
    fits = {"kind": "prices", "services": [t.name for t in network.tables], "nodes": network.nodes}
    path.with_suffix(".json").write_text(json.dumps({**fits, **text}) + "\n")


def load_prices(path: Path, network: EdgeNetwork, requests: int) -> Prices:
    """Read what `save_prices` wrote. Raises ArtifactError where it does not fit network or number of requests."""
    try:
        text = json.loads(path.with_suffix(".json").read_text())
        tables = {k: v.astype(np.float64) for k, v in load_file(path.with_suffix(".safetensors")).items()}
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error}; learn prices with --preset prices") from error
    wanted = ("prices", [t.name for t in network.tables], network.nodes)
    if (text.get("kind"), text.get("services"), text.get("nodes")) != wanted:
        raise ArtifactError(f"{path}: not prices for services {wanted[1]} on {wanted[2]} nodes")
    if tables["waiting"].shape[0] != requests:
        raise ArtifactError(
            f"{path}: learned for {tables['waiting'].shape[0]} requests per slot, asked for {requests}; "
            "train with --preset prices --set per_service=..."
        )
    return Prices(**tables)


@dataclass(frozen=True)
class PriceSettings:
    """How prices are learned; the temperature falls geometrically and is 0 in the last rounds."""

    slots: int = 3000
    rounds: int = 12
    last: int = 6  # rounds at temperature 0
    temperature: float = 0.5  # in reward; 0: none, for a start that is already settled
    temperature_end: float = 0.005
    convention: bool = False  # start from that rule's split instead of from nothing

    def temperature_at(self, round_: int) -> float:
        """The softness of the agents' answers in a round."""
        soft = self.rounds - self.last
        if self.temperature <= 0 or round_ >= soft:
            return 0.0
        return float(self.temperature * (self.temperature_end / self.temperature) ** (round_ / max(soft - 1, 1)))


def learn_prices(
    network: EdgeNetwork,
    load: Load,
    settings: PriceSettings,
    seed: int = 0,
    progress: Callable[[int, Prices], None] = lambda round_, prices: None,
) -> Prices:
    """Learn the prices of blind agents for slots of this load; `progress` gets the prices after each round."""
    rng = np.random.default_rng([seed, 7])
    slots = draw_slots(network, load, settings.slots, rng)
    agents, nodes = slots.requests, network.nodes
    seconds, megabytes = np.zeros((agents, LEVELS, len(SECONDS), nodes)), np.zeros((agents, len(MEGABYTES), nodes))
    edges = np.quantile(slots.system_tflop, np.linspace(0, 1, LEVELS + 1)[1:-1])
    prices = Prices(edges, seconds, seconds.copy(), megabytes, megabytes.copy())
    policy = PricedAgents(network, prices)
    if settings.convention:
        placements = Convention(network, load, seed, swaps=4000, slots=1000).decide(slots, rng)
    else:
        placements = policy.decide(slots, rng)
    for round_ in range(settings.rounds):
        temperature = settings.temperature_at(round_)
        for u in rng.permutation(agents):
            _learn_from_earlier(network, slots, int(u), placements, prices)
            _learn_from_later(network, slots, int(u), placements, prices)
            for first in range(0, slots.slots, BLOCK):
                block = slice(first, first + BLOCK)
                scores, _ = policy.scores(slots.take(block), int(u))
                if temperature > 0:
                    scores = scores + temperature * rng.gumbel(size=scores.shape)
                placements[block, u] = _best(scores)
        progress(round_, prices)
    return prices


def _learn_from_earlier(network: EdgeNetwork, slots: Slots, u: int, placements: IntArray, prices: Prices) -> None:
    """Tables of what agent u loses on each node by the requests before it."""
    state = network.start(slots)
    for w in range(u):
        network.place(state, slots, w, placements[:, w])
    wait_s = (state.waiting_tflop - slots.system_tflop) / network.graph.tflops
    taken_mb = state.memory_used_mb - slots.memory_used_mb
    levels = np.searchsorted(prices.edges, slots.system_tflop)
    for k in range(network.nodes):
        for level in range(LEVELS):
            waits = np.sort(wait_s[levels[:, k] == level, k])
            sums, within = np.concatenate([[0.0], np.cumsum(waits)]), np.searchsorted(waits, SECONDS, side="right")
            lost = len(waits) - within
            prices.waiting[u, level, :, k] = (sums[within] + LOSS * lost) / max(len(waits), 1)
        fits = np.searchsorted(np.sort(taken_mb[:, k]), MEGABYTES, side="right")
        prices.crowded[u, :, k] = LOSS * (slots.slots - fits) / slots.slots


def _learn_from_later(network: EdgeNetwork, slots: Slots, u: int, placements: IntArray, prices: Prices) -> None:
    """Tables of what the requests after agent u lose on each node if it stands before them."""
    without = placements.copy()
    without[:, u] = REJECT
    state = network.start(slots)
    levels = np.searchsorted(prices.edges, slots.system_tflop)
    prices.delaying[u], prices.crowding[u] = 0.0, 0.0
    rows = np.arange(slots.slots)
    counts = np.stack([(levels == level).sum(axis=0) for level in range(LEVELS)])  # (LEVELS, K)
    for w in range(slots.requests):
        node = np.maximum(placements[:, w, 2], 0)
        reason, _, _, access, transmission, compute, *_ = network.place(state, slots, w, without[:, w])
        if w <= u:
            continue
        served = reason == ACCEPTED
        slack_s = slots.deadline_s[:, w] - (access + transmission + compute)
        spare_mb = (network.graph.memory_mb - state.memory_used_mb)[rows, node]  # what is left beside request w
        for k in range(network.nodes):
            here = served & (node == k)
            for level in range(LEVELS):
                slacks = np.sort(slack_s[here & (levels[:, k] == level)])
                late = np.searchsorted(slacks, SECONDS, side="left")
                loss = LOSS * late + SECONDS * (len(slacks) - late)
                prices.delaying[u, level, :, k] += loss / max(counts[level, k], 1)
            lost = np.searchsorted(np.sort(spare_mb[here]), MEGABYTES, side="left")
            prices.crowding[u, :, k] += LOSS * lost / slots.slots
