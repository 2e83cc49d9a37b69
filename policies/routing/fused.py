"""Actor and critic forwards, and the gradient of Algorithm 1's losses, as compiled passes (numba; training only).

What torch's automatic differentiation would compute, block of rows by block of rows, so that everything between
features and gradients stays in the processor's cache, and without the zeros of the features. The tests compare it
with torch.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.routing.towers import Floats, Rows, Scratch, Seen, Tower, compiled_pass, inlined

BLOCK = 32
"""Rows treated together: their layers fit the first-level cache."""
_ONE = np.float32(1.0)
_TWO = np.float32(2.0)
_HALF = np.float32(0.5)
_WIDEST = np.float32(9.0)
# Lambert's continued fraction of tanh to its seventh term, as a quotient of polynomials in the argument's square.
_P0, _P1, _P2 = np.float32(135135.0), np.float32(17325.0), np.float32(378.0)
_Q0, _Q1, _Q2, _Q3 = np.float32(135135.0), np.float32(62370.0), np.float32(3150.0), np.float32(28.0)


def scratch_for(w: Tower) -> Scratch:
    """Working memory for these weights."""
    rows = [np.zeros((BLOCK, m.shape[1]), dtype=np.float32) for m in (w.first, w.second, w.last) for _ in range(2)]
    return Scratch(*rows, *[np.zeros(m.shape[::-1], dtype=np.float32) for m in (w.second, w.last)])


@compiled_pass
def _tanh(a: Any) -> None:
    """a = tanh(a), to 2e-7: the fraction at half the argument, then the double-angle formula."""
    for j in range(BLOCK):
        for k in range(a.shape[1]):
            y = _HALF * min(max(a[j, k], -_WIDEST), _WIDEST)
            z = y * y
            p = y * (_P0 + z * (_P1 + z * (_P2 + z)))
            q = _Q0 + z * (_Q1 + z * (_Q2 + z * _Q3))
            a[j, k] = _TWO * p * q / (q * q + p * p)


@compiled_pass
def _add_product(x: Any, w: Any, out: Any) -> None:
    """out += x @ w: eight inputs at a time, for all rows before the next eight, so that no step waits for the last."""
    for k in range(0, w.shape[0], 8):
        for j in range(BLOCK):
            a, b, c, d = x[j, k], x[j, k + 1], x[j, k + 2], x[j, k + 3]
            e, f, g, h = x[j, k + 4], x[j, k + 5], x[j, k + 6], x[j, k + 7]
            for o in range(w.shape[1]):
                out[j, o] += (a * w[k, o] + b * w[k + 1, o] + c * w[k + 2, o] + d * w[k + 3, o]) + (
                    e * w[k + 4, o] + f * w[k + 5, o] + g * w[k + 6, o] + h * w[k + 7, o]
                )


@compiled_pass
def _add_outer(x: Any, error: Any, gradient: Any, bias: Any) -> None:
    """gradient += x.T @ error; bias += the sum of errors."""
    for j in range(BLOCK):
        for o in range(bias.shape[0]):
            bias[o] += error[j, o]
    for i in range(0, BLOCK, 8):
        for k in range(gradient.shape[0]):
            a, b, c, d = x[i, k], x[i + 1, k], x[i + 2, k], x[i + 3, k]
            e, f, g, h = x[i + 4, k], x[i + 5, k], x[i + 6, k], x[i + 7, k]
            for o in range(gradient.shape[1]):
                gradient[k, o] += (
                    a * error[i, o] + b * error[i + 1, o] + c * error[i + 2, o] + d * error[i + 3, o]
                ) + (e * error[i + 4, o] + f * error[i + 5, o] + g * error[i + 6, o] + h * error[i + 7, o])


@inlined
def _start(bias: Any, out: Any) -> None:
    for j in range(BLOCK):
        for o in range(bias.shape[0]):
            out[j, o] = bias[o]


@inlined
def _back(error: Any, turned: Any, active: Any, below: Any) -> None:
    """below = (error @ turned) times tanh's slope where it gave `active`; turned: the layer's transpose."""
    for j in range(BLOCK):
        for k in range(turned.shape[1]):
            below[j, k] = 0.0
    _add_product(error, turned, below)
    for j in range(BLOCK):
        for k in range(turned.shape[1]):
            below[j, k] *= _ONE - active[j, k] * active[j, k]


@compiled_pass
def _up(w: Any, s: Any, x: Any, rows: Any, at: int) -> None:
    """A tower's outputs for a block of rows from `at` on; past the end the last row stands in."""
    _start(w.first_bias, s.first)
    for j in range(BLOCK):
        r = rows[min(at + j, rows.shape[0] - 1)]
        for k in range(x.start[r], x.start[r + 1]):
            v, c = x.value[k], x.place[k]
            for o in range(s.first.shape[1]):
                s.first[j, o] += v * w.first[c, o]
    _tanh(s.first)
    _start(w.second_bias, s.second)
    _add_product(s.first, w.second, s.second)
    _tanh(s.second)
    _start(w.last_bias, s.out)
    _add_product(s.second, w.last, s.out)


@compiled_pass
def _down(g: Any, s: Any, x: Any, rows: Any, at: int) -> None:
    """Add a block's gradients from the errors of its outputs."""
    _add_outer(s.second, s.error, g.last, g.last_bias)
    _back(s.error, s.last_turned, s.second, s.second_error)
    _add_outer(s.first, s.second_error, g.second, g.second_bias)
    _back(s.second_error, s.second_turned, s.first, s.first_error)
    for j in range(min(BLOCK, rows.shape[0] - at)):
        r = rows[at + j]
        for o in range(s.first_error.shape[1]):
            g.first_bias[o] += s.first_error[j, o]
        for k in range(x.start[r], x.start[r + 1]):
            v, c = x.value[k], x.place[k]
            for o in range(s.first_error.shape[1]):
                g.first[c, o] += v * s.first_error[j, o]


