"""ONNX files in onnxruntime: on the CPU, or on a GPU through the CUDA or TensorRT provider.

The only file that imports onnxruntime. Its GPU wheel falls back to the CPU without a word when a driver or a
library is missing, so the session is asked which provider it really uses, and a fallback is refused. On a GPU,
inputs and outputs stay in buffers that are bound once per batch size.
"""

import contextlib
import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.catalog import Variant, VariantError
from models.preprocess import MAX_PIXELS, Prepared, Tensor, prepare
from models.runtime import Answer, blank_tensor, check_file, stacked, to_answers

if TYPE_CHECKING:
    import onnxruntime

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
LARGEST_BATCH = 8  # of the range that a TensorRT engine is built for


class OnnxRuntime:
    """A session for one variant on one device."""

    def __init__(
        self, variant: Variant, *, device: str = "cpu", threads: int = 1, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.variant = variant
        self._max_pixels = max_pixels
        self._session = _open_session(variant, device, threads)
        self._fixed_batch = _check_session(self._session, variant)
        self._output = str(self._session.get_outputs()[0].name)
        self._bindings = _Bindings(self._session, variant.input.name, self._output) if device != "cpu" else None

    def prepare(self, payload: bytes, content_type: str) -> Prepared:
        """Decode and preprocess one request body. Raises `InvalidInput`."""
        return prepare(payload, content_type, self.variant, self._max_pixels)

    def execute(self, batch: Sequence[Prepared]) -> list[Answer]:
        """Answers in order. A file exported for a batch of one is run once per input."""
        whole = stacked(batch)
        groups: list[Tensor] = [whole[i : i + 1] for i in range(len(whole))] if self._fixed_batch else [whole]
        answers: list[Answer] = []
        for group in groups:
            answers += to_answers(self._run(group), self.variant)
        return answers

    def warm_up(self) -> None:
        """Run twice on a blank input: the first run plans memory, the second uses the plan."""
        blank = Prepared(tensor=blank_tensor(self.variant))
        for _ in range(2):
            self.execute([blank])

    def close(self) -> None:
        """Drop the session; onnxruntime frees its memory with it."""
        with contextlib.suppress(AttributeError):
            del self._bindings
            del self._session

    def _run(self, images: Tensor) -> Any:
        if self._bindings is not None:
            return self._bindings.run(images)
        return self._session.run([self._output], {self.variant.input.name: images})[0]


class _Bindings:
    """Device buffers for inputs and outputs, made once per batch size and filled in place."""

    def __init__(
        self, session: "onnxruntime.InferenceSession", input_name: str, output_name: str, device: str = "cuda"
    ) -> None:
        self._session = session
        self._input_name, self._output_name = input_name, output_name
        self._device = device
        self._bound: dict[int, tuple[Any, Any]] = {}  # batch size -> (binding, input buffer)

    def run(self, images: Tensor) -> Any:
        """Outputs [batch, classes] as a numpy array."""
        import onnxruntime

        if len(images) not in self._bound:
            buffer = onnxruntime.OrtValue.ortvalue_from_shape_and_type(images.shape, images.dtype, self._device, 0)
            binding = self._session.io_binding()
            binding.bind_ortvalue_input(self._input_name, buffer)
            binding.bind_output(self._output_name, self._device)
            self._bound[len(images)] = (binding, buffer)
        binding, buffer = self._bound[len(images)]
        buffer.update_inplace(images)
        self._session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]


