"""The commands that a person types first: demo, replay, compare, bench; over real processes, read as JSON."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.running_system import RunningSystem, deployment

ROOT = Path(__file__).parents[2]
SCORE_KEYS = {"requests", "goodput_ratio", "violation_ratio", "heavy_ratio", "p50_ms", "p98_ms", "p99_ms"}
TWO_SIZES = """
name = "two-sizes"
[services.imagenet]
variants = ["pnasnet5large_t4", "efficientnet_b0_t4"]
requirement_ms = 2000
[[workers]]
name = "a"
instances = [{ variant = "pnasnet5large_t4" }]
[[workers]]
name = "b"
instances = [{ variant = "efficientnet_b0_t4" }]
"""


def tidegate(*arguments: str, timeout_s: float = 100.0) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tidegate.main", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def results(ended: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one JSON object on stdout."""
    assert ended.returncode == 0, ended.stderr[-2000:]
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    file = deployment(tmp_path_factory.mktemp("commands") / "two.toml", TWO_SIZES)
    with RunningSystem(file) as running:
        yield running


def test_the_demo_compares_four_routers_on_one_trace_of_real_images(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    found = results(tidegate("demo", "--duration-s", "6", "--embedded", "--json", "--report", str(report)))
    assert list(found["results"]) == ["light-only", "heavy-only", "single-queue", "deadline"]
    sizes = set()
    for router, phases in found["results"].items():
        assert set(phases) == {"overall", "bursty", "normal"}
        for scores in phases.values():
            assert set(scores) == SCORE_KEYS
        assert phases["bursty"]["requests"] + phases["normal"]["requests"] == phases["overall"]["requests"]
        assert sum(found["details"][router]["outcomes"].values()) == phases["overall"]["requests"]
        sizes.add(phases["overall"]["requests"])
    assert len(sizes) == 1, "the same trace for all"
    assert found["results"]["light-only"]["overall"]["heavy_ratio"] == 0.0
    assert found["results"]["heavy-only"]["overall"]["heavy_ratio"] == 1.0
    service_s = found["service_s"]
    assert found["requirement_ms"] == pytest.approx(300 / 43 * service_s["digits_heavy"] * 1e3, abs=1)
    # Labels are true ones: a model that guesses would be right one time in ten.
    assert found["results"]["light-only"]["overall"]["goodput_ratio"] > 0.5
    page = report.read_text()
    assert "Plotly" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=.https?:", page), "nothing is fetched to read it"


def test_compare_restores_the_router_and_uses_the_same_requests(system: RunningSystem) -> None:
    arguments = ["--url", system.url, "--workload", "poisson:30", "--duration-s", "2", "--json"]
    found = results(tidegate("compare", "--routers", "uniform,heavy-only,threshold", *arguments))
    assert list(found["results"]) == ["uniform", "heavy-only", "threshold"]
    requests = {phases["overall"]["requests"] for phases in found["results"].values()}
    assert len(requests) == 1
    assert all(set(phases) == {"overall"} for phases in found["results"].values()), "no phases in a Poisson stream"
    assert found["results"]["heavy-only"]["overall"]["heavy_ratio"] == 1.0
    again = results(tidegate("replay", *arguments))
    assert list(again["results"]) == ["deadline"], "the router that it had before"


def test_compare_goes_on_without_a_router_that_cannot_be_used_there(system: RunningSystem) -> None:
    """The shipped learned policies were trained for four instances; here are two."""
    arguments = ["--url", system.url.removeprefix("http://"), "--workload", "poisson:30", "--duration-s", "2"]
    ended = tidegate("compare", "--routers", "learned-po,uniform", *arguments, "--json")
    assert ended.returncode == 1
    found = json.loads(ended.stdout)
    assert list(found["results"]) == ["uniform"]
    assert list(found["left_out"]) == ["learned-po"]
    assert "trained for" in found["left_out"]["learned-po"]
    assert f"learned-po was left out: {found['left_out']['learned-po']}" in ended.stderr
    again = results(tidegate("replay", *arguments, "--json"))
    assert list(again["results"]) == ["deadline"], "the router that it had before"
    assert again["comparable"] is (again["warning"] == "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "--routers", "deadlin"], ["deadlin", "choose from", "did you mean 'deadline'?"]),
        (["compare", "--workload", "monday.csv"], ["monday.csv: no such file", "poisson:RATE"]),
        (["replay", "--url", "edge:port"], ["'edge:port' is no address", "http://127.0.0.1:8700"]),
        (["replay", "--url", "http://127.0.0.1:9"], ["no gateway answers", "tidegate up"]),
        (["replay", "--workload", "paprika"], ["paprika"]),
        (["demo", "--duration-s", "1"], ["5 to 3600"]),
        (["demo", "--report", "/no/such/folder/r.html"], ["no folder /no/such/folder", "folder that exists"]),
        (["replay", "--report", "/tmp"], ["report = /tmp: is a folder"]),
    ],
)
def test_a_mistake_is_named_with_its_remedy(arguments: list[str], words: list[str]) -> None:
    ended = tidegate(*arguments)
    assert ended.returncode != 0
    said = " ".join(ended.stderr.replace("│", " ").split())
    for word in words:
        assert word in said


def test_an_unknown_service_is_named_beside_those_that_exist(system: RunningSystem) -> None:
    ended = tidegate("replay", "--url", system.url, "--service", "imagnet", "--duration-s", "1")
    assert ended.returncode == 1
    assert "imagnet" in ended.stderr
    assert "did you mean 'imagenet'?" in ended.stderr


def test_ctrl_c_ends_a_replay_and_still_reports(system: RunningSystem, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    command = [sys.executable, "-m", "tidegate.main", "replay", "--url", system.url, "--workload", "poisson:20"]
    process = subprocess.Popen(
        [*command, "--duration-s", "60", "--json", "--report", str(report)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        while "sent" not in process.stderr.readline():
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    found = json.loads(output)
    assert found["details"]["deadline"]["interrupted"] is True
    assert 0 < found["results"]["deadline"]["overall"]["requests"] < 60 * 20
    assert report.exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["bench", "overload"], "sent"), (["bench", "live"], "sent"), (["bench", "memory"], "sent")],
)
def test_ctrl_c_ends_a_bench_in_words(arguments: list[str], word: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tidegate.main", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        while word not in (line := process.stderr.readline()):
            assert line, "it ended by itself"
        os.kill(process.pid, signal.SIGINT)
        output, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    assert output == ""


def test_overload_gives_useful_answers_and_computes_for_nobody_else() -> None:
    found = results(tidegate("bench", "overload", "--seconds", "3", "--json"))
    assert found["offered"] == 180
    assert found["ok"] + found["refused"] + found["timeout"] == 180
    assert found["computed"] == found["ok"], "nothing is computed that nobody gets"
    assert found["computed_after_end"] == 0
    assert found["ok"] >= 55, "three seconds of 20 a second, and what was queued at their end"
