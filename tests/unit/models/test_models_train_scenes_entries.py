"""The shipped scene variants: their entries, their files, and that they find what is in held-out scenes."""

import json
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("torch", reason='pip install -e ".[train]"')
pytest.importorskip("pycocotools", reason='pip install -e ".[edge]"')
pytest.importorskip("trackeval", reason='pip install -e ".[edge]"')

from models.catalog import BUILT_IN_FOLDER
from models.datasets.scenes import LABELS
from models.detection import Detections, open_detector
from models.edge_catalog import edge_variant_from, load_edge_catalog
from models.edge_items import scene_stills
from models.edge_scores import detection_scores
from models.train_scenes_entries import ENTRIES, main, measured, values_of
from models.train_scenes_tasks import TASKS

FOLDER = BUILT_IN_FOLDER / "edge"
PRETRAINED = BUILT_IN_FOLDER.parent / "pretrained"


@pytest.mark.parametrize("name", list(ENTRIES))
def test_a_shipped_entry_is_the_one_that_is_written(name: str) -> None:
    """But for its figures, which are above 0 and say how they were measured."""
    shipped = load_edge_catalog()[name]
    bare = edge_variant_from(values_of(name), name, FOLDER)
    for key in bare.__struct_fields__:
        if key not in ("memory_mb", "tflop", "accuracy"):
            assert getattr(shipped, key) == getattr(bare, key), key
    assert Path(shipped.path).is_file()
    assert shipped.memory_mb > 5
    assert 1e-5 < shipped.tflop < 1e-2
    assert shipped.accuracy.source == "measured"
    assert "held-out" in shipped.accuracy.note


def test_the_figures_are_what_was_asked_for() -> None:
    """mAP 0.5 for the larger detector, 5 points above the smaller one; MOTA 0.6 for the best tracker; 30 MB in all."""
    accuracy = {name: load_edge_catalog()[name].accuracy.value or 0.0 for name in ENTRIES}
    assert accuracy["scenes_detector_large"] >= 0.5
    assert accuracy["scenes_detector_large"] >= accuracy["scenes_detector_small"] + 0.05
    assert max(accuracy[name] for name, entry in ENTRIES.items() if entry.tracker) > 0.6
    assert sum(file.stat().st_size for file in PRETRAINED.rglob("model.onnx")) < 30e6


@pytest.mark.parametrize("name", list(TASKS))
def test_every_network_ships_with_the_record_of_its_training(name: str) -> None:
    record = json.loads((PRETRAINED / name / "training.json").read_text())
    assert record["command"].startswith(f"python -m models.train_scenes {name} --seed ")
    assert f"--steps {TASKS[name].steps}" in record["command"]
    assert 0 < record["held_out"]["mAP"] <= 1


def test_shipped_detectors_find_what_is_in_held_out_scenes() -> None:
    """Through the serving path, on scenes 2000 to 2019: about the accuracy that their entries state."""
    stills = list(scene_stills(20, first_seed=2000))
    for name in ("scenes_detector_large", "scenes_detector_small", "scenes_detector_yolox"):
        variant = load_edge_catalog()[name]
        detector = open_detector(variant)
        found = [detector.detect(still.media.frames[0]) for still in stills]
        score = detection_scores([still.truth for still in stills], found, LABELS).m_ap
        assert score == pytest.approx(variant.accuracy.value, abs=0.12), name
        assert all(isinstance(one, Detections) for one in found)


@pytest.mark.slow
def test_an_entry_states_what_was_measured() -> None:
    """Measured anew on two scenes, the small detector's entry keeps its operations and memory."""
    entry = tomllib.loads(measured("scenes_detector_small", FOLDER, stills=2, clips=1))
    again, shipped = edge_variant_from(entry, "entry", FOLDER), load_edge_catalog()["scenes_detector_small"]
    assert again.path == shipped.path
    assert again.tflop == pytest.approx(shipped.tflop, rel=0.2)  # the second stage looks at fewer boxes or more
    assert again.memory_mb == pytest.approx(shipped.memory_mb, rel=0.5)
    assert "2 held-out scenes" in again.accuracy.note


def test_an_unknown_variant_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["scenes_detector_huge"])
    assert "scenes_detector_huge is no scene variant; choose from scenes_detector_large" in capsys.readouterr().err
