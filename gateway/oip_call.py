"""One `infer` request of the Open Inference Protocol: from its bytes to a `Request`, from the reply to its bytes.

The life in between is `Gateway.serve`, the same as for /v1.
"""

import asyncio
import math
from typing import Any, Final

import msgspec

from gateway.admission import LONGEST_DEADLINE_MS, Receive, Uploads, check_length, read_body, request_id
from gateway.oip_encoding import chosen_coding, compress, decompress
from gateway.oip_models import ALL_SCORES, IMAGE, TOP, VERSION, Model, datatype
from gateway.oip_tensors import (
    InferGiven,
    InputGiven,
    Output,
    OutputAsked,
    bytes_of_one,
    element_count,
    float_bytes,
    header_length,
    invalid,
    read_infer,
    write_answer,
)
from gateway.request import Answered, Refused, Request
from gateway.responses import Send, send_refusal
from gateway.router import ServiceRouter
from protocol.outcomes import Outcome
from protocol.records import PREDICTIONS, TENSORS, InputRecord

TENSOR_TYPE: Final = "application/x-tidegate-tensor"
_IMAGE_TYPE: Final = "application/octet-stream"
_RAW_IMAGE_TYPES: Final = (b"image/jpeg", b"image/png")
_IN_THREAD_BYTES: Final = 64 << 10
"""JSON beyond this, and anything compressed, is read in a thread, so that others' requests do not wait for it."""


class _Prediction(msgspec.Struct):
    label: str
    class_id: int
    score: float


class _Predictions(msgspec.Struct):
    predictions: list[_Prediction]


_decode_predictions = msgspec.json.Decoder(_Predictions).decode


