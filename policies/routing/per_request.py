"""`learned-request`: a small network in the place of the `deadline` rule, asked about every request.

It sees what the live gateway knows at that moment and nothing else: the forecasts that `deadline` sees, and what the
gateway has noticed itself: how fast requests come, how much service times vary, the margin learned from misses. One
network looks at each instance alone, so it serves any number of instances. What it gives is read as the logit of
"this request would be in time there"; the request goes where accuracy times that probability is largest.

`learned_request` is plain code over arrays, compiled by the simulator; `RequestNetwork` is the same in numpy, for
serving (a parity test holds them together). Trained by `evolution.py`.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from policies.routing.contract import REJECT, FloatArray, Indexable, RoutingError
from policies.routing.estimation import FIRST_TAIL

FEATURES, HIDDEN = 7, 8
WEIGHTS = HIDDEN * FEATURES + HIDDEN + HIDDEN + FEATURES + 1
"""Hidden weights [HIDDEN, FEATURES], hidden biases, output weights, weights past the hidden layer, output bias."""

BIAS = HIDDEN * FEATURES
OUT = BIAS + HIDDEN
PAST = OUT + HIDDEN
OUT_BIAS = PAST + FEATURES
"""Where each part of the weights begins."""

RATE_PER_S, LAST_S, SQUARED_CV = 4, 5, 6
"""Places in a decider's state, [margin, promise, tail, spent, ...]: the first four as in `estimation.py`."""
RATE_SPAN_S = 0.5
"""Arrivals are counted with weights that fall by 1/e in this time."""


def new_state(margin: float, promise: float) -> list[float]:
    """A fresh state, to be given to the rule in place of the margin."""
    return [margin, promise, FIRST_TAIL, 1.0, 0.0, 0.0, 0.0]


def note_arrival(now_s: float, state: Indexable) -> None:
    """A request has come: the recent arrival rate follows."""
    state[RATE_PER_S] = state[RATE_PER_S] * math.exp((state[LAST_S] - now_s) / RATE_SPAN_S) + 1.0 / RATE_SPAN_S
    state[LAST_S] = now_s


def learn_spread(observed_s: float, expected_s: float, state: Indexable, rate: float) -> None:
    """A service time was observed: the squared coefficient of variation follows."""
    off = observed_s / expected_s - 1.0
    state[SQUARED_CV] += rate * (off * off - state[SQUARED_CV])


def learned_request(
    now_s: float,
    budget_s: float,
    draw: float,
    length: Indexable,
    capacity: Indexable,
    clear_s: Indexable,
    service_s: Indexable,
    rank: Indexable,
    state: Indexable,
    accuracy: Indexable,
    weights: Indexable,
) -> int:
    """The instance with the largest accuracy x learned probability of being in time; full ones come last.

    Arguments as in `rules.py`, with the state of this file in place of the margin. Ties go to the first after a
    drawn start, so that gateways with one stale view do not all pick the same.
    """
    n = len(capacity)
    load = math.log(1.0 + state[RATE_PER_S] * budget_s / n) / 3.0
    cv = min(math.sqrt(state[SQUARED_CV]), 2.0)
    lightest = 1
    for i in range(n):
        if rank[i] > lightest:
            lightest = rank[i]
    chosen = REJECT
    best = 0.0
    full = REJECT
    full_s = 0.0
    i = int(draw * n)
    for _ in range(n):
        if i >= n:
            i = 0
        if capacity[i] > 0:
            finish_s = max(clear_s[i], now_s) + service_s[i]
            if length[i] >= capacity[i]:
                if full < 0 or finish_s < full_s:
                    full = i
                    full_s = finish_s
            else:
                x0 = min((finish_s - now_s) / budget_s, 2.0)
                x1 = service_s[i] / budget_s
                x2 = min(length[i] / 8.0, 2.0)
                x3 = rank[i] / lightest
                out = weights[OUT_BIAS] + weights[PAST] * x0 + weights[PAST + 1] * x1 + weights[PAST + 2] * x2
                out += weights[PAST + 3] * x3 + weights[PAST + 4] * load + weights[PAST + 5] * cv
                out += weights[PAST + 6] * state[0]
                for h in range(HIDDEN):
                    k = FEATURES * h
                    a = weights[BIAS + h] + weights[k] * x0 + weights[k + 1] * x1 + weights[k + 2] * x2
                    a += weights[k + 3] * x3 + weights[k + 4] * load + weights[k + 5] * cv + weights[k + 6] * state[0]
                    out += weights[OUT + h] * math.tanh(a)
                value = accuracy[i] / (1.0 + math.exp(-out))
                if chosen < 0 or value > best:
                    chosen = i
                    best = value
        i += 1
    return chosen if chosen >= 0 else full


