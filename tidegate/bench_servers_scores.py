"""Scores that hold for any server: judged by the client's clock alone, whatever a server itself calls late."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loadgen.answers import Outcome
from loadgen.record import RunRecord
from loadgen.score import percentile_ms

ACCURACY: Final = (0.8278, 0.7769)
"""Published ImageNet top-1 of the emulated variants, by rank (Tan et al. 2024)."""
REFUSED: Final = (Outcome.QUEUE_FULL, Outcome.UNAVAILABLE, Outcome.EXPIRED)
MEANS: Final = ("goodput_ratio", "violation_ratio", "late_ratio", "refused_ratio", "other_ratio", "heavy_ratio")


def server_score(record: RunRecord, requirement_s: float) -> dict[str, dict[str, Any]]:
    """Scores by phase, `overall`, and `50:50`: the mean of the two phases' ratios, as Tan's tables have it.

    goodput_ratio: the accuracy of the model that answered, summed over answers in time, over all requests (what is
    expected; no labels are drawn). violation_ratio = late + refused (429, 503, 504) + other (failed, cut off).
    heavy_ratio: share of rank 0 among answers. p50_ms, p99_ms: of answers, from the intended send time.
    """
    parts = {"overall": np.ones(len(record), dtype=np.bool_)}
    if record.phase is not None:
        parts |= {name: record.phase == number for number, name in enumerate(record.phase_names)}
    scores = {name: _score(record, part, requirement_s) for name, part in parts.items() if part.any()}
    phases = [one for name, one in scores.items() if name != "overall"]
    if len(phases) == 2:
        scores["50:50"] = {
            key: None if any(one[key] is None for one in phases) else sum(one[key] for one in phases) / 2
            for key in MEANS
        }
    return scores


def _score(record: RunRecord, part: NDArray[np.bool_], requirement_s: float) -> dict[str, Any]:
    answered = record.answered & part
    in_time = answered & (record.latency_s <= requirement_s)
    refused = np.isin(record.outcome, REFUSED) & part
    requests = int(part.sum())
    accuracy = np.asarray(ACCURACY)[record.rank[in_time]]
    latency_ms = record.latency_s[answered] * 1e3
    late, answers = int((answered & ~in_time).sum()), int(answered.sum())
    return {
        "requests": requests,
        "goodput_ratio": float(accuracy.sum()) / requests,
        "violation_ratio": 1.0 - int(in_time.sum()) / requests,
        "late_ratio": late / requests,
        "refused_ratio": int(refused.sum()) / requests,
        "other_ratio": (requests - answers - int(refused.sum())) / requests,
        "heavy_ratio": int((record.rank[answered] == 0).sum()) / answers if answers else None,
        "p50_ms": percentile_ms(latency_ms, 50),
        "p99_ms": percentile_ms(latency_ms, 99),
    }
