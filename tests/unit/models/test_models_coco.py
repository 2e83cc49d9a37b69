"""COCO folders: what was written is read back, pycocotools reads it too, and broken ones are explained."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.datasets.coco import DatasetError, read_coco, read_picture, write_coco
from models.datasets.scenes import LABELS, FrameTruth, SceneSettings, plan_scene, render

SETTINGS = SceneSettings(width=96, height=64, frames=3)


def clips(count: int) -> list[tuple[np.ndarray, FrameTruth]]:
    rendered = (render(plan_scene(seed, SETTINGS), [1]) for seed in range(count))
    return [(clip.frames[0], clip.truth[0]) for clip in rendered]


def minimal() -> dict[str, Any]:
    """Annotations as the real COCO has them: further keys, gaps between category ids, a polygon, a crowd."""
    return {
        "info": {"year": 2017},
        "images": [{"id": 139, "file_name": "000139.jpg", "width": 96, "height": 64, "license": 2}],
        "annotations": [
            {
                "id": 1,
                "image_id": 139,
                "category_id": 90,
                "bbox": [10, 20, 30, 40],
                "area": 700.5,
                "iscrowd": 0,
                "segmentation": [[10, 20, 40, 20, 40, 60]],
            },
            {"id": 2, "image_id": 139, "category_id": 1, "bbox": [0, 0, 5, 6], "iscrowd": 1, "area": 30},
        ],
        "categories": [{"id": 90, "name": "toothbrush", "supercategory": "x"}, {"id": 1, "name": "person"}],
    }


def real_layout(folder: Path, annotations: Any) -> Path:
    """A folder like COCO 2017's, with one gray picture."""
    write_coco(folder, [(np.full((64, 96, 3), 90, np.uint8), clips(1)[0][1])], LABELS, split="one")
    (folder / "val2017").mkdir()
    (folder / "one" / "000000000001.jpg").rename(folder / "val2017" / "000139.jpg")
    (folder / "annotations" / "instances_one.json").unlink()
    text = annotations if isinstance(annotations, str) else json.dumps(annotations)
    (folder / "annotations" / "instances_val2017.json").write_text(text)
    return folder


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    wanted = clips(4)
    write_coco(tmp_path, wanted, LABELS)
    data = read_coco(tmp_path)
    assert data.labels == LABELS
    assert len(data.images) == 4
    for image, (pixels, truth) in zip(data.images, wanted, strict=True):
        assert np.abs(image.boxes - truth.boxes).max() <= 0.011
        assert image.classes.tolist() == truth.classes.tolist()
        assert image.crowd.tolist() == (truth.visibility < 0.25).tolist()
        back = read_picture(image).astype(int)
        assert np.abs(back - pixels).mean() < 4


def test_pycocotools_reads_what_was_written(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="pip install pycocotools")
    wanted = clips(3)
    file = write_coco(tmp_path, wanted, LABELS)
    with contextlib.redirect_stdout(io.StringIO()):
        read = coco.COCO(str(file))
    assert [read.cats[number]["name"] for number in (1, 2, 3, 4)] == list(LABELS)
    for number, (_, truth) in enumerate(wanted, start=1):
        rows = read.loadAnns(read.getAnnIds(imgIds=[number]))
        sides = truth.boxes[:, 2:] - truth.boxes[:, :2]
        assert np.allclose([row["bbox"][2:] for row in rows], sides, atol=0.011)
        assert [row["category_id"] - 1 for row in rows] == truth.classes.tolist()


def test_the_real_layout_is_read(tmp_path: Path) -> None:
    data = read_coco(real_layout(tmp_path, minimal()))
    assert data.labels == ("person", "toothbrush")
    assert data.category_ids == (1, 90)
    [image] = data.images
    assert image.file == tmp_path / "val2017" / "000139.jpg"
    assert image.boxes.tolist() == [[10, 20, 40, 60], [0, 0, 5, 6]]
    assert image.classes.tolist() == [1, 0]
    assert image.areas.tolist() == [700.5, 30]
    assert image.crowd.tolist() == [False, True]
    assert read_coco(tmp_path / "annotations" / "instances_val2017.json").images[0].number == 139


def test_of_several_splits_one_has_to_be_named(tmp_path: Path) -> None:
    for split in ("first", "second"):
        write_coco(tmp_path, clips(1), LABELS, split=split)
    with pytest.raises(DatasetError, match="splits: first, second"):
        read_coco(tmp_path)
    assert read_coco(tmp_path, "second").images[0].file.parent.name == "second"


def test_a_written_split_is_not_written_over(tmp_path: Path) -> None:
    write_coco(tmp_path, clips(1), LABELS)
    with pytest.raises(DatasetError, match="is there already"):
        write_coco(tmp_path, clips(1), LABELS)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda raw: "{", "no file of COCO instances"),
        (lambda raw: {"images": []}, "required field"),
        (lambda raw: raw | {"images": []}, "0 images"),
        (lambda raw: raw | {"images": raw["images"] * 2}, "same id"),
        (lambda raw: _row(raw, image_id=7), r"annotations\[0\] names image_id 7"),
        (lambda raw: _row(raw, category_id=2), "category_id 2"),
        (lambda raw: _row(raw, bbox=[1, 2, -3, 4]), r"annotations\[0\].bbox is \[1.0, 2.0, -3.0, 4.0\]"),
        (lambda raw: _row(raw, bbox=[1, 2, 3]), "bbox"),
        (lambda raw: raw | {"images": [raw["images"][0] | {"file_name": "other.jpg"}]}, "such as other.jpg"),
    ],
)
def test_broken_annotations_are_explained(tmp_path: Path, change: Any, told: str) -> None:
    folder = real_layout(tmp_path, change(minimal()))
    with pytest.raises(DatasetError, match=told):
        read_coco(folder)


def test_folders_and_pictures_that_are_missing_or_broken_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        read_coco(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="splits: none"):
        read_coco(tmp_path)
    image = read_coco(real_layout(tmp_path, minimal())).images[0]
    whole = image.file.read_bytes()
    image.file.write_bytes(b"not a picture")
    with pytest.raises(DatasetError, match="not a readable JPEG"):
        read_picture(image)
    image.file.write_bytes(whole)
    wider = minimal()
    wider["images"][0]["width"] = 97
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(wider))
    with pytest.raises(DatasetError, match="is 96x64, the annotations say 97x64"):
        read_picture(read_coco(tmp_path).images[0])


def _row(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return raw | {"annotations": [raw["annotations"][0] | changes, raw["annotations"][1]]}