@compiled_pass
def _forward(w: Any, s: Any, x: Any, rows: Any, out: Any) -> None:
    for at in range(0, rows.shape[0], BLOCK):
        _up(w, s, x, rows, at)
        for j in range(min(BLOCK, rows.shape[0] - at)):
            for o in range(out.shape[1]):
                out[at + j, o] = s.out[j, o]


def forward(w: Tower, s: Scratch, x: Rows, outputs: int) -> Floats:
    """The first `outputs` outputs float32[N, outputs] of a tower for all rows of x."""
    out = np.zeros((len(x.start) - 1, outputs), dtype=np.float32)
    _forward(w, s, x, np.arange(len(out)), out)
    return out


@inlined
def _choices(
    out: Any, error: Any, j: int, first: int, choices: int, chosen: int, upstream: float, entropy: float
) -> float:
    """Log-probability of the chosen of `choices` logits from column `first`; their errors are written (upstream times
    its gradient, and the entropy bonus's)."""
    top = out[j, first]
    for k in range(1, choices):
        top = max(top, out[j, first + k])
    total = 0.0
    for k in range(choices):
        total += math.exp(out[j, first + k] - top)
    normal = top + math.log(total)
    mean = 0.0
    for k in range(choices):
        log_p = out[j, first + k] - normal
        mean += math.exp(log_p) * log_p
    for k in range(choices):
        log_p = out[j, first + k] - normal
        p = math.exp(log_p)
        hit = 1.0 if k == chosen else 0.0
        error[j, first + k] = upstream * (hit - p) + entropy * p * (log_p - mean)
    return float(out[j, first + chosen] - normal)


@compiled_pass
def _losses(
    a: Any, c: Any, seen: Any, rows: Any, at: int, choices: int, mean: float, spread: float, sigma: float, clip: float,
    entropy: float, weight: float,
) -> None:  # fmt: skip
    """Errors of the outputs: of the clipped objective (Eq. 10, negated) and of the critic's squared error."""
    n, variants = seen.log_y.shape[1], seen.pairs.shape[1]
    constant = 0.5 * math.log(n) + (n - 1) * math.log(sigma * math.sqrt(2.0 * math.pi))
    for j in range(BLOCK):
        if at + j >= rows.shape[0]:
            weight = 0.0
        r = rows[min(at + j, rows.shape[0] - 1)]
        total, squares, logs = 0.0, 0.0, 0.0
        for i in range(n):
            q = seen.log_y[r, i] - a.out[j, i]
            total += q
            squares += q * q
            logs += seen.log_y[r, i]
        log_prob = total * total / (2.0 * n * sigma * sigma) - squares / (2.0 * sigma * sigma) - constant - logs
        for v in range(variants):
            log_prob += _choices(a.out, a.error, j, n + v * choices, choices, seen.pairs[r, v], 0.0, 0.0)
        gain = (seen.advantage[r] - mean) / spread
        ratio = math.exp(log_prob - seen.log_prob[r])
        clipped = (ratio > 1.0 + clip and gain > 0.0) or (ratio < 1.0 - clip and gain < 0.0)
        upstream = 0.0 if clipped else -weight * ratio * gain
        for i in range(n):
            q = seen.log_y[r, i] - a.out[j, i]
            a.error[j, i] = upstream * (q - total / n) / (sigma * sigma)
        for v in range(variants):
            _choices(a.out, a.error, j, n + v * choices, choices, seen.pairs[r, v], upstream, weight * entropy)
        c.error[j, 0] = 2.0 * weight * (c.out[j, 0] - seen.target[r])


@inlined
def _turn(matrix: Any, turned: Any) -> None:
    for k in range(matrix.shape[0]):
        for o in range(matrix.shape[1]):
            turned[o, k] = matrix[k, o]


@compiled_pass
def _gradient(
    actor: Any, critic: Any, actor_gradient: Any, critic_gradient: Any, a: Any, c: Any, x: Any, seen: Any, rows: Any,
    choices: int, mean: float, spread: float, sigma: float, clip: float, entropy: float, weight: float,
) -> None:  # fmt: skip
    _turn(actor.second, a.second_turned)
    _turn(actor.last, a.last_turned)
    _turn(critic.second, c.second_turned)
    _turn(critic.last, c.last_turned)
    for at in range(0, rows.shape[0], BLOCK):
        _up(actor, a, x, rows, at)
        _up(critic, c, x, rows, at)
        _losses(a, c, seen, rows, at, choices, mean, spread, sigma, clip, entropy, weight)
        _down(actor_gradient, a, x, rows, at)
        _down(critic_gradient, c, x, rows, at)


def gradient(
    towers: tuple[Tower, Tower], scratch: tuple[Scratch, Scratch], x: Rows, seen: Seen, rows: NDArray[np.int64], *,
    choices: int, mean: float, spread: float, sigma: float, clip: float, entropy: float, weight: float,
) -> tuple[Tower, Tower]:  # fmt: skip
    """Gradients (actor's, critic's), each row counting `weight`, of the critic's squared error less the actor's
    objective over `rows`.

    choices: batch choices per variant; mean and spread normalise the advantages; sigma, clip: Eqs. 9 and 10;
    entropy: bonus on batch choices.
    """
    actor, critic = (Tower(*[np.zeros_like(m) for m in tower]) for tower in towers)
    _gradient(*towers, actor, critic, *scratch, x, seen, rows, choices, mean, spread, sigma, clip, entropy, weight)
    return actor, critic
