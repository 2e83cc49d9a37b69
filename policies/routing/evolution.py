"""Learning `learned-request` by evolution strategies: noise on the weights, the simulator's goodput as the judge.

A gradient through single requests would need to say which of thousands of choices lost one answer; a whole run's
goodput does not care. Each generation tries `PAIRS` random directions both ways on the same arrivals and service
times (Salimans et al. 2017, antithetic pairs), over all `SCENARIOS`, and steps with Adam.

    python -m policies.routing.evolution --minutes 9 --out runs/request
    python -m policies.routing.evolution --compare policies/pretrained/learned-request.json
"""

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from policies.routing.contract import FloatArray
from policies.routing.per_request import OUT, PAST, WEIGHTS, first_weights, load_weights, save_weights
from policies.routing.presets import paper_service
from policies.routing.queueing_model import PERIODIC, ArrivalModel, build, paper_arrivals
from policies.routing.scores import Scores, scores_of
from policies.routing.simulator import run_rule

PAIRS = 12
SIGMA = 0.1
PROMISE = 0.02


@dataclass(frozen=True, slots=True)
class Scenario:
    """What the paper's service may meet: random service times, several gateways with stale views, batches."""

    law: str
    cv: float
    gateways: int = 1
    batching: bool = False


SCENARIOS = (
    Scenario("gamma", 0.1),
    Scenario("gamma", 0.3),
    Scenario("gamma", 0.5),
    Scenario("gamma", 1.0),
    Scenario("lognormal", 1.0),
    Scenario("gamma", 0.3, gateways=4),
    Scenario("gamma", 1.0, gateways=8),
    Scenario("gamma", 0.3, batching=True),
    Scenario("gamma", 1.0, batching=True),
)


UNSEEN = (
    Scenario("deterministic", 0.0),
    Scenario("lognormal", 0.5),
    Scenario("gamma", 0.5, gateways=2),
    Scenario("gamma", 0.0, gateways=8),
    Scenario("gamma", 0.5, gateways=8),
    Scenario("deterministic", 0.0, batching=True),
    Scenario("gamma", 0.5, gateways=4, batching=True),
)
"""Scenarios that training never met."""


def short_cycles() -> ArrivalModel:
    """The paper's rates in cycles of 5 s and 60 s: both phases count alike, and many changes fit into a short run."""
    return ArrivalModel(PERIODIC, ("bursty", "normal"), rate=np.array([180.0, 10.0]), hold_s=np.array([5.0, 60.0]))


def trial(
    scenario: Scenario,
    arrivals: ArrivalModel,
    *,
    environments: int,
    duration_s: float,
    seed: int,
    weights: FloatArray | None = None,
) -> Scores:
    """50:50 scores of `learned-request` with these weights, or of `deadline` (weights None), on one set of traces."""
    system, state = build(
        replace(paper_service(), law=scenario.law, cv=scenario.cv),
        arrivals,
        environments,
        seed,
        gateways=scenario.gateways,
        refresh_s=0.05,
        bounce=scenario.gateways > 1,
        batching=scenario.batching,
        choose_limits=scenario.batching,
        learn_trust=True,
        learn_rate=0.02,
        weights=weights,
    )
    run_rule(system, state, "deadline" if weights is None else "learned-request", duration_s)
    return scores_of(state.tally.sum(axis=0), arrivals.phase_names)["overall_50_50"]


def fitness(weights: FloatArray | None, seed: int, duration_s: float = 260.0) -> float:
    """Mean goodput over the scenarios, less ten times what violations exceed the promise by."""
    total = 0.0
    for scenario in SCENARIOS:
        s = trial(scenario, short_cycles(), environments=4, duration_s=duration_s, seed=seed, weights=weights)
        total += s.goodput_ratio - 10.0 * max(0.0, s.violation_ratio - PROMISE)
    return total / len(SCENARIOS)


def compare(weights: FloatArray, slots: int, seed: int) -> list[tuple[Scenario, Scores, Scores]]:
    """(scenario, `deadline`, `learned-request`) on the paper's workload, both on the same traces."""
    found = []
    for scenario in SCENARIOS + UNSEEN:
        deadline, learned = (
            trial(scenario, paper_arrivals(), environments=8, duration_s=slots / 8.0, seed=seed, weights=w)
            for w in (None, weights)
        )
        found.append((scenario, deadline, learned))
    return found


