"""Every per-request routing rule, the batching rule and the expiry rule: one plain function each, for two worlds.

The live gateway and worker call these with Python lists; the simulator compiles the very same functions over
numpy arrays. So: scalars and indexing only, no allocation, no library call. All routing rules share one signature

    rule(now_s, budget_s, draw, length, capacity, clear_s, service_s, rank, margin) -> instance | HOLD | REJECT

with, per instance i of n:
    length[i]    requests in the instance now (waiting and in service), as the decider knows it
    capacity[i]  places; 0 means that the instance cannot be routed to
    clear_s[i]   predicted time, on the clock of now_s, at which it has finished everything that it now holds
    service_s[i] predicted service time of one request
    rank[i]      0 for the heaviest variant, 1 for the next, ...
and what is learned of how far to trust forecasts (`estimation.py`):
    margin[0]    in (0, 1]: a predicted sojourn has to be at most margin[0] * budget_s
    margin[2]    the tail: hardly any service takes longer than margin[2] times what is expected
    margin[3]    violations so far, over what they may be
draw is uniform in [0, 1).
"""

from policies.routing.contract import HOLD, REJECT, Indexable, Rule
from policies.routing.estimation import LEAST_TAIL

TRIES = 16
"""How fast `deadline` loses patience with an idle instance that is k times too slow for the tail: it tries it for
k ** -TRIES of the requests; 22% at 1.1, 3% at 1.25, none at 2."""

SPARE = 1.25
"""How much further than the tail says `deadline` may go at most while the promise is hardly used."""

IDLE_SHARE = 0.25
"""A batch of at most this share of the budget is safe whatever the margin: even if its time were exponentially
distributed, exp(-4) = 1.8% of them would miss, which keeps a promise of 2%."""

MANY, LOOKS, HEAVY_LOOKS = 64, 32, 8
"""Among more than MANY instances, how many `deadline` looks at before it may be content: all of 256 take 24 us in
plain Python."""

BATCH_TURNS = 1.25
"""`largest_batch` calls a size safe if this many batches of it fit into what forecasts may use: 2 never takes a
size from which a newcomer may be late, but gives up half of what batching gains (docs/results/routing.md)."""


def uniform(
    now_s: float,
    budget_s: float,
    draw: float,
    length: Indexable,
    capacity: Indexable,
    clear_s: Indexable,
    service_s: Indexable,
    rank: Indexable,
    margin: Indexable,
) -> int:
    """An instance drawn with equal chances from all that can be routed to, full or not."""
    count = 0
    for i in range(len(capacity)):
        if capacity[i] > 0:
            count += 1
    if count == 0:
        return REJECT
    pick = int(draw * count)
    for i in range(len(capacity)):
        if capacity[i] > 0:
            if pick == 0:
                return i
            pick -= 1
    return REJECT


def light_only(
    now_s: float,
    budget_s: float,
    draw: float,
    length: Indexable,
    capacity: Indexable,
    clear_s: Indexable,
    service_s: Indexable,
    rank: Indexable,
    margin: Indexable,
) -> int:
    """Equal chances among the instances of the lightest variant that can be routed to (Tan's LW)."""
    wanted = -1
    count = 0
    for i in range(len(capacity)):
        if capacity[i] > 0:
            if rank[i] > wanted:
                wanted = rank[i]
                count = 1
            elif rank[i] == wanted:
                count += 1
    if count == 0:
        return REJECT
    pick = int(draw * count)
    for i in range(len(capacity)):
        if capacity[i] > 0 and rank[i] == wanted:
            if pick == 0:
                return i
            pick -= 1
    return REJECT


def heavy_only(
    now_s: float,
    budget_s: float,
    draw: float,
    length: Indexable,
    capacity: Indexable,
    clear_s: Indexable,
    service_s: Indexable,
    rank: Indexable,
    margin: Indexable,
) -> int:
    """Equal chances among the instances of the heaviest variant that can be routed to, full or not (Tan's HW)."""
    wanted = 1 << 30
    count = 0
    for i in range(len(capacity)):
        if capacity[i] > 0:
            if rank[i] < wanted:
                wanted = rank[i]
                count = 1
            elif rank[i] == wanted:
                count += 1
    if count == 0:
        return REJECT
    pick = int(draw * count)
    for i in range(len(capacity)):
        if capacity[i] > 0 and rank[i] == wanted:
            if pick == 0:
                return i
            pick -= 1
    return REJECT


def single_queue(
    now_s: float,
    budget_s: float,
    draw: float,
    length: Indexable,
    capacity: Indexable,
    clear_s: Indexable,
    service_s: Indexable,
    rank: Indexable,
    margin: Indexable,
) -> int:
    """The heaviest idle instance, else HOLD (Tan's SQ as worded: the heavy model first when both are idle)."""
    chosen = REJECT
    best = 1 << 30
    for i in range(len(capacity)):
        if capacity[i] > 0:
            if length[i] == 0 and rank[i] < best:
                best = rank[i]
                chosen = i
            elif chosen == REJECT:
                chosen = HOLD
    return chosen


def single_queue_random(
    now_s: float,
    budget_s: float,
    draw: float,
    length: Indexable,
    capacity: Indexable,
    clear_s: Indexable,
    service_s: Indexable,
    rank: Indexable,
    margin: Indexable,
) -> int:
    """An idle instance drawn with equal chances, else HOLD (what Tan's figures for SQ fit)."""
    idle = 0
    routable = 0
    for i in range(len(capacity)):
        if capacity[i] > 0:
            routable += 1
            if length[i] == 0:
                idle += 1
    if routable == 0:
        return REJECT
    pick = int(draw * idle)
    for i in range(len(capacity)):
        if capacity[i] > 0 and length[i] == 0:
            if pick == 0:
                return i
            pick -= 1
    return HOLD


