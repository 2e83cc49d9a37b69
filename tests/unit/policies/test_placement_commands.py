"""`tidegate placement ...`: the JSON as promised, figures, and errors that name the remedy."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tidegate.placement_commands import app

RUNNER = CliRunner()


def test_evaluate_prints_the_promised_json_and_figures_draw_it(tmp_path: Path) -> None:
    arguments = ["evaluate", "--policy", "sequential,hisper,hisper-sequential", "--agents", "8", "--slots", "3"]
    cache = ["--seeds", "2", "--cache", str(tmp_path / "optima.json"), "--json"]
    result = RUNNER.invoke(app, [*arguments, *cache])
    assert result.exit_code == 0, result.output
    text = json.loads(result.stdout)
    for record in text["results"].values():
        assert set(record["reward"]) == {"mean", "std"}
        assert set(record["decide_ms"]) == {"p50", "p99"}
        assert {"accuracy", "delay_s", "cost_usd", "failure_ratio", "gap_per_slot", "agents"} < set(record)
        assert record["gap_per_slot"] > -1e-6
        assert len(record["agents"]["delay_s"]) == 8
    assert text["setting"]["optima_proved"] == 1.0
    (tmp_path / "results.json").write_text(result.stdout)
    drawn = RUNNER.invoke(app, ["figures", str(tmp_path / "results.json"), "--out", str(tmp_path / "figures")])
    assert drawn.exit_code == 0, drawn.output
    page = (tmp_path / "figures" / "placement-8.html").read_text()
    assert all(title in page for title in ("Fig. 7", "Fig. 8", "Fig. 9", "Fig. 10", "hisper-sequential"))
    assert (tmp_path / "figures" / "plotly.min.js").stat().st_size > 1_000_000


def test_figures_without_a_file_evaluates_by_itself_and_writes_tables(tmp_path: Path) -> None:
    arguments = ["figures", "--agents", "8", "--slots", "2", "--seeds", "1", "--out", str(tmp_path)]
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    table = (tmp_path / "placement-8.md").read_text()
    assert all(f"Fig{part}" in table for part in ("s. 7, 8 and 9", ". 7: training of `hisper-paper`", ". 10: delay"))
    shown = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert {"random", "heuristic", "hasac", "happo", "beam"} < set(shown)
    assert "exact" not in shown
    assert "Fig. 10" in (tmp_path / "placement-8.html").read_text()


def test_tables_and_the_network_are_shown() -> None:
    result = RUNNER.invoke(app, ["evaluate", "--policy", "beam", "--slots", "2", "--seeds", "1", "--no-gap"])
    assert result.exit_code == 0
    assert "beam" in result.stdout
    assert "16 configurations x 3 variants" in " ".join(RUNNER.invoke(app, ["show"]).stdout.split())


def test_all_leaves_out_what_was_not_trained_for_that_many() -> None:
    arguments = ["evaluate", "--policy", "all", "--agents", "12", "--slots", "1", "--seeds", "1", "--no-gap", "--json"]
    result = RUNNER.invoke(app, [*arguments, "--graph", "eua16"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "left out: hasac:" in result.stderr
    assert {"sequential", "beam", "hisper-sequential"} < set(json.loads(result.stdout)["results"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["evaluate", "--policy", "oracle", "--no-gap"], "unknown; use one of random"),
        (["evaluate", "--agents", "7", "--no-gap"], "multiple of the 2 services"),
        (["evaluate", "--graph", "mars", "--no-gap"], "graph 'mars' is unknown"),
        (["evaluate", "--policy", "hisper", "--agents", "40", "--no-gap"], "use hisper-sequential"),
        (["evaluate", "--table", "/nowhere.toml"], "cannot be read"),
        (["train", "--out", "x", "--preset", "sarsa"], "preset 'sarsa' is unknown"),
        (["train", "--out", "x", "--set", "steps"], "not KEY=VALUE"),
        (["train", "--out", "x", "--set", "stepz=1"], "setting 'stepz' is unknown"),
        (["train", "--out", "/nonexistent/x", "--resume"], "nothing to resume"),
        (["figures", "/nowhere.json"], "evaluate --json"),
    ],
)
def test_errors_name_the_remedy(arguments: list[str], says: str) -> None:
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())