def first_weights(rng: np.random.Generator) -> FloatArray:
    """Weights that behave much like `deadline`: in time if the forecast is within the margin; hidden layer unused."""
    weights = np.zeros(WEIGHTS)
    weights[:BIAS] = rng.normal(0.0, 0.5, BIAS)
    weights[PAST], weights[OUT_BIAS - 1], weights[OUT_BIAS] = -20.0, 20.0, 3.0
    return weights


class RequestNetwork:
    """The rule in numpy, with the arguments of `rules.py`, for a fixed set of instances."""

    def __init__(self, weights: FloatArray, rank: Indexable, accuracy: Indexable) -> None:
        if weights.shape != (WEIGHTS,) or not np.isfinite(weights).all():
            raise RoutingError(f"weights of shape {weights.shape}: {WEIGHTS} finite numbers are needed")
        self._hidden = np.ascontiguousarray(weights[:BIAS].reshape(HIDDEN, FEATURES).T)
        self._hidden_bias, self._out, self._past = weights[BIAS:OUT], weights[OUT:PAST], weights[PAST:OUT_BIAS]
        self._bias = float(weights[OUT_BIAS])
        self._accuracy = np.asarray(accuracy, dtype=np.float64)
        self._x = np.zeros((len(self._accuracy), FEATURES))
        self._x[:, 3] = np.asarray(rank) / max(1, *rank)

    def __call__(
        self, now_s: float, budget_s: float, draw: float, length: Indexable, capacity: Indexable, clear_s: Indexable,
        service_s: Indexable, rank: Indexable, state: Indexable,
    ) -> int:  # fmt: skip
        """The instance for a request, or REJECT."""
        x, n = self._x, len(capacity)
        held, places = np.array(length), np.array(capacity)
        added_s = np.array(service_s)
        sojourn_s = np.maximum(np.array(clear_s) - now_s, 0.0) + added_s
        open_ = (places > 0) & (held < places)
        if not open_.any():
            if not places.any():
                return REJECT
            return int(np.where(places > 0, sojourn_s, np.inf).argmin())
        x[:, 0] = np.minimum(sojourn_s / budget_s, 2.0)
        x[:, 1] = added_s / budget_s
        x[:, 2] = np.minimum(held / 8.0, 2.0)
        x[:, 4] = math.log(1.0 + state[RATE_PER_S] * budget_s / n) / 3.0
        x[:, 5] = min(math.sqrt(state[SQUARED_CV]), 2.0)
        x[:, 6] = state[0]
        out = self._bias + x @ self._past + np.tanh(x @ self._hidden + self._hidden_bias) @ self._out
        value = np.where(open_, self._accuracy / (1.0 + np.exp(-out)), -1.0)
        start = int(draw * n)
        return (int(np.concatenate((value[start:], value[:start])).argmax()) + start) % n


def save_weights(path: Path, weights: FloatArray, training: dict[str, Any]) -> None:
    """Write weights and how they were trained as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"router": "learned-request", "training": training, "weights": weights.tolist()}))


def load_weights(path: Path) -> FloatArray:
    """The weights float64[80] of a file; an error says what is wrong with it."""
    try:
        weights = np.array(json.loads(path.read_text())["weights"], dtype=np.float64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RoutingError(f"{path}: no weights of learned-request ({error})") from error
    if weights.shape != (WEIGHTS,) or not np.isfinite(weights).all():
        raise RoutingError(f"{path}: {weights.size} weights, some perhaps not finite; {WEIGHTS} finite ones are needed")
    return weights
