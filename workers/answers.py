"""From a model's answer to the bytes of a REPLY: JSON predictions, or raw scores when tensors were asked for. Pure."""

import msgspec

from models.catalog import Variant
from models.runtime import Answer
from protocol.records import PREDICTIONS, TENSORS, Infer


class Prediction(msgspec.Struct, frozen=True):
    """One class that the model considers, with its probability."""

    label: str
    class_id: int
    score: float


class Predictions(msgspec.Struct, frozen=True):
    """The JSON body of an answer: the likeliest classes, best first. The gateway splices it in without decoding."""

    predictions: list[Prediction]


_encode = msgspec.json.Encoder().encode


def encode_answer(answer: Answer, variant: Variant, asked: Infer) -> tuple[bytes, tuple[int, ...]]:
    """Payload and shape of the reply: JSON and (), or with `TENSORS` little-endian float32 scores and their shape.

    With `PREDICTIONS` beside `TENSORS`: the JSON, and the scores right behind it.
    """
    if asked.flags & TENSORS:
        scores = answer.scores.astype("<f4").tobytes()
        before = encode_predictions(answer, variant, asked.top_k) if asked.flags & PREDICTIONS else b""
        return before + scores, tuple(answer.scores.shape)
    return encode_predictions(answer, variant, asked.top_k), ()


def encode_predictions(answer: Answer, variant: Variant, top_k: int) -> bytes:
    """The `top_k` likeliest classes (at least one) as JSON."""
    likeliest = answer.top_k(max(1, top_k))
    predictions = [Prediction(variant.labels[index], index, round(score, 6)) for index, score in likeliest]
    return _encode(Predictions(predictions))
