"""Clients that nobody here wrote, against real processes: NVIDIA's tritonclient, and KServe's protocol over REST.

The service is `digits` with real models and real images; the variant `digits_light` is pinned for tensors.
"""

import asyncio
import gzip
import io
import json
import os
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from PIL import Image
from tritonclient.utils import InferenceServerException

from models.catalog import load_catalog
from models.preprocess import prepare
from tests.fakes.running_system import RunningSystem, answers, deployment

DIGITS = """
name = "digits-oip"
[services.digits]
variants = ["digits_heavy", "digits_light"]
requirement_ms = 5000
max_body_bytes = 1000000
[[workers]]
name = "a"
instances = [{ variant = "digits_heavy" }]
[[workers]]
name = "b"
instances = [{ variant = "digits_light" }]
"""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    with RunningSystem(deployment(tmp_path_factory.mktemp("oip") / "oip.toml", DIGITS)) as running:
        yield running


@pytest.fixture
def client(system: RunningSystem) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{system.port}") as one:
        yield one


def picture(kind: str = "jpeg") -> bytes:
    """A real handwritten digit (scikit-learn's first: a nought), encoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sklearn.datasets import load_digits
    pixels = (load_digits().images[0] * 255 / 16).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).resize((40, 40)).save(data, kind, **({"quality": 95} if kind == "jpeg" else {}))
    return data.getvalue()


def image_input(data: bytes) -> triton.InferInput:
    given = triton.InferInput("image", [1], "BYTES")
    given.set_data_from_numpy(np.array([data], dtype=object))
    return given


def tensor_input(*, binary: bool = True) -> triton.InferInput:
    """The same digit, prepared as the worker would prepare it."""
    variant = load_catalog()["digits_light"]
    tensor = prepare(picture("png"), "image/png", variant).tensor
    assert tensor is not None
    batch: npt.NDArray[Any] = tensor[np.newaxis]
    given = triton.InferInput(variant.input.name, list(batch.shape), "FP32")
    given.set_data_from_numpy(batch, binary_data=binary)
    return given


def test_health_metadata_config_statistics(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits_light", "1")
    assert not client.is_model_ready("nothing")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata("digits")["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [1]}]
    assert client.get_model_metadata("digits_light")["outputs"][-1]["shape"] == [1, 10]
    assert client.get_model_config("digits")["name"] == "digits"
    before = client.get_inference_statistics("digits")["model_stats"][0]["inference_count"]
    client.infer("digits", [image_input(picture())])
    after = client.get_inference_statistics("digits")["model_stats"][0]
    assert after["inference_count"] == before + 1
    assert after["inference_stats"]["compute_infer"]["ns"] > 0
    assert {one["name"] for one in client.get_model_repository_index()} == {"digits", "digits_heavy", "digits_light"}


@pytest.mark.parametrize("kind", ["jpeg", "png"])
@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
def test_an_encoded_image_is_answered(client: triton.InferenceServerClient, kind: str, coding: str | None) -> None:
    result = client.infer(
        "digits",
        [image_input(picture(kind))],
        request_id="seven",
        timeout=4_000_000,
        priority=1,
        request_compression_algorithm=coding,
        response_compression_algorithm=coding,
    )
    assert result.as_numpy("labels")[0] == b"0"
    assert result.as_numpy("scores")[0] > 0.5
    assert result.get_response()["id"] == "seven"
    assert result.get_response()["parameters"]["outcome"] == "OK"


def test_a_pinned_variant_answers_images_and_tensors_alike(client: triton.InferenceServerClient) -> None:
    by_image = client.infer("digits_light", [image_input(picture("png"))])
    assert by_image.get_response()["parameters"]["instance"] == "b/digits_light"
    assert by_image.as_numpy("labels")[0] == b"0"
    for binary in (True, False):
        by_tensor = client.infer("digits_light", [tensor_input(binary=binary)])
        scores = by_tensor.as_numpy("probabilities")
        assert scores.shape == (1, 10)
        assert scores.sum() == pytest.approx(1.0, abs=1e-5)
        assert scores.argmax() == 0
        assert by_tensor.as_numpy("scores") == pytest.approx(by_image.as_numpy("scores"), abs=1e-4)


def test_classes_by_the_classification_extension(client: triton.InferenceServerClient) -> None:
    asked = [triton.InferRequestedOutput("scores", class_count=3)]
    best = client.infer("digits", [image_input(picture())], outputs=asked).as_numpy("scores")
    assert best[0].split(b":")[1] == b"0"
    assert len(best) == 3


def test_errors_reach_the_client_in_words(client: triton.InferenceServerClient) -> None:
    wrong_type = triton.InferInput("image", [1], "FP32")
    wrong_type.set_data_from_numpy(np.zeros(1, np.float32))
    for model, given, settings, words in (
        ("nothing", image_input(picture()), {}, "unknown model 'nothing'"),
        ("digits", image_input(b"GIF89a"), {}, "neither a JPEG nor a PNG"),
        ("digits", image_input(picture()[:200]), {}, "the JPEG image cannot be read"),
        ("digits", wrong_type, {}, "it takes BYTES"),
        ("digits", tensor_input(), {}, "unknown input 'input'"),
        ("digits", image_input(picture()), {"model_version": "2"}, "no version '2'"),
        ("digits", image_input(picture()), {"timeout": -5}, "must be microseconds"),
    ):
        with pytest.raises(InferenceServerException, match=words):
            client.infer(model, [given], **settings)


def test_the_asynchronous_client(system: RunningSystem) -> None:
    async def scenario() -> None:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{system.port}") as one:
            assert await one.is_server_ready()
            results = await asyncio.gather(*(one.infer("digits_light", [image_input(picture())]) for _ in range(8)))
            assert [result.as_numpy("labels")[0] for result in results] == [b"0"] * 8
            with pytest.raises(InferenceServerException, match="unknown model"):
                await one.infer("nothing", [image_input(picture())])

    asyncio.run(scenario())


def test_unload_and_load(client: triton.InferenceServerClient) -> None:
    client.unload_model("digits_light")
    assert not client.is_model_ready("digits_light")
    assert client.is_model_ready("digits")
    states = {one["name"]: one["state"] for one in client.get_model_repository_index()}
    assert states == {"digits": "READY", "digits_heavy": "READY", "digits_light": "UNAVAILABLE"}
    with pytest.raises(InferenceServerException, match="no instance of digits_light is ready"):
        client.infer("digits_light", [image_input(picture())])
    assert client.infer("digits", [image_input(picture())]).get_response()["parameters"]["variant"] == "digits_heavy"
    client.load_model("digits_light")
    assert client.is_model_ready("digits_light")
    assert client.infer("digits_light", [image_input(picture())]).as_numpy("labels")[0] == b"0"
    with pytest.raises(InferenceServerException, match="unknown model"):
        client.load_model("nothing")
    with pytest.raises(InferenceServerException, match="cannot be given here"):
        client.load_model("digits_light", config="{}")


def post(system: RunningSystem, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """A request written by hand, header names with _ for -."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n{lines}\r\n"
    (answer,) = answers(system.say(head.encode() + body))
    return answer.status, answer.headers, answer.body


