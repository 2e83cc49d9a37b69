"""The protocol's surface over a gateway without workers: `dispatch` is a fake that keeps the request and answers.

What reaches the dispatcher, what comes back to NVIDIA's client code, and what is counted.
"""

import asyncio
import json
import re
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import tritonclient.http as triton

from gateway.app import TidegateApp
from gateway.config import GatewayConfig
from gateway.handle import Gateway
from gateway.oip_document import OIP_PATHS
from gateway.oip_repository import changed
from gateway.request import Answered, Refused, Request
from gateway.router import ServiceRouter
from protocol.board import Board
from protocol.outcomes import Attempt, Outcome
from protocol.records import (
    PREDICTIONS,
    TENSORS,
    Deployment,
    InputRecord,
    InstanceRecord,
    InstanceSpec,
    InstanceState,
    Reply,
    ServiceSpec,
    Status,
    WorkerSpec,
)

SHAPE = (1, 2, 3)
SCORES = np.array([0.125, 0.5, 0.25, 0.125], dtype=np.float32)
PREDICTED = json.dumps(
    {"predictions": [{"label": f"class {i}", "class_id": i, "score": float(SCORES[i])} for i in (1, 2, 0)]}
).encode()


def record(id: str, variant: str, state: InstanceState = InstanceState.READY) -> InstanceRecord:
    return InstanceRecord(
        id=id,
        worker=id.partition("/")[0],
        address="unix:/nowhere",
        service="pets",
        variant=variant,
        capacity=3,
        state=state,
        epoch="1",
        input=InputRecord("pixels", SHAPE, "float32"),
        classes=4,
    )