def print_comparison(weights: FloatArray, slots: int, seed: int) -> None:
    """Prints `compare` as a table: goodput and violations 50:50, percent."""
    print("law            cv  gateways  batches    deadline         learned-request")
    for s, rule, learned in compare(weights, slots, seed):
        line = f"{s.law:14s}{s.cv:4.1f}{s.gateways:8d}  {'yes' if s.batching else 'no':>7s}"
        for one in (rule, learned):
            line += f"   {100 * one.goodput_ratio:6.2f} ({100 * one.violation_ratio:5.2f})"
        print(line + ("" if s in SCENARIOS else "   not trained on"), flush=True)


def steps() -> FloatArray:
    """How far each weight moves at a time: those past the hidden layer carry the forecast and are large."""
    scale = np.ones(WEIGHTS)
    scale[:OUT] = 0.5
    scale[PAST:] = 4.0
    return scale


class Evolution:
    """A search: `generation` improves `weights`; `save` and `load` keep it. Seeded by `seed`."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.weights = first_weights(self.rng)
        self.done = 0
        self._first, self._second = np.zeros(WEIGHTS), np.zeros(WEIGHTS)

    def generation(self, rate: float) -> float:
        """One step of Adam along the estimated gradient; returns the mean fitness of the pairs."""
        self.done += 1
        noise = self.rng.normal(size=(PAIRS, WEIGHTS))
        seed = int(self.rng.integers(1 << 31))
        scale = steps()
        found = np.array(
            [[fitness(self.weights + sign * SIGMA * scale * way, seed) for sign in (1.0, -1.0)] for way in noise]
        )
        gain = found[:, 0] - found[:, 1]
        gradient = (gain / (np.abs(gain).mean() + 1e-9)) @ noise / PAIRS
        self._first = 0.9 * self._first + 0.1 * gradient
        self._second = 0.99 * self._second + 0.01 * gradient**2
        mean = self._first / (1.0 - 0.9**self.done)
        spread = np.sqrt(self._second / (1.0 - 0.99**self.done)) + 1e-8
        self.weights = self.weights + rate * scale * mean / spread
        return float(found.mean())

    def save(self, path: Path) -> None:
        """Write a checkpoint from which `load` goes on."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {
            "done": self.done,
            "weights": self.weights.tolist(),
            "first": self._first.tolist(),
            "second": self._second.tolist(),
            "rng": self.rng.bit_generator.state,
        }
        path.write_text(json.dumps(kept))

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        kept = json.loads(path.read_text())
        self.done = kept["done"]
        self.weights = np.array(kept["weights"])
        self._first, self._second = np.array(kept["first"]), np.array(kept["second"])
        self.rng.bit_generator.state = kept["rng"]


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description="Train learned-request by evolution strategies.")
    parser.add_argument("--minutes", type=float, default=9.0, help="processor time to spend")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.03, help="step of Adam, in units of each weight's scale")
    parser.add_argument("--out", type=Path, default=None, help="folder for checkpoint.json and weights.json")
    parser.add_argument("--compare", type=Path, default=None, help="only compare these weights with deadline")
    parser.add_argument("--slots", type=int, default=100_000, help="slots per scenario of --compare")
    options = parser.parse_args()
    if options.compare is not None:
        print_comparison(load_weights(options.compare), options.slots, options.seed)
        return
    if options.out is None:
        parser.error("--out FOLDER (to train) or --compare WEIGHTS is needed")
    search = Evolution(options.seed)
    checkpoint = options.out / "checkpoint.json"
    if checkpoint.exists():
        search.load(checkpoint)
    began = time.process_time()
    print(
        f"deadline {fitness(None, 99, 2600.0):.5f}, at the start {fitness(search.weights, 99, 2600.0):.5f}", flush=True
    )
    while time.process_time() - began < 60.0 * options.minutes:
        tried = search.generation(options.rate)
        if search.done % 5 == 0:
            left_s = 60.0 * options.minutes - (time.process_time() - began)
            print(f"{search.done:5d} generations, pairs {tried:.5f}, {left_s / 60.0:.1f} min left", flush=True)
            search.save(checkpoint)
    search.save(checkpoint)
    print(f"at the end {fitness(search.weights, 99, 2600.0):.5f}", flush=True)
    training = {"seed": options.seed, "generations": search.done, "pairs": PAIRS, "sigma": SIGMA}
    save_weights(options.out / "weights.json", search.weights, training)


if __name__ == "__main__":
    main()