def test_a_raw_body_with_header_length_0_is_the_image(system: RunningSystem) -> None:
    for path in ("/v2/models/digits/infer", "/v2/models/digits_light/versions/1/infer"):
        status, headers, body = post(system, path, picture(), inference_header_content_length="0")
        assert status == 200
        found = triton.InferenceServerClient.parse_response_body(
            body, header_length=int(headers["inference-header-content-length"])
        )
        assert found.as_numpy("labels")[0] == b"0"


MALFORMED = [
    (b"[" * 10_000 + b"]" * 10_000, {}, "not an inference request"),
    (b'{"parameters": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001, {}, "nested too deeply"),
    (b'{"inputs": []}', {"inference_header_content_length": "15"}, "the body has only 14 bytes"),
    (b'{"inputs": []}', {"inference_header_content_length": "-1"}, "0 or more"),
    (
        b'{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1], "data": ["x"]}]}',
        {},
        "none negative",
    ),
    (b'{"inputs": [{"name": "image", "datatype": 7, "shape": [1], "data": ["x"]}]}', {}, "Expected `str`"),
    (b'{"inputs": [{"name": "image", "datatype": "FP32", "shape": [1], "data": [1]}]}', {}, "it takes BYTES"),
    (b'{"inputs": [{"name": "imago", "datatype": "BYTES", "shape": [1], "data": ["x"]}]}', {}, "unknown input"),
    (gzip.compress(bytes(200 << 20)), {"content_encoding": "gzip"}, "unfolds to more than 1000000 bytes"),
    (zlib.compress(b'{"inputs": []}')[:-3], {"content_encoding": "deflate"}, "cut short"),
    (b"", {"inference_header_content_length": "0"}, "the body is empty"),
    (
        b'{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["x"]}], "outputs": ['
        + b'{"name": "scores"},' * 20_000
        + b'{"name": "scores"}]}',
        {},
        "asked for more than once",
    ),
]


@pytest.mark.parametrize(("body", "headers", "words"), MALFORMED, ids=[words for _, _, words in MALFORMED])
def test_malformed_requests_get_400_and_the_reason(
    system: RunningSystem, body: bytes, headers: dict[str, str], words: str
) -> None:
    before_mb = system.resident_mb("gateway-0")
    status, _, answer = post(system, "/v2/models/digits/infer", body, **headers)
    assert status == 400
    assert words in json.loads(answer)["error"]
    assert system.resident_mb("gateway-0") - before_mb < 20.0
    assert post(system, "/v2/models/digits/infer", picture(), content_type="image/jpeg")[0] == 200


def test_tensors_that_break_the_model_down_are_answered_with_the_reason(system: RunningSystem) -> None:
    """Not a number, and numbers so large that the network overflows: JSON has no word for the scores."""
    shape = load_catalog()["digits_light"].input.shape
    for value, status, words in ((np.nan, 400, "not finite"), (np.inf, 400, "not finite"), (3e38, 500, "not finite")):
        body = np.full(shape, value, np.float32).tobytes()
        found, _, answer = post(system, "/v2/models/digits_light/infer", body, inference_header_content_length="0")
        assert found == status
        assert words in json.loads(answer)["error"]


def test_the_rest_calls_of_kserve(system: RunningSystem) -> None:
    """KServe's documented V2 REST calls, as its client writes them. The package itself: the slow test below."""

    async def scenario() -> None:
        async with aiohttp.ClientSession(system.url) as session:

            async def get(path: str) -> Any:
                async with session.get(path) as response:
                    assert response.status == 200
                    return await response.json()

            assert (await get("/v2/health/live"))["live"] is True
            assert (await get("/v2/health/ready"))["ready"] is True
            assert (await get("/v2/models/digits/ready"))["ready"] is True
            assert (await get("/v2/models/digits"))["name"] == "digits"
            request = InferRequestBody(picture())
            async with session.post("/v2/models/digits/infer", data=request.body, headers=request.headers) as response:
                assert response.status == 200
                answer = json.loads((await response.read())[: int(response.headers.get(request.LENGTH, 1 << 30))])
            assert answer["model_name"] == "digits"
            assert answer["outputs"][1]["data"][0] == "0"
            async with session.post("/v2/models/nothing/infer", data=request.body, headers=request.headers) as response:
                assert (response.status, "error" in await response.json()) == (404, True)

    asyncio.run(scenario())


class InferRequestBody:
    """An image in KServe's binary request: JSON with `binary_data_size`, then the bytes; outputs asked as JSON."""

    LENGTH = "Inference-Header-Content-Length"

    def __init__(self, image: bytes) -> None:
        element = len(image).to_bytes(4, "little") + image
        entry = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(element)}}
        head = json.dumps({"id": "1", "model_name": "digits", "inputs": [entry]}).encode()
        self.body = head + element
        self.headers = {self.LENGTH: str(len(head)), "content-type": "application/octet-stream"}


@pytest.mark.slow
def test_the_kserve_package(system: RunningSystem, tmp_path: Path) -> None:
    """KServe's client itself, in an environment of its own: it holds back pandas and psutil for everybody else.

    TIDEGATE_KSERVE_PYTHON names an interpreter that has it; otherwise it is installed for this test.
    """
    python = os.environ.get("TIDEGATE_KSERVE_PYTHON", "")
    if not python:
        subprocess.run([sys.executable, "-m", "venv", tmp_path / "kserve"], check=True)
        python = str(tmp_path / "kserve" / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "kserve==0.21.0"], check=True)
    (tmp_path / "digit.jpg").write_bytes(picture())
    script = Path(__file__).parents[1] / "fakes" / "kserve_calls.py"
    side = str(load_catalog()["digits_light"].input.shape[-1])
    done = subprocess.run([python, script, system.url, tmp_path / "digit.jpg", side], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["health"] == [True, True, True]
    assert (found["id"], found["label"], found["shapes"]) == ("mine", "0", [[1, 10], [1, 10]])
    assert "unknown model 'nothing'" in found["error"]


def test_the_gateway_stays_small(system: RunningSystem) -> None:
    assert system.resident_mb("gateway-0") < 100.0
