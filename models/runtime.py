"""How a variant runs: one interface over onnxruntime, torch, OpenVINO and emulation.

    payload ── prepare (any thread) ──► Prepared ── execute (the executor's thread) ──► Answer

`open_runtime` is the only door. Each library is imported by its own file (`onnx_runtime.py`,
`torch_runtime.py`, `openvino_runtime.py`), and only when a variant asks for it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import msgspec
import numpy as np
import numpy.typing as npt

from models.catalog import Emulation, Variant, VariantError
from models.preprocess import MAX_PIXELS, InvalidInput, Prepared, Tensor

LABEL_PREFIX = b"tidegate-label:"
GPU_BATCHES = (1, 3, 5, 8)
"""Batch sizes that GPUs prepare for (kernels, engines, graphs); others are filled up to the next, or split."""


class Answer(msgspec.Struct, frozen=True, eq=False):
    """What a variant says about one input: `scores` [classes], probabilities that sum to 1."""

    scores: npt.NDArray[np.float32]

    def top_k(self, k: int) -> list[tuple[int, float]]:
        """The `k` likeliest classes (fewer if there are fewer), best first, as (class index, probability)."""
        if k < len(self.scores):
            chosen = np.argpartition(self.scores, -k)[-k:]
            found = list(zip(chosen.tolist(), self.scores[chosen].tolist(), strict=True))
        else:
            found = list(enumerate(self.scores.tolist()))
        # Equal scores: the lower index first, so that the order is the same everywhere.
        found.sort(key=lambda one: (-one[1], one[0]))
        return found


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
    """Load `variant` on `device` ("cpu", "cuda", "tensorrt"; "cuda:1" for the second GPU).

    Raises `VariantError` if the file, the device or a package is missing.

    `threads` is the number of CPU threads inside one inference; `seed` drives an emulated variant's draws.
    """
    if variant.runtime == "emulated":
        return EmulatedRuntime(variant, seed=seed)
    if variant.runtime == "torch":
        from models.torch_runtime import TorchRuntime

        return TorchRuntime(variant, device=device, threads=threads, max_pixels=max_pixels)
    if variant.runtime == "openvino":
        from models.openvino_runtime import OpenvinoRuntime

        return OpenvinoRuntime(variant, device=device, threads=threads, max_pixels=max_pixels)
    from models.onnx_runtime import OnnxRuntime

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
        self._answers: dict[int, Answer] = {}  # by the label that is answered: all that it can ever say
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
        return [self._answer(prepared.label) for prepared in batch]

    def warm_up(self) -> None:
        """Nothing to warm."""

    def close(self) -> None:
        """Nothing to give back."""

    def _answer(self, label: int) -> Answer:
        if self._answer_rng.random() >= self._accuracy:
            other = int(self._answer_rng.integers(self.variant.classes - 1))
            label = other if other < label else other + 1
        answer = self._answers.get(label)
        if answer is None:
            scores = np.zeros(self.variant.classes, dtype=np.float32)
            scores[label] = 1.0
            scores.setflags(write=False)
            answer = self._answers[label] = Answer(scores)
        return answer


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


def stacked(batch: Sequence[Prepared]) -> Tensor:
    """The inputs of a batch as one array [batch, channels, height, width]. Raises `ValueError` if one has none."""
    tensors = [prepared.tensor for prepared in batch if prepared.tensor is not None]
    if not tensors or len(tensors) != len(batch):
        raise ValueError("an input was prepared by another runtime: it carries no tensor")
    return cast(Tensor, np.stack(tensors))


def gpu_batches(images: Tensor) -> list[Tensor]:
    """`images` in parts of at most the largest of `GPU_BATCHES`."""
    largest = GPU_BATCHES[-1]
    return [images[start : start + largest] for start in range(0, len(images), largest)]


def filled(images: Tensor) -> Tensor:
    """`images`, with zeros up to the next of `GPU_BATCHES`."""
    size = min(size for size in GPU_BATCHES if size >= len(images))
    if size == len(images):
        return images
    whole = np.zeros((size, *images.shape[1:]), dtype=images.dtype)
    whole[: len(images)] = images
    return whole


def check_file(variant: Variant) -> None:
    """Raises `VariantError` unless the variant's file is there."""
    if not Path(variant.path).is_file():
        remedy = "no such file; `tidegate models export` makes the built-in ImageNet models"
        raise VariantError(variant.name, "path", variant.path, remedy)


def to_answers(outputs: npt.NDArray[np.floating], variant: Variant) -> list[Answer]:
    """One answer per row of `outputs` [batch, classes]; logits go through a softmax.

    Raises `ValueError` if a score is not a finite number: the model broke down, and no class can be named.
    """
    rows = outputs.reshape(len(outputs), -1).astype(np.float32)
    if variant.output == "logits":
        with np.errstate(invalid="ignore"):
            rows = np.exp(rows - rows.max(axis=1, keepdims=True))
        rows /= rows.sum(axis=1, keepdims=True)
    if not np.isfinite(rows).all():
        raise ValueError(f"{variant.name} gave scores that are not finite numbers")
    return [Answer(scores=row) for row in rows]


def _draw_ms(law: Emulation, rng: np.random.Generator) -> float:
    """One draw of d(1) in ms, with the law's mean and coefficient of variation."""
    if law.distribution == "gamma":
        return float(rng.gamma(1.0 / law.cv**2, law.service_ms * law.cv**2))
    if law.distribution == "lognormal":
        sigma_squared = np.log1p(law.cv**2)
        return float(law.service_ms * rng.lognormal(-sigma_squared / 2.0, np.sqrt(sigma_squared)))
    return law.service_ms
