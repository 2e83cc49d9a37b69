"""ONNX files in onnxruntime: on the CPU, or on a GPU through the CUDA or TensorRT provider.

The only file that imports onnxruntime; detectors get their sessions from `open_session`, too. Its GPU wheel falls back
to the CPU without a word when a driver or a library is missing, so the session is asked which provider it really uses,
and a fallback is refused. On a GPU, inputs stay in buffers that are bound once per batch size, and there are few batch
sizes: the best kernel is searched for each new one, which takes seconds, so batches are filled up to the next of those
that were warmed up.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.catalog import Variant, VariantError, kind_and_index
from models.device_decode import open_decoder
from models.preprocess import MAX_PIXELS, Prepared, Tensor, prepare
from models.runtime import (
    GPU_BATCHES,
    Answer,
    blank_tensor,
    check_file,
    filled,
    gpu_batches,
    stacked,
    to_answers,
)

if TYPE_CHECKING:
    import onnxruntime

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


class OnnxRuntime:
    """A session for one variant on one device."""

    def __init__(
        self, variant: Variant, *, device: str = "cpu", threads: int = 1, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.variant = variant
        self._max_pixels = max_pixels
        self._decoder = open_decoder(variant, device)
        kind, index = kind_and_index(device)
        check_file(variant)
        self._session = open_session(
            variant.name, variant.path, device, threads, lambda kind, index: _providers(variant, kind, index)
        )
        self._fixed_batch = _check_session(self._session, variant)
        self._output = str(self._session.get_outputs()[0].name)
        self._bindings = (
            _Bindings(self._session, variant.input.name, self._output, "cuda", index) if kind != "cpu" else None
        )

    def prepare(self, payload: bytes, content_type: str) -> Prepared:
        """Decode and preprocess one request body. Raises `InvalidInput`."""
        return prepare(payload, content_type, self.variant, self._max_pixels, self._decoder)

    def execute(self, batch: Sequence[Prepared]) -> list[Answer]:
        """Answers in order. A file exported for a batch of one is run once per input."""
        whole = stacked(batch)
        groups: list[Tensor] = [whole]
        if self._fixed_batch:
            groups = [whole[i : i + 1] for i in range(len(whole))]
        elif self._bindings is not None:
            groups = gpu_batches(whole)
        answers: list[Answer] = []
        for group in groups:
            answers += to_answers(self._run(group), self.variant)
        return answers

    def warm_up(self) -> None:
        """Run twice on blank inputs: the first run plans memory, the second uses the plan. On a GPU, every size."""
        blank = Prepared(tensor=blank_tensor(self.variant))
        for size in (1,) if self._bindings is None or self._fixed_batch else GPU_BATCHES:
            for _ in range(2):
                self.execute([blank] * size)

    def close(self) -> None:
        """Drop the session; onnxruntime frees its memory with it."""
        with contextlib.suppress(AttributeError):
            del self._bindings
            del self._session

    def _run(self, images: Tensor) -> Any:
        if self._bindings is not None:
            whole = images if self._fixed_batch else filled(images)
            return self._bindings.run(whole)[: len(images)]
        return self._session.run([self._output], {self.variant.input.name: images})[0]


class _Bindings:
    """Device buffers for inputs and outputs, made once per batch size and filled in place."""

    def __init__(
        self,
        session: "onnxruntime.InferenceSession",
        input_name: str,
        output_name: str,
        device: str = "cuda",
        index: int = 0,
    ) -> None:
        self._session = session
        self._input_name, self._output_name = input_name, output_name
        self._device, self._index = device, index
        self._bound: dict[int, tuple[Any, Any]] = {}  # batch size -> (binding, input buffer)

    def run(self, images: Tensor) -> Any:
        """Outputs [batch, classes] as a numpy array."""
        import onnxruntime

        if len(images) not in self._bound:
            buffer = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                images.shape, images.dtype, self._device, self._index
            )
            binding = self._session.io_binding()
            binding.bind_ortvalue_input(self._input_name, buffer)
            binding.bind_output(self._output_name, self._device, self._index)
            self._bound[len(images)] = (binding, buffer)
        binding, buffer = self._bound[len(images)]
        buffer.update_inplace(images)
        # The session computes on a stream of its own: the copies before and after must be waited for.
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding.copy_outputs_to_cpu()[0]


def open_session(
    name: str,
    file: str,
    device: str,
    threads: int,
    providers: Callable[[str, int], list[str | tuple[str, dict[str, str]]]],
) -> "onnxruntime.InferenceSession":
    """A session for the variant `name` whose first provider is the device's, `threads` wide. Raises `VariantError`.

    `providers` gives the list for a kind of device and its number, once it is known that there is such a one.
    """
    kind, index = kind_and_index(device)
    if kind not in _PROVIDERS:
        raise VariantError(name, "device", device, f"choose one of {', '.join(_PROVIDERS)}")
    _refuse_both_wheels(name)
    try:
        import onnxruntime
    except ImportError as error:
        remedy = 'pip install "tidegate[cpu]" or "tidegate[gpu]"'
        raise VariantError(name, "runtime", "onnxruntime", remedy) from error
    provider = _PROVIDERS[kind]
    available = onnxruntime.get_available_providers()
    if provider not in available:
        remedy = f'this onnxruntime has only {available}; install onnxruntime-gpu or set device = "cpu"'
        raise VariantError(name, "device", device, remedy)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads take the core that the gateway or a neighbour needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        # The wheels find CUDA's libraries in NVIDIA's own packages, or in torch's.
        if kind != "cpu" and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        if kind == "tensorrt":
            with contextlib.suppress(ImportError):  # then the linker has to find its libraries
                importlib.import_module("tensorrt")
        session = onnxruntime.InferenceSession(file, options, providers=providers(kind, index))
    except Exception as error:  # onnxruntime raises a dozen kinds for broken files, none with a common base
        raise VariantError(name, "path", file, f"cannot be loaded ({error})") from error
    if session.get_providers()[0] != provider:
        remedy = f"onnxruntime fell back to {session.get_providers()}: check driver and CUDA libraries"
        raise VariantError(name, "device", device, remedy)
    session.disable_fallback()  # nor later: a run that fails must fail
    return session


def _providers(variant: Variant, device: str, index: int = 0) -> list[str | tuple[str, dict[str, str]]]:
    """Providers in order of preference, with their options. What the first cannot run, the next one does."""
    if device == "cpu":
        return ["CPUExecutionProvider"]
    cuda = (
        "CUDAExecutionProvider",
        # Exhaustive search and the largest workspace: seconds once, for the fastest kernel ever after.
        {
            "device_id": str(index),
            "cudnn_conv_algo_search": "EXHAUSTIVE",
            "cudnn_conv_use_max_workspace": "1",
            "use_tf32": "1",
        },
    )
    if device == "cuda":
        return [cuda, "CPUExecutionProvider"]
    cache = Path(os.environ.get("TIDEGATE_ENGINE_CACHE", Path.home() / ".cache" / "tidegate" / "engines"))
    # An engine carries the weights, but onnxruntime finds it by the graph alone: new weights must not meet old engines.
    folder = cache / f"{variant.name}-{_digest(Path(variant.path))}"
    folder.mkdir(parents=True, exist_ok=True)
    shape = "x".join(str(length) for length in variant.input.shape)
    tensorrt = {
        "device_id": str(index),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_fp16_enable": "1" if variant.precision == "float16" else "0",
        # One engine for every batch size, tuned for the middle one of the adaptive batches (1, 3, 5).
        "trt_profile_min_shapes": f"{variant.input.name}:{GPU_BATCHES[0]}x{shape}",
        "trt_profile_opt_shapes": f"{variant.input.name}:3x{shape}",
        "trt_profile_max_shapes": f"{variant.input.name}:{GPU_BATCHES[-1]}x{shape}",
    }
    return [("TensorrtExecutionProvider", tensorrt), cuda, "CPUExecutionProvider"]


def _digest(file: Path) -> str:
    """16 hexadecimal digits that change with the file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def _refuse_both_wheels(name: str) -> None:
    """The CPU and the GPU wheel share one module: whichever was installed last has overwritten the other."""
    installed = []
    for wheel in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(wheel)
            installed.append(wheel)
    if len(installed) == 2:
        remedy = "both wheels are installed and overwrite each other: uninstall both, then install one"
        raise VariantError(name, "runtime", " + ".join(installed), remedy)


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
