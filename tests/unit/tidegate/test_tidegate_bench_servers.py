"""What `tidegate bench servers` computes itself: scores by the client's clock, set-ups, and what processes cost."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loadgen.answers import Outcome
from loadgen.record import RunRecord
from loadgen.score import score
from models.catalog import load_catalog
from protocol.deployment import read_deployment
from tidegate.bench_servers_footprint import cpu_s, descendants, memory_mb
from tidegate.bench_servers_lineups import LINEUPS, ROOT, environment_python, read_triton, slowed, target_of
from tidegate.bench_servers_scores import server_score
from tidegate.up_command import StartFailed


def run_of(rows: list[tuple[Outcome, int, float, int]]) -> RunRecord:
    """A run of (outcome, rank, latency in seconds, phase), one request a second."""
    sent = np.arange(len(rows), dtype=np.float64)
    unknown = np.full(len(rows), -1, dtype=np.int16)
    return RunRecord(
        intended_s=sent,
        sent_s=sent,
        done_s=sent + np.array([row[2] for row in rows]),
        outcome=np.array([row[0] for row in rows], dtype=np.int8),
        correct=unknown.astype(np.int8),
        rank=np.array([row[1] for row in rows], dtype=np.int8),
        variant=unknown,
        instance=unknown,
        service_s=np.full(len(rows), np.nan),
        variants=(),
        instances=(),
        phase=np.array([row[3] for row in rows], dtype=np.int16),
        phase_names=("bursty", "normal"),
        end_s=float(len(rows)),
        planned=len(rows),
    )


def test_in_time_is_what_the_client_has_in_time_whatever_the_server_calls_it() -> None:
    rows = [
        (Outcome.OK, 0, 0.1, 0),
        (Outcome.OK, 1, 0.31, 0),  # the server does not know of a requirement
        (Outcome.LATE, 1, 0.29, 0),  # or counts otherwise
        (Outcome.UNAVAILABLE, -1, 0.01, 0),
        (Outcome.OK, 0, 0.05, 1),
        (Outcome.TIMEOUT, -1, 5.0, 1),
    ]
    found = server_score(run_of(rows), 0.3)
    assert found["bursty"]["goodput_ratio"] == pytest.approx((0.8278 + 0.7769) / 4)
    assert found["bursty"]["violation_ratio"] == pytest.approx(0.5)
    assert (found["bursty"]["late_ratio"], found["bursty"]["refused_ratio"]) == (0.25, 0.25)
    assert found["bursty"]["heavy_ratio"] == pytest.approx(1 / 3)
    assert (found["normal"]["other_ratio"], found["normal"]["violation_ratio"]) == (0.5, 0.5)
    assert found["50:50"]["goodput_ratio"] == pytest.approx(((0.8278 + 0.7769) / 4 + 0.8278 / 2) / 2)
    assert found["overall"]["requests"] == 6


def test_where_server_and_client_agree_violations_are_those_of_every_other_command() -> None:
    outcomes = [Outcome.OK, Outcome.QUEUE_FULL, Outcome.LATE, Outcome.EXPIRED, Outcome.CONNECTION, Outcome.FAILED]
    record = run_of([(one, 0, 0.4 if one == Outcome.LATE else 0.1, i % 2) for i, one in enumerate(outcomes * 3)])
    theirs = score(record)
    for phase, ours in server_score(record, 0.3).items():
        if phase != "50:50":
            assert ours["violation_ratio"] == pytest.approx(theirs[phase]["violation_ratio"])
            parts = ours["late_ratio"] + ours["refused_ratio"] + ours["other_ratio"]
            assert parts == pytest.approx(ours["violation_ratio"])


def test_a_phase_without_answers_has_no_heavy_share() -> None:
    found = server_score(run_of([(Outcome.UNAVAILABLE, -1, 0.0, 0), (Outcome.OK, 0, 0.1, 1)]), 0.3)
    assert found["bursty"]["heavy_ratio"] is None
    assert found["50:50"]["heavy_ratio"] is None
    assert found["50:50"]["goodput_ratio"] == pytest.approx(0.8278 / 2)


def test_the_rank_is_the_number_at_the_end_of_tritons_answer() -> None:
    head = b'{"model_name":"mixed","outputs":[{"name":"rank"}]}'
    assert read_triton(200, False, head + b"\x01\x00\x00\x00", None, None).rank == 1
    assert read_triton(200, False, head + b"\x00\x00\x00\x00", None, None).variant == "heavy"
    refused = read_triton(503, False, b'{"error":"Exceeds maximum queue size"}', None, None)
    assert (refused.outcome, refused.rank) == (Outcome.UNAVAILABLE, -1)


def test_a_client_chooses_by_lot_or_by_refusal() -> None:
    by_lot = target_of(LINEUPS["triton-half"], "http://x", 1, str).options.urls_of
    assert by_lot is not None
    models = [by_lot(i)[0].split("/")[-2] for i in range(2000)]
    assert all(len(by_lot(i)) == 1 for i in range(10))
    assert 900 < models.count("heavy") < 1100
    by_refusal = target_of(LINEUPS["triton-retry"], "http://x", 1, str).options.urls_of
    assert by_refusal is not None
    assert [url.split("/")[-2] for url in by_refusal(0)] == ["heavy", "light"]


def test_a_slower_deployment_is_the_same_over_slower_variants(tmp_path: Path) -> None:
    file = read_deployment(ROOT / "deploy" / "paper-t4.toml")
    slower = slowed(file, 1.5, tmp_path)
    known = load_catalog([Path(folder) for folder in slower.catalog])
    pairs = zip(file.workers, slower.workers, strict=True)
    for before, after in pairs:
        was, now = (known[one.instances[0].variant] for one in (before, after))
        assert was.emulated is not None
        assert now.emulated is not None
        assert now.emulated.service_ms == pytest.approx(1.5 * was.emulated.service_ms)
        assert now.accuracy == was.accuracy
        assert now.name in slower.services["imagenet"].variants
    assert slowed(file, 1.0, tmp_path) is file


def test_what_a_child_and_its_child_use_is_found() -> None:
    inner = "import sys; sys.stdin.read()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], stdin=subprocess.PIPE) as child:
        while len(found := descendants(child.pid)) < 1:
            assert child.poll() is None
        assert {child.pid, *found} <= set(descendants(os.getpid()))
        proportional_mb, resident_mb = memory_mb([child.pid, *found])
        assert 0.0 < proportional_mb <= resident_mb
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(30.0) == 0
    assert cpu_s([child.pid]) == 0.0  # it has ended
    assert cpu_s([os.getpid()]) == pytest.approx(sum(os.times()[:4]), abs=0.05)


def test_a_folder_without_the_servers_is_refused_with_the_commands_that_make_one(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match=r"-m venv .*pip install .*ray\[serve\].*nvidia-pytriton"):
        environment_python(tmp_path)