class OipCall:
    """POST v2/models/{name}/infer. `found`: the model, or the refusal that says why there is none."""

    def __init__(
        self,
        found: Model | Refused,
        headers: dict[bytes, bytes],
        method: str,
        body_timeout_s: float,
        uploads: Uploads,
    ) -> None:
        self.id = request_id(headers)
        self.router: ServiceRouter | None = found.router if isinstance(found, Model) else None
        self.variant = found.variant if isinstance(found, Model) else ""
        self._found = found
        self._headers = headers
        self._method = method
        self._body_timeout_s = body_timeout_s
        self._uploads = uploads
        self._given_id: str | None = None
        self._outputs: list[OutputAsked] = []
        self._all_binary = False

    async def admit(self, receive: Receive, arrived_s: float) -> Request:
        """The request, body read and understood. Raises `Refused` or `ClientGone`."""
        model, headers = self._found, self._headers
        if isinstance(model, Refused):
            raise model
        if self._method != "POST":
            raise Refused(Outcome.INVALID, f"{self._method} is not allowed here: POST the inference request", 405)
        limit = model.router.spec.max_body_bytes
        check_length(headers.get(b"content-length"), limit)
        body = await read_body(receive, limit, self._body_timeout_s, self._uploads)
        coding = headers.get(b"content-encoding", b"")
        if coding or len(body) > _IN_THREAD_BYTES:
            return await asyncio.to_thread(self._read, model, body, coding, limit, arrived_s)
        return self._read(model, body, coding, limit, arrived_s)

    def _read(self, model: Model, body: bytes, coding: bytes, limit: int, arrived_s: float) -> Request:
        body = decompress(body, coding, limit) if coding else body
        size = header_length(self._headers.get(b"inference-header-content-length"), len(body))
        named = self._headers.get(b"content-type", b"").lower() if size is None else b""
        bare_image, bare_tensor = named.startswith(_RAW_IMAGE_TYPES), named.startswith(TENSOR_TYPE.encode())
        tensor = model.input
        if size == 0 or bare_image or bare_tensor:
            payload, is_tensor = body, tensor is not None and not bare_image and len(body) == _bytes_of(tensor)
            if not body:
                raise invalid("the body is empty: a raw request is the input's bytes")
            if bare_tensor and not is_tensor:
                raise invalid(_no_tensor(model, len(body)))
            self._outputs, self._all_binary = _all_outputs(model, is_tensor), size == 0
            parameters: dict[str, Any] = {}
        else:
            given = read_infer(body, size)
            payload, is_tensor = _one_input(model, tensor, given.inputs)
            parameters = given.parameters or {}
            self._given_id = given.id
            self._all_binary = parameters.get("binary_data_output") is True
            self._outputs = _checked(model, given) or _all_outputs(model, is_tensor)
        top_k = max([model.router.spec.top_k, *(_classification(one) for one in self._outputs)])
        asked = {one.name for one in self._outputs}
        flags = 0
        if ALL_SCORES in asked:
            flags = TENSORS | (PREDICTIONS if len(asked) > 1 else 0)
        return Request(
            self.id,
            arrived_s,
            arrived_s + self._budget_s(parameters, model.router.spec.requirement_ms / 1e3),
            payload,
            TENSOR_TYPE if is_tensor else _IMAGE_TYPE,
            top_k,
            flags,
            model.variant,
        )

    def _budget_s(self, parameters: dict[str, Any], requirement_s: float) -> float:
        """The protocol's `timeout` (microseconds), else `X-Deadline-Ms`, else the service's requirement."""
        for unsupported in ("sequence_id", "sequence_start", "sequence_end"):
            if parameters.get(unsupported):
                raise invalid(f"{unsupported} = {parameters[unsupported]!r}: models here keep no sequences")
        for name, factor in (("timeout", 1e-6), ("x-deadline-ms", 1e-3)):
            given = parameters.get(name) if name == "timeout" else self._headers.get(name.encode())
            if given is None or (name == "timeout" and given == 0 and type(given) is int):
                continue
            try:
                seconds = float(given) * factor
            except (TypeError, ValueError):
                seconds = math.nan
            if isinstance(given, bool) or not 0.0 < seconds <= LONGEST_DEADLINE_MS / 1e3:
                unit = "microseconds" if name == "timeout" else "milliseconds"
                shown = given.decode("latin-1") if isinstance(given, bytes) else given
                raise invalid(f"{name} = {str(shown)[:40]!r}: must be {unit}, above 0 and at most 10 minutes")
            return seconds
        return requirement_s

    async def answer(self, send: Send, outcome: Outcome, answered: Answered, total_s: float) -> None:
        """Writes the outputs that were asked for, compressed if the client takes that."""
        assert isinstance(self._found, Model), "only an admitted request is answered"
        reply, target = answered.reply, answered.target
        head = {
            "model_name": self._found.name,
            "model_version": VERSION,
            "id": self._given_id if self._given_id is not None else self.id,
            "parameters": {
                "variant": target.record.variant,
                "instance": target.id,
                "outcome": outcome.name,
                "attempts": answered.attempts,
                "batch": reply.batch,
                "total_ms": round(total_s * 1e3, 3),
                "prepare_ms": round(reply.prepare_s * 1e3, 3),
                "queue_ms": round(reply.queue_s * 1e3, 3),
                "service_ms": round(reply.service_s * 1e3, 3),
            },
        }
        body, json_bytes = write_answer(head, self._filled(answered.payload, reply.shape))
        headers = [(b"x-request-id", self.id.encode())]
        if json_bytes is None:
            headers.append((b"content-type", b"application/json"))
        else:
            headers.append((b"content-type", b"application/octet-stream"))
            headers.append((b"inference-header-content-length", b"%d" % json_bytes))
        if outcome is Outcome.LATE:
            headers.append((b"x-tidegate-late", b"1"))
        coding = chosen_coding(self._headers.get(b"accept-encoding", b""))
        if coding:
            body = compress(body, coding)
            headers += [(b"content-encoding", coding), (b"vary", b"Accept-Encoding")]
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def refuse(self, send: Send, refused: Refused, retry_after_s: float, *, close: bool) -> None:
        """Writes `{"error", ...}`."""
        await send_refusal(send, self.id, refused, retry_after_s, close)

    def _filled(self, payload: bytes, shape: tuple[int, ...]) -> list[Output]:
        """The outputs with their values, from the worker's payload: JSON, then as many scores as `shape` has."""
        scores = b""
        if shape:
            split = len(payload) - 4 * math.prod(shape)
            payload, scores = payload[:split], payload[split:]
        best = _decode_predictions(payload).predictions if payload else []
        filled = []
        for one in self._outputs:
            values: Any
            classes = _classification(one)
            kind, lengths = TOP.get(one.name, "FP32"), [len(best)]
            if classes:
                values = [f"{each.score:f}:{each.class_id}:{each.label}" for each in best[:classes]]
                kind, lengths = "BYTES", [len(values)]
            elif one.name == ALL_SCORES:
                values, lengths = scores, [1, *shape]
            elif one.name == "scores":
                values = [each.score for each in best]
            elif one.name == "labels":
                values = [each.label for each in best]
            else:
                values = [each.class_id for each in best]
            binary = (one.parameters or {}).get("binary_data", self._all_binary) is True
            filled.append(Output(one.name, kind, lengths, values, binary))
        return filled


