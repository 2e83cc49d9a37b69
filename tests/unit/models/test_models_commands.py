"""`tidegate models`: JSON on stdout, errors on stderr with status 2, users' folders joined in."""

import json
from pathlib import Path

from typer.testing import CliRunner

from models.profiles import read_profiles
from tidegate.models_commands import app

ENTRY = """
name = "mine"
service = "pets"
runtime = "emulated"
labels = 2
accuracy = {value = 0.5, source = "modelled"}
emulated = {service_ms = 4.0, fixed_share = 0.5}
"""

runner = CliRunner()


def test_list_shows_the_users_variants_beside_the_built_in_ones(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(ENTRY)
    result = runner.invoke(app, ["list", "--json", "--catalog", str(tmp_path)])
    assert result.exit_code == 0
    found = {row["name"]: row for row in json.loads(result.stdout)["variants"]}
    assert found["mine"]["accuracy"] == 0.5
    assert found["digits_heavy"]["available"]
    assert found["digits_heavy"]["accuracy_source"] == "measured"
    table = runner.invoke(app, ["list", "--catalog", str(tmp_path)])
    assert "digits_light" in table.stdout


def test_profile_writes_what_it_prints(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(ENTRY)
    out = tmp_path / "p.json"
    arguments = ["profile", "mine", "-c", str(tmp_path), "--batch", "1", "--batch", "3", "-o", str(out), "--json"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["profiles"]
    assert [(row["batch_size"], round(row["p50_ms"], 6)) for row in rows] == [(1, 4.0), (3, 8.0)]
    (profile,) = read_profiles(out)
    assert profile.quantile_s(3, 0.98) == 0.008


def test_mistakes_are_named_with_status_2(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(ENTRY.replace("0.5,", "5,"))
    broken = runner.invoke(app, ["list", "--catalog", str(tmp_path)])
    assert broken.exit_code == 2
    assert "accuracy.value = 5" in broken.stderr
    unknown = runner.invoke(app, ["profile", "nothing"])
    assert unknown.exit_code == 2
    assert "choose from" in unknown.stderr
    assert unknown.stdout == ""


def test_the_list_shows_where_each_file_is() -> None:
    listed = runner.invoke(app, ["list"])
    assert listed.exit_code == 0
    rows = {line.split()[0]: line.split() for line in listed.stdout.splitlines() if line.strip()}
    assert rows["digits_heavy"][-1].endswith("digits_heavy/1/model.onnx")
    assert Path(rows["digits_heavy"][-1]).is_file()
    assert rows["pnasnet5large_t4"][-1] == "–", "an emulated variant has no file"
    variants = json.loads(runner.invoke(app, ["list", "--json"]).stdout)["variants"]
    files = {one["name"]: one["file"] for one in variants}
    assert (Path(files["digits_light"]).is_file(), files["null"]) == (True, "")
