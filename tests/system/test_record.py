"""`tidegate record` beside a load: every request is in the trace, at the time when it was sent; loadgen reads it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from loadgen.traces import parse_workload
from tests.fakes.running_system import RunningSystem, any_port, deployment
from tidegate.client import Client

NULL = """
name = "record"
[services.null]
variants = ["null"]
requirement_ms = 5000
[[workers]]
name = "a"
instances = [{ variant = "null" }]
"""


def test_a_recording_is_what_was_sent(tmp_path: Path) -> None:
    """Two gateway processes share the port; 40 requests in two bursts, the second half a second after the first."""
    out = tmp_path / "trace.csv"
    with RunningSystem(deployment(tmp_path / "record.toml", NULL, processes=2)) as system:
        command = [sys.executable, "-m", "tidegate.record_command", "--url", system.url, "--service", "null"]
        recording = subprocess.Popen(
            [*command, "-o", str(out), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert recording.stderr is not None
        assert "2 gateway processes" in recording.stderr.readline()
        unknown = [*command[:-1], "nul", "-o", str(tmp_path / "none.csv")]
        refused = subprocess.run(unknown, capture_output=True, text=True, check=False, timeout=20)
        assert refused.returncode == 1
        assert "unknown model 'nul': there are null" in refused.stderr
        assert not (tmp_path / "none.csv").exists()
        sent_s = []
        for _ in range(2):
            for _ in range(4):
                with Client(system.url) as client:  # a new connection: perhaps the other process
                    for _ in range(5):
                        sent_s.append(time.monotonic())
                        client.infer("null", b"tidegate-label:1\n")
            time.sleep(0.5)
        recording.send_signal(signal.SIGINT)
        summary, complaints = recording.communicate(timeout=20)
    assert recording.returncode == 0, complaints
    report = json.loads(summary)
    assert (report["requests"], report["lost"], report["gateways"]) == (40, 0, 2)
    found = parse_workload(str(out)).arrivals
    assert len(found) == 40
    sent = np.diff(np.asarray(sent_s))
    assert np.abs(np.diff(found.time_s) - sent).max() < 0.2
    assert found.end_s >= found.time_s[-1]


def test_no_gateway_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tidegate.record_command", "--url", f"http://127.0.0.1:{any_port()}"]
    done = subprocess.run([*command, "-o", str(tmp_path / "x.csv")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "tidegate up" in done.stderr
    assert not (tmp_path / "x.csv").exists()
