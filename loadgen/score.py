"""Scores of a run: overall and per phase, in the JSON form that every command of the project prints.

Ratios are fractions over the requests that count (all but INVALID and CANCELLED); percentiles come from an
HdrHistogram of the answered ones, so they hold to three digits at any scale.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray

from loadgen.answers import UNKNOWN, Outcome
from loadgen.record import RunRecord

LATE_SENDER_MS = 10.0
"""A request that leaves this much later than intended counts as sent late."""

LATE_RUN_RATIO = 0.05
"""A run of which more than this share was sent late shows the sender's machine, not the service."""
SPEED_CHANGE = 1.25
"""Medians of one variant's service time that are further apart than this factor show a machine that changed."""

_HIGHEST_US = 24 * 3600 * 1_000_000
_DIGITS = 3


class Score(TypedDict):
    """One row of results. A ratio or percentile with nothing to stand on is None (JSON null)."""

    requests: int
    goodput_ratio: float | None
    violation_ratio: float | None
    heavy_ratio: float | None
    p50_ms: float | None
    p98_ms: float | None
    p99_ms: float | None


def score(record: RunRecord) -> dict[str, Score]:
    """Return {"overall": ..., and one entry per phase name that occurs in the run}.

    requests: all that were sent. goodput_ratio: answered correctly and in time, over those that count; None
    when no payload has a label. violation_ratio: LATE, refused, expired, failed, timed out or cut off, over
    those that count. heavy_ratio: rank 0, over those whose answer names a rank (an answer says which variant
    the request went to; refusals may). Percentiles: over OK and LATE, from the intended send time; how many had
    no answer and so stand in none of them, `unanswered` tells.
    """
    return {name: _score(record, part) for name, part in _parts(record).items()}


def unanswered(record: RunRecord) -> dict[str, int]:
    """Return how many requests that count got no answer, in time or late: overall, and by phase as in `score`."""
    return {name: int((record.counted & ~record.answered & part).sum()) for name, part in _parts(record).items()}


def late_ratio(record: RunRecord) -> float:
    """Return the share of requests that left more than `LATE_SENDER_MS` after their time."""
    return float((record.sending_lag_s * 1000.0 > LATE_SENDER_MS).mean()) if len(record) else 0.0


def not_comparable(records: Mapping[str, RunRecord]) -> str:
    """Return why these runs, by name, cannot be held against each other (or one against a promise); empty if so.

    An open loop that falls behind sends another load than the trace asks for, and not the same to everybody.
    """
    behind = {name: ratio for name, one in records.items() if (ratio := late_ratio(one)) > LATE_RUN_RATIO}
    if not behind:
        return ""
    shares = ", ".join(f"{name} {ratio:.1%}" for name, ratio in behind.items())
    return (
        f"not comparable: this machine could not keep the load up; requests left more than {LATE_SENDER_MS:g} ms late"
        f" ({shares}). End other programs, or lower the rate"
    )


def service_ms(record: RunRecord) -> dict[str, float]:
    """Return each variant's median service time, as far as its answers tell one."""
    told = record.answered & ~np.isnan(record.service_s)
    found = {name: record.service_s[told & (record.variant == i)] for i, name in enumerate(record.variants)}
    return {name: round(float(np.median(times)) * 1000.0, 3) for name, times in found.items() if len(times)}


def changed_speed(records: Mapping[str, RunRecord]) -> str:
    """Return which variant took how much longer in one run than in another; empty if none did by `SPEED_CHANGE`.

    Where instances share the machine in the same way in all runs, and without batches, the machine is the cause.
    """
    times = {name: service_ms(record) for name, record in records.items()}
    for variant in sorted({variant for found in times.values() for variant in found}):
        took = {name: found[variant] for name, found in times.items() if variant in found}
        least, most = min(took, key=took.__getitem__), max(took, key=took.__getitem__)
        if took[most] > SPEED_CHANGE * took[least]:
            return f"{variant} took {took[least]:.1f} ms with {least} and {took[most]:.1f} ms with {most} (medians)"
    return ""


def _parts(record: RunRecord) -> dict[str, NDArray[np.bool_]]:
    """Which requests stand in which row: all, and those of each phase that occurs."""
    parts = {"overall": np.ones(len(record), dtype=np.bool_)}
    if record.phase is not None:
        named = ((name, record.phase == phase) for phase, name in enumerate(record.phase_names))
        parts |= {name: part for name, part in named if part.any()}
    return parts


