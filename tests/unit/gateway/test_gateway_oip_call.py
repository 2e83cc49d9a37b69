"""One infer call: how many bytes a tensor has, and where an answer's JSON ends and its scores begin."""

import asyncio
import gzip
import json
from typing import Any

import msgspec
import numpy as np

from gateway.admission import Uploads
from gateway.oip_call import TENSOR_TYPE, OipCall
from gateway.oip_models import find_model
from gateway.oip_tensors import OutputAsked
from gateway.presence import Presence, announce
from protocol.records import InputRecord
from tests.unit.gateway.test_gateway_oip import PREDICTED, SHAPE, Surface, record


def test_a_float16_tensor_has_two_bytes_for_each_number() -> None:
    surface = Surface()
    half = msgspec.structs.replace(record("a/big", "big"), input=InputRecord("pixels", SHAPE, "float16"))
    surface.router.set_instances([half], {"unix:/nowhere"})
    numbers = np.arange(6, dtype="<f2").tobytes()
    asked = {"content_type": TENSOR_TYPE}
    status, _, _ = surface.call("POST", "/v2/models/big/infer", numbers, **asked)
    assert status == 200
    assert (surface.seen[0].body, surface.seen[0].content_type) == (numbers, TENSOR_TYPE)
    status, said = surface.json("POST", "/v2/models/big/infer", numbers * 2, **asked)
    assert status == 400
    assert "'big' takes 12 bytes" in said["error"]


def test_who_left_while_its_body_was_read_is_sent_nowhere() -> None:
    """Compressed bodies are read in a thread; the connection tells of the client's leaving meanwhile."""
    surface, presence = Surface(), Presence()
    sent: list[object] = []
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/v2/models/pets/infer",
        "query_string": b"",
        "headers": [(b"content-type", b"image/png"), (b"content-encoding", b"gzip")],
    }
    announce(scope, presence)

    async def receive() -> dict[str, object]:
        presence.leave()  # from now on
        return {"type": "http.request", "body": gzip.compress(b"picture"), "more_body": False}

    async def send(message: object) -> None:
        sent.append(message)

    asyncio.run(surface.app(scope, receive, send))
    assert surface.seen == []
    assert sent == []
    assert surface.outcomes() == {"pets": {"CANCELLED": 1}}


def test_scores_of_any_shape_are_told_from_the_json_before_them() -> None:
    surface = Surface()
    found = find_model(surface.gateway.fleet.services, "big")
    assert found is not None
    call = OipCall(found, {}, "POST", 1.0, Uploads(1))
    call._outputs = [OutputAsked("probabilities"), OutputAsked("class_ids")]
    scores = np.arange(6, dtype="<f4").tobytes()
    probabilities, classes = call._filled(PREDICTED + scores, (2, 3))
    assert (probabilities.values, probabilities.shape) == (scores, [1, 2, 3])
    assert classes.values == [one["class_id"] for one in json.loads(PREDICTED)["predictions"]]
