"""Random numbers inside compiled code: one SplitMix64 stream per environment and purpose.

Arrivals, routing draws and service times have streams of their own, so that every router meets the same trace
(common random numbers) and a run repeats bit for bit from its seed, whatever the number of threads.
"""

import math

import numpy as np
from numpy.typing import NDArray

from policies.routing.compiled import jit

ARRIVAL_STREAM, ROUTE_STREAM, SERVICE_STREAM = 0, 1, 2
STREAMS = 3

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


def streams(seed: int, environments: int) -> NDArray[np.uint64]:
    """Start states uint64[environments, STREAMS], far apart by numpy's SeedSequence."""
    words = np.random.SeedSequence(seed).generate_state(environments * STREAMS, np.uint64)
    return np.asarray(words.reshape(environments, STREAMS), dtype=np.uint64)


@jit
def draw_uniform(state: NDArray[np.uint64], stream: int) -> float:
    """The next uniform in [0, 1), 53 bits."""
    s = state[stream] + _GOLDEN
    state[stream] = s
    z = (s ^ (s >> _S30)) * _MIX_A
    z = (z ^ (z >> _S27)) * _MIX_B
    z = z ^ (z >> _S31)
    return float(z >> _S11) * 1.1102230246251565e-16


@jit
def draw_exponential(state: NDArray[np.uint64], stream: int) -> float:
    """The next exponential of mean 1."""
    return -math.log(1.0 - draw_uniform(state, stream))


@jit
def draw_normal(state: NDArray[np.uint64], stream: int) -> float:
    """The next standard normal (Box and Muller, one of the pair)."""
    radius = math.sqrt(2.0 * draw_exponential(state, stream))
    return radius * math.cos(2.0 * math.pi * draw_uniform(state, stream))


@jit
def draw_gamma(state: NDArray[np.uint64], stream: int, shape: float) -> float:
    """The next gamma variate of this shape and scale 1 (Marsaglia and Tsang 2000)."""
    boost = 1.0
    if shape < 1.0:
        boost = (1.0 - draw_uniform(state, stream)) ** (1.0 / shape)
        shape += 1.0
    d = shape - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    while True:
        x = draw_normal(state, stream)
        v = 1.0 + c * x
        if v <= 0.0:
            continue
        v = v * v * v
        u = 1.0 - draw_uniform(state, stream)
        if math.log(u) < 0.5 * x * x + d - d * v + d * math.log(v):
            return d * v * boost
