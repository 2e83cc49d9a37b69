"""Shipping a run: the command that made it, from its own record; speeds counted from where the loop began."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from policies.placement.actors import PRETRAINED, load_artifact
from policies.placement.edge_network import EdgeNetwork
from policies.placement.graph import eua16
from policies.placement.ship import ship, training_command
from policies.placement.speed import Speed
from policies.placement.tables import shipped_tables
from policies.placement.train import preset, train
from policies.placement.training import Settings, with_overrides


def _settings_of(command: str) -> Settings:
    """What the command line says, read as `tidegate placement train` reads it."""
    words = shlex.split(command)
    overrides = dict(words[n + 1].split("=", 1) for n, word in enumerate(words) if word == "--set")
    return with_overrides(preset(words[words.index("--preset") + 1]), overrides)


def test_a_shipped_run_names_the_command_that_trains_it_and_keeps_its_curve(tmp_path: Path) -> None:
    options = {"steps": "40", "evaluate_every": "20", "minibatch": "8", "prefill": "60", "warmup": "1", "tau": "0.9"}
    settings = with_overrides(preset("hisper-no-hra"), {**options, "evaluation_slots": "5", "bfloat16": "false"})
    train(settings, tmp_path / "run")
    ship(tmp_path / "run", "named", tmp_path)
    text = json.loads((tmp_path / "named.json").read_text())
    assert text["record"]["command"].startswith(
        "tidegate placement train --preset hisper-no-hra --out runs/named --set "
    )
    assert _settings_of(text["record"]["command"]) == settings
    assert [row["step"] for row in text["record"]["curve"]] == [0, 20, 40]
    network = EdgeNetwork(eua16(), shipped_tables())
    kept, shipped = (load_artifact(tmp_path / name, network).weights for name in ("run/actors", "named"))
    for name, weights in kept.items():
        np.testing.assert_allclose(shipped[name], weights, atol=1e-3)


def test_a_preset_as_it_is_needs_no_options() -> None:
    settings = {**vars(preset("hasac")), "device": "cuda", "checkpoint_every": 7}
    assert training_command(settings, "x") == "tidegate placement train --preset hasac --out runs/x"
    with pytest.raises(ValueError, match="unknown"):
        training_command({**settings, "preset": "sarsa"}, "x")


SHIPPED = sorted(path.stem for path in (PRETRAINED / "placement").glob("*.json"))


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_shipped_says_how_it_was_trained(name: str) -> None:
    text = json.loads((PRETRAINED / "placement" / f"{name}.json").read_text())
    command = text["record"]["command"]
    found, kept = vars(_settings_of(command)), text["settings"]
    assert f" --out runs/{name}" in command
    # An older artifact may lack settings that came later; what it holds is what the command says.
    assert {key: found[key] for key in kept if key != "checkpoint_every"} == {
        key: value for key, value in kept.items() if key != "checkpoint_every"
    }


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith(("hisper-paper", "hasac"))])
def test_the_soft_learners_were_trained_to_the_end_of_their_budget(name: str) -> None:
    text = json.loads((PRETRAINED / "placement" / f"{name}.json").read_text())
    assert text["record"]["curve"][-1]["step"] == text["record"]["steps"] == text["settings"]["steps"]


def test_speeds_count_from_where_the_loop_began() -> None:
    speed = Speed(10.0, step=100, updates=5, samples=640)
    assert speed.rates(14.0, 180, 9, 1152) == {"steps_per_s": 20.0, "updates_per_s": 1.0, "samples_per_s": 128.0}
    assert set(speed.rates(10.0, 100, 5, 640).values()) == {0.0}