def deadline(
    now_s: float,
    budget_s: float,
    draw: float,
    length: Indexable,
    capacity: Indexable,
    clear_s: Indexable,
    service_s: Indexable,
    rank: Indexable,
    margin: Indexable,
) -> int:
    """The heaviest instance whose predicted sojourn is within margin[0] * budget_s, else the soonest finish.

    The margin is about how far to trust the forecast of a queue. An idle instance has none: it may also be used
    when margin[2] times its service time fits the budget, whatever the margin has become. One that is too slow for
    that is tried now and then (TRIES): what is never used would never be known better, and stay locked out.
    The less of the promise is used so far, the more of such risk is taken (SPARE); the other way round it would only
    take heavy instances out of bursts that need them.
    An instance that should be done but still holds requests is not idle, though its forecast says so.
    Among instances of one variant the soonest finish wins; instances with a free place come before full ones.
    The search starts at a drawn instance, so that gateways with the same stale view do not all pick the same tie.
    Among more than MANY instances it ends once it has met LOOKS of them, HEAVY_LOOKS of the heaviest variant, and one
    that fits: the best of many instances is hardly better than the best of some. It goes round in strides of a
    prime, so that it meets all variants however the instances are ordered, and everyone in the end.
    """
    n = len(capacity)
    looks = n
    stride = 1
    if n > MANY:
        looks = LOOKS
        stride = 37
        if n % 37 == 0:
            stride = 41 if n % 41 != 0 else 1
    heavy = 0
    limit_s = now_s + margin[0] * budget_s
    reach_s = budget_s / margin[2]
    if margin[3] * SPARE < 1.0:
        reach_s *= SPARE
    elif margin[3] < 1.0:
        reach_s /= margin[3]
    luck = draw * n - int(draw * n)
    chosen = REJECT
    chosen_rank = 1 << 30
    chosen_s = 0.0
    late = REJECT
    late_s = 0.0
    full = REJECT
    full_s = 0.0
    i = int(draw * n)
    for k in range(n):
        if i >= n:
            i -= n
        places = capacity[i]
        if places > 0:
            finish_s = clear_s[i]
            if finish_s < now_s:
                finish_s = now_s
            finish_s += service_s[i]
            if length[i] >= places:
                if full < 0 or finish_s < full_s:
                    full = i
                    full_s = finish_s
            elif finish_s <= limit_s or (
                length[i] == 0
                and LEAST_TAIL * (finish_s - now_s) <= budget_s
                and (finish_s - now_s <= reach_s or luck < (reach_s / (finish_s - now_s)) ** TRIES)
            ):
                r = rank[i]
                if r < chosen_rank or (r == chosen_rank and finish_s < chosen_s):
                    chosen = i
                    chosen_rank = r
                    chosen_s = finish_s
            elif late < 0 or finish_s < late_s:
                late = i
                late_s = finish_s
            if stride > 1 and rank[i] == 0:
                heavy += 1
        if k >= looks and chosen >= 0 and heavy >= HEAVY_LOOKS:
            break
        i += stride
    if chosen >= 0:
        return chosen
    if late >= 0:
        return late
    return full


RULES: dict[str, Rule] = {
    "uniform": uniform,
    "light-only": light_only,
    "heavy-only": heavy_only,
    "heavy-expire": heavy_only,
    "single-queue": single_queue,
    "single-queue-random": single_queue_random,
    "deadline": deadline,
}
"""Per-request rules by router name. `heavy-expire` routes like `heavy-only`: expiry is the service's setting."""


def batch_size(waiting: int, minimum: int, maximum: int) -> int:
    """Size of the batch that an idle instance starts, or 0 to wait for more (Tan 5.2.2, sizes 1, 3 and 5).

    Fewer than minimum: wait. At least maximum: a batch of maximum. Between: the largest size that is available.
    """
    if waiting < minimum or waiting < 1:
        return 0
    if waiting >= maximum:
        return maximum
    if waiting >= 5:
        return 5
    if waiting >= 3:
        return 3
    return 1


def largest_batch(single_s: float, three_s: float, five_s: float, length: int, budget_s: float, margin: float) -> int:
    """The largest batch worth making, of 1, 3 and 5, when these take single_s, three_s and five_s.

    A size pays if it takes less time per request than every smaller one. It is safe if BATCH_TURNS times its time is
    at most margin * budget_s, what forecasts may use: so a request may still come behind a batch that is well under
    way; IDLE_SHARE of the budget is safe whatever the margin. An instance whose `length`
    requests would take longer than budget_s one by one is late anyhow: there, what pays is enough. The gateway
    forecasts by this and the worker serves by it.
    """
    pressed = length * single_s > budget_s
    allowed_s = max(margin, IDLE_SHARE) * budget_s
    largest = 1
    each_s = single_s
    if three_s < 3.0 * each_s:
        each_s = three_s / 3.0
        if pressed or BATCH_TURNS * three_s <= allowed_s:
            largest = 3
    if five_s < 5.0 * each_s and (pressed or BATCH_TURNS * five_s <= allowed_s):
        largest = 5
    return largest


def cannot_finish(now_s: float, deadline_s: float, start_s: float, service_s: float) -> bool:
    """Whether a request that can start at start_s at the earliest will miss deadline_s for certain.

    All times on one clock; a start in the past counts as now.
    """
    if start_s < now_s:
        start_s = now_s
    return start_s + service_s > deadline_s
