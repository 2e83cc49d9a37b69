"""ONNX files in OpenVINO: another way to run them on Intel and AMD processors.

The only file that imports openvino. Which of the two is faster depends on processor and model: measure with
`tidegate models profile` and choose by `runtime` in the entry.
"""

from collections.abc import Sequence
from typing import Any

from models.catalog import Variant, VariantError
from models.device_decode import open_decoder
from models.preprocess import MAX_PIXELS, Prepared, prepare
from models.runtime import Answer, blank_tensor, check_file, stacked, to_answers


class OpenvinoRuntime:
    """A compiled model for one variant on the CPU."""

    def __init__(
        self, variant: Variant, *, device: str = "cpu", threads: int = 1, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.variant = variant
        self._max_pixels = max_pixels
        self._decoder = open_decoder(variant, device)
        self._request: Any = _compile(variant, device, threads).create_infer_request()

    def prepare(self, payload: bytes, content_type: str) -> Prepared:
        """Decode and preprocess one request body. Raises `InvalidInput`."""
        return prepare(payload, content_type, self.variant, self._max_pixels, self._decoder)

    def execute(self, batch: Sequence[Prepared]) -> list[Answer]:
        """Answers in order."""
        outputs = self._request.infer({self.variant.input.name: stacked(batch)})
        return to_answers(outputs[0], self.variant)

    def warm_up(self) -> None:
        """Run twice on a blank input."""
        for _ in range(2):
            self.execute([Prepared(tensor=blank_tensor(self.variant))])

    def close(self) -> None:
        """Drop the compiled model."""
        self._request = None


def _compile(variant: Variant, device: str, threads: int) -> Any:
    """The compiled model, its input held against the entry. Raises `VariantError`."""
    if device != "cpu":
        raise VariantError(variant.name, "device", device, 'OpenVINO runs here on "cpu" only')
    check_file(variant)
    try:
        import openvino
    except ImportError as error:
        raise VariantError(variant.name, "runtime", "openvino", "pip install openvino") from error
    core = openvino.Core()
    try:
        model = core.read_model(variant.path)
    except RuntimeError as error:
        raise VariantError(variant.name, "path", variant.path, f"cannot be loaded ({error})") from error
    names = [name for item in model.inputs for name in item.get_names()]
    if names != [variant.input.name]:
        raise VariantError(variant.name, "input.name", variant.input.name, f"the file has {names}")
    wanted = openvino.PartialShape([-1, *variant.input.shape])
    if not model.inputs[0].get_partial_shape().compatible(wanted):
        shape = list(variant.input.shape)
        found = model.inputs[0].get_partial_shape()
        raise VariantError(variant.name, "input.shape", shape, f"the file takes {found} (batch first)")
    return core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # Left alone it would compute in bfloat16 where the processor can: other answers, unasked.
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
