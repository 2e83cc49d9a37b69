"""What a model of the Open Inference Protocol is here: a service, or one variant of it. Read-only views of the fleet.

A service takes one encoded image (BYTES) and is answered by whichever instance its router chooses. Naming a variant
pins the request to its instances; beside the image it takes the variant's own input tensor and gives all of its
scores. Where a service and a variant have one name, it means the service.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from gateway.router import ServiceRouter, Target
from protocol.records import InputRecord, InstanceState

IMAGE: Final = "image"
"""Name of the BYTES input."""
TOP: Final = {"scores": "FP32", "labels": "BYTES", "class_ids": "INT64"}
"""Outputs of every model: the likeliest classes, best first, with their datatypes."""
ALL_SCORES: Final = "probabilities"
"""The further FP32 output of a variant: the scores of all classes, in the order of the classes."""
VERSION: Final = "1"
"""Models have one version: a variant that changes gets a name of its own."""

_DATATYPES: Final = {"float32": "FP32", "float16": "FP16"}
_STATES: Final = {
    InstanceState.LOADING: "LOADING",
    InstanceState.WARMING: "LOADING",
    InstanceState.DRAINING: "UNLOADING",
    InstanceState.FAILED: "UNAVAILABLE",
    InstanceState.READY: "UNAVAILABLE",  # ready, but its worker cannot be reached from here
}


class Model(msgspec.Struct, frozen=True):
    """A service (`variant` is "") or a variant of it."""

    name: str
    router: ServiceRouter
    variant: str = ""

    @property
    def variants(self) -> tuple[str, ...]:
        """What can answer."""
        return (self.variant,) if self.variant else self.router.spec.variants

    @property
    def ready(self) -> bool:
        """Whether a request could be placed now."""
        if not self.variant:
            return self.router.routable > 0
        return any(self.router.capacity[target.index] > 0 for target in self._targets())

    @property
    def input(self) -> InputRecord | None:
        """The tensor that a loaded variant takes; None for a service, or while no instance is loaded."""
        if not self.variant:
            return None
        return next((target.record.input for target in self._targets() if target.record.input), None)

    @property
    def classes(self) -> int:
        """Classes that a loaded variant tells apart; -1 while unknown."""
        return next((target.record.classes for target in self._targets() if target.record.classes), -1)

    def _targets(self) -> Iterator[Target]:
        return (target for target in self.router.targets if target.record.variant in self.variants)

    def outputs(self) -> dict[str, str]:
        """Names and datatypes."""
        return {**TOP, ALL_SCORES: "FP32"} if self.variant else TOP

    def metadata(self) -> dict[str, Any]:
        """Answer of `GET v2/models/{name}`."""
        inputs: list[dict[str, Any]] = [{"name": IMAGE, "datatype": "BYTES", "shape": [1]}]
        if tensor := self.input:
            inputs.append({"name": tensor.name, "datatype": datatype(tensor), "shape": [1, *tensor.shape]})
        outputs = [
            {"name": name, "datatype": kind, "shape": [1, self.classes] if name == ALL_SCORES else [-1]}
            for name, kind in self.outputs().items()
        ]
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": "tidegate_variant" if self.variant else "tidegate_service",
            "inputs": inputs,
            "outputs": outputs,
        }

    def config(self) -> dict[str, Any]:
        """Answer of `GET v2/models/{name}/config`. Of a variant's two inputs, a request brings one."""
        metadata, spec = self.metadata(), self.router.spec
        optional = len(metadata["inputs"]) > 1
        settings = {
            "service": self.router.name,
            "variants": ",".join(self.variants),
            "router": spec.router,
            "requirement_ms": f"{spec.requirement_ms:g}",
            "percentile": f"{spec.percentile:g}",
        }
        return {
            "name": self.name,
            "platform": metadata["platform"],
            "backend": "tidegate",
            "max_batch_size": 0,
            "version_policy": {"latest": {"num_versions": 1}},
            "input": [{**_configured(one), "optional": optional} for one in metadata["inputs"]],
            "output": [_configured(one) for one in metadata["outputs"]],
            "instance_group": [{"name": target.id, "count": 1} for target in self._targets()],
            "parameters": {key: {"string_value": value} for key, value in settings.items()},
        }

    def state(self) -> tuple[str, str]:
        """READY, LOADING, UNLOADING or UNAVAILABLE, and the reason for anything but READY."""
        if self.ready:
            return "READY", ""
        found = [target.record for target in self._targets()]
        if not found:
            return "UNAVAILABLE", "unloaded"
        states = {_STATES[record.state] for record in found}
        reasons = sorted({record.reason for record in found if record.reason})
        state = next(one for one in ("LOADING", "UNLOADING", "UNAVAILABLE") if one in states)
        return state, "; ".join(reasons) or state.lower()


def find_model(services: Mapping[str, ServiceRouter], name: str) -> Model | None:
    """The service or variant of this name."""
    router = services.get(name)
    if router is not None:
        return Model(name, router)
    for router in services.values():
        if name in router.spec.variants:
            return Model(name, router, name)
    return None


def all_models(services: Mapping[str, ServiceRouter]) -> list[Model]:
    """Every service and every variant, each name once."""
    found = {name: Model(name, router) for name, router in services.items()}
    for router in services.values():
        for variant in router.spec.variants:
            found.setdefault(variant, Model(variant, router, variant))
    return [found[name] for name in sorted(found)]


def datatype(tensor: InputRecord) -> str:
    """The protocol's word for the tensor's type."""
    return _DATATYPES[tensor.dtype]


def _configured(tensor: dict[str, Any]) -> dict[str, Any]:
    kind = "STRING" if tensor["datatype"] == "BYTES" else tensor["datatype"]
    return {"name": tensor["name"], "data_type": f"TYPE_{kind}", "dims": tensor["shape"]}
