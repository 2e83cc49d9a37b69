"""The simulator's routing stream in Python integers (SplitMix64): what it draws for routing, a test can draw too."""

from collections.abc import Callable

import numpy as np

from policies.routing.randomness import STREAMS

_MASK = (1 << 64) - 1


def route_draws(seed: int) -> Callable[[], float]:
    """The draws of environment 0 of a simulation built with this seed, one a call."""
    word = int(np.random.SeedSequence(seed).generate_state(STREAMS, np.uint64)[1])

    def draw() -> float:
        nonlocal word
        word = (word + 0x9E3779B97F4A7C15) & _MASK
        z = word
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return float((z ^ (z >> 31)) >> 11) / float(2**53)

    return draw
