"""Weights, rows and working memory in the form that the compiled passes of `fused.py` read (numba; training only).

Matrices are stored input by output here (torch stores output by input) and padded: `pack` and `unpack` translate.
Rows are stored without their zeros: one-hot lengths and padded ages leave about 8 of 132 features of a slot.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy, nn

from policies.routing import compiled  # noqa: F401  (sets numba's cache folder)

F = TypeVar("F", bound=Callable[..., Any])
Floats = NDArray[np.float32]

LANES = 16
"""Layers are padded to multiples of this, the float32 numbers of a vector register, so that no loop has a remainder."""
# "contract" allows fused multiply-adds; numpy's error model drops the test for division by zero. Both let the
# compiler use vectors; neither reorders sums, so results repeat bit for bit.
OPTIONS: Any = {"cache": True, "nogil": True, "fastmath": {"contract"}, "error_model": "numpy", "_nrt": False}


def inlined(function: F) -> F:
    """The function, compiled into its compiled callers."""
    return cast(F, numba.njit(forceinline=True, **OPTIONS)(function))


def compiled_pass(function: F) -> F:
    """The function compiled, without the GIL."""
    return cast(F, numba.njit(**OPTIONS)(function))


class Tower(NamedTuple):
    """Three layers of one network, padded; also the shape of their gradient."""

    first: Floats
    first_bias: Floats
    second: Floats
    second_bias: Floats
    last: Floats
    last_bias: Floats


class Rows(NamedTuple):
    """Features [N, F] without their zeros: row r has `value[k]` in column `place[k]` for start[r] <= k < start[r+1]."""

    start: NDArray[np.int64]
    place: NDArray[np.int32]
    value: Floats


class Seen(NamedTuple):
    """What was done in N slots and what came of it.

    log_y float32[N, n]; pairs int64[N, variants]; log_prob, advantage, target float32[N].
    """

    log_y: Floats
    pairs: NDArray[np.int64]
    log_prob: Floats
    advantage: Floats
    target: Floats


class Scratch(NamedTuple):
    """Working memory of one thread for one tower: activations, their errors, and transposes."""

    first: Floats
    first_error: Floats
    second: Floats
    second_error: Floats
    out: Floats
    error: Floats
    second_turned: Floats
    last_turned: Floats


def _padded(matrix: Tensor) -> Floats:
    """A torch weight or bias, turned round, with zeros up to the next multiples of LANES."""
    a = matrix.detach().numpy().T
    wide = np.zeros([-(-size // LANES) * LANES for size in a.shape], dtype=np.float32)
    wide[tuple(slice(size) for size in a.shape)] = a
    return wide


def pack(network: nn.Sequential) -> Tower:
    """The weights of a network of three linear layers, copied and padded."""
    return Tower(*[_padded(p) for p in network.parameters()])


def unpack(parts: Sequence[Tower], network: nn.Sequential) -> list[Tensor]:
    """The sum of gradients, in the order and shapes of the network's parameters."""
    total = [sum(arrays[1:], arrays[0]) for arrays in zip(*parts, strict=True)]
    return [
        from_numpy(np.ascontiguousarray(a.T[tuple(slice(size) for size in p.shape)]))
        for a, p in zip(total, network.parameters(), strict=True)
    ]


def compact(x: Floats) -> Rows:
    """Features float32[N, F] without their zeros."""
    start = np.zeros(len(x) + 1, dtype=np.int64)
    _count(x, start)
    place, value = np.zeros(int(start[-1]), dtype=np.int32), np.zeros(int(start[-1]), dtype=np.float32)
    _fill(x, start, place, value)
    return Rows(start, place, value)


@compiled_pass
def _count(x: Any, start: Any) -> None:
    for r in range(x.shape[0]):
        found = 0
        for c in range(x.shape[1]):
            if x[r, c] != 0.0:
                found += 1
        start[r + 1] = start[r] + found


@compiled_pass
def _fill(x: Any, start: Any, place: Any, value: Any) -> None:
    for r in range(x.shape[0]):
        k = start[r]
        for c in range(x.shape[1]):
            if x[r, c] != 0.0:
                place[k] = c
                value[k] = x[r, c]
                k += 1