def _one_input(model: Model, tensor: InputRecord | None, inputs: list[InputGiven]) -> tuple[bytes, bool]:
    """The payload for the worker, and whether it is a tensor."""
    names = f"{IMAGE!r}" + (f" or {tensor.name!r}" if tensor else "")
    if len(inputs) != 1:
        raise invalid(f"{len(inputs)} inputs: model {model.name!r} takes one, {names}")
    (one,) = inputs
    if "shared_memory_region" in (one.parameters or {}):
        raise invalid(f"input {one.name!r}: this server shares no memory with clients; send the bytes")
    if one.name == IMAGE:
        if one.datatype != "BYTES":
            raise invalid(f"input {one.name!r} has datatype {one.datatype!r}: it takes BYTES, the encoded image")
        image = bytes_of_one(one)
        if not image:
            raise invalid(f"input {one.name!r} is empty: send an encoded image")
        return image, False
    if tensor is None or one.name != tensor.name:
        if model.variant and tensor is None:
            raise Refused(Outcome.UNAVAILABLE, f"no instance of {model.name} is loaded: its inputs are not known yet")
        raise invalid(f"unknown input {one.name[:80]!r}: model {model.name!r} takes {names}")
    if one.datatype != datatype(tensor):
        raise invalid(f"input {one.name!r} has datatype {one.datatype[:40]!r}: it takes {datatype(tensor)}")
    element_count(one)
    if tuple(one.shape) not in (tensor.shape, (1, *tensor.shape)):
        raise invalid(f"shape {one.shape} of input {one.name!r}: it takes {[1, *tensor.shape]}")
    return float_bytes(one), True


def _checked(model: Model, given: InferGiven) -> list[OutputAsked]:
    known = model.outputs()
    if len({one.name for one in given.outputs or []}) < len(given.outputs or []):
        raise invalid("an output is asked for more than once")
    for one in given.outputs or []:
        if one.name not in known:
            raise invalid(f"unknown output {one.name[:80]!r}: model {model.name!r} gives {', '.join(known)}")
        if "shared_memory_region" in (one.parameters or {}):
            raise invalid(f"output {one.name!r}: this server shares no memory with clients")
        _classification(one)
    return given.outputs or []


def _all_outputs(model: Model, is_tensor: bool) -> list[OutputAsked]:
    """What is answered where nothing particular was asked: all scores only to those who speak in tensors."""
    return [OutputAsked(name) for name in model.outputs() if is_tensor or name != ALL_SCORES]


def _classification(one: OutputAsked) -> int:
    """The classification extension's number of classes; 0 if it is not asked for."""
    count = (one.parameters or {}).get("classification", 0)
    if type(count) is not int or not 0 <= count <= 100:
        raise invalid(f"classification = {count!r} of output {one.name!r}: must be a number of classes up to 100")
    if count and one.name != "scores":
        raise invalid(f"classification of output {one.name!r}: ask for it with 'scores'")
    return count


def _no_tensor(model: Model, size: int) -> str:
    tensor = model.input
    if tensor is None:
        return f"model {model.name!r} takes no tensor: name a loaded variant ({', '.join(model.variants)})"
    shape, needed = list(tensor.shape), _bytes_of(tensor)
    return f"{size} bytes are no {tensor.dtype} of shape {shape}: {model.name!r} takes {needed} bytes"


def _bytes_of(tensor: InputRecord) -> int:
    return math.prod(tensor.shape) * (2 if tensor.dtype == "float16" else 4)
