"""What a decider believes about instances between two reports: load, service times, and how far to trust them.

Same style as `rules.py` (scalars and indexing, in place, no allocation), so that the live gateway and the simulator
run the same lines. Arrays are those of `rules.py`.
"""

from policies.routing.contract import Indexable

MARGIN_STATE = 4
"""Length of the array that a decider learns in: [margin, promise, tail, spent]."""

FIRST_MARGIN = 0.8
"""Where the margin starts at most: with an idle instance of the heaviest variant in reach, if it takes up to 0.64 of
the requirement. With known service times every margin from 0.3 to 1 gives the same goodput (the heavy instances are
never idle in a burst), so starting low costs nothing and spares the first burst."""
CAUTIOUS_MARGIN = 0.3
"""Where it starts at least. In 30 s and some 500 requests there are few misses to learn from: a start of 0.5 has up
to twice the violations (docs/results/routing.md)."""

TARGET_PART = 12.0
"""The margin aims at this part of the promise: a miss costs some sixteen times what a heavy answer gains over a light
one, and a higher margin hardly gains any (a quarter, tried first, was 0.1 points worse; a fortieth is slow to rise)."""

FIRST_TAIL, LEAST_TAIL, LAST_TAIL = 4.0, 1.15, 20.0
"""Where the tail starts, and its bounds. Were service times exponential, 1.8% would take over four times their mean.
Whatever the service times, an answer takes some time on its way: the least leaves 13% of the budget for that."""
SERVICE_RATE = 0.02
"""How fast deciders learn mean service times: half forgotten within 34 observations. At 0.05 those that vary as much
as exponential ones seem a third too long at times, and their instances too slow."""
SPENT_PART = 0.75
"""What of the promise is for use: with so many violations so far, the tail alone decides."""
SPENT_RATE = 1e-4
"""How fast violations so far are forgotten: half within 6,900 requests, so that bursts and calm count together."""
TAIL_STEP = 0.03
"""By how much a service time beyond the tail raises it."""


def new_margin(promise: float = 0.02, heavy_share: float = 1.0) -> list[float]:
    """A fresh margin state for a service that promises at most the share `promise` of violations.

    heavy_share: the longest service time over the requirement. The margin starts low, but not so low that an idle
    instance of the heaviest variant would be out of its reach; unknown (1.0) is taken as long.
    """
    return [min(FIRST_MARGIN, max(CAUTIOUS_MARGIN, 1.25 * heavy_share)), promise, FIRST_TAIL, 1.0]


def arrive(now_s: float, i: int, length: Indexable, clear_s: Indexable, service_s: Indexable) -> None:
    """A request was sent to instance i: it holds one more, and is clear one service time later."""
    length[i] += 1
    if clear_s[i] < now_s:
        clear_s[i] = now_s
    clear_s[i] += service_s[i]


def depart(now_s: float, i: int, remaining: int, length: Indexable, clear_s: Indexable, service_s: Indexable) -> None:
    """An answer came from instance i, which now holds `remaining`; the next of them starts now."""
    length[i] = remaining
    clear_s[i] = now_s + remaining * service_s[i]


def arrive_batched(
    now_s: float,
    i: int,
    maximum: int,
    full_s: float,
    length: Indexable,
    clear_s: Indexable,
    added_s: Indexable,
    serving: Indexable,
) -> None:
    """Like `arrive`, for an instance that serves up to `maximum` together, which takes full_s.

    added_s[i]: what one more request adds to clear_s[i]; a rule is given it in place of service_s. Waiting requests
    are forecast in full batches, also the last one: others may yet join it, and then it takes that long.
    serving[i]: how many are in service.
    """
    length[i] += 1
    if clear_s[i] < now_s:
        clear_s[i] = now_s
    clear_s[i] += added_s[i]
    if serving[i] == 0:
        serving[i] = 1
    added_s[i] = full_s if (length[i] - serving[i]) % maximum == 0 else 0.0


def depart_batched(
    now_s: float,
    i: int,
    remaining: int,
    batch: int,
    left_s: float,
    maximum: int,
    single_s: float,
    full_s: float,
    length: Indexable,
    clear_s: Indexable,
    added_s: Indexable,
    serving: Indexable,
) -> None:
    """Like `depart`: instance i holds `remaining`, of which `batch` are in service for another left_s."""
    length[i] = remaining
    serving[i] = batch
    waiting = remaining - batch
    clear_s[i] = now_s + left_s + (waiting + maximum - 1) // maximum * full_s
    if remaining == 0:
        added_s[i] = single_s
    else:
        added_s[i] = full_s if waiting % maximum == 0 else 0.0


def learn_service(i: int, observed_s: float, service_s: Indexable, rate: float) -> None:
    """Move the estimate of instance i's service time towards one observation (exponential smoothing).

    rate in (0, 1]: `SERVICE_RATE` for deciders.
    """
    service_s[i] += rate * (observed_s - service_s[i])


def learn_margin(predicted_s: float, observed_s: float, budget_s: float, margin: Indexable) -> None:
    """Adjust margin[0] by the outcome of one request (stochastic approximation of a quantile).

    predicted_s: sojourn that the rule predicted when it chose; observed_s: the sojourn that came of it, infinity
    for a request that was refused, expired or lost; budget_s: what it had.
    Only requests that the margin let through, and not by far, say anything about it: those predicted between half
    of what it allows and all of it. In calm times hardly any are, so the margin keeps what bursts have taught it;
    and a request that nothing could save, sent to the soonest finish, is not the margin's fault. Of these a miss
    lowers the margin by a twentieth, an answer in time raises it by target / (1 - target) of that: it settles where
    a share `target` of them miss.
    """
    allowed_s = margin[0] * budget_s
    if predicted_s > allowed_s or predicted_s < 0.5 * allowed_s:
        return
    target = margin[1] / TARGET_PART
    if observed_s > budget_s:
        margin[0] *= 0.95
        if margin[0] < 0.05:
            margin[0] = 0.05
    else:
        margin[0] *= 1.0 + 0.05 * target / (1.0 - target)
        if margin[0] > 1.0:
            margin[0] = 1.0


def learn_tail(observed_s: float, expected_s: float, margin: Indexable) -> None:
    """Adjust margin[2], the tail: how many times its mean a service time exceeds as rarely as the promise allows.

    observed_s: a service time; expected_s: what was expected of it. Like `learn_margin` a stochastic approximation of
    a quantile, of all instances together: so it goes on learning while an instance is not used.
    """
    if observed_s > margin[2] * expected_s:
        margin[2] *= 1.0 + TAIL_STEP
        if margin[2] > LAST_TAIL:
            margin[2] = LAST_TAIL
    else:
        margin[2] *= 1.0 - TAIL_STEP * margin[1] / (1.0 - margin[1])
        if margin[2] < LEAST_TAIL:
            margin[2] = LEAST_TAIL


def learn_spent(observed_s: float, budget_s: float, margin: Indexable) -> None:
    """Adjust margin[3]: violations so far, over SPENT_PART of what the promise allows.

    observed_s: the sojourn of one request, infinity if it was refused or dropped; budget_s: what it had.
    """
    margin[3] -= SPENT_RATE * margin[3]
    if observed_s > budget_s:
        margin[3] += SPENT_RATE / (SPENT_PART * margin[1])
