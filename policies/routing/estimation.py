"""What a decider believes about instances between two reports: load, service times, and how far to trust them.

Same style as `rules.py` (scalars and indexing, in place, no allocation), so that the live gateway and the simulator
run the same lines. Arrays are those of `rules.py`.
"""

from policies.routing.contract import Indexable

MARGIN_STATE = 4
"""Length of the array that `learn_margin` keeps: [margin, smoothed violation ratio, promise, unused]."""


def new_margin(promise: float = 0.02) -> list[float]:
    """A fresh margin state for a service that promises at most `promise` violations: full trust to begin with."""
    return [1.0, 0.0, promise, 0.0]


def arrive(now_s: float, i: int, length: Indexable, clear_s: Indexable, service_s: Indexable) -> None:
    """A request was sent to instance i: it holds one more, and is clear one service time later."""
    length[i] += 1
    if clear_s[i] < now_s:
        clear_s[i] = now_s
    clear_s[i] += service_s[i]


def depart(
    now_s: float, i: int, remaining: int, length: Indexable, clear_s: Indexable, service_s: Indexable
) -> None:
    """An answer came from instance i, which now holds `remaining`; the next of them starts now."""
    length[i] = remaining
    clear_s[i] = now_s + remaining * service_s[i]


def learn_service(i: int, observed_s: float, service_s: Indexable, rate: float) -> None:
    """Move the estimate of instance i's service time towards one observation (exponential smoothing).

    rate in (0, 1]: 0.05 forgets half within 14 observations.
    """
    service_s[i] += rate * (observed_s - service_s[i])


def learn_margin(predicted_s: float, observed_s: float, budget_s: float, margin: Indexable) -> None:
    """Adjust margin[0] by the outcome of one request (stochastic approximation of a quantile).

    predicted_s: sojourn that the rule predicted when it chose; observed_s: the sojourn that came of it, infinity
    for a request that was refused, expired or lost; budget_s: what it had.
    A miss lowers the margin by one step; a request in time raises it by step * target / (1 - target), so that it
    settles where a share `target` of the requests miss. The target is a quarter of the promise (margin[2]).
    Only requests that had a chance by their prediction count: a miss foretold says nothing about trust.
    """
    if predicted_s > budget_s:
        return
    target = 0.25 * margin[2]
    step = 0.02
    if observed_s > budget_s:
        margin[0] -= step
        if margin[0] < 0.1:
            margin[0] = 0.1
    else:
        margin[0] += step * target / (1.0 - target)
        if margin[0] > 1.0:
            margin[0] = 1.0
