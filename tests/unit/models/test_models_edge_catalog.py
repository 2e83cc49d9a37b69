"""The edge catalog: what ships, what a folder adds, and how mistakes are named."""

import importlib.util
import tomllib
from pathlib import Path
from typing import Any

import pytest

from models.catalog import BUILT_IN_FOLDER, VariantError
from models.edge_catalog import EdgeVariant, edge_variant_from, load_edge_catalog

PAPER = {
    "faster_rcnn_r50_fpn": "r50_fpn_fp16",
    "faster_rcnn_r50_c4": "r50_c4",
    "faster_rcnn_r101_fpn": "r101_fpn",
    "faster_rcnn_x101_64x4d_fpn": "x101_64x4d_fpn",
}


def entry(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": "mine",
        "service": "detection",
        "labels": ["cat", "dog"],
        "short_side": 192,
        "long_side": 320,
        "memory_mb": 12.5,
        "tflop": 0.001,
        "weights": "trained",
    }
    return values | changes


def written(folder: Path, **changes: Any) -> Path:
    lines = [f"{key} = {value!r}" for key, value in entry(**changes).items()]
    (folder / "edge").mkdir(parents=True, exist_ok=True)
    file = folder / "edge" / f"{changes.get('name', 'mine')}.toml"
    file.write_text("\n".join(lines))
    return file


def test_the_papers_detectors_stand_as_in_the_placement_table() -> None:
    table = tomllib.loads((BUILT_IN_FOLDER.parent.parent / "policies/placement/tables/detection.toml").read_text())
    rows = {row["name"]: row for row in table["variant"]}
    found = load_edge_catalog()
    for name, table_name in PAPER.items():
        variant, row = found[name], rows[table_name]
        assert variant.table_name == table_name
        assert (variant.memory_mb, variant.tflop) == (row["memory_mb"], row["tflop"])
        assert variant.accuracy.value == row["accuracy"][0]
        assert (variant.accuracy.source, variant.weights, variant.path) == ("published", "published", "")
        assert (variant.short_side, variant.long_side, len(variant.labels)) == (800, 1333, 80)
    assert found["faster_rcnn_r50_c4"].colour == "bgr"
    assert found["faster_rcnn_r50_fpn"].precision == "float16"


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision holds the other list")
def test_class_names_are_cocos_in_order() -> None:
    from models.architectures import torchvision_operators

    torchvision_operators.register(compiled=False)
    from torchvision.models._meta import _COCO_CATEGORIES

    named = [name for name in _COCO_CATEGORIES if name not in ("__background__", "N/A")]
    assert list(load_edge_catalog()["faster_rcnn_r50_fpn"].labels) == named


def test_a_folders_entry_replaces_the_built_in_one_and_its_paths_count_from_it(tmp_path: Path) -> None:
    written(tmp_path, name="faster_rcnn_r50_fpn", path="../net/1/model.onnx")
    written(tmp_path, name="other")
    found = load_edge_catalog([tmp_path])
    assert found["faster_rcnn_r50_fpn"].path == str(tmp_path / "net/1/model.onnx")
    assert found["faster_rcnn_r50_fpn"].labels == ("cat", "dog")
    assert found["other"].memory_mb == 12.5
    assert set(load_edge_catalog()) | {"other"} == set(found)


def test_two_folders_with_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        written(tmp_path / folder)
    with pytest.raises(VariantError, match=r"name = 'mine': .*a/edge/mine\.toml already has this name"):
        load_edge_catalog([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(VariantError, match="no such folder"):
        load_edge_catalog([tmp_path / "c"])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"name": "Mine!"}, "name"),
        ({"service": "speech"}, "service"),
        ({"service": "tracking"}, "tracker"),
        ({"tracker": "sort"}, "tracker"),
        ({"labels": []}, "labels"),
        ({"labels": "no-such.txt"}, "labels"),
        ({"short_side": 0}, "short_side"),
        ({"long_side": 100}, "long_side"),
        ({"pad_to": 0}, "pad_to"),
        ({"pad_value": 300.0}, "pad_value"),
        ({"mean": [1.0, 2.0]}, "mean"),
        ({"mean": [1.0, float("nan"), 2.0]}, "mean"),
        ({"std": [1.0, 0.0, 1.0]}, "std"),
        ({"score_threshold": 1.5}, "score_threshold"),
        ({"memory_mb": float("inf")}, "memory_mb"),
        ({"tflop": -1.0}, "tflop"),
        ({"weights": "downloaded"}, "weights"),
        ({"accuracy": {"value": 0.5}}, "accuracy.source"),
        ({"accuracy": {"value": 0.5, "source": "measured"}, "weights": "random"}, "accuracy.value"),
        ({"colour": "gray"}, "colour"),
        ({"shortside": 5}, "shortside"),
    ],
)
def test_a_mistake_is_named_with_its_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(VariantError) as raised:
        edge_variant_from(entry(**changes), "here.toml", Path("."))
    assert (raised.value.key, raised.value.where) == (key, "here.toml")


def test_what_is_missing_and_what_is_not_toml_is_said(tmp_path: Path) -> None:
    values = entry()
    del values["memory_mb"]
    with pytest.raises(VariantError, match="memory_mb"):
        edge_variant_from(values, "here.toml", Path("."))
    written(tmp_path).write_text("name = ")
    with pytest.raises(VariantError, match="not valid TOML"):
        load_edge_catalog([tmp_path])


def test_a_right_entry_is_taken_as_it_is() -> None:
    found = edge_variant_from(entry(accuracy={"value": 0.5, "source": "measured"}), "here", Path("."))
    assert isinstance(found, EdgeVariant)
    assert (found.labels, found.accuracy.value, found.weights, found.path) == (("cat", "dog"), 0.5, "trained", "")


def test_the_example_in_the_catalogs_readme_is_valid(tmp_path: Path) -> None:
    readme = (BUILT_IN_FOLDER / "README.md").read_text()
    block = next(block for block in readme.split("\n\n") if 'name = "street"' in block)
    variant = edge_variant_from(
        tomllib.loads(block.removeprefix("    ").replace("\n    ", "\n")), "README.md", tmp_path
    )
    assert (variant.name, variant.service, variant.labels) == ("street", "detection", ("car", "bus"))
    assert (variant.short_side, variant.long_side) == (480, 800)
