"""The shipped digit models: the split is what its seed gives, and the catalog's accuracy is what they score."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

MISSING = [n for n in ("sklearn", "torch", "onnxruntime") if importlib.util.find_spec(n) is None]
if MISSING:
    pytest.skip(f"needs {', '.join(MISSING)}: see the [train] extra", allow_module_level=True)

from sklearn.datasets import load_digits  # noqa: E402 - after the skip

from models.catalog import load_catalog  # noqa: E402
from models.train_digits import PRETRAINED, SPLIT_SEED, held_out_answers, split  # noqa: E402

NAMES = ("digits_light", "digits_heavy")


def test_the_shipped_split_is_what_its_seed_gives() -> None:
    shipped = json.loads((PRETRAINED / "digits_split.json").read_text())
    train, held_out = split()
    assert shipped == {"seed": SPLIT_SEED, "train": train.tolist(), "held_out": held_out.tolist()}
    assert sorted(shipped["train"] + shipped["held_out"]) == list(range(1797))
    labels = load_digits().target
    halves = [np.bincount(labels[half]) for half in (train, held_out)]
    assert np.abs(halves[0] - halves[1]).max() <= 1


def test_the_models_are_small_and_their_accuracy_is_the_recorded_one() -> None:
    catalog = load_catalog()
    files = [Path(catalog[name].path) for name in NAMES]
    assert sum(file.stat().st_size for file in files) < 5_000_000
    accuracy = {}
    for name in NAMES:
        record = json.loads((PRETRAINED / name / "training.json").read_text())
        assert record["held_out_images"] == len(split()[1])
        accuracy[name] = catalog[name].accuracy.value
        assert accuracy[name] == record["held_out_accuracy"]["png"]
        assert catalog[name].accuracy.source == "measured"
    light, heavy = (accuracy[name] for name in NAMES)
    assert light is not None
    assert heavy is not None
    assert heavy - light >= 0.03


def test_shipped_files_do_not_tell_of_the_machine_that_made_them() -> None:
    files = sorted(PRETRAINED.glob("*/1/*.onnx"))
    assert len(files) >= 2
    assert [file.parts[-3] for file in files if b"site-packages" in file.read_bytes()] == []


def test_a_sample_of_held_out_images_is_read_through_the_serving_path() -> None:
    sample = split()[1][::20]
    for image_format in ("PNG", "JPEG"):
        assert held_out_answers("digits_light", image_format, sample).mean() > 0.85


@pytest.mark.slow
def test_all_held_out_images_paired() -> None:
    """A minute: the recorded accuracies exactly, and a gap that pairing shows to be no accident."""
    held_out = split()[1]
    catalog = load_catalog()
    right = {name: held_out_answers(name, "PNG", held_out) for name in NAMES}
    for name in NAMES:
        value = catalog[name].accuracy.value
        assert value is not None
        # Another processor may round a near tie the other way: two images of 901.
        assert abs(right[name].mean() - value) < 0.0025
    only_heavy = int((right["digits_heavy"] & ~right["digits_light"]).sum())
    only_light = int((right["digits_light"] & ~right["digits_heavy"]).sum())
    # McNemar's statistic: 10.8 would be one chance in a thousand.
    assert (only_heavy - only_light) ** 2 / (only_heavy + only_light) > 10.8
