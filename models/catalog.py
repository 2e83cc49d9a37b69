"""The catalog: one TOML file per variant, read into frozen structs and checked before anything starts.

Built-in entries lie in `models/catalog/`; a user's own ONNX model needs one such file in a folder of theirs.
Paths in an entry are relative to its file. Nothing here opens a model: see `runtime.open_runtime`.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

BUILT_IN_FOLDER = Path(__file__).parent / "catalog"

# Body of a request that pins a variant and brings its input tensor: raw little-endian values, row-major.
TENSOR_CONTENT_TYPE = "application/x-tidegate-tensor"

Entry = TypeVar("Entry")
RuntimeName = Literal["onnxruntime", "openvino", "torch", "emulated"]
AccuracySource = Literal["measured", "published", "modelled", "none"]

_Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
_NotNegative = Annotated[float, msgspec.Meta(ge=0)]
_Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Length = Annotated[int, msgspec.Meta(ge=1, le=65536)]


class VariantError(ValueError):
    """An entry or a model file that cannot be used; says which key, its value and what would be right."""

    def __init__(self, where: str, key: str, value: object, remedy: str) -> None:
        super().__init__(f"{where}: {key} = {value!r}: {remedy}")
        self.where = where
        self.key = key
        self.value = value
        self.remedy = remedy


class Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model's one input, without its batch axis."""

    name: str = "input"
    shape: tuple[_Length, _Length, _Length] = (3, 224, 224)  # channels, height, width
    dtype: Literal["float32", "float16"] = "float32"


class Preprocess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From a decoded image to the input: resize, crop, then (pixel / 255 - mean) / std per channel."""

    resize: Annotated[int, msgspec.Meta(ge=0, le=65536)] = 0  # shorter side in pixels before the crop
    crop: Literal["centre", "none"] = "none"  # "none": stretch the whole image to the input's size
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    colour: Literal["rgb", "bgr", "gray"] = "rgb"
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    resizer: Literal["pillow", "simd"] = "pillow"  # Pillow's pixels; "simd" is gone, and refused
    decoder: Literal["cpu", "device"] = "cpu"  # of JPEGs; see `device_decode.py`


class Accuracy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Top-1 accuracy as a fraction and where the figure comes from; "none" carries no value."""

    value: _Fraction | None = None
    source: AccuracySource = "none"
    note: str = ""


class Emulation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Service time law: a batch of b takes d(1) * (a + (1 - a) * b), where a = fixed_share."""

    service_ms: _NotNegative  # mean of d(1)
    cv: _NotNegative = 0.0  # coefficient of variation (standard deviation / mean)
    distribution: Literal["deterministic", "gamma", "lognormal"] = "deterministic"
    fixed_share: _Fraction = 0.0
    note: str = ""


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One DNN with weights and input size. `path` is absolute and `labels` are names once loaded."""

    name: _Name
    service: _Name
    runtime: RuntimeName
    labels: tuple[str, ...]
    path: str = ""
    input: Input = Input()
    preprocess: Preprocess = Preprocess()
    output: Literal["logits", "probabilities"] = "logits"
    # Of the arithmetic, where a runtime can choose: "float16" halves GPU time and may cost accuracy.
    precision: Literal["float32", "float16"] = "float32"
    memory_mb: _NotNegative = 0.0
    accuracy: Accuracy = Accuracy()
    emulated: Emulation | None = None
    description: str = ""

    @property
    def classes(self) -> int:
        """Number of classes that the variant tells apart."""
        return len(self.labels)


def read_variant(file: Path) -> Variant:
    """Read and check one entry. Raises `VariantError`."""
    return variant_from(read_entry(file), str(file), file.parent)


def variant_from(entry: Mapping[str, Any], where: str, folder: Path) -> Variant:
    """Check one entry given as a mapping; relative paths count from `folder`. Raises `VariantError`."""
    variant = entry_as(entry, Variant, where, folder)
    _check(variant, where)
    return variant


def read_entry(file: Path) -> dict[str, Any]:
    """What the TOML file says, unchecked. Raises `VariantError`."""
    where = str(file)
    try:
        entry: dict[str, Any] = msgspec.toml.decode(file.read_bytes())
    except OSError as error:
        raise VariantError(where, "file", file.name, f"cannot be read ({error.strerror})") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise VariantError(where, "file", file.name, f"is not valid TOML ({error})") from error
    return entry


def entry_as(entry: Mapping[str, Any], kind: type[Entry], where: str, folder: Path) -> Entry:
    """An entry as that kind of struct, `labels` as names and `path` absolute. Raises `VariantError`."""
    values = dict(entry)
    if "labels" in values:
        values["labels"] = _labels(values["labels"], where, folder)
    if isinstance(values.get("path"), str) and values["path"]:
        values["path"] = str((folder / values["path"]).resolve())
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        key, value = _fault(str(error), entry)
        raise VariantError(where, key, value, str(error).partition(" - at ")[0]) from error


