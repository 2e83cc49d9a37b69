"""The exact optimum of one slot: CP-SAT on the joint problem (Huang's Eqs. 12 to 18), started from `beam`.

Nothing that is placed in a slot changes the next one, so this is a true ceiling for every policy. Before the
solver starts, actions that cannot be part of a better solution are dropped: those whose own value, with every other
request at its best, stays below the warm start, and those dominated on the same node and variant by an action with
no less value, no more delay, work and data. Figures are rounded to a millionth of a reward unit or second, always
to the safe side, so a solution of the model is feasible in the network and optimal to within U / 1e6.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from policies.placement.contract import ABSENT, REJECT, FloatArray, IntArray, Slots
from policies.placement.edge_network import EdgeNetwork
from policies.placement.rules import Beam

SCALE = 1_000_000


@dataclass(frozen=True)
class ExactAnswer:
    """One slot's answer: the best placements known, their reward and how far off they can be."""

    placements: IntArray  # (U, 3)
    reward: float
    bound: float  # no placement of this slot earns more
    proved: bool  # true: the placements are optimal; false: the time ran out first


@dataclass(frozen=True)
class _Actions:
    """The actions of one request that may still be part of a better solution."""

    placement: IntArray  # (n, 3)
    value: FloatArray  # (n,) own reward, without memory cost
    delay_s: FloatArray
    work_s: FloatArray  # what it makes later requests on its node wait
    data_mb: FloatArray


# How much of the time left after the model is built the solver is given: its presolve overruns a little.
SOLVER_SHARE = 0.7


class OutOfTimeError(Exception):
    """The model was not built in time; the warm start is the answer."""


class Exact:
    """`exact` (and its live form: a short `limit_s`, few actions per request): anytime, never worse than its start."""

    def __init__(
        self,
        network: EdgeNetwork,
        limit_s: float = 60.0,
        workers: int = 1,
        beam_width: int = 64,
        name: str = "exact",
        clock: Callable[[], float] = time.perf_counter,
        most_actions: int | None = None,
    ) -> None:
        """`limit_s` covers warm start, model and search; the clock only measures that span.

        `most_actions` keeps only that many of each request's actions, those of highest own value, beside the warm
        start's, so that a model for milliseconds is built in milliseconds; the answer is then not proved.
        """
        if not limit_s > 0:
            raise ValueError(f"limit_s is {limit_s}; the solver needs some seconds")
        self.network, self.limit_s, self.workers, self.name = network, limit_s, workers, name
        self.beam, self.clock, self.most_actions = Beam(network, beam_width), clock, most_actions

    def decide(self, slots: Slots, rng: np.random.Generator) -> IntArray:
        """Placements (E, U, 3), slot by slot."""
        return np.stack([self.solve(slots.take(slice(e, e + 1))).placements for e in range(slots.slots)])

    def solve(self, slot: Slots) -> ExactAnswer:
        """The best placements of one slot (E = 1) that the time allows."""
        began = self.clock()
        self.network.check_slots(slot)
        warm = self.beam.decide_one(slot)
        reward = float(self.network.evaluate(slot, warm[None]).reward[0])
        actions, bound = self._actions(slot, reward)
        if bound <= reward + 1e-9:
            return ExactAnswer(warm, reward, reward, True)
        kept = (
            actions
            if self.most_actions is None
            else [_likeliest(a, self.most_actions, warm[u]) for u, a in enumerate(actions)]
        )
        whole = sum(len(a.value) for a in kept) == sum(len(a.value) for a in actions)
        try:
            model = _Model(self.network, slot, kept, warm, lambda: self.clock() - began > self.limit_s)
        except OutOfTimeError:
            return ExactAnswer(warm, reward, bound, False)
        left_s = SOLVER_SHARE * (self.limit_s - (self.clock() - began))
        if left_s <= 0.001:
            return ExactAnswer(warm, reward, bound, False)
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = self.workers
        solver.parameters.max_time_in_seconds = left_s
        status = solver.solve(model.model)
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            if whole:
                bound = min(bound, solver.best_objective_bound / SCALE + slot.requests / SCALE)
            found = model.placements(solver)
            found_reward = float(self.network.evaluate(slot, found[None]).reward[0])
            if found_reward > reward:
                warm, reward = found, found_reward
        return ExactAnswer(warm, reward, max(bound, reward), whole and status == cp_model.OPTIMAL)

    def _actions(self, slot: Slots, incumbent: float) -> tuple[list[_Actions], float]:
        """Per request what may still improve on the incumbent, and a first bound on the reward."""
        network, state = self.network, self.network.start(slot)
        price = network.prices.memory_usd_per_mb
        best = np.zeros(slot.requests)
        listed: list[_Actions | None] = []
        for u in range(slot.requests):
            service = int(slot.service[0, u])
            if service == ABSENT:
                listed.append(None)
                continue
            options = network.options(state, slot, u)
            c, m, k = np.nonzero(options.feasible[0])
            new = ~state.deployed[0, k, network.first_variant[service] + m]
            value = options.value[0, c, m, k] + price * network.variant_mb[service, m] * new
            listed.append(
                _Actions(
                    np.stack([c, m, k], axis=1),
                    value,
                    options.delay_s[0, c, m, k],
                    network.work_tflop[service, c, m] / network.graph.tflops[k],
                    network.size_factor[service, c] * slot.data_mb[0, u],
                )
            )
            best[u] = max(value.max(initial=-np.inf), network.prices.penalty)
        bound = float(best.sum())
        empty = _Actions(np.empty((0, 3), dtype=np.int64), *(np.empty(0) for _ in range(4)))
        kept = [
            empty if a is None else _undominated(_filter(a, a.value > incumbent - (bound - best[u]) - 1e-9))
            for u, a in enumerate(listed)
        ]
        return kept, bound


