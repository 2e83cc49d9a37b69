"""Networks saved with `torch.export` (.pt2) in torch: channels last, CUDA graphs on a GPU.

The only serving file that imports torch. A CUDA graph is recorded once per batch size; a replay is one launch,
whatever the number of layers, which is what small batches spend their time on. Other batch sizes are filled up
to the next recorded one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from models.catalog import Variant, VariantError, kind_and_index
from models.device_decode import open_decoder
from models.preprocess import MAX_PIXELS, Prepared, Tensor, prepare
from models.runtime import (
    GPU_BATCHES,
    Answer,
    blank_tensor,
    check_file,
    gpu_batches,
    stacked,
    to_answers,
)


class TorchRuntime:
    """An exported program for one variant on "cpu" or "cuda"."""

    def __init__(
        self, variant: Variant, *, device: str = "cpu", threads: int = 1, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.variant = variant
        self._max_pixels = max_pixels
        self._decoder = open_decoder(variant, device)
        self._module, self._device = _load(variant, device, threads)
        self._graphs: dict[int, _Graph] = {}

    def prepare(self, payload: bytes, content_type: str) -> Prepared:
        """Decode and preprocess one request body. Raises `InvalidInput`."""
        return prepare(payload, content_type, self.variant, self._max_pixels, self._decoder)

    def execute(self, batch: Sequence[Prepared]) -> list[Answer]:
        """Answers in order."""
        images = stacked(batch)
        if self._device == "cpu":
            return to_answers(_forward(self.variant, self._module, _tensor(images)).numpy(), self.variant)
        answers: list[Answer] = []
        with self._current_device():
            for part in gpu_batches(images):
                size = min(size for size in GPU_BATCHES if size >= len(part))
                if size not in self._graphs:
                    self._graphs[size] = _Graph(self.variant, self._module, size, self._device)
                answers += to_answers(self._graphs[size].run(part), self.variant)
        return answers

    def _current_device(self) -> Any:
        """Streams and events belong to a thread's current GPU: make it ours."""
        import torch

        return torch.cuda.device(self._device)

    def warm_up(self) -> None:
        """Run once, or record the graph of every batch size."""
        blank = Prepared(tensor=blank_tensor(self.variant))
        for size in (1,) if self._device == "cpu" else GPU_BATCHES:
            self.execute([blank] * size)

    def close(self) -> None:
        """Drop graphs and weights."""
        self._graphs.clear()
        self._module = None


class _Graph:
    """A recorded forward pass for one batch size, with pinned host and fixed device buffers."""

    def __init__(self, variant: Variant, module: Any, size: int, device: str) -> None:
        import torch

        shape = (size, *variant.input.shape)
        self._host = torch.zeros(shape).pin_memory()
        self._input = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose their kernels before the recording
                output = _forward(variant, module, self._input)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may decode on the same GPU meanwhile, which a recording would else forbid.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._output = _forward(variant, module, self._input)
        self._answers = torch.empty(output.shape, dtype=output.dtype).pin_memory()
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def run(self, images: Tensor) -> Any:
        """Outputs [batch, classes] for at most `size` images; rows beyond them keep older images."""
        self._host.numpy()[: len(images)] = images
        self._input.copy_(self._host, non_blocking=True)
        self._graph.replay()
        self._answers.copy_(self._output, non_blocking=True)
        self._done.record()
        self._done.synchronize()
        return self._answers.numpy()[: len(images)].copy()


def _tensor(images: Tensor) -> Any:
    import torch

    return torch.from_numpy(images.astype(np.float32, copy=False)).contiguous(memory_format=torch.channels_last)


def _forward(variant: Variant, module: Any, images: Any) -> Any:
    """Outputs as float32, computed in the variant's precision."""
    import torch

    half = variant.precision == "float16"
    kind = images.device.type
    dtype = torch.float16 if kind == "cuda" else torch.bfloat16
    # Without a cache of cast weights, since a recorded graph may not read memory that autocast frees.
    with torch.inference_mode(), torch.autocast(kind, dtype, enabled=half, cache_enabled=False):
        return module(images).float()


def _load(variant: Variant, device: str, threads: int) -> tuple[Any, str]:
    """The program as a module on its device. Raises `VariantError`."""
    check_file(variant)
    try:
        import torch
        from torch.export.passes import move_to_device_pass
    except ImportError as error:
        remedy = 'pip install "tidegate[train]", or set runtime = "onnxruntime"'
        raise VariantError(variant.name, "runtime", "torch", remedy) from error
    kind, index = kind_and_index(device)
    if kind not in ("cpu", "cuda"):
        raise VariantError(variant.name, "device", device, 'choose "cpu" or "cuda" for runtime "torch"')
    if kind == "cuda" and not (torch.cuda.is_available() and index < torch.cuda.device_count()):
        count = torch.cuda.device_count()
        remedy = f'torch {torch.__version__} sees {count or "no"} GPU(s): check the driver, or set device = "cpu"'
        raise VariantError(variant.name, "device", device, remedy)
    if kind == "cpu":
        torch.set_num_threads(threads)
    else:
        device = f"cuda:{index}"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    try:
        program = torch.export.load(variant.path)
        if kind == "cuda":
            program = move_to_device_pass(program, device)
        module = program.module()
    except Exception as error:  # zip, JSON and torch errors: all mean that the file is not such a program
        remedy = f"is not a program saved by torch.export ({str(error)[:200]})"
        raise VariantError(variant.name, "path", variant.path, remedy) from error
    return module.to(memory_format=torch.channels_last), device  # type: ignore[call-overload]
