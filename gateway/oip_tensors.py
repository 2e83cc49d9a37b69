"""Tensors of the Open Inference Protocol, as JSON and in the binary extension: bytes in, bytes out. Pure.

    request   JSON header {"inputs": [...]}            + the inputs' bytes, in order   (Inference-Header-Content-Length)
    answer    JSON header {"outputs": [...]}           + the outputs' bytes, in order  (the same header, if any)

BYTES elements carry a little-endian 4-byte length in the binary form. Everything that is wrong with a request raises
`Refused` (INVALID, 400) with the reason.
"""

import base64
import binascii
import struct
from collections.abc import Iterable, Sequence
from itertools import chain
from math import prod
from typing import Any, Final

import msgspec

from gateway.request import Refused
from protocol.outcomes import Outcome

FLOATS: Final = {"FP32": "f", "FP16": "e"}
"""Datatypes of tensor inputs, with their `struct` codes."""
_MOST_AXES: Final = 8
_BASE64_IMAGES: Final = ("/9j/", "iVBORw0KGgo")
"""How the base64 text of a JPEG and of a PNG begins."""


class InputGiven(msgspec.Struct):
    """One element of `inputs`. `data` is undecoded JSON; `raw` the bytes from behind the header, if it has some."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: msgspec.Raw = msgspec.Raw()
    raw: bytes | None = None


class OutputAsked(msgspec.Struct):
    """One element of `outputs`."""

    name: str
    parameters: dict[str, Any] | None = None


class InferGiven(msgspec.Struct):
    """The JSON of an infer request."""

    inputs: list[InputGiven]
    id: str | None = None
    outputs: list[OutputAsked] | None = None
    parameters: dict[str, Any] | None = None


class Output(msgspec.Struct):
    """One output of an answer. `values`: its elements in row-major order, or their bytes (FP32 only)."""

    name: str
    datatype: str
    shape: list[int]
    values: Sequence[float] | Sequence[int] | Sequence[str] | bytes
    binary: bool


_decode_infer = msgspec.json.Decoder(InferGiven).decode
_encode = msgspec.json.Encoder().encode


def invalid(reason: str) -> Refused:
    """A request that the protocol does not allow."""
    return Refused(Outcome.INVALID, reason, 400)


def header_length(given: bytes | None, body_bytes: int) -> int | None:
    """`Inference-Header-Content-Length` as a number, or None without one. Raises `Refused`."""
    if given is None:
        return None
    shown = given[:40].decode("latin-1")
    if not given.isdigit() or len(given) > 18:
        raise invalid(f"Inference-Header-Content-Length = {shown!r}: must be a number of bytes, 0 or more")
    if int(given) > body_bytes:
        raise invalid(f"Inference-Header-Content-Length = {shown}: the body has only {body_bytes} bytes")
    return int(given)


def read_infer(body: bytes, header_bytes: int | None) -> InferGiven:
    """The request, each binary input with its bytes. `header_bytes`: where the JSON ends (None: with the body)."""
    json_part = body if header_bytes is None else body[:header_bytes]
    try:
        given = _decode_infer(json_part)
    except msgspec.MsgspecError as error:
        raise invalid(f"the JSON is not an inference request: {error}") from None
    except UnicodeDecodeError:
        raise invalid("the JSON is not an inference request: it is not UTF-8") from None
    except RecursionError:
        raise invalid("the JSON is nested too deeply") from None
    at = len(json_part)
    for one in given.inputs:
        size = (one.parameters or {}).get("binary_data_size")
        if size is None:
            continue
        if type(size) is not int or size < 0:
            raise invalid(f"binary_data_size = {size!r} of input {one.name!r}: must be a number of bytes")
        if at + size > len(body):
            raise invalid(f"input {one.name!r} announces {size} bytes, but only {len(body) - at} follow the JSON")
        one.raw = body[at : at + size]
        at += size
    if at != len(body):
        raise invalid(f"{len(body) - at} bytes behind the JSON belong to no input: give it binary_data_size")
    return given


def element_count(one: InputGiven) -> int:
    """Elements that the shape announces. Raises `Refused` for lengths below 0 and for shapes beyond reason."""
    if len(one.shape) > _MOST_AXES or any(length < 0 for length in one.shape):
        raise invalid(f"shape {one.shape[: _MOST_AXES + 1]} of input {one.name!r}: at most 8 lengths, none negative")
    return prod(one.shape)


def bytes_of_one(one: InputGiven) -> bytes:
    """The single element of a BYTES input. In JSON it is text: base64 of an image, or taken as UTF-8."""
    if element_count(one) != 1:
        raise invalid(f"shape {one.shape} of input {one.name!r}: send one element, as [1]; one image per request")
    if one.raw is not None:
        if len(one.raw) < 4 or struct.unpack_from("<I", one.raw)[0] != len(one.raw) - 4:
            raise invalid(f"input {one.name!r}: a BYTES element is its length (4 bytes, little-endian), then its bytes")
        return one.raw[4:]
    values = _json_elements(one, 1)
    text = values[0]
    if not isinstance(text, str):
        raise invalid(f"input {one.name!r}: a BYTES element in JSON is a string, as base64 of an image")
    if (one.parameters or {}).get("content_type") == "base64" or text.startswith(_BASE64_IMAGES):
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise invalid(f"input {one.name!r}: the text is not base64: {error}") from None
    return text.encode()


def float_bytes(one: InputGiven) -> bytes:
    """The little-endian, row-major bytes of an FP32 or FP16 input."""
    count, code = element_count(one), FLOATS[one.datatype]
    size = count * struct.calcsize(code)
    if one.raw is not None:
        if len(one.raw) != size:
            raise invalid(f"input {one.name!r} has {len(one.raw)} bytes: {one.shape} {one.datatype} needs {size}")
        return one.raw
    values = _json_elements(one, count)
    try:
        return struct.pack(f"<{count}{code}", *values)
    except (struct.error, OverflowError) as error:
        raise invalid(f"input {one.name!r}: its data are not {one.datatype} numbers: {error}") from None


def _json_elements(one: InputGiven, count: int) -> list[Any]:
    """The elements of `data`, which may be nested as deeply as the shape, or flat."""
    if not bytes(one.data):
        raise invalid(f"input {one.name!r} has no data: give data, or binary_data_size and the bytes")
    try:
        values = msgspec.json.decode(one.data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise invalid(f"input {one.name!r}: its data cannot be read") from None
    if not isinstance(values, list):
        raise invalid(f"input {one.name!r}: data must be a list")
    for _ in range(max(1, len(one.shape)) - 1):
        if not values or not all(type(part) is list for part in values):
            break
        values = list(chain.from_iterable(values))
    if len(values) != count:
        raise invalid(f"input {one.name!r} has {len(values)} elements: shape {one.shape} needs {count}")
    return values


def write_answer(head: dict[str, Any], outputs: Iterable[Output]) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON if binary outputs follow it (else None)."""
    described: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for one in outputs:
        entry: dict[str, Any] = {"name": one.name, "datatype": one.datatype, "shape": one.shape}
        if one.binary:
            data = _binary(one)
            tail.append(data)
            entry["parameters"] = {"binary_data_size": len(data)}
        else:
            values = one.values
            entry["data"] = struct.unpack(f"<{len(values) // 4}f", values) if isinstance(values, bytes) else values
        described.append(entry)
    json_part = _encode({**head, "outputs": described})
    if not tail:
        return json_part, None
    return b"".join((json_part, *tail)), len(json_part)


def _binary(one: Output) -> bytes:
    values = one.values
    if isinstance(values, bytes):
        return values
    if one.datatype == "BYTES":
        encoded = [str(value).encode() for value in values]
        return b"".join(part for value in encoded for part in (len(value).to_bytes(4, "little"), value))
    return struct.pack(f"<{len(values)}{'f' if one.datatype == 'FP32' else 'q'}", *values)
