"""A model for Triton's Python backend: an emulated device. `triton_start.py` puts it into the model repository.

An instance is heavy or light by the name of its group, so one model may have instances of both.
"""

import json
import time
from typing import Any

import numpy as np
import triton_python_backend_utils as backend
from emulated_device import RANKS, SERVICE_S, EmulatedDevice


class TritonPythonModel:
    """One instance: one process that Triton starts, one request at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        """`model_instance_name` is the group's name with a number."""
        variant = next(name for name in RANKS if args["model_instance_name"].startswith(name))
        slower = float(json.loads(args["model_config"])["parameters"]["slower"]["string_value"])
        self._device = EmulatedDevice(SERVICE_S[variant] * slower)
        self._rank = np.array([[RANKS[variant]]], dtype=np.int32)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers each request with the rank of the model that it had."""
        responses = []
        for request in requests:
            backend.get_input_tensor_by_name(request, "image").as_numpy()
            time.sleep(max(0.0, self._device.next_end_s() - time.monotonic()))
            responses.append(backend.InferenceResponse([backend.Tensor("rank", self._rank)]))
        return responses
