"""What the Open Inference Protocol's statistics ask for: counts and times by model, summed since this process began.

A model is a service or a variant of it. Prometheus metrics (`metrics.py`) are the better source for operating; this
is for clients that ask over the protocol.
"""

import time
from typing import Final

import msgspec

from protocol.records import Reply

_NS: Final = 1e9


class Duration(msgspec.Struct):
    """How often, and nanoseconds in all."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        """One more."""
        self.count += 1
        self.ns += int(seconds * _NS)


class InferenceTimes(msgspec.Struct):
    """Where the time of answered requests went; `fail` counts the ones without an answer (they carry no time)."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class _Model:
    """Running sums of one model."""

    def __init__(self) -> None:
        self.times = InferenceTimes(*(Duration() for _ in range(6)))
        self.executions = 0.0
        self.last_ms = 0


class Inferences:
    """Sums by model name. A request for a service counts for the service and for the variant that answered."""

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}

    def add(self, service: str, variant: str, total_s: float, reply: Reply) -> None:
        """An answered request: it shared one execution with `reply.batch` - 1 others."""
        now_ms = int(time.time() * 1000)  # the protocol wants a date: not compared with anything here
        for name in (service, variant) if variant != service else (service,):
            model = self._models.get(name)
            if model is None:
                model = self._models[name] = _Model()
            times = model.times
            times.success.add(total_s)
            times.queue.add(reply.queue_s)
            times.compute_input.add(reply.prepare_s)
            times.compute_infer.add(reply.service_s)
            times.compute_output.add(0.0)
            model.executions += 1.0 / max(1, reply.batch)
            model.last_ms = now_ms

    def add_failure(self, service: str, variant: str) -> None:
        """A request that ended without an answer; `variant` if the client had pinned one."""
        for name in {service, variant} - {""}:
            self._models.setdefault(name, _Model()).times.fail.count += 1

    def of(self, name: str) -> dict[str, object]:
        """One entry of `model_stats`; zeros for a model that has not been asked."""
        model = self._models.get(name) or _Model()
        return {
            "name": name,
            "version": "1",
            "last_inference": model.last_ms,
            "inference_count": model.times.success.count,
            "execution_count": round(model.executions),
            "inference_stats": model.times,
            "batch_stats": [],
        }
