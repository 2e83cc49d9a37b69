"""How a variant runs: one interface over onnxruntime and emulation.

    payload ── prepare (any thread) ──► Prepared ── execute (the executor's thread) ──► Answer

`open_runtime` is the only door: it checks that the device asked for is really there, because onnxruntime
falls back to the CPU without a word. This is the only file that imports onnxruntime.
"""

import contextlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from models.catalog import Emulation, Variant, VariantError
from models.preprocess import MAX_PIXELS, InvalidInput, Prepared, Tensor, prepare

if TYPE_CHECKING:
    import onnxruntime

LABEL_PREFIX = b"tidegate-label:"

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


class Answer(msgspec.Struct, frozen=True, eq=False):
    """What a variant says about one input: `scores` [classes], probabilities that sum to 1."""

    scores: npt.NDArray[np.float32]

    def top_k(self, k: int) -> list[tuple[int, float]]:
        """The `k` likeliest classes (fewer if there are fewer), best first, as (class index, probability)."""
        k = min(k, len(self.scores))
        likeliest = np.argpartition(self.scores, -k)[-k:]
        # Equal scores: the lower index first, so that the order is the same everywhere.
        order = sorted(likeliest.tolist(), key=lambda index: (-self.scores[index], index))
        return [(index, float(self.scores[index])) for index in order]


class Runtime(Protocol):
    """A loaded variant. `prepare` may be called from many threads, `execute` from one at a time."""

    @property
    def variant(self) -> Variant:
        """The entry that this runtime was opened for."""

    def prepare(self, payload: bytes, content_type: str) -> Prepared:
        """Decode and preprocess one request body. Raises `InvalidInput`."""

    def execute(self, batch: Sequence[Prepared]) -> list[Answer]:
        """Answers for 1 or more prepared inputs, in order. Blocks until they are computed."""

    def warm_up(self) -> None:
        """Run once, so that the first request does not pay for lazy allocations."""

    def close(self) -> None:
        """Give back memory and device. The runtime cannot be used afterwards."""


def open_runtime(
    variant: Variant, *, device: str = "cpu", threads: int = 1, seed: int = 0, max_pixels: int = MAX_PIXELS
) -> Runtime:
    """Load `variant` on `device`. Raises `VariantError` if the file, the device or the package is missing.

    `threads` is the number of CPU threads inside one inference; `seed` drives an emulated variant's draws.
    """
    if variant.runtime == "emulated":
        return EmulatedRuntime(variant, seed=seed)
    return OnnxRuntime(variant, device=device, threads=threads, max_pixels=max_pixels)


class EmulatedRuntime:
    """A variant without a network: service times by a law, answers right with the variant's accuracy.

    Neither sleeps nor waits: whoever runs it asks `duration_s` and keeps the time, so that one service starts
    where the previous one ended and timers cannot drift.
    """

    def __init__(self, variant: Variant, *, seed: int = 0) -> None:
        if variant.emulated is None or variant.accuracy.value is None:
            raise VariantError(variant.name, "emulated", None, "add [emulated] and an accuracy value")
        self.variant = variant
        self._law: Emulation = variant.emulated
        self._accuracy = variant.accuracy.value
        # Two streams: how many answers were drawn must not change the service times, and the other way round.
        self._time_rng, self._answer_rng = (np.random.default_rng((seed, stream)) for stream in (0, 1))

    def duration_s(self, batch_size: int) -> float:
        """Draw the service time in seconds of a batch: d(1) * (a + (1 - a) * batch_size)."""
        law = self._law
        return _draw_ms(law, self._time_rng) * batch_factor(law.fixed_share, batch_size) / 1000.0

    def prepare(self, payload: bytes, content_type: str) -> Prepared:
        """Read the label of a payload that carries one; any other body stands for class 0.

        Images are not decoded: emulation costs nothing but its service time. Raises `InvalidInput`.
        """
        if not payload:
            raise InvalidInput("the body is empty")
        if not payload.startswith(LABEL_PREFIX):
            return Prepared(label=0)
        # The label ends at the line's end; what follows pads the body to a realistic size.
        text = bytes(payload[len(LABEL_PREFIX) : len(LABEL_PREFIX) + 16]).partition(b"\n")[0]
        if not text.isdigit() or int(text) >= self.variant.classes:
            raise InvalidInput(f"the payload's label must be a whole number below {self.variant.classes}")
        return Prepared(label=int(text))

    def execute(self, batch: Sequence[Prepared]) -> list[Answer]:
        """Answer at once: each label with probability = accuracy, else one of the other classes."""
        return [Answer(scores=self._scores(prepared.label)) for prepared in batch]

    def warm_up(self) -> None:
        """Nothing to warm."""

    def close(self) -> None:
        """Nothing to give back."""

    def _scores(self, label: int) -> npt.NDArray[np.float32]:
        scores = np.zeros(self.variant.classes, dtype=np.float32)
        if self._answer_rng.random() >= self._accuracy:
            other = int(self._answer_rng.integers(self.variant.classes - 1))
            label = other if other < label else other + 1
        scores[label] = 1.0
        return scores


