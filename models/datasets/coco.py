"""Pictures with boxes in COCO's files: `annotations/instances_SPLIT.json` and the JPEGs in `SPLIT/` beside it.

`read_coco` takes the folder of the real COCO 2017 (or one like it, or of one annotation file); `write_coco` makes such
a folder from pictures with truth, so that everybody's tools read our scenes. Boxes are corners in pixels here and
corner, width and height in the files. COCO's crowds are objects that are neither asked for nor held against a
detector; scenes use them for what is hardly visible.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import simplejpeg

from models.datasets.scenes import FrameTruth

LEAST_VISIBLE = 0.25  # a scene's object less visible than this is written as a crowd


class DatasetError(ValueError):
    """A data set's folder or file is not as it should be; says which one, what is wrong and what would help."""


@dataclass(frozen=True, eq=False)
class CocoImage:
    """One picture's file and its objects."""

    number: int  # COCO's image id
    file: Path
    width: int
    height: int
    boxes: npt.NDArray[np.float64]  # [n, 4] x1, y1, x2, y2 in pixels
    classes: npt.NDArray[np.int64]  # [n], index into the data set's labels
    areas: npt.NDArray[np.float64]  # [n] square pixels, of the object rather than of its box where they differ
    crowd: npt.NDArray[np.bool_]  # [n]


@dataclass(frozen=True)
class CocoData:
    """A read data set. `category_ids[class]` is COCO's number of a class (COCO leaves gaps in them)."""

    labels: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: tuple[CocoImage, ...]
    annotations: Path


class _Category(msgspec.Struct):
    id: int
    name: str


class _Image(msgspec.Struct):
    id: int
    file_name: str
    width: int
    height: int


class _Annotation(msgspec.Struct):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int = 0


class _Instances(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


def read_coco(path: Path, split: str = "") -> CocoData:
    """The data set in folder `path` (its only `instances_*.json`, or that of `split`), or of that JSON file.

    Pictures are looked for in `SPLIT/`, `images/`, `images/SPLIT/` and the folder itself. Raises `DatasetError`.
    """
    file = path if path.suffix == ".json" else _annotation_file(path, split)
    try:
        raw = msgspec.json.decode(file.read_bytes(), type=_Instances)
    except OSError as error:
        raise DatasetError(f"{file}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise DatasetError(f"{file}: {error}; this is no file of COCO instances") from error
    if not raw.images or not raw.categories:
        raise DatasetError(
            f"{file}: has {len(raw.images)} images, {len(raw.categories)} categories; needs some of both"
        )
    categories = sorted(raw.categories, key=lambda one: one.id)
    class_of = {one.id: index for index, one in enumerate(categories)}
    rows: dict[int, list[_Annotation]] = {one.id: [] for one in raw.images}
    if len(rows) != len(raw.images) or len(class_of) != len(categories):
        raise DatasetError(f"{file}: two images or two categories have the same id")
    for place, row in enumerate(raw.annotations):
        if row.image_id not in rows or row.category_id not in class_of:
            which = f"image_id {row.image_id}, category_id {row.category_id}"
            raise DatasetError(f"{file}: annotations[{place}] names {which}, and one of them is not in the file")
        if not (np.isfinite(row.bbox).all() and min(row.bbox[2:]) >= 0):
            raise DatasetError(f"{file}: annotations[{place}].bbox is {list(row.bbox)}: no x, y, width, height")
        rows[row.image_id].append(row)
    folder = _picture_folder(file, raw.images)
    images = tuple(_image(one, folder, rows[one.id], class_of) for one in raw.images)
    return CocoData(tuple(one.name for one in categories), tuple(one.id for one in categories), images, file)


def read_picture(image: CocoImage) -> npt.NDArray[np.uint8]:
    """RGB pixels [height, width, 3]. Raises `DatasetError` if the JPEG is broken or of another size than promised."""
    try:
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(image.file.read_bytes(), "RGB")
    except (OSError, ValueError) as error:
        raise DatasetError(f"{image.file}: not a readable JPEG: {error}") from error
    if pixels.shape[:2] != (image.height, image.width):
        promised = f"{image.width}x{image.height}"
        raise DatasetError(f"{image.file}: is {pixels.shape[1]}x{pixels.shape[0]}, the annotations say {promised}")
    return pixels


def write_coco(
    folder: Path,
    pictures: Iterable[tuple[npt.NDArray[np.uint8], FrameTruth]],
    labels: Sequence[str],
    *,
    split: str = "scenes",
    quality: int = 95,
) -> Path:
    """Write pictures [h, w, 3] with their truth into `folder`; gives the annotation file. Categories count from 1.

    Raises `DatasetError` if the split is there already.
    """
    file = folder / "annotations" / f"instances_{split}.json"
    if file.exists():
        raise DatasetError(f"{file}: is there already; choose another folder or remove it")
    (folder / split).mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (pixels, truth) in enumerate(pictures, start=1):
        name = f"{number:012d}.jpg"
        (folder / split / name).write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB"))
        images.append({"id": number, "file_name": name, "width": pixels.shape[1], "height": pixels.shape[0]})
        for box, label, visible in zip(truth.boxes, truth.classes, truth.visibility, strict=True):
            x1, y1, x2, y2 = (round(float(edge), 2) for edge in box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(label) + 1,
                    "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                    "area": round((x2 - x1) * (y2 - y1), 2),
                    "iscrowd": int(visible < LEAST_VISIBLE),
                    "visibility": round(float(visible), 3),
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(labels, start=1)]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def _annotation_file(folder: Path, split: str) -> Path:
    """The one file of instances, or of the split, in a COCO folder."""
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; give one that holds annotations/instances_*.json")
    files = sorted([*folder.glob("annotations/instances_*.json"), *folder.glob("instances_*.json")])
    chosen = [file for file in files if not split or file.stem == f"instances_{split}"]
    if len(chosen) != 1:
        found = ", ".join(file.stem.removeprefix("instances_") for file in files) or "none"
        raise DatasetError(f"{folder}: {len(chosen)} files annotations/instances_{split or '*'}.json; splits: {found}")
    return chosen[0]


def _picture_folder(file: Path, images: Sequence[_Image]) -> Path:
    """Where all the pictures are."""
    split = file.stem.removeprefix("instances_")
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    candidates = (root / split, root / "images", root / "images" / split, root)
    missing = {
        folder: [one.file_name for one in images if not (folder / one.file_name).is_file()] for folder in candidates
    }
    best = min(candidates, key=lambda folder: len(missing[folder]))
    if missing[best]:
        lacking = f"{len(missing[best])} of {len(images)} pictures, such as {missing[best][0]}"
        raise DatasetError(f"{best}: lacks {lacking}; put them there or leave them out of {file.name}")
    return best


def _image(one: _Image, folder: Path, rows: list[_Annotation], class_of: dict[int, int]) -> CocoImage:
    boxes = np.array([row.bbox for row in rows], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    areas = [row.bbox[2] * row.bbox[3] if row.area is None else row.area for row in rows]
    return CocoImage(
        one.id,
        folder / one.file_name,
        one.width,
        one.height,
        boxes,
        np.array([class_of[row.category_id] for row in rows], np.int64),
        np.array(areas, np.float64),
        np.array([row.iscrowd != 0 for row in rows], bool),
    )
