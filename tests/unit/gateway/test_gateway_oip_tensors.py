"""Requests that NVIDIA's client writes are read, answers are read back by it, and malformed ones are named."""

import base64
import json
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.http as triton

from gateway.oip_tensors import (
    InputGiven,
    Output,
    bytes_of_one,
    element_count,
    float_bytes,
    header_length,
    read_infer,
    write_answer,
)
from gateway.request import Refused

JPEG = b"\xff\xd8\xff\xe0 not really a picture, but no text either \x00\xff"
NUMBERS = np.random.default_rng(7).normal(size=(1, 3, 4, 5)).astype(np.float32)


def request_of(*inputs: triton.InferInput, **settings: Any) -> tuple[bytes, int | None]:
    """What tritonclient would send."""
    return triton.InferenceServerClient.generate_request_body(list(inputs), **settings)  # type: ignore[no-any-return]


def triton_input(name: str, values: npt.NDArray[Any], datatype: str, *, binary: bool = True) -> triton.InferInput:
    given = triton.InferInput(name, list(values.shape), datatype)
    given.set_data_from_numpy(values, binary_data=binary)
    return given


def test_reads_an_image_from_tritonclient() -> None:
    body, size = request_of(triton_input("image", np.array([JPEG], dtype=object), "BYTES"), request_id="seven")
    given = read_infer(body, size)
    assert given.id == "seven"
    assert given.parameters == {"binary_data_output": True}
    assert bytes_of_one(given.inputs[0]) == JPEG


@pytest.mark.parametrize("binary", [True, False])
def test_reads_numbers_from_tritonclient(binary: bool) -> None:
    body, size = request_of(triton_input("x", NUMBERS, "FP32", binary=binary))
    given = read_infer(body, size)
    assert float_bytes(given.inputs[0]) == NUMBERS.astype("<f4").tobytes()


def test_reads_half_precision_both_ways() -> None:
    half = NUMBERS.astype(np.float16)
    body, size = request_of(triton_input("x", half, "FP16"))
    assert float_bytes(read_infer(body, size).inputs[0]) == half.tobytes()
    text = {"inputs": [{"name": "x", "datatype": "FP16", "shape": [60], "data": half.ravel().tolist()}]}
    assert float_bytes(read_infer(json.dumps(text).encode(), None).inputs[0]) == half.tobytes()


def test_numbers_may_be_nested_as_deeply_as_the_shape() -> None:
    text = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3, 4, 5], "data": NUMBERS.tolist()}]}
    assert float_bytes(read_infer(json.dumps(text).encode(), None).inputs[0]) == NUMBERS.tobytes()


def test_an_image_may_be_base64_text() -> None:
    for data, parameters in (
        (b"\xff\xd8\xff\xe0 a jpeg", {}),
        (b"\x89PNG\r\n\x1a\n a png", {}),
        (b"anything", {"content_type": "base64"}),
    ):
        entry = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "parameters": parameters}
        text = {"inputs": [{**entry, "data": [[base64.b64encode(data).decode()]]}]}
        assert bytes_of_one(read_infer(json.dumps(text).encode(), None).inputs[0]) == data


def test_other_text_is_utf_8() -> None:
    text = '{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["Grüße"]}]}'
    assert bytes_of_one(read_infer(text.encode(), None).inputs[0]) == "Grüße".encode()


def test_tritonclient_reads_binary_and_json_outputs() -> None:
    scores = np.array([[0.25, 0.5, 0.125]], dtype=np.float32)
    for binary in (True, False):
        outputs = [
            Output("probabilities", "FP32", [1, 3], scores.tobytes(), binary),
            Output("labels", "BYTES", [2], ["Katze", "Hündchen"], binary),
            Output("class_ids", "INT64", [2], [3, 2**40], binary),
            Output("scores", "FP32", [2], [0.5, 0.25], not binary),
        ]
        body, size = write_answer({"model_name": "m", "model_version": "1", "id": "1"}, outputs)
        result = triton.InferenceServerClient.parse_response_body(body, header_length=size)
        assert (result.as_numpy("probabilities") == scores).all()
        labels = [one.decode() if isinstance(one, bytes) else one for one in result.as_numpy("labels")]
        assert labels == ["Katze", "Hündchen"]
        assert result.as_numpy("class_ids").tolist() == [3, 2**40]
        assert result.as_numpy("scores").tolist() == [0.5, 0.25]


def test_an_answer_without_binary_outputs_is_plain_json() -> None:
    body, size = write_answer({"id": "1"}, [Output("scores", "FP32", [1], [0.5], False)])
    assert size is None
    assert json.loads(body)["outputs"] == [{"name": "scores", "datatype": "FP32", "shape": [1], "data": [0.5]}]


def test_header_length_is_read() -> None:
    assert [header_length(given, 9) for given in (None, b"0", b"9", b"007")] == [None, 0, 9, 7]


