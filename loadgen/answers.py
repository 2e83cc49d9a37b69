"""What one HTTP answer means: how the request ended, whether the label is right, and who answered.

Pure functions over status, headers and body, so that scoring needs no network. The names of the outcomes are
those of the service; TIMEOUT and CONNECTION are what only a client can see.
"""

import enum
import math
from typing import Any

import msgspec


class Outcome(enum.IntEnum):
    """How a request ended, as its client saw it."""

    OK = 0
    LATE = 1
    QUEUE_FULL = 2
    EXPIRED = 3
    CANCELLED = 4  # this load generator was stopped before the answer came
    INVALID = 5
    UNAVAILABLE = 6
    FAILED = 7
    TIMEOUT = 8  # gave up waiting
    CONNECTION = 9  # refused, reset or closed before a whole answer was read


NOT_COUNTED = (Outcome.CANCELLED, Outcome.INVALID)
"""Outcomes that stand in no ratio's denominator."""

ANSWERED = (Outcome.OK, Outcome.LATE)
"""Outcomes that carry predictions and whose latency counts in the percentiles."""

UNKNOWN = -1
"""In `Answer.correct` and `Answer.rank`: the answer, or the payload, does not say."""


class Prediction(msgspec.Struct, frozen=True):
    """One entry of the answer's top-k list, the most probable first."""

    label: str | int | None = None
    class_id: int | None = None
    score: float | None = None


class _Body(msgspec.Struct, frozen=True):
    predictions: tuple[Prediction, ...] = ()
    variant: str = ""
    instance: str = ""
    rank: int = UNKNOWN
    timings_ms: Any = None


class Answer(msgspec.Struct, frozen=True):
    """What scoring needs of one answer. correct: 1, 0 or UNKNOWN; rank 0 is the service's heaviest variant.

    service_s: what the service says that computing took, with its whole batch; NaN where it says nothing.
    """

    outcome: Outcome
    correct: int = UNKNOWN
    variant: str = ""
    instance: str = ""
    rank: int = UNKNOWN
    service_s: float = math.nan


_decoder = msgspec.json.Decoder(_Body)


def outcome_of(status: int, late: bool) -> Outcome:
    """Return the outcome for an HTTP status; `late`: the answer carried X-Tidegate-Late.

    A service may send its late answers as errors (504 with the header): they are LATE all the same.
    """
    if late and status in (200, 504):
        return Outcome.LATE
    if status == 429:
        return Outcome.QUEUE_FULL
    if status == 503:
        return Outcome.UNAVAILABLE
    if status == 504:
        return Outcome.EXPIRED
    if 200 <= status < 300:
        return Outcome.OK
    # A redirect is no answer to an inference request: the URL is wrong, as with the other 4xx.
    return Outcome.INVALID if 300 <= status < 500 else Outcome.FAILED


def read_answer(
    status: int, late: bool, body: bytes, label: int | None = None, label_name: str | None = None
) -> Answer:
    """Score one answer against the payload's true label (number, name, or neither).

    The first prediction decides. A 200 whose body is not the JSON that was promised counts as FAILED.
    """
    outcome = outcome_of(status, late)
    try:
        content = _decoder.decode(body)
    except msgspec.MsgspecError:
        content = _Body()
        if outcome in ANSWERED:
            outcome = Outcome.FAILED
    correct = UNKNOWN
    if status == 200 and outcome in ANSWERED and (label is not None or label_name is not None):
        correct = int(bool(content.predictions) and _matches(content.predictions[0], label, label_name))
    service_ms = content.timings_ms.get("service") if isinstance(content.timings_ms, dict) else None
    service_s = service_ms / 1000.0 if isinstance(service_ms, int | float) else math.nan
    return Answer(outcome, correct, content.variant, content.instance, content.rank, service_s)


def _matches(prediction: Prediction, label: int | None, label_name: str | None) -> bool:
    if label is not None and prediction.class_id is not None:
        return prediction.class_id == label
    wanted = label_name if label_name is not None else label
    return prediction.label is not None and str(prediction.label) == str(wanted)