def details(record: RunRecord, requirement_ms: float | None = None) -> dict[str, Any]:
    """Return what the scores leave out, as plain JSON values.

    outcomes: requests by name of outcome. unanswered: see `unanswered`. service_ms: median
    service time by variant, where answers tell it. refusal_p50_ms, refusal_p99_ms: from the intended send time to a 429
    or 503. sending: how late requests left (p50_ms, p99_ms, max_ms), and how many by more than 10 ms.
    late_at_client (with a requirement): answers that the service called in time and that nevertheless took
    longer than requirement_ms from the intended send time; they are not moved to LATE.
    """
    latency_ms = record.latency_s * 1000.0
    refused = np.isin(record.outcome, (Outcome.QUEUE_FULL, Outcome.UNAVAILABLE))
    lag_ms = record.sending_lag_s * 1000.0
    result: dict[str, Any] = {
        "sent": len(record),
        "planned": record.planned,
        "interrupted": record.interrupted,
        "duration_s": record.end_s,
        "offered_per_s": len(record) / record.end_s if record.end_s > 0 else None,
        "outcomes": {o.name: n for o in Outcome if (n := int((record.outcome == o).sum()))},
        "unanswered": unanswered(record),
        "variants": {name: int((record.variant[record.answered] == i).sum()) for i, name in enumerate(record.variants)},
        "instances": {
            name: int((record.instance[record.answered] == i).sum()) for i, name in enumerate(record.instances)
        },
        "service_ms": service_ms(record),
        "refusal_p50_ms": percentile_ms(latency_ms[refused], 50),
        "refusal_p99_ms": percentile_ms(latency_ms[refused], 99),
        "sending": {
            "late": int((lag_ms > LATE_SENDER_MS).sum()),
            "late_ratio": late_ratio(record),
            "late_means_over_ms": LATE_SENDER_MS,
            "p50_ms": percentile_ms(lag_ms, 50),
            "p99_ms": percentile_ms(lag_ms, 99),
            "max_ms": round(float(lag_ms.max()), 3) if len(lag_ms) else None,
        },
    }
    if requirement_ms is not None:
        in_time = record.outcome == Outcome.OK
        result["late_at_client"] = int((latency_ms[in_time] > requirement_ms).sum())
    return result


def percentile_ms(values_ms: NDArray[np.float64], percent: float) -> float | None:
    """Return a percentile to three digits, or None of nothing."""
    return _percentiles_ms(values_ms, (percent,))[0]


def _score(record: RunRecord, part: NDArray[np.bool_]) -> Score:
    counted = record.counted & part
    violated = counted & (record.outcome != Outcome.OK)
    right = counted & (record.outcome == Outcome.OK) & (record.correct == 1)
    ranked = part & (record.rank != UNKNOWN)
    labelled = bool((record.correct[part & record.answered] != UNKNOWN).any())
    if not (part & record.answered).any():
        labelled = bool((record.correct != UNKNOWN).any())  # nothing answered here: ask the rest of the run
    p50, p98, p99 = _percentiles_ms(record.latency_s[part & record.answered] * 1000.0, (50, 98, 99))
    return {
        "requests": int(part.sum()),
        "goodput_ratio": _ratio(right, counted) if labelled else None,
        "violation_ratio": _ratio(violated, counted),
        "heavy_ratio": _ratio(ranked & (record.rank == 0), ranked),
        "p50_ms": p50,
        "p98_ms": p98,
        "p99_ms": p99,
    }


def _ratio(part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> float | None:
    count = int(whole.sum())
    return int(part.sum()) / count if count else None


def _percentiles_ms(values_ms: NDArray[np.float64], percents: tuple[float, ...]) -> list[float | None]:
    if not len(values_ms):
        return [None] * len(percents)
    histogram = HdrHistogram(1, _HIGHEST_US, _DIGITS)
    microseconds, counts = np.unique(np.rint(values_ms * 1000.0).astype(np.int64), return_counts=True)
    for value, count in zip(microseconds.tolist(), counts.tolist(), strict=True):
        histogram.record_value(min(max(value, 1), _HIGHEST_US), count)
    return [histogram.get_value_at_percentile(percent) / 1000.0 for percent in percents]
