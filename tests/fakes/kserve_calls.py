"""`python kserve_calls.py URL IMAGE SIDE`: KServe's own REST client against a gateway; runs where kserve is.

Prints one JSON object with what the client understood. Not part of any process of ours.
"""

import asyncio
import json
import sys
from pathlib import Path

import httpx  # type: ignore[import-not-found,unused-ignore]
import numpy as np
from kserve import (  # type: ignore[import-not-found,unused-ignore]
    InferenceRESTClient,
    InferInput,
    InferRequest,
    RESTConfig,
)


async def calls(url: str, image: bytes, side: int) -> dict[str, object]:
    """Health, readiness, infer with an image and with a tensor both ways, and an error."""
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=1, timeout=20))
    health = [await client.is_server_live(url), await client.is_server_ready(url)]
    health.append(await client.is_model_ready(url, "digits"))
    picture = InferInput("image", [1], "BYTES")
    picture.set_data_from_numpy(np.array([image], dtype=object), binary_data=True)
    answer = await client.infer(url, InferRequest("digits", [picture], "mine"), model_name="digits")
    shapes = []
    for binary in (True, False):
        tensor = InferInput("input", [1, 1, side, side], "FP32")
        tensor.set_data_from_numpy(np.zeros((1, 1, side, side), np.float32), binary_data=binary)
        request = InferRequest("digits_light", [tensor], "t", parameters={"binary_data_output": binary})
        found = await client.infer(url, request, model_name="digits_light")
        shapes.append(list(found.outputs[-1].as_numpy().shape))
    try:
        await client.infer(url, InferRequest("nothing", [picture]), model_name="nothing")
        error = ""
    except httpx.HTTPStatusError as raised:
        error = str(raised)
    await client.close()
    return {"health": health, "id": answer.id, "label": answer.outputs[1].data[0], "shapes": shapes, "error": error}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(calls(sys.argv[1], Path(sys.argv[2]).read_bytes(), int(sys.argv[3])))))
