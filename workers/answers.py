"""From a model's answer to the bytes of a REPLY: JSON predictions, or raw scores when tensors were asked for. Pure."""

import msgspec

from models.catalog import Variant
from models.runtime import Answer
from protocol.records import TENSORS, Infer


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
    """Payload and shape of the reply: JSON and (), or with `TENSORS` little-endian float32 scores and their shape."""
    if asked.flags & TENSORS:
        return answer.scores.astype("<f4").tobytes(), tuple(answer.scores.shape)
    likeliest = answer.top_k(max(1, asked.top_k))
    predictions = [Prediction(variant.labels[index], index, round(score, 6)) for index, score in likeliest]
    return _encode(Predictions(predictions)), ()
