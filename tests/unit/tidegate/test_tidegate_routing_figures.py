"""`tidegate routing figures`: tables on the terminal, pages on disk."""

import json
from pathlib import Path

from typer.testing import CliRunner

from tidegate.main import app


def run(*arguments: str) -> str:
    """What a figure's command prints."""
    result = CliRunner().invoke(app, ["routing", "figures", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_learning_curves_as_table_and_page(tmp_path: Path) -> None:
    page = tmp_path / "curves.html"
    table = run("curves", "--out", str(page))
    assert "learned-po " in table
    assert "learned-fo-periodic" in table
    text = page.read_text()
    for title in ("Fig. 2", "Fig. 4", "Fig. 6"):
        assert title in text
    assert 'src="plotly.min.js"' in text
    assert (tmp_path / "plotly.min.js").exists()


def test_a_row_of_the_table_is_a_point_of_the_curve() -> None:
    found = json.loads(run("curves", "--json"))
    last = found["learned-po"][-1]
    rows = [r for r in run("curves").splitlines() if r.startswith("learned-po ")]
    assert f"{last['slots'] / 1e6:.2f} M" in rows[-1]
    assert f"{100 * last['scores']['overall_50_50']['goodput_ratio']:.2f}" in rows[-1]


def test_batches_of_the_shipped_router(tmp_path: Path) -> None:
    shares = json.loads(run("batches", "--slots", "2000", "--json"))["shares"]
    assert set(shares) == {"heavy, bursty", "heavy, normal", "light, bursty", "light, normal"}
    for row in shares.values():
        assert abs(sum(row.values()) - 1.0) < 1e-9
    assert "1 to 5" in run("batches", "--slots", "2000", "--out", str(tmp_path / "batches.html"))
    assert "Fig. 5" in (tmp_path / "batches.html").read_text()


def test_latencies_of_rules(tmp_path: Path) -> None:
    page = tmp_path / "latencies.html"
    table = run("latencies", "--routers", "light-only,deadline", "--slots", "2000", "--out", str(page))
    name, goodput, *_ = table.splitlines()[2].split()
    assert name == "light-only"
    assert abs(float(goodput) - 77.69) < 0.1
    assert "Fig. 3" in page.read_text()


def test_missing_results_name_the_command() -> None:
    result = CliRunner().invoke(app, ["routing", "figures", "negative", "--results", "nowhere.json"])
    assert result.exit_code == 2
    assert "policies.routing.negative_results" in " ".join(result.output.split())