class OnnxRuntime:
    """An ONNX file in onnxruntime, on the CPU or through the CUDA or TensorRT provider."""

    def __init__(
        self, variant: Variant, *, device: str = "cpu", threads: int = 1, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.variant = variant
        self._max_pixels = max_pixels
        self._session = _open_session(variant, device, threads)
        self._fixed_batch = _check_session(self._session, variant)

    def prepare(self, payload: bytes, content_type: str) -> Prepared:
        """Decode and preprocess one request body. Raises `InvalidInput`."""
        return prepare(payload, content_type, self.variant, self._max_pixels)

    def execute(self, batch: Sequence[Prepared]) -> list[Answer]:
        """Answers in order. A file exported for a batch of one is run once per input."""
        tensors = [prepared.tensor for prepared in batch if prepared.tensor is not None]
        if len(tensors) != len(batch):
            raise ValueError("an input was prepared by another runtime: it carries no tensor")
        groups = [[tensor] for tensor in tensors] if self._fixed_batch else [tensors]
        answers: list[Answer] = []
        for group in groups:
            (outputs,) = self._session.run([self._output], {self.variant.input.name: np.stack(group)})
            answers += to_answers(np.asarray(outputs), self.variant)
        return answers

    def warm_up(self) -> None:
        """Run twice on a blank input: the first run plans memory, the second uses the plan."""
        blank = Prepared(tensor=blank_tensor(self.variant))
        for _ in range(2):
            self.execute([blank])

    def close(self) -> None:
        """Drop the session; onnxruntime frees its memory with it."""
        with contextlib.suppress(AttributeError):
            del self._session

    @property
    def _output(self) -> str:
        return str(self._session.get_outputs()[0].name)


def batch_factor(fixed_share: float, batch_size: int) -> float:
    """How many times d(1) a batch takes: a + (1 - a) * b. Raises `ValueError` below a batch of 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: at least 1")
    return fixed_share + (1.0 - fixed_share) * batch_size


def blank_tensor(variant: Variant) -> Tensor:
    """An input of zeros, for warming up."""
    if variant.input.dtype == "float16":
        return np.zeros(variant.input.shape, dtype=np.float16)
    return np.zeros(variant.input.shape, dtype=np.float32)


def to_answers(outputs: npt.NDArray[np.floating], variant: Variant) -> list[Answer]:
    """One answer per row of `outputs` [batch, classes]; logits go through a softmax."""
    rows = outputs.reshape(len(outputs), -1).astype(np.float32)
    if variant.output == "logits":
        rows = np.exp(rows - rows.max(axis=1, keepdims=True))
        rows /= rows.sum(axis=1, keepdims=True)
    return [Answer(scores=row) for row in rows]


def _draw_ms(law: Emulation, rng: np.random.Generator) -> float:
    """One draw of d(1) in ms, with the law's mean and coefficient of variation."""
    if law.distribution == "gamma":
        return float(rng.gamma(1.0 / law.cv**2, law.service_ms * law.cv**2))
    if law.distribution == "lognormal":
        sigma_squared = np.log1p(law.cv**2)
        return float(law.service_ms * rng.lognormal(-sigma_squared / 2.0, np.sqrt(sigma_squared)))
    return law.service_ms


def _open_session(variant: Variant, device: str, threads: int) -> "onnxruntime.InferenceSession":
    """An onnxruntime session whose first provider is the one asked for. Raises `VariantError`."""
    if device not in _PROVIDERS:
        raise VariantError(variant.name, "device", device, f"choose one of {', '.join(_PROVIDERS)}")
    if not Path(variant.path).is_file():
        remedy = "no such file; `tidegate models export` makes the built-in ImageNet models"
        raise VariantError(variant.name, "path", variant.path, remedy)
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
    wanted = list(dict.fromkeys((provider, "CPUExecutionProvider")))
    try:
        session = onnxruntime.InferenceSession(variant.path, options, providers=wanted)
    except Exception as error:  # onnxruntime raises a dozen kinds for broken files, none with a common base
        raise VariantError(variant.name, "path", variant.path, f"cannot be loaded ({error})") from error
    if session.get_providers()[0] != provider:
        remedy = f"onnxruntime fell back to {session.get_providers()}: check driver and CUDA libraries"
        raise VariantError(variant.name, "device", device, remedy)
    return session


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
