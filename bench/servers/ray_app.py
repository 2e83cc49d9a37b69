"""Ray Serve over emulated devices. Run by an environment of its own: it is not ours.

    python bench/servers/ray_app.py --port 8000 --folder /tmp/x --heavy 2 --light 2

With both models, requests go to the heavy one while its queue has room for them to be in time, else to the light one;
who finds both full is refused (503). With one model, to that one or nowhere. Queues are as long as lets their last
request be in time; what is not answered within the requirement is cut off (408), also while it waits.
"""

import argparse
import asyncio
import os
import time
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read while ray is imported
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")  # its documented settings for speed; HAProxy listens
os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "1")  # on all addresses of this machine

import ray
from emulated_device import RANKS, REQUIREMENT_S, SERVICE_S, EmulatedDevice
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import JSONResponse

AT_REPLICA, AT_INGRESS = 0.7, 0.2
"""Shares of the requirement that requests may wait: at a replica, and for a place there."""


@serve.deployment
class Model:
    """One device."""

    def __init__(self, variant: str, slower: float) -> None:
        self._device = EmulatedDevice(SERVICE_S[variant] * slower)
        self._turn = asyncio.Lock()
        self._answer = {"variant": variant, "rank": RANKS[variant]}

    async def infer(self, body: bytes) -> dict[str, Any]:
        """Waits for the device, then for as long as it computes."""
        async with self._turn:
            await asyncio.sleep(max(0.0, self._device.next_end_s() - time.monotonic()))
        return self._answer


@serve.deployment
class Ingress:
    """The heaviest model whose queue has room."""

    def __init__(self, *models: DeploymentHandle) -> None:
        self._infer = [model.infer for model in models]

    async def __call__(self, request: Request) -> Any:
        """The answer of the first model that does not refuse."""
        body = await request.body()
        for infer in self._infer:
            try:
                return await infer.remote(body)
            except BackPressureError:
                continue
        return JSONResponse({"error": "all queues are full", "code": "QUEUE_FULL"}, status_code=503)


def deployed(variant: str, replicas: int, slower: float) -> Any:
    """So many replicas of a model behind a queue that keeps the requirement."""
    in_time = REQUIREMENT_S / SERVICE_S[variant]
    return Model.options(
        name=variant,
        num_replicas=replicas,
        max_ongoing_requests=int(AT_REPLICA * in_time),
        max_queued_requests=max(2, int(AT_INGRESS * in_time * replicas)),
        ray_actor_options={"num_cpus": 0},
        logging_config=LoggingConfig(enable_access_log=False),
    ).bind(variant, slower)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", required=True, help="for Ray's sockets and logs")
    parser.add_argument("--heavy", type=int, default=0, help="replicas of the heavy model")
    parser.add_argument("--light", type=int, default=0, help="replicas of the light model")
    parser.add_argument(
        "--slower", type=float, default=1.0, help="multiplies service times, which the queues do not know"
    )
    asked = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=asked.folder)
    serve.start(
        http_options={"host": "127.0.0.1", "port": asked.port, "request_timeout_s": REQUIREMENT_S},
        logging_config=LoggingConfig(enable_access_log=False),
    )
    models = [
        deployed(variant, count, asked.slower)
        for variant, count in (("heavy", asked.heavy), ("light", asked.light))
        if count
    ]
    ingress = Ingress.options(
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        logging_config=LoggingConfig(enable_access_log=False),
    ).bind(*models)
    serve.run(ingress)
    while True:
        time.sleep(3600.0)
