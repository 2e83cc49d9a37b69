"""The catalog: built-in entries are sound, and every fault names its key, its value and the remedy."""

from pathlib import Path

import pytest

from models.catalog import BUILT_IN_FOLDER, VariantError, load_catalog, read_variant

SOUND = """
name = "mine"
service = "pets"
runtime = "onnxruntime"
path = "weights/mine.onnx"
labels = ["cat", "dog"]
[input]
name = "image"
shape = [3, 32, 48]
[preprocess]
resize = 64
crop = "centre"
mean = [0.5, 0.5, 0.5]
std = [0.5]
"""

EMULATED = """
name = "mine"
service = "pets"
runtime = "emulated"
labels = 4
[accuracy]
value = 0.5
source = "modelled"
[emulated]
service_ms = 10
cv = 0.3
distribution = "gamma"
"""


def write(folder: Path, text: str, name: str = "mine.toml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_built_in_entries_are_sound_and_the_papers_times_are_marked_as_inferred() -> None:
    catalog = load_catalog()
    heavy, light = catalog["pnasnet5large_t4"], catalog["efficientnet_b0_t4"]
    assert heavy.service == light.service == "imagenet"
    assert heavy.emulated is not None
    assert light.emulated is not None
    assert (heavy.emulated.service_ms, light.emulated.service_ms) == (43.0, 11.5)
    assert (heavy.accuracy.value, light.accuracy.value) == (0.8278, 0.7769)
    assert heavy.accuracy.source == light.accuracy.source == "published"
    assert "inferred" in heavy.emulated.note
    assert "inferred" in light.emulated.note
    null = catalog["null"].emulated
    assert null is not None
    assert null.service_ms == 0


def test_a_users_entry_is_read_with_paths_relative_to_its_file(tmp_path: Path) -> None:
    variant = read_variant(write(tmp_path, SOUND))
    assert variant.path == str(tmp_path / "weights" / "mine.onnx")
    assert variant.labels == ("cat", "dog")
    assert variant.classes == 2
    assert variant.accuracy.source == "none"
    assert variant.accuracy.value is None


def test_labels_may_be_a_count_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("tench\ngoldfish\n")
    by_file = SOUND.replace('["cat", "dog"]', '"names.txt"')
    assert read_variant(write(tmp_path, by_file)).labels == ("tench", "goldfish")
    assert read_variant(write(tmp_path, SOUND.replace('["cat", "dog"]', "3"))).labels == ("0", "1", "2")


@pytest.mark.parametrize(
    ("text", "old", "new", "key", "remedy"),
    [
        (SOUND, 'service = "pets"', "", "service", "missing required field"),
        (SOUND, 'runtime = "onnxruntime"', 'runtime = "onnx"', "runtime", "Invalid enum value"),
        (SOUND, "[input]", 'size = "big"\n[input]', "size", "unknown field"),
        (SOUND, "[3, 32, 48]", "[3, 32, 0]", "input.shape", ">= 1"),
        (SOUND, "[3, 32, 48]", "[1, 32, 48]", "input.shape", "3 channel"),
        (SOUND, "resize = 64", "resize = 40", "preprocess.resize", "(48)"),
        (SOUND, 'crop = "centre"', "", "preprocess.resize", 'set crop = "centre"'),
        (SOUND, 'crop = "centre"', 'crop = "centre"\nresizer = "simd"', "preprocess.resizer", "leave it out"),
        (SOUND, "std = [0.5]", "std = [0.5, 0.1]", "preprocess.std", "give 1 number or 3"),
        (SOUND, "std = [0.5]", "std = [0.0]", "preprocess.std", "above 0"),
        (SOUND, "mean = [0.5, 0.5, 0.5]", "mean = [nan]", "preprocess.mean", "finite"),
        (SOUND, 'path = "weights/mine.onnx"', "", "path", "give the model file"),
        (SOUND, '["cat", "dog"]', '"absent.txt"', "labels", "text file"),
        (SOUND, '["cat", "dog"]', "[]", "labels", "at least one class"),
        (SOUND, '["cat", "dog"]', "0", "labels", "count"),
        (SOUND, 'name = "mine"', 'name = "My Model"', "name", "regex"),
        (SOUND, "[input]", "accuracy = {value = 0.5}\n[input]", "accuracy.source", "needs one"),
        (SOUND, "[input]", 'accuracy = {source = "measured"}\n[input]', "accuracy.source", "needs one"),
        (SOUND, "[input]", "emulated = {service_ms = 1}\n[input]", "emulated", "leave it out"),
        (EMULATED, "value = 0.5", "value = 1.5", "accuracy.value", "<= 1.0"),
        (EMULATED, '[accuracy]\nvalue = 0.5\nsource = "modelled"', "", "accuracy", "give a value"),
        (EMULATED, "[emulated]", "[other]", "other", "unknown field"),
        (EMULATED, "cv = 0.3", "cv = 0.0", "emulated.cv", "above 0"),
        (EMULATED, 'distribution = "gamma"', "", "emulated.cv", "cv 0"),
        (EMULATED, "service_ms = 10", "service_ms = inf", "emulated.service_ms", "finite"),
        (EMULATED, "labels = 4", "labels = 1", "labels", "2 or more"),
        (SOUND, "name =", "name", "file", "TOML"),
    ],
)
def test_a_fault_names_key_value_and_remedy(
    tmp_path: Path, text: str, old: str, new: str, key: str, remedy: str
) -> None:
    assert old in text
    file = write(tmp_path, text.replace(old, new))
    with pytest.raises(VariantError) as caught:
        read_variant(file)
    assert caught.value.key == key
    assert remedy in caught.value.remedy
    assert str(file) in str(caught.value)
    assert repr(caught.value.value) in str(caught.value)


def test_a_fault_carries_the_value_that_stands_there(tmp_path: Path) -> None:
    with pytest.raises(VariantError, match=r"input\.shape = \[3, 32, 0\]"):
        read_variant(write(tmp_path, SOUND.replace("48", "0")))


def test_users_folders_join_the_catalog_and_names_stay_unique(tmp_path: Path) -> None:
    write(tmp_path, SOUND)
    assert load_catalog([tmp_path])["mine"].service == "pets"
    write(tmp_path, SOUND, "second.toml")
    with pytest.raises(VariantError, match="already has this name"):
        load_catalog([tmp_path])
    with pytest.raises(VariantError, match="no such folder"):
        load_catalog([tmp_path / "absent"])


def test_the_examples_in_the_catalogs_readme_are_valid(tmp_path: Path) -> None:
    readme = (BUILT_IN_FOLDER / "README.md").read_text()
    blocks = [block for block in readme.split("\n\n") if block.startswith("    ")]
    lines = [line[4:] for block in blocks for line in block.splitlines() if line.startswith("    ")]
    entries = "\n".join(lines).split('name = "street"')[0]  # then an edge service's: test_models_edge_catalog.py
    own, _, law_of = entries.partition("[emulated]")
    (tmp_path / "pets.txt").write_text("cat\ndog\n")
    variant = read_variant(write(tmp_path, own, "pets.toml"))
    assert variant.name == "pets_small"
    assert variant.preprocess.resize == 183
    assert variant.accuracy.value == 0.91
    emulated = own.replace('"onnxruntime"', '"emulated"') + "[emulated]" + law_of
    law = read_variant(write(tmp_path, emulated, "law.toml")).emulated
    assert law is not None
    assert law.cv == 0.3
