"""The eight ways in which a request can end; every request ends in exactly one.

    client ──► gateway ──► worker queue ──► executor ──► answer
       │          │             │              │            └─ OK, LATE
       │          │             │              └─ FAILED (the model raised)
       │          │             └─ QUEUE_FULL, EXPIRED (refused or dropped before compute)
       │          └─ INVALID, UNAVAILABLE
       └─ CANCELLED (the client left)

`BOUNCED` and `LOST` are not outcomes: they end one *attempt* at a worker, and the gateway turns them into a second
attempt or into an outcome. They live in `Attempt`, whose first eight codes are the outcomes themselves.
"""

import enum


class Outcome(enum.IntEnum):
    """How a request ended. The integer goes over the wire; the name is the metric label."""

    OK = 0
    LATE = 1
    QUEUE_FULL = 2
    EXPIRED = 3
    CANCELLED = 4
    INVALID = 5
    UNAVAILABLE = 6
    FAILED = 7


OUTCOMES: tuple[Outcome, ...] = tuple(Outcome)

VIOLATIONS: frozenset[Outcome] = frozenset(
    {Outcome.LATE, Outcome.QUEUE_FULL, Outcome.EXPIRED, Outcome.UNAVAILABLE, Outcome.FAILED}
)
"""Outcomes that break the latency promise."""

NOT_COUNTED: frozenset[Outcome] = frozenset({Outcome.INVALID, Outcome.CANCELLED})
"""Outcomes that are the client's doing: they stand in no ratio's denominator."""

HTTP_STATUS: dict[Outcome, int] = {
    Outcome.OK: 200,
    Outcome.LATE: 200,
    Outcome.QUEUE_FULL: 429,
    Outcome.EXPIRED: 504,
    Outcome.CANCELLED: 499,
    Outcome.INVALID: 400,
    Outcome.UNAVAILABLE: 503,
    Outcome.FAILED: 500,
}
"""The status sent for each outcome. 499 is never seen by a client (it has gone); INVALID may carry 413, 415 or 422."""


class Attempt(enum.IntEnum):
    """How one attempt at a worker ended: an outcome, or one of the two ends that allow a second attempt."""

    OK = 0
    LATE = 1
    QUEUE_FULL = 2
    EXPIRED = 3
    CANCELLED = 4
    INVALID = 5
    UNAVAILABLE = 6
    FAILED = 7
    BOUNCED = 8
    """The worker saw on arrival that its own queue makes the request late, and the frame allowed it to say so."""
    LOST = 9
    """The connection to the worker broke while the request was there. Made by the gateway, never sent."""


def violation_ratio(counts: dict[Outcome, int]) -> float:
    """Share of violations among all that counts (arrived less INVALID and CANCELLED); 0.0 if nothing does."""
    denominator = sum(number for outcome, number in counts.items() if outcome not in NOT_COUNTED)
    violations = sum(counts.get(outcome, 0) for outcome in VIOLATIONS)
    return violations / denominator if denominator else 0.0
