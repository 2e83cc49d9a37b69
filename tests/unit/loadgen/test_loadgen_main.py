"""`python -m loadgen` as its users run it: against a server in another process, with and without Ctrl-C."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadgen.__main__ import app
from loadgen.self_test import bare_server, self_test
from loadgen.traces import read_trace

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with bare_server() as address:
        yield address


def test_json_is_one_object_and_files_are_written(url: str, tmp_path: Path) -> None:
    report, saved = tmp_path / "report.html", tmp_path / "trace.csv"
    arguments = ["--url", url, "--workload", "constant:100", "--duration-s", "0.3", "--json", "--name", "mine"]
    result = CliRunner().invoke(app, [*arguments, "--report", str(report), "--save-trace", str(saved)])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    row = printed["results"]["mine"]["overall"]
    assert set(row) == {
        "requests",
        "goodput_ratio",
        "violation_ratio",
        "heavy_ratio",
        "p50_ms",
        "p98_ms",
        "p99_ms",
    }
    assert row["requests"] == 30
    assert row["violation_ratio"] == 0.0
    assert row["heavy_ratio"] == 1.0
    assert printed["details"]["mine"]["outcomes"] == {"OK": 30}
    assert "mine" in report.read_text()
    assert len(read_trace(saved)) == 30


def test_people_get_a_table(url: str) -> None:
    result = CliRunner().invoke(app, ["--url", url, "--workload", "constant:50", "--duration-s", "0.1"])
    assert result.exit_code == 0
    assert "goodput" in result.stdout
    assert "5 OK" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--url http://HOST:PORT/v1/SERVICE"),
        (["--url", "http://x/", "--workload", "bursts"], "no workload"),
        (["--url", "http://x/", "--payload", "digits"], "--split FILE"),
        (["--url", "x"], "no HTTP address"),
        (["--url", "http://x/", "--header", "novalue"], "'Name: value'"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], reason: str) -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    assert result.exit_code == 2
    assert reason in result.output


def test_ctrl_c_stops_sending_and_still_reports(url: str, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    command = [sys.executable, "-m", "loadgen", "--url", url, "--workload", "constant:50"]
    command += ["--duration-s", "60", "--json", "--report", str(report)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    while " OK" not in child.stderr.readline():  # the first line of progress shows that answers come in
        assert child.poll() is None
    child.send_signal(signal.SIGINT)
    stdout, _ = child.communicate(timeout=20)
    assert child.returncode == 130
    found = json.loads(stdout)["details"]["service"]
    assert found["interrupted"]
    assert 0 < found["sent"] < 3000
    assert found["outcomes"] == {"OK": found["sent"]}
    assert "was stopped after" in report.read_text()


@pytest.mark.benchmark
def test_two_thousand_requests_per_second_leave_on_time() -> None:
    result = self_test()
    assert result["kept_up"], result["details"]["sending"]
