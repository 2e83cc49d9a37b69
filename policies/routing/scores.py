"""Scores of a router: the ratios of Tan 5.1.8 from the simulator's counters, per phase and overall."""

from dataclasses import asdict, dataclass

import numpy as np

from policies.routing.contract import FloatArray
from policies.routing.queueing_model import (
    ARRIVED,
    BOUNCED,
    EXPIRED,
    GOODPUT,
    IN_TIME,
    LATE,
    QUEUE_FULL,
    SOJOURN_S,
    TO_HEAVY,
    UNAVAILABLE,
)


@dataclass(frozen=True, slots=True)
class Scores:
    """Fractions of all requests that arrived. goodput_rps: correct answers in time per second, 0 if unknown.

    goodput_ratio is expected: accuracy summed over requests in time, without sampling of labels.
    """

    requests: int
    goodput_ratio: float
    goodput_rps: float
    violation_ratio: float
    rejection_ratio: float
    delay_ratio: float
    heavy_ratio: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers by name, as in the JSON."""
        return asdict(self)


def _score(row: FloatArray, duration_s: float) -> Scores:
    arrived = float(row[ARRIVED])
    per = 1.0 / arrived if arrived else 0.0
    rejected = float(row[QUEUE_FULL] + row[EXPIRED] + row[UNAVAILABLE])
    return Scores(
        requests=int(arrived),
        goodput_ratio=float(row[GOODPUT]) * per,
        goodput_rps=float(row[GOODPUT]) / duration_s if duration_s > 0.0 else 0.0,
        violation_ratio=(rejected + float(row[LATE])) * per,
        rejection_ratio=rejected * per,
        delay_ratio=float(row[LATE]) * per,
        heavy_ratio=float(row[TO_HEAVY]) * per,
    )


def scores_of(count: FloatArray, phase_names: tuple[str, ...], duration_s: float = 0.0) -> dict[str, Scores]:
    """Scores by phase name, `overall` (raw) and `overall_50_50` (the phases weighed equally).

    count float64[phases, COUNTERS] as summed by the simulator; duration_s: simulated time of all environments.
    """
    rows = {name: _score(count[h], 0.0) for h, name in enumerate(phase_names)}
    overall = _score(np.asarray(count.sum(axis=0)), duration_s)
    seen = [r for r in rows.values() if r.requests]
    even = overall
    if len(seen) > 1:
        mean = {k: float(np.mean([getattr(r, k) for r in seen])) for k in Scores.__slots__ if k != "requests"}
        mean["goodput_rps"] = mean["goodput_ratio"] * overall.requests / duration_s if duration_s > 0.0 else 0.0
        even = Scores(requests=overall.requests, **mean)
    return {"overall": overall, "overall_50_50": even, **rows}


def columns(count: FloatArray) -> dict[str, float]:
    """Raw counters summed over phases, by name: in_time, late, queue_full, expired, unavailable, bounced, sojourn_s."""
    total = count.sum(axis=0)
    return {
        "arrived": float(total[ARRIVED]),
        "in_time": float(total[IN_TIME]),
        "late": float(total[LATE]),
        "queue_full": float(total[QUEUE_FULL]),
        "expired": float(total[EXPIRED]),
        "unavailable": float(total[UNAVAILABLE]),
        "bounced": float(total[BOUNCED]),
        "sojourn_s": float(total[SOJOURN_S]),
    }