def load_catalog(folders: Iterable[Path] = ()) -> dict[str, Variant]:
    """All variants by name: the built-in ones and those of `folders` (every `*.toml` directly inside).

    Raises `VariantError`, also when two entries share a name.
    """
    found: dict[str, Variant] = {}
    origin: dict[str, Path] = {}
    for folder in (BUILT_IN_FOLDER, *folders):
        if not folder.is_dir():
            raise VariantError(
                "catalog",
                "folder",
                str(folder),
                "no such folder; `tidegate models export NAME -o FOLDER` makes one, or leave it out",
            )
        for file in sorted(folder.glob("*.toml")):
            variant = read_variant(file)
            if variant.name in found:
                remedy = f"{origin[variant.name]} already has this name; choose another"
                raise VariantError(str(file), "name", variant.name, remedy)
            found[variant.name] = variant
            origin[variant.name] = file
    return found


def kind_and_index(device: str) -> tuple[str, int]:
    """ "cuda:1" as ("cuda", 1); without a number, the first one."""
    kind, _, index = device.partition(":")
    return kind, int(index) if index.isdecimal() else 0


def _labels(given: object, where: str, folder: Path) -> object:
    """`labels` may be names, a count (classes without names) or a text file with one name a line."""
    if isinstance(given, int) and not isinstance(given, bool):
        if not 1 <= given <= 1_000_000:
            raise VariantError(where, "labels", given, "a count of classes is 1 to 1000000")
        return [str(index) for index in range(given)]
    if isinstance(given, str):
        try:
            return (folder / given).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            remedy = "give names, a count or a readable UTF-8 text file with one name a line"
            raise VariantError(where, "labels", given, remedy) from error
    return given


def _fault(message: str, entry: Mapping[str, Any]) -> tuple[str, object]:
    """The key that a msgspec message points at, dotted, and the value that stands there."""
    path = message.partition(" - at `$")[2].rstrip("`").lstrip(".").partition("[")[0]
    if not path:
        # "unknown field `x`" and "missing required field `x`" name the field in the text itself.
        field = message.split("`")[-2] if message.count("`") >= 2 else "entry"
        return field, entry.get(field)
    value: object = entry
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return path, value


def _check(variant: Variant, where: str) -> None:
    """What one field's type cannot say: rules between fields."""

    def require(right: bool, key: str, value: object, remedy: str) -> None:
        if not right:
            raise VariantError(where, key, value, remedy)

    pre, channels = variant.preprocess, variant.input.shape[0]
    require(len(variant.labels) > 0, "labels", variant.labels, "at least one class is needed")
    expected = 1 if pre.colour == "gray" else 3
    require(
        channels == expected,
        "input.shape",
        list(variant.input.shape),
        f"colour {pre.colour!r} has {expected} channel(s): make the first length {expected} or change colour",
    )
    for key, numbers in (("mean", pre.mean), ("std", pre.std)):
        remedy = f"give 1 number or {channels} (one per channel), all finite"
        right = len(numbers) in (1, channels) and all(math.isfinite(number) for number in numbers)
        require(right, f"preprocess.{key}", list(numbers), remedy)
    require(all(s > 0 for s in pre.std), "preprocess.std", list(pre.std), "must be above 0")
    if pre.crop == "centre":
        remedy = f"a centre crop needs at least the input's longer side ({max(variant.input.shape[1:])})"
        require(pre.resize >= max(variant.input.shape[1:]), "preprocess.resize", pre.resize, remedy)
    else:
        require(pre.resize == 0, "preprocess.resize", pre.resize, 'leave it out, or set crop = "centre"')
    remedy = '"simd" is gone: leave it out, Pillow\'s own pixels take hardly longer now (`tidegate doctor`: resizing)'
    require(pre.resizer != "simd", "preprocess.resizer", pre.resizer, remedy)
    known = variant.accuracy.value is not None
    remedy = 'source "none" has no value; every other source needs one'
    require(known != (variant.accuracy.source == "none"), "accuracy.source", variant.accuracy.source, remedy)
    if variant.runtime == "emulated":
        require(variant.emulated is not None, "emulated", None, "give [emulated] with service_ms")
        require(known, "accuracy", None, "an emulated variant answers by its accuracy: give a value")
        require(variant.classes >= 2, "labels", variant.classes, "an emulated variant needs 2 or more")
    else:
        require(variant.emulated is None, "emulated", "...", f"leave it out for runtime {variant.runtime!r}")
        require(variant.path != "", "path", variant.path, "give the model file, relative to this entry")
    law = variant.emulated
    if law is not None:
        for key, number in (("service_ms", law.service_ms), ("cv", law.cv)):
            require(math.isfinite(number), f"emulated.{key}", number, "must be finite")
        varies = law.distribution != "deterministic"
        remedy = "a deterministic time has cv 0; gamma and lognormal need cv above 0"
        require(varies == (law.cv > 0), "emulated.cv", law.cv, remedy)