class Surface:
    """A gateway whose one service `pets` has the variants `big` and `small`."""

    def __init__(self, token: str = "") -> None:
        self.gateway = Gateway(GatewayConfig(board_url="redis://127.0.0.1:1/0", admin_token=token), Board("redis://x"))
        spec = ServiceSpec(variants=("big", "small"), requirement_ms=250, max_body_bytes=20_000, top_k=3)
        self.router = ServiceRouter("pets", spec)
        self.router.set_instances([record("a/big", "big"), record("b/small", "small")], {"unix:/nowhere"})
        self.gateway.fleet.services["pets"] = self.router
        self.gateway.fleet.deployment = DEPLOYMENT
        self.gateway.dispatcher.dispatch = self._dispatch  # type: ignore[method-assign]
        self.app = TidegateApp(self.gateway)
        self.seen: list[Request] = []
        self.fails: Refused | None = None

    async def _dispatch(self, router: ServiceRouter, request: Request) -> Answered:
        self.seen.append(request)
        if self.fails is not None:
            raise self.fails
        variant = request.variant or "big"
        target = next(one for one in router.targets if one.record.variant == variant)
        payload, shape = PREDICTED, ()
        if request.flags & TENSORS:
            payload = (PREDICTED if request.flags & PREDICTIONS else b"") + SCORES.tobytes()
            shape = SCORES.shape
        reply = Reply(Attempt.OK, Status(target.id), service_s=0.002, queue_s=0.001, batch=1, shape=shape)
        return Answered(target, 0, reply, payload, 1)

    def call(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, body; header names with _ for -."""
        return asyncio.run(self._call(method, path, body, headers))

    async def _call(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        sent: list[dict[str, Any]] = []
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        }
        receive: Callable[[], Awaitable[Any]] = _once({"type": "http.request", "body": body, "more_body": False})

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        start, end = sent
        return start["status"], {name.decode(): value.decode() for name, value in start["headers"]}, end["body"]

    def json(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
        """Status and decoded body."""
        status, _, answer = self.call(method, path, body, **headers)
        return status, json.loads(answer)

    def infer(
        self, model: str, *inputs: triton.InferInput, headers: dict[str, str] | None = None, **settings: Any
    ) -> triton.InferResult:
        """What tritonclient makes of the answer to what tritonclient would send."""
        body, size = triton.InferenceServerClient.generate_request_body(list(inputs), **settings)
        length = {} if size is None else {"inference-header-content-length": str(size)}
        status, got, answer = self.call("POST", f"/v2/models/{model}/infer", body, **length, **(headers or {}))
        assert status == 200, answer
        found = got.get("inference-header-content-length")
        return triton.InferenceServerClient.parse_response_body(
            answer, header_length=None if found is None else int(found), content_encoding=got.get("content-encoding")
        )

    def outcomes(self) -> dict[str, dict[str, int]]:
        statistics = self.gateway.statistics()
        assert statistics.arrived == sum(sum(ends.values()) for ends in statistics.outcomes.values())
        return statistics.outcomes


def _once(message: dict[str, Any]) -> Callable[[], Awaitable[Any]]:
    given = [message]

    async def receive() -> Any:
        return given.pop() if given else await asyncio.Event().wait()

    return receive


DEPLOYMENT = Deployment(
    name="zoo",
    services={"pets": ServiceSpec(variants=("big", "small"), requirement_ms=250)},
    workers=(
        WorkerSpec(name="a", instances=(InstanceSpec(variant="big"), InstanceSpec(variant="small"))),
        WorkerSpec(name="b", instances=(InstanceSpec(variant="small"), InstanceSpec(variant="small", capacity=2))),
    ),
    version=4,
)


def image(data: bytes = b"\xff\xd8\xff...") -> triton.InferInput:
    given = triton.InferInput("image", [1], "BYTES")
    given.set_data_from_numpy(np.array([data], dtype=object))
    return given


def tensor(shape: tuple[int, ...] = (1, *SHAPE), *, binary: bool = True) -> triton.InferInput:
    given = triton.InferInput("pixels", list(shape), "FP32")
    given.set_data_from_numpy(np.arange(6, dtype=np.float32).reshape(shape), binary_data=binary)
    return given


def test_a_service_takes_an_image_and_gives_the_likeliest_classes() -> None:
    surface = Surface()
    result = surface.infer("pets", image(), request_id="my id", timeout=100_000, priority=2)
    assert result.as_numpy("labels").tolist() == [b"class 1", b"class 2", b"class 0"]
    assert result.as_numpy("scores").tolist() == [0.5, 0.25, 0.125]
    assert result.as_numpy("class_ids").tolist() == [1, 2, 0]
    head = result.get_response()
    assert (head["model_name"], head["model_version"], head["id"]) == ("pets", "1", "my id")
    assert (head["parameters"]["variant"], head["parameters"]["outcome"]) == ("big", "OK")
    (request,) = surface.seen
    assert (request.body, request.variant, request.flags, request.top_k) == (b"\xff\xd8\xff...", "", 0, 3)
    assert request.deadline_s - request.arrived_s == pytest.approx(0.1)
    assert surface.outcomes() == {"pets": {"OK": 1}}


def test_a_variant_is_pinned_and_takes_its_tensor() -> None:
    surface = Surface()
    result = surface.infer("small", tensor())
    assert (result.as_numpy("probabilities") == SCORES.reshape(1, 4)).all()
    assert result.as_numpy("labels").tolist() == [b"class 1", b"class 2", b"class 0"]
    (request,) = surface.seen
    assert (request.variant, request.flags) == ("small", TENSORS | PREDICTIONS)
    assert request.content_type == "application/x-tidegate-tensor"
    assert request.body == np.arange(6, dtype=np.float32).tobytes()
    assert request.deadline_s - request.arrived_s == pytest.approx(0.25)


def test_only_what_is_asked_comes_back() -> None:
    surface = Surface()
    asked = [triton.InferRequestedOutput("probabilities", binary_data=False)]
    result = surface.infer("small", tensor(SHAPE, binary=False), outputs=asked)
    assert result.as_numpy("probabilities").tolist() == [SCORES.tolist()]
    assert [one["name"] for one in result.get_response()["outputs"]] == ["probabilities"]
    assert surface.seen[0].flags == TENSORS


def test_classification_extension() -> None:
    surface = Surface()
    result = surface.infer("pets", image(), outputs=[triton.InferRequestedOutput("scores", class_count=2)])
    assert result.as_numpy("scores").tolist() == [b"0.500000:1:class 1", b"0.250000:2:class 2"]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_answers_are_compressed_where_the_client_takes_it(coding: str) -> None:
    surface = Surface()
    result = surface.infer("pets", image(), headers={"accept-encoding": coding})
    assert result.as_numpy("scores").tolist() == [0.5, 0.25, 0.125]
    _, headers, _ = surface.call("GET", "/v2/models/pets", accept_encoding=coding)
    assert headers["content-encoding"] == coding


def test_a_raw_request_is_the_image_or_exactly_the_tensor() -> None:
    surface = Surface()
    pixels = np.arange(6, dtype=np.float32).tobytes()
    zero = {"inference_header_content_length": "0"}
    for model, body, headers, is_tensor in (
        ("pets", b"\xff\xd8\xff", zero, False),
        ("small", pixels, zero, True),
        ("small", pixels + b"1", zero, False),
        ("pets", b"\xff\xd8\xff", {"content_type": "image/jpeg"}, False),
    ):
        status, got, _ = surface.call("POST", f"/v2/models/{model}/infer", body, **headers)
        assert status == 200
        assert ("inference-header-content-length" in got) == (headers is zero)
        assert surface.seen[-1].body == body
        assert (surface.seen[-1].content_type == "application/x-tidegate-tensor") == is_tensor


def test_a_bare_tensor_is_answered_in_json_and_has_to_fit() -> None:
    surface = Surface()
    bare = {"content_type": "application/x-tidegate-tensor"}
    pixels = np.arange(6, dtype=np.float32).tobytes()
    status, answer = surface.json("POST", "/v2/models/small/infer", pixels, **bare)
    assert status == 200
    assert "probabilities" in {output["name"] for output in answer["outputs"]}
    assert (surface.seen[-1].content_type, surface.seen[-1].variant) == ("application/x-tidegate-tensor", "small")
    for model, body, reason in (
        ("small", pixels[1:], "23 bytes are no float32 of shape [1, 2, 3]: 'small' takes 24 bytes"),
        ("pets", pixels, "model 'pets' takes no tensor: name a loaded variant (big, small)"),
        ("small", b"", "the body is empty: a raw request is the input's bytes"),
    ):
        status, answer = surface.json("POST", f"/v2/models/{model}/infer", body, **bare)
        assert (status, answer["error"]) == (400, reason)
    assert len(surface.seen) == 1


def text(datatype: str = "BYTES", name: str = "image", shape: str = "[1]", more: str = "") -> bytes:
    return (
        f'{{"inputs": [{{"name": "{name}", "datatype": "{datatype}", "shape": {shape}, "data": ["/9j/"]}}]{more}}}'
    ).encode()


@pytest.mark.parametrize(
    ("model", "body", "status", "reason"),
    [
        ("pets", b"", 400, "not an inference request"),
        ("pets", b'{"inputs": []}', 400, "0 inputs: model 'pets' takes one, 'image'"),
        ("pets", text("FP32"), 400, "it takes BYTES"),
        ("pets", text(name="pixels"), 400, "unknown input 'pixels': model 'pets' takes 'image'"),
        ("small", text(name="picture"), 400, "unknown input 'picture': model 'small' takes 'image' or 'pixels'"),
        ("small", text("FP64", "pixels"), 400, "datatype 'FP64': it takes FP32"),
        ("small", text("FP32", "pixels", "[1, -2, 3]"), 400, "none negative"),
        ("small", text("FP32", "pixels", "[6]"), 400, r"it takes \[1, 1, 2, 3\]"),
        ("pets", text(shape="[-1]"), 400, "none negative"),
        ("pets", text(shape="[2]"), 400, "one image per request"),
        ("pets", text(more=', "outputs": [{"name": "x"}]'), 400, "unknown output 'x'"),
        ("pets", text(more=', "outputs": [{"name": "probabilities"}]'), 400, "unknown output 'probabilities'"),
        ("pets", text(more=', "parameters": {"timeout": -1}'), 400, "timeout = '-1': must be microseconds"),
        ("pets", text(more=', "parameters": {"timeout": true}'), 400, "timeout = 'True'"),
        ("pets", text(more=', "parameters": {"timeout": 1e99}'), 400, "at most 10 minutes"),
        ("pets", text(more=', "parameters": {"sequence_id": 9}'), 400, "keep no sequences"),
        (
            "pets",
            text(more=', "outputs": [{"name": "scores", "parameters": {"classification": -1}}]'),
            400,
            "classification = -1",
        ),
        ("nope", text(), 404, "unknown model 'nope': there are big, pets, small"),
        ("pets/versions/2", text(), 404, "has no version '2'"),
        ("pets/versions/1/x", text(), 404, "no such path"),
        ("pets", b"x" * 20_001, 413, "larger than 20000 bytes"),
    ],
)
def test_what_is_wrong_is_said(model: str, body: bytes, status: int, reason: str) -> None:
    surface = Surface()
    got, answer = surface.json("POST", f"/v2/models/{model}/infer", body)
    assert got == status
    assert answer["code"] == "INVALID"
    assert re.search(reason, answer["error"])
    assert surface.seen == []
    known = "unknown" if status == 404 else "pets"
    assert surface.outcomes() == {known: {"INVALID": 1}}


def test_a_zero_timeout_is_none_and_a_header_may_say_it_instead() -> None:
    surface = Surface()
    surface.json("POST", "/v2/models/pets/infer", text(more=', "parameters": {"timeout": 0}'))
    surface.json("POST", "/v2/models/pets/infer", text(), x_deadline_ms="40")
    assert [one.deadline_s - one.arrived_s for one in surface.seen] == pytest.approx([0.25, 0.04])


def test_a_refusal_is_an_error_of_the_protocol() -> None:
    surface = Surface()
    surface.fails = Refused(Outcome.QUEUE_FULL, "no place in the queue")
    status, headers, body = surface.call("POST", "/v2/models/small/infer", text())
    assert (status, json.loads(body)["error"]) == (429, "no place in the queue")
    assert int(headers["retry-after"]) >= 1
    assert surface.json("GET", "/v2/models/small/stats")[1]["model_stats"][0]["inference_stats"]["fail"]["count"] == 1


@pytest.mark.parametrize(("on_late", "status"), [("serve", 200), ("error", 504)])
def test_lateness_is_judged_when_the_answer_is_there(on_late: str, status: int) -> None:
    surface = Surface()
    surface.router.configure(msgspec.structs.replace(surface.router.spec, on_late=on_late))
    given, headers, body = surface.call(
        "POST", "/v2/models/pets/infer", b"image", x_deadline_ms="0.0001", content_type="image/png"
    )
    assert (given, headers["x-tidegate-late"]) == (status, "1")
    answer = json.loads(body)
    assert (answer["code"] if status == 504 else answer["parameters"]["outcome"]) == "LATE"
    assert status == 504 or answer["parameters"]["total_ms"] > 0.0
    assert surface.outcomes() == {"pets": {"LATE": 1}}


def test_a_refusal_ends_the_connection_only_where_the_body_may_not_have_been_read() -> None:
    surface = Surface()
    asked = ("POST", "/v2/models/pets/infer", b"x" * 20_001)
    status, headers, _ = surface.call(*asked, content_length="20001")
    assert (status, headers.get("connection")) == (413, "close")
    surface.fails = Refused(Outcome.QUEUE_FULL, "no place")
    status, headers, _ = surface.call("POST", "/v2/models/pets/infer", b"image", content_type="image/png")
    assert (status, headers.get("connection")) == (429, None)
    # Elsewhere below /v2, too.
    status, headers, _ = surface.call("POST", "/v2/repository/index", b"x", content_length="70000")
    assert (status, headers.get("connection")) == (413, "close")
    status, headers, _ = surface.call("POST", "/v2/repository/index", b"x")
    assert (status, headers.get("connection")) == (400, None)


def test_health_and_metadata() -> None:
    surface = Surface()
    assert surface.json("GET", "/v2")[1]["name"] == "tidegate"
    assert surface.json("GET", "/v2/health/live") == (200, {"live": True})
    assert surface.json("GET", "/v2/health/ready") == (200, {"ready": True})
    assert surface.json("GET", "/v2/models/small/versions/1/ready") == (200, {"name": "small", "ready": True})
    status, metadata = surface.json("GET", "/v2/models/small")
    assert status == 200
    assert metadata["inputs"][1] == {"name": "pixels", "datatype": "FP32", "shape": [1, *SHAPE]}
    assert metadata["outputs"][-1] == {"name": "probabilities", "datatype": "FP32", "shape": [1, 4]}
    config = surface.json("GET", "/v2/models/pets/config")[1]
    assert config["input"] == [{"name": "image", "data_type": "TYPE_STRING", "dims": [1], "optional": False}]
    assert [one["name"] for one in config["instance_group"]] == ["a/big", "b/small"]


def test_readiness_of_what_cannot_be_asked() -> None:
    surface = Surface()
    surface.router.set_instances(
        [record("a/big", "big", InstanceState.LOADING), record("b/small", "small")], {"unix:/nowhere"}
    )
    assert surface.json("GET", "/v2/models/big/ready") == (503, {"name": "big", "ready": False})
    assert surface.json("GET", "/v2/models/pets/ready")[0] == 200
    index = surface.json("POST", "/v2/repository/index")[1]
    assert [(one["name"], one["state"]) for one in index] == [("big", "LOADING"), ("pets", "READY"), ("small", "READY")]
    ready = surface.json("POST", "/v2/repository/index", b'{"ready": true}')[1]
    assert [one["name"] for one in ready] == ["pets", "small"]
    surface.gateway.draining = True
    assert surface.json("GET", "/v2/health/ready")[0] == 503


def test_statistics_add_up() -> None:
    surface = Surface()
    for _ in range(3):
        surface.infer("pets", image())
    surface.infer("small", image())
    found = {one["name"]: one for one in surface.json("GET", "/v2/models/stats")[1]["model_stats"]}
    assert {name: one["inference_count"] for name, one in found.items()} == {"pets": 4, "big": 3, "small": 1}
    times = found["big"]["inference_stats"]
    assert times["compute_infer"] == {"count": 3, "ns": 6_000_000}
    assert times["queue"] == {"count": 3, "ns": 3_000_000}
    assert found["big"]["execution_count"] == 3


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v2/models/pets/infer", b"", 405),
        ("GET", "/v2/nothing", b"", 404),
        ("GET", "/v2/models/nope/ready", b"", 404),
        ("POST", "/v2/models/pets", b"", 404),
        ("POST", "/v2/repository/index", b"[" * 10_000 + b"]" * 10_000, 400),
        ("POST", "/v2/repository/index", b"[]", 400),
        ("POST", "/v2/repository/index", b"x" * 70_000, 413),
        ("POST", "/v2/repository/models/nope/load", b"", 404),
        ("POST", "/v2/repository/models/pets/load", b'{"parameters": {"config": "{}"}}', 400),
        ("GET", "/v2/tidegate/arrivals?since=x", b"", 400),
        ("GET", "/v2/systemsharedmemory/status", b"", 404),
    ],
)
def test_other_faults_are_errors_too(method: str, path: str, body: bytes, status: int) -> None:
    got, answer = Surface().json(method, path, body)
    assert got == status
    assert answer["error"]


def test_loading_needs_the_token_when_there_is_one() -> None:
    surface = Surface(token="secret")
    for given in ("", "Bearer wrong"):
        status, answer = surface.json("POST", "/v2/repository/models/pets/unload", authorization=given)
        assert (status, "Authorization" in answer["error"]) == (401, True)


def test_unloading_keeps_the_places() -> None:
    wanted, ids = changed(DEPLOYMENT, ("small",), False)
    assert ids == ["a/small", "b/small", "b/small#2"]
    assert [[spec.loaded for spec in worker.instances] for worker in wanted.workers] == [[True, False], [False, False]]
    assert changed(wanted, ("small",), True)[0] == DEPLOYMENT


@pytest.mark.parametrize("since", ["--1", "1-", "x", "", "9" * 19, "%D9%A3", "1.0", "-"])
def test_arrivals_since_nonsense_are_refused(since: str) -> None:
    status, answer = Surface().json("GET", f"/v2/tidegate/arrivals?since={since}&")
    if since:
        assert (status, answer["code"]) == (400, "INVALID")
        assert "since = " in answer["error"]
    else:
        assert status == 200, "an empty value is none"


def test_a_bug_is_a_failure_in_json() -> None:
    surface = Surface()
    surface.gateway.inferences = None  # type: ignore[assignment]
    status, answer = surface.json("GET", "/v2/models/stats")
    assert (status, answer["code"]) == (500, "FAILED")


def test_arrivals_tell_what_came_and_what_was_lost() -> None:
    surface = Surface()
    start = surface.json("GET", "/v2/tidegate/arrivals")[1]
    assert (start["next"], start["time_s"]) == (0, [])
    surface.infer("pets", image())
    surface.infer("small", image())
    surface.call("POST", "/v2/models/nope/infer", b"x")
    page = surface.json("GET", "/v2/tidegate/arrivals?since=0")[1]
    assert page["services"] == ["pets", "small"], "a pinned request is no router's"
    assert page["gateway"] == start["gateway"]
    assert 0.0 <= page["time_s"][0] <= page["time_s"][1] <= page["now_s"]
    assert surface.json("GET", f"/v2/tidegate/arrivals?since={page['next']}")[1]["services"] == []


def test_the_document_and_the_handler_agree() -> None:
    """Every operation that the document names exists, and answers with a status that the document names."""
    surface = Surface()
    surface.infer("pets", image())
    status, _, body = surface.call("GET", "/openapi.json")
    assert status == 200
    paths = json.loads(body)["paths"]
    assert set(OIP_PATHS) <= set(paths)
    for path, operations in OIP_PATHS.items():
        for method, operation in operations.items():
            if path.endswith(("load", "unload")):
                continue  # they need a board: tested against real processes
            concrete = path.replace("{name}", "pets").replace("{version}", "1")
            content = struct.pack("<I", 1) if method == "post" and "index" not in path else b""
            got, answer = surface.json(method.upper(), concrete, content)
            assert str(got) in operation["responses"], (path, got, answer)
            unknown, answer = surface.json(method.upper(), path.replace("{name}", "nope").replace("{version}", "1"))
            if "{name}" in path:
                assert (unknown, "unknown model" in answer["error"]) == (404, True)
