"""What is sent: sets of request bodies with, where they have one, their true labels.

`digits`: scikit-learn's handwritten digits as PNG and JPEG files, only the held-out ones (real images, real
labels). `emulated:SIZE`: bodies that carry their label, for instances that emulate a model's time and
accuracy. `raw:SIZE`: bytes without a label. A folder: images, labelled by their sub-folder's name. A file:
that one body.
"""

import io
import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

EMULATED_PREFIX = b"tidegate-label:"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_JPEG_QUALITY = 95
_DIGITS_LEVELS = 16.0  # scikit-learn's digits have pixel values 0..16

K = TypeVar("K")
V = TypeVar("V")


class PayloadError(ValueError):
    """A payload that cannot be made; says what was asked and what would be right."""


@dataclass(frozen=True)
class Payload:
    """One request body. label: the true class number; label_name: its name, where only that is known."""

    body: bytes
    content_type: str
    label: int | None = None
    label_name: str | None = None
    name: str = ""


@dataclass(frozen=True)
class PayloadSet:
    """Payloads to choose from and a line that says what they are."""

    description: str
    payloads: tuple[Payload, ...]

    def __post_init__(self) -> None:
        if not self.payloads:
            raise PayloadError(f"{self.description}: holds no payload; name a folder or file that has images")

    def choose(
        self,
        rng: np.random.Generator,
        count: int,
        labels: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
    ) -> list[int]:
        """Return `count` indices into `payloads`, drawn evenly: a random order, again and again.

        labels (-1: any) or names ("": any), one per request, narrow the choice to payloads that fit: this is
        how a trace says which payload each request carried. Raises PayloadError when none fits.
        """
        order: list[int] = []
        while len(order) < count:
            order.extend(rng.permutation(len(self.payloads)).tolist())
        del order[count:]
        if names is not None:
            by_name = {payload.name: i for i, payload in enumerate(self.payloads)}
            for i, name in enumerate(names[:count]):
                if name:
                    order[i] = _found(by_name, name, f"{self.description}: payload named")
        if labels is not None:
            by_label: dict[int, list[int]] = {}
            for i, payload in enumerate(self.payloads):
                if payload.label is not None:
                    by_label.setdefault(payload.label, []).append(i)
            for i, label in enumerate(labels[:count]):
                if label >= 0 and (names is None or not names[i]):
                    fitting = _found(by_label, label, f"{self.description}: payload with label")
                    order[i] = fitting[int(rng.integers(len(fitting)))]
        return order


def parse_payloads(spec: str, split: Path | None = None, seed: int = 0) -> PayloadSet:
    """Read "digits", "digits:png", "digits:jpeg", "emulated[:SIZE]", "raw[:SIZE]", a folder or a file.

    SIZE is in bytes. split: the JSON file that names the held-out digits (needed for `digits` only).
    """
    kind, _, detail = spec.partition(":")
    if kind == "digits" and detail in ("", "png", "jpeg"):
        if split is None:
            raise PayloadError("digits need the file that names the held-out images: give --split FILE")
        return digits(split, (detail,) if detail else ("png", "jpeg"))
    if kind in ("emulated", "raw"):
        try:
            size = int(detail or 1000)
        except ValueError:
            raise PayloadError(f"{spec!r}: {detail!r} is no size; write {kind}:BYTES") from None
        return emulated(size) if kind == "emulated" else raw(size, seed)
    path = Path(spec)
    if path.is_dir():
        return folder(path)
    if path.is_file():
        return PayloadSet(f"file {path.name}", (_file(path, None),))
    raise PayloadError(
        f"{spec!r} is no payload: write digits, digits:png, digits:jpeg, emulated:BYTES, raw:BYTES, "
        "or name a folder of images or one file"
    )


def digits(split: Path, formats: Sequence[str] = ("png", "jpeg")) -> PayloadSet:
    """Return the held-out digits, each in every one of `formats`, as 8 x 8 gray images.

    split: a JSON file {"held_out": [indices into scikit-learn's data set], ...}. Raises PayloadError when
    it cannot be read or scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits  # heavy, and only the digits need it
    except ImportError as error:
        raise PayloadError("digits need scikit-learn: pip install 'tidegate[demo]'") from error
    try:
        held_out = msgspec.json.decode(split.read_bytes(), type=_Split).held_out
    except OSError as error:
        raise PayloadError(f"{split}: cannot be read ({error.strerror}); --split names the file") from error
    except msgspec.MsgspecError as error:
        raise PayloadError(f'{split}: must be JSON with "held_out": [indices] ({error})') from error
    data = load_digits()
    if held_out and not 0 <= min(held_out) <= max(held_out) < len(data.images):
        raise PayloadError(f"{split}: held_out must lie in 0..{len(data.images) - 1}")
    payloads: list[Payload] = []
    for index in held_out:
        pixels = np.rint(data.images[index] * (255.0 / _DIGITS_LEVELS)).astype(np.uint8)
        payloads.extend(
            Payload(encode_image(pixels, form), f"image/{form}", int(data.target[index]), name=f"{index}.{form}")
            for form in formats
        )
    return PayloadSet(f"{len(held_out)} held-out handwritten digits as {' and '.join(formats)}", tuple(payloads))


def encode_image(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], form: str) -> bytes:
    """Return `pixels` ([height, width] gray or [height, width, 3]) as a "png" or "jpeg" file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **({"quality": _JPEG_QUALITY} if form == "jpeg" else {}))
    return buffer.getvalue()


def emulated(size_bytes: int = 1000, classes: int = 1000) -> PayloadSet:
    """Return one payload per class: b"tidegate-label:<class>" and a newline, padded with zeros.

    An emulated instance answers with this label as often as its variant's accuracy says.
    """
    bodies = [EMULATED_PREFIX + b"%d\n" % label for label in range(classes)]
    if size_bytes < max(len(body) for body in bodies):
        raise PayloadError(f"emulated:{size_bytes} is too small to carry a label; use 32 bytes or more")
    return PayloadSet(
        f"emulated payloads of {size_bytes} bytes that carry their label",
        tuple(
            Payload(body.ljust(size_bytes, b"\0"), "application/octet-stream", label)
            for label, body in enumerate(bodies)
        ),
    )


def raw(size_bytes: int, seed: int = 0) -> PayloadSet:
    """Return one payload of random bytes, without a label."""
    if size_bytes < 0:
        raise PayloadError(f"raw:{size_bytes}: a size cannot be negative")
    body = np.random.default_rng(seed).bytes(size_bytes)
    return PayloadSet(f"{size_bytes} random bytes", (Payload(body, "application/octet-stream"),))


def folder(path: Path) -> PayloadSet:
    """Return the JPEG and PNG files of a folder, in order of their names.

    An image in a sub-folder has that folder's name as its label (a class number where it is a number); one
    that lies directly in the folder has none.
    """
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    payloads = tuple(_file(file, path) for file in files)
    return PayloadSet(f"{len(files)} images of {path.name}", payloads)


class _Split(msgspec.Struct):
    held_out: list[int]


def _file(path: Path, root: Path | None) -> Payload:
    content_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    inside = path.relative_to(root).parts if root else (path.name,)
    label, label_name = None, None
    if len(inside) > 1:
        label, label_name = (int(inside[0]), None) if inside[0].isdecimal() else (None, inside[0])
    return Payload(path.read_bytes(), content_type, label, label_name, "/".join(inside))


def _found(table: Mapping[K, V], key: K, what: str) -> V:
    try:
        return table[key]
    except KeyError:
        raise PayloadError(f"{what} {key!r}: there is none") from None