@pytest.mark.parametrize(
    ("given", "reason"),
    [(b"10", "the body has only 9 bytes"), (b"-1", "0 or more"), (b"ten", "0 or more"), (b"9" * 40, "0 or more")],
)
def test_a_header_longer_than_the_body_is_refused(given: bytes, reason: str) -> None:
    with pytest.raises(Refused, match=reason) as refused:
        header_length(given, 9)
    assert refused.value.http_status == 400


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not an inference request"),
        (b"[]", "not an inference request"),
        (b'{"inputs": 3}', r"Expected `array`, got `int` - at `\$.inputs`"),
        (b'{"inputs": [{"name": "x"}]}', "missing required field `datatype`"),
        (b'{"inputs": [{"name": 1, "datatype": "FP32", "shape": [1]}]}', "Expected `str`"),
        (b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1.5]}]}', "Expected `int`"),
        (b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": "1"}]}', "Expected `array`"),
        (b'{"inputs": []} trailing', "not an inference request"),
        (b'{"inputs": [{"name": "\xff", "datatype": "FP32", "shape": [1]}]}', "not an inference request"),
        (b'{"inputs": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "Expected `object`|nested too deeply"),
        (b'{"parameters": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"}", "nested too deeply"),
    ],
)
def test_malformed_json_is_refused(body: bytes, reason: str) -> None:
    with pytest.raises(Refused, match=reason) as refused:
        read_infer(body, None)
    assert refused.value.http_status == 400


def with_data(data: str, shape: str = "[2]", datatype: str = "FP32") -> InputGiven:
    text = f'{{"inputs": [{{"name": "x", "datatype": "{datatype}", "shape": {shape}, "data": {data}}}]}}'
    return read_infer(text.encode(), None).inputs[0]


@pytest.mark.parametrize(
    ("data", "shape", "reason"),
    [
        ("[1]", "[2]", "has 1 elements: shape \\[2\\] needs 2"),
        ("[1, [2]]", "[2]", "not FP32 numbers"),
        ('["a", "b"]', "[2]", "not FP32 numbers"),
        ("[1, 1e39]", "[2]", "not FP32 numbers"),
        ("[1, null]", "[2]", "not FP32 numbers"),
        ("7", "[2]", "data must be a list"),
        ("[1, 2]", "[-2]", "none negative"),
        ("[1, 2]", "[1, -2]", "none negative"),
        ("[]", "[1,1,1,1,1,1,1,1,1]", "at most 8 lengths"),
        ("[[[[1, 2]]]]", "[2]", "has 1 elements"),
        ("[[1, 2]]", "[2]", "has 1 elements"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(data: str, shape: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        float_bytes(with_data(data, shape))


def test_data_nested_ten_thousand_deep_are_refused() -> None:
    with pytest.raises(Refused, match=r"nested too deeply|cannot be read") as refused:
        float_bytes(with_data("[" * 10_000 + "]" * 10_000))
    assert refused.value.http_status == 400


@pytest.mark.parametrize(
    ("data", "shape", "reason"),
    [
        ('["a", "b"]', "[2]", "one image per request"),
        ("[]", "[0]", "one image per request"),
        ('["a"]', "[-1]", "none negative"),
        ("[3]", "[1]", "is a string"),
        ('["/9j/ not base64!"]', "[1]", "not base64"),
    ],
)
def test_images_that_do_not_fit_are_refused(data: str, shape: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        bytes_of_one(with_data(data, shape, "BYTES"))


def binary(size: object, tail: bytes, shape: object = (1,), datatype: str = "BYTES") -> bytes:
    entry = {"name": "x", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}
    return json.dumps({"inputs": [entry]}).encode() + tail


@pytest.mark.parametrize(
    ("size", "tail", "reason"),
    [
        (10, b"123456789", "announces 10 bytes, but only 9 follow"),
        (8, b"123456789", "1 bytes behind the JSON belong to no input"),
        (-1, b"", "must be a number of bytes"),
        ("9", b"123456789", "must be a number of bytes"),
        (True, b"1", "must be a number of bytes"),
    ],
)
def test_binary_data_that_do_not_add_up_are_refused(size: object, tail: bytes, reason: str) -> None:
    body = binary(size, tail)
    with pytest.raises(Refused, match=reason):
        read_infer(body, len(body) - len(tail))


@pytest.mark.parametrize("tail", [b"", b"\x01", struct.pack("<I", 5) + b"four", struct.pack("<I", 2**32 - 1) + b"x"])
def test_a_bytes_element_that_is_not_as_long_as_it_says_is_refused(tail: bytes) -> None:
    body = binary(len(tail), tail)
    given = read_infer(body, len(body) - len(tail)).inputs[0]
    with pytest.raises(Refused, match="4 bytes, little-endian"):
        bytes_of_one(given)


def test_binary_numbers_of_the_wrong_length_are_refused() -> None:
    body = binary(7, b"1234567", [2], "FP32")
    given = read_infer(body, len(body) - 7).inputs[0]
    with pytest.raises(Refused, match="has 7 bytes"):
        float_bytes(given)


def test_every_cut_of_a_request_is_refused_or_read() -> None:
    """No cut makes anything but `Refused`; only the whole body is read."""
    body, size = request_of(triton_input("image", np.array([JPEG], dtype=object), "BYTES"))
    assert size is not None
    for end in range(len(body)):
        cut = body[:end]
        with pytest.raises(Refused):
            read_infer(cut, header_length(str(size).encode(), len(cut)))


def test_element_count_multiplies() -> None:
    assert element_count(InputGiven("x", "FP32", [2, 3, 4])) == 24
    assert element_count(InputGiven("x", "FP32", [])) == 1
