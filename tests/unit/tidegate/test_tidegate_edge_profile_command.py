"""`tidegate models profile --service ...` from the command line to the files, with a network written by hand."""

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

for _package in ("onnx", "onnxruntime", "trackers", "trackeval", "pycocotools", "av"):
    if importlib.util.find_spec(_package) is None:
        pytest.skip(f"needs {_package}", allow_module_level=True)

from models.datasets.mot import write_sequence  # noqa: E402 - after the skip
from models.datasets.scenes import LABELS, plan_scene, render  # noqa: E402
from policies.placement.tables import read_table  # noqa: E402
from tests.fakes.finder_network import write_finder  # noqa: E402
from tidegate.models_commands import app  # noqa: E402


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    folder = tmp_path / "catalog"
    (folder / "edge").mkdir(parents=True)
    write_finder(folder / "finder.onnx")
    for name, service, tracker in (("finder", "detection", ""), ("follower", "tracking", "sort")):
        lines = [f'name = "{name}"', f'service = "{service}"', f'tracker = "{tracker}"', 'path = "../finder.onnx"']
        lines += [f"labels = {json.dumps(LABELS)}", "short_side = 192", "long_side = 320", "memory_mb = 4.0"]
        lines += ["tflop = 0.5", 'weights = "random"']
        (folder / "edge" / f"{name}.toml").write_text("\n".join(lines))
    return folder


def test_a_detection_table_with_its_heat_maps(catalog: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "detection.toml"
    given = ["profile", "finder", "--service", "detection", "--catalog", str(catalog), "--limit", "2", "-o", str(out)]
    grid = ["--resolution", "1", "--resolution", "0.5", "--quality", "95", "--quality", "40", "--json"]
    result = CliRunner().invoke(app, given + grid)
    assert result.exit_code == 0, result.output
    table = read_table(out)
    assert table.configurations == ("1x_q95", "1x_q40", "0.5x_q95", "0.5x_q40")
    assert (table.variants, table.memory_mb[0], table.tflop[0]) == (("finder",), 4.0, 0.5)
    figures = json.loads(result.stdout)["figures"]
    assert figures["requests"] == 2
    assert figures["variants"][0]["service_ms"][0] > 0
    page = out.with_suffix(".html").read_text()
    assert "finder" in page
    assert "bytes, of the highest" in page


def test_a_tracking_table_from_folders_on_disk(catalog: Path, tmp_path: Path) -> None:
    clip = render(plan_scene(2), range(9))
    write_sequence(tmp_path / "mot" / "ONE", list(clip.frames), clip.truth, clip.fps, LABELS)
    out = tmp_path / "tracking.toml"
    given = ["profile", "follower", "--service", "tracking", "--data", str(tmp_path / "mot"), "-o", str(out)]
    result = CliRunner().invoke(app, [*given, "--catalog", str(catalog), "--resolution", "1"])
    assert result.exit_code == 0, result.output
    table = read_table(out)
    assert table.configurations == ("1x_fps15", "1x_fps7.5", "1x_fps5", "1x_fps2.5")
    assert table.inferences.tolist() == [9, 5, 3, 2]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["profile"], "--service"),
        (["profile", "nobody", "--service", "detection"], "nobody"),
        (["profile", "finder", "--service", "detection", "--data", "missing"], "missing"),
        (["profile", "follower", "--service", "tracking", "--data", "missing"], "missing"),
        (["profile", "finder", "--service", "detection", "--resolution", "3"], "resolution"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(given: list[str], said: str, catalog: Path, tmp_path: Path) -> None:
    out = tmp_path / "none.toml"
    result = CliRunner().invoke(app, [*given, "--catalog", str(catalog), "-o", str(out)])
    assert result.exit_code == 2
    assert said in result.output
    assert not out.exists()
