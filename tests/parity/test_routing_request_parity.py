"""The learned per-request rule: numpy in serving, plain code in the simulator, one choice."""

from pathlib import Path

import numpy as np
import pytest

from policies.routing.contract import REJECT, RoutingError
from policies.routing.per_request import (
    RATE_PER_S,
    SQUARED_CV,
    WEIGHTS,
    RequestNetwork,
    first_weights,
    learn_spread,
    learned_request,
    load_weights,
    new_state,
    note_arrival,
    save_weights,
)


@pytest.mark.parametrize("n", [1, 4, 48])
def test_numpy_chooses_as_the_plain_code_does(n: int) -> None:
    rng = np.random.default_rng(n)
    weights = first_weights(rng)
    weights[64:72] = rng.normal(size=8)
    rank, accuracy = rng.integers(0, 3, n), rng.uniform(0.5, 1.0, n)
    network = RequestNetwork(weights, rank.tolist(), accuracy.tolist())
    seen = set()
    for trial in range(400):
        length = rng.integers(0, 16, n).tolist()
        capacity = (15 * (rng.random(n) < 0.9)).tolist()
        if trial % 10 == 0:
            length = [15] * n
        clear_s = (10.0 + rng.normal(0.0, 0.2, n)).tolist()
        service_s = rng.uniform(0.0, 0.1, n).tolist()
        state = [rng.random(), 0.02, 4.0, 1.0, rng.uniform(0.0, 300.0), 9.9, rng.random()]
        given = (10.0, 0.3, rng.random(), length, capacity, clear_s, service_s, rank.tolist(), state)
        chosen = network(*given)
        assert chosen == learned_request(*given, accuracy.tolist(), weights.tolist())
        seen.add(chosen)
    assert REJECT in seen or n > 1
    assert len(seen) > min(n, 4) - 1


def test_state_follows_arrivals_and_spread() -> None:
    rng = np.random.default_rng(3)
    state = new_state(0.5, 0.02)
    for now_s in np.cumsum(rng.exponential(1 / 180, 4000)):
        note_arrival(now_s, state)
        learn_spread(rng.gamma(4.0, 0.25 * 0.043), 0.043, state, 0.01)
    assert state[RATE_PER_S] == pytest.approx(180.0, rel=0.3)
    assert state[SQUARED_CV] == pytest.approx(0.25, rel=0.5)


def test_bad_weights_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    save_weights(path, np.zeros(WEIGHTS - 1), {})
    with pytest.raises(RoutingError, match="79 weights"):
        load_weights(path)
    with pytest.raises(RoutingError, match="none"):
        load_weights(path.parent / "none")
    with pytest.raises(RoutingError, match="finite"):
        RequestNetwork(np.full(WEIGHTS, np.nan), [0], [1.0])