def _filter(actions: _Actions, keep: FloatArray | IntArray) -> _Actions:
    return _Actions(
        actions.placement[keep], actions.value[keep], actions.delay_s[keep], actions.work_s[keep], actions.data_mb[keep]
    )


def _likeliest(actions: _Actions, most: int, start: IntArray) -> _Actions:
    """The `most` actions of highest own value, and the warm start's, so that the solver has a solution at once."""
    keep = (actions.placement == start).all(axis=1)
    keep[np.argsort(-actions.value, kind="stable")[:most]] = True
    return _filter(actions, keep)


def _undominated(actions: _Actions) -> _Actions:
    """Drop an action if another of the same node and variant is as good in all four figures (first one kept)."""
    place, n = actions.placement, len(actions.value)
    same = (place[:, None, 1] == place[None, :, 1]) & (place[:, None, 2] == place[None, :, 2])
    better = same & (actions.value[None] >= actions.value[:, None])
    for figure in (actions.delay_s, actions.work_s, actions.data_mb):
        better &= figure[None] <= figure[:, None]
    mutual = better & better.T
    better &= ~mutual | (np.arange(n)[None] < np.arange(n)[:, None])
    np.fill_diagonal(better, False)
    return _filter(actions, ~better.any(axis=1))


class _Model:
    """The CP-SAT model of one slot over the surviving actions."""

    def __init__(
        self, network: EdgeNetwork, slot: Slots, actions: list[_Actions], warm: IntArray, late: Callable[[], bool]
    ) -> None:
        """Build it; raises OutOfTimeError as soon as `late` says so."""
        self.model, self.late = cp_model.CpModel(), late
        self.network, self.slot, self.actions = network, slot, actions
        self.chosen = [[self.model.new_bool_var("") for _ in a.value] for a in actions]
        self.objective: list[cp_model.LinearExpr] = []
        for u in range(slot.requests):
            if slot.service[0, u] == ABSENT:
                continue
            rejected = self.model.new_bool_var("")
            self.model.add_exactly_one([*self.chosen[u], rejected])
            self.objective.append(rejected * _floor(network.prices.penalty))
            for variable, value in zip(self.chosen[u], actions[u].value, strict=True):
                self.objective.append(variable * _floor(float(value)))
            for variable, placement in zip(self.chosen[u], actions[u].placement, strict=True):
                self.model.add_hint(variable, bool((placement == warm[u]).all()))
        self._waiting()
        self._memory()
        if late():
            raise OutOfTimeError
        self.model.maximize(cp_model.LinearExpr.sum(self.objective))

    def placements(self, solver: cp_model.CpSolver) -> IntArray:
        """The solution's placements (U, 3)."""
        found = np.full((self.slot.requests, 3), REJECT, dtype=np.int64)
        for u, variables in enumerate(self.chosen):
            for a, variable in enumerate(variables):
                if solver.boolean_value(variable):
                    found[u] = self.actions[u].placement[a]
        return found

    def _waiting(self) -> None:
        """Eq. 5: whoever is served later on a node waits for the earlier ones; Eq. 15 with that wait."""
        for u in range(1, self.slot.requests):
            if self.late():
                raise OutOfTimeError
            own = self.actions[u]
            if not len(own.value):
                continue
            waits, deadline = [], int(np.floor(self.slot.deadline_s[0, u] * SCALE))
            for k in np.unique(own.placement[:, 2]):
                here = [self.chosen[u][a] for a in np.flatnonzero(own.placement[:, 2] == k)]
                terms, longest = [], 0
                for earlier in range(u):
                    other = self.actions[earlier]
                    at = np.flatnonzero(other.placement[:, 2] == k)
                    steps = [_ceil(float(other.work_s[a])) for a in at]
                    terms += [self.chosen[earlier][a] * step for a, step in zip(at, steps, strict=True)]
                    longest += max(steps, default=0)
                if not terms:
                    continue
                wait = self.model.new_int_var(0, longest, "")
                self.model.add(wait >= cp_model.LinearExpr.sum(terms) - longest * (1 - cp_model.LinearExpr.sum(here)))
                waits.append(wait)
                self.objective.append(-1 * wait)
            if waits:
                delays = [x * _ceil(float(d)) for x, d in zip(self.chosen[u], own.delay_s, strict=True)]
                self.model.add(cp_model.LinearExpr.sum([*delays, *waits]) <= deadline)

    def _memory(self) -> None:
        """Eqs. 9, 13 and 14: one instance per variant and node, shared; what is placed has to fit."""
        network, slot = self.network, self.slot
        users: dict[tuple[int, int], list[cp_model.IntVar]] = {}
        data: dict[int, list[tuple[cp_model.IntVar, int]]] = {}
        for u, own in enumerate(self.actions):
            service = int(slot.service[0, u])
            for variable, (_, m, k), size in zip(self.chosen[u], own.placement, own.data_mb, strict=True):
                users.setdefault((int(k), int(network.first_variant[service] + m)), []).append(variable)
                data.setdefault(int(k), []).append((variable, _ceil(float(size))))
        sizes = np.concatenate(
            [mb[: len(t.variants)] for mb, t in zip(network.variant_mb, network.tables, strict=True)]
        )
        used: dict[int, list[cp_model.LinearExpr]] = {}
        for (k, column), variables in users.items():
            if slot.deployed[0, k, column]:
                continue
            instance = self.model.new_bool_var("")
            for variable in variables:
                self.model.add_implication(variable, instance)
            self.objective.append(instance * -_ceil(network.prices.memory_usd_per_mb * float(sizes[column])))
            used.setdefault(k, []).append(instance * _ceil(float(sizes[column])))
        for k, entries in data.items():
            free = int(np.floor((network.graph.memory_mb[k] - slot.memory_used_mb[0, k]) * SCALE))
            self.model.add(sum(variable * size for variable, size in entries) + sum(used.get(k, [])) <= free)


def _floor(figure: float) -> int:
    return int(np.floor(figure * SCALE))


def _ceil(figure: float) -> int:
    return int(np.ceil(figure * SCALE))