def _open_session(variant: Variant, device: str, threads: int) -> "onnxruntime.InferenceSession":
    """An onnxruntime session whose first provider is the one asked for. Raises `VariantError`."""
    if device not in _PROVIDERS:
        raise VariantError(variant.name, "device", device, f"choose one of {', '.join(_PROVIDERS)}")
    check_file(variant)
    _refuse_both_wheels(variant)
    try:
        import onnxruntime
    except ImportError as error:
        remedy = 'pip install "tidegate[cpu]" or "tidegate[gpu]"'
        raise VariantError(variant.name, "runtime", variant.runtime, remedy) from error
    provider = _PROVIDERS[device]
    available = onnxruntime.get_available_providers()
    if provider not in available:
        remedy = f'this onnxruntime has only {available}; install onnxruntime-gpu or set device = "cpu"'
        raise VariantError(variant.name, "device", device, remedy)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads take the core that the gateway or a neighbour needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        # The wheels find CUDA's libraries in NVIDIA's own packages, or in torch's.
        if device != "cpu" and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        session = onnxruntime.InferenceSession(variant.path, options, providers=_providers(variant, device))
    except Exception as error:  # onnxruntime raises a dozen kinds for broken files, none with a common base
        raise VariantError(variant.name, "path", variant.path, f"cannot be loaded ({error})") from error
    if session.get_providers()[0] != provider:
        remedy = f"onnxruntime fell back to {session.get_providers()}: check driver and CUDA libraries"
        raise VariantError(variant.name, "device", device, remedy)
    return session


def _providers(variant: Variant, device: str) -> list[str | tuple[str, dict[str, str]]]:
    """Providers in order of preference, with their options. What the first cannot run, the next one does."""
    if device == "cpu":
        return ["CPUExecutionProvider"]
    cuda = (
        "CUDAExecutionProvider",
        # Exhaustive search and the largest workspace: seconds once, for the fastest kernel ever after.
        {"cudnn_conv_algo_search": "EXHAUSTIVE", "cudnn_conv_use_max_workspace": "1", "use_tf32": "1"},
    )
    if device == "cuda":
        return [cuda, "CPUExecutionProvider"]
    cache = Path(os.environ.get("TIDEGATE_ENGINE_CACHE", Path.home() / ".cache" / "tidegate" / "engines"))
    folder = cache / variant.name
    folder.mkdir(parents=True, exist_ok=True)
    shape = "x".join(str(length) for length in variant.input.shape)
    tensorrt = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_fp16_enable": "1" if variant.precision == "float16" else "0",
        # One engine for every batch size, tuned for the middle one of the adaptive batches (1, 3, 5).
        "trt_profile_min_shapes": f"{variant.input.name}:1x{shape}",
        "trt_profile_opt_shapes": f"{variant.input.name}:3x{shape}",
        "trt_profile_max_shapes": f"{variant.input.name}:{LARGEST_BATCH}x{shape}",
    }
    return [("TensorrtExecutionProvider", tensorrt), cuda, "CPUExecutionProvider"]


def _refuse_both_wheels(variant: Variant) -> None:
    """The CPU and the GPU wheel share one module: whichever was installed last has overwritten the other."""
    installed = []
    for wheel in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(wheel)
            installed.append(wheel)
    if len(installed) == 2:
        remedy = "both wheels are installed and overwrite each other: uninstall both, then install one"
        raise VariantError(variant.name, "runtime", " + ".join(installed), remedy)


def _check_session(session: "onnxruntime.InferenceSession", variant: Variant) -> bool:
    """Hold the file against its entry; gives back whether it takes batches of one only."""
    inputs = {item.name: item for item in session.get_inputs()}
    if set(inputs) != {variant.input.name}:
        raise VariantError(variant.name, "input.name", variant.input.name, f"the file has {sorted(inputs)}")
    found = inputs[variant.input.name]
    wanted_type = {"float32": "tensor(float)", "float16": "tensor(float16)"}[variant.input.dtype]
    if found.type != wanted_type:
        raise VariantError(variant.name, "input.dtype", variant.input.dtype, f"the file takes {found.type}")
    lengths = zip(found.shape[1:], variant.input.shape, strict=False)
    if len(found.shape) != 4 or any(isinstance(have, int) and have != want for have, want in lengths):
        shape = list(variant.input.shape)
        raise VariantError(variant.name, "input.shape", shape, f"the file takes {found.shape} (batch first)")
    if isinstance(found.shape[0], int) and found.shape[0] != 1:
        remedy = f"the file is fixed to batches of {found.shape[0]}: export it with a free batch axis"
        raise VariantError(variant.name, "path", variant.path, remedy)
    classes = session.get_outputs()[0].shape[-1]
    if isinstance(classes, int) and classes != variant.classes:
        raise VariantError(variant.name, "labels", variant.classes, f"the file gives {classes} classes")
    return isinstance(found.shape[0], int)
