"""What the Open Inference Protocol's statistics ask for: counts and times by model, summed since this process began.

A model is a service or a variant of it. Prometheus metrics (`metrics.py`) are the better source for operating; this
is for clients that ask over the protocol.
"""

import time
from typing import Final

import msgspec

from protocol.records import Reply

_NS: Final = 1e9


class Duration(msgspec.Struct, frozen=True):
    """How often, and nanoseconds in all."""

    count: int
    ns: int


class InferenceTimes(msgspec.Struct, frozen=True):
    """Where the time of answered requests went; `fail` counts the ones without an answer (they carry no time)."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class _Model:
    """Running sums of one model. Times in seconds."""

    __slots__ = ("answered", "executions", "failed", "last_s", "prepare_s", "queue_s", "service_s", "total_s")

    def __init__(self) -> None:
        self.answered = 0
        self.failed = 0
        self.executions = 0.0
        self.last_s = 0.0
        self.total_s = 0.0
        self.queue_s = 0.0
        self.prepare_s = 0.0
        self.service_s = 0.0

    def times(self) -> InferenceTimes:
        """The sums in the protocol's form."""
        counted = self.answered
        return InferenceTimes(
            success=Duration(counted, int(self.total_s * _NS)),
            fail=Duration(self.failed, 0),
            queue=Duration(counted, int(self.queue_s * _NS)),
            compute_input=Duration(counted, int(self.prepare_s * _NS)),
            compute_infer=Duration(counted, int(self.service_s * _NS)),
            compute_output=Duration(counted, 0),
        )


class Inferences:
    """Sums by model name. A request for a service counts for the service and for the variant that answered."""

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}

    def add(self, service: str, variant: str, total_s: float, reply: Reply) -> None:
        """An answered request: it shared one execution with `reply.batch` - 1 others."""
        now_s = time.time()  # the protocol wants a date: not compared with anything here
        for name in (service, variant) if variant != service else (service,):
            model = self._models.get(name)
            if model is None:
                model = self._models[name] = _Model()
            model.answered += 1
            model.total_s += total_s
            model.queue_s += reply.queue_s
            model.prepare_s += reply.prepare_s
            model.service_s += reply.service_s
            model.executions += 1.0 / max(1, reply.batch)
            model.last_s = now_s

    def add_failure(self, service: str, variant: str) -> None:
        """A request that ended without an answer; `variant` if the client had pinned one."""
        for name in {service, variant} - {""}:
            self._models.setdefault(name, _Model()).failed += 1

    def of(self, name: str) -> dict[str, object]:
        """One entry of `model_stats`; zeros for a model that has not been asked."""
        model = self._models.get(name) or _Model()
        return {
            "name": name,
            "version": "1",
            "last_inference": int(model.last_s * 1000),
            "inference_count": model.answered,
            "execution_count": round(model.executions),
            "inference_stats": model.times(),
            "batch_stats": [],
        }
