"""The variants of the edge services, detection and tracking: one TOML file each, checked before anything starts.

Built-in entries lie in `models/catalog/edge/`; those of an export or of yours in `FOLDER/edge/`. Nothing here opens a
network: `models/detection.py` and `models/tracking.py` do. An entry without a `path` is known (its memory, its compute
and its published accuracy count in a placement) but has to be exported before it answers.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from models.catalog import BUILT_IN_FOLDER, Accuracy, VariantError, entry_as, read_entry

SUBFOLDER = "edge"

_Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
_NotNegative = Annotated[float, msgspec.Meta(ge=0)]
_Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Length = Annotated[int, msgspec.Meta(ge=1, le=8192)]
_Levels = tuple[float, float, float]


class EdgeVariant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One network of an edge service, and how an image becomes its input; `path` is absolute once loaded.

    An image is resized, keeping its ratio, until its shorter side has `short_side` pixels or its longer one
    `long_side`, whichever comes first; each value becomes (level - mean) / std, levels being 0 to 255; then the right
    and the bottom are filled with `pad_value` (a level) up to a multiple of `pad_to` pixels.
    """

    name: _Name
    service: Literal["detection", "tracking"]
    tracker: Literal["", "sort", "bytetrack", "qdtrack"] = ""  # "": a detector
    path: str = ""  # the network's ONNX file; "": to be exported first
    labels: tuple[str, ...]  # class names; the index is the class number

    short_side: _Length = 800  # pixels
    long_side: _Length = 1333  # pixels
    pad_to: _Length = 1  # pixels; 1: no padding here (torchvision's networks pad inside the file)
    pad_value: Annotated[float, msgspec.Meta(ge=0, le=255)] = 0.0
    mean: _Levels = (0.0, 0.0, 0.0)  # in the order of `colour`, levels 0 to 255
    std: _Levels = (1.0, 1.0, 1.0)
    colour: Literal["rgb", "bgr"] = "rgb"
    score_threshold: _Fraction = 0.05  # boxes below it are not reported
    # Trackers, see models/associations.py: least scores that begin a track, and that are sure; 0: the method's own.
    begin_score: _Fraction = 0.0
    sure_score: _Fraction = 0.0

    precision: Literal["float32", "float16"] = "float32"  # of the file's weights
    memory_mb: _NotNegative  # what it takes on a node
    tflop: _NotNegative  # one forward pass, in the unit of the placement tables (tera-operations)
    weights: Literal["trained", "published", "random"]  # by this project, by others, drawn
    accuracy: Accuracy = Accuracy()  # COCO box mAP of a detector, MOTA of a tracker
    table_name: str = ""  # what a placement table calls it, where that is another name
    description: str = ""


def load_edge_catalog(folders: Iterable[Path] = ()) -> dict[str, EdgeVariant]:
    """All variants by name: the built-in ones, then those of `FOLDER/edge/*.toml` of each of `folders`.

    An entry of a folder replaces a built-in one of the same name: this is how an export brings the file that the
    built-in entry lacks. Raises `VariantError`, also when two folders share a name or a folder does not exist.
    """
    found = {variant.name: variant for variant, _ in _entries(BUILT_IN_FOLDER)}
    origin: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            remedy = "no such folder; `tidegate models export NAME -o FOLDER` makes one, or leave it out"
            raise VariantError("edge catalog", "folder", str(folder), remedy)
        for variant, file in _entries(folder):
            if variant.name in origin:
                remedy = f"{origin[variant.name]} already has this name; choose another"
                raise VariantError(str(file), "name", variant.name, remedy)
            found[variant.name] = variant
            origin[variant.name] = file
    return found


def read_edge_variant(file: Path) -> EdgeVariant:
    """Read and check one entry. Raises `VariantError`."""
    return edge_variant_from(read_entry(file), str(file), file.parent)


def edge_variant_from(entry: Mapping[str, Any], where: str, folder: Path) -> EdgeVariant:
    """Check one entry given as a mapping; relative paths count from `folder`. Raises `VariantError`."""
    variant = entry_as(entry, EdgeVariant, where, folder)
    _check(variant, where)
    return variant


def _entries(folder: Path) -> list[tuple[EdgeVariant, Path]]:
    return [(read_edge_variant(file), file) for file in sorted((folder / SUBFOLDER).glob("*.toml"))]


def _check(variant: EdgeVariant, where: str) -> None:
    """What one field's type cannot say: rules between fields."""

    def require(right: bool, key: str, value: object, remedy: str) -> None:
        if not right:
            raise VariantError(where, key, value, remedy)

    require(len(variant.labels) > 0, "labels", variant.labels, "at least one class is needed")
    tracks = variant.service == "tracking"
    remedy = f"service {variant.service!r} {'needs sort, bytetrack or qdtrack' if tracks else 'has none'}"
    require(bool(variant.tracker) == tracks, "tracker", variant.tracker, remedy)
    remedy = f"give at least short_side ({variant.short_side})"
    require(variant.long_side >= variant.short_side, "long_side", variant.long_side, remedy)
    for key, numbers in (("mean", variant.mean), ("std", variant.std)):
        require(all(math.isfinite(number) for number in numbers), key, list(numbers), "must be finite")
    require(all(number > 0 for number in variant.std), "std", list(variant.std), "must be above 0")
    for key, number in (("memory_mb", variant.memory_mb), ("tflop", variant.tflop)):
        require(math.isfinite(number), key, number, "must be finite")
    known = variant.accuracy.value is not None
    remedy = 'source "none" has no value; every other source needs one'
    require(known != (variant.accuracy.source == "none"), "accuracy.source", variant.accuracy.source, remedy)
    remedy = "random weights have no accuracy: leave it out"
    require(variant.weights != "random" or not known, "accuracy.value", variant.accuracy.value, remedy)
