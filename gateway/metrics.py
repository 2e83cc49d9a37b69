"""How the requests of this gateway process ended: the one count of them that `/metrics` and `/state` read.

Who counts what, each thing in one place:
    requests by outcome, latencies, answers by variant    here, once per request (`Gateway.count`)
    requests that ever came                               `Gateway`: arrived = ended here + in flight
    attempts at instances, which a request may make two of `dispatch.py`; equals what the workers saw arrive
    times by model, as the Open Inference Protocol asks   `inferences.py`
    the latest arrivals themselves, for traces            `arrivals.py`
Labels are bounded: services, variants and instances of the deployment, and outcomes. Plain numbers, because every
request pays for them (0.9 against 5.3 µs with prometheus-client's); `exposition.py` makes the text.
"""

from bisect import bisect_left
from typing import Final

from protocol.outcomes import OUTCOMES, Outcome

_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3)
BUCKETS_S: Final = (*_BUCKETS_S, 0.4, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, float("inf"))
"""Upper bounds of the latency histogram's buckets."""
UNKNOWN: Final = "unknown"

Values = dict[tuple[str, ...], float]
"""Samples of a metric, by label values."""


class ServiceCounts:
    """Of one service: requests by outcome, answered ones by latency bucket and by variant, their seconds in all."""

    __slots__ = ("answers", "buckets", "outcomes", "seconds")

    def __init__(self) -> None:
        self.outcomes = [0] * len(OUTCOMES)
        self.buckets = [0] * len(BUCKETS_S)
        self.seconds = 0.0
        self.answers: dict[str, int] = {}


class GatewayMetrics:
    """Counts every request once."""

    def __init__(self) -> None:
        self.services: dict[str, ServiceCounts] = {}

    def of(self, service: str) -> ServiceCounts:
        """The counts of one of the deployment's services, or of `UNKNOWN`."""
        counts = self.services.get(service)
        if counts is None:
            counts = self.services[service] = ServiceCounts()
        return counts

    def count(self, service: str, outcome: Outcome, seconds: float | None, variant: str | None) -> None:
        """One request has ended; `seconds` and `variant` if it was answered."""
        counts = self.of(service)
        counts.outcomes[outcome] += 1
        if seconds is not None:
            counts.buckets[bisect_left(BUCKETS_S, seconds)] += 1
            counts.seconds += seconds
        if variant is not None:
            counts.answers[variant] = counts.answers.get(variant, 0) + 1

    @property
    def ended(self) -> int:
        """All requests that have ended."""
        return sum(sum(counts.outcomes) for counts in self.services.values())

    def outcomes(self) -> dict[str, dict[str, int]]:
        """Requests by service and outcome, without the zeros."""
        return {
            service: {outcome.name: number for outcome in OUTCOMES if (number := counts.outcomes[outcome])}
            for service, counts in self.services.items()
            if any(counts.outcomes)
        }
