"""Each check names what is wrong and the remedy; a sound machine gets no problem. Run on made-up machines."""

import asyncio
import json
import os
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from models.catalog import load_catalog
from models.compiled_resizing import passes
from protocol.deployment import read_deployment
from tidegate.doctor_checks import (
    OK,
    PROBLEM,
    WARNING,
    check_board,
    check_cpu,
    check_files,
    check_loading,
    check_models,
    check_packages,
    check_port,
    check_python,
    check_resizing,
    check_sockets,
    holder,
    judge_providers,
    usable_cpus,
)
from tidegate.doctor_command import doctor

DEPLOY = Path(__file__).parents[3] / "deploy"


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(doctor)
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.stdout


def test_python_and_packages() -> None:
    assert check_python((3, 10, 9)).state == PROBLEM
    assert check_python((3, 12, 0)).state == OK
    assert check_packages().state == OK
    missing = check_packages({"no_such_module": "no-such-package"})
    assert (missing.state, "no-such-package" in missing.what) == (PROBLEM, True)


def test_cpus_against_the_workers_threads() -> None:
    file = read_deployment(DEPLOY / "paper-t4.toml")
    assert check_cpu(2.0, file).state == WARNING
    assert check_cpu(4.0, file).state == OK
    assert check_cpu(1.0, None).state == OK
    assert usable_cpus() > 0.0


def test_limits() -> None:
    assert [check_files(limit).state for limit in (256, 65_536, -1)] == [WARNING, OK, OK]
    assert check_sockets("/tmp/" + "x" * 60).state == PROBLEM
    assert check_sockets("/tmp", longest_name=10).state == OK


@pytest.mark.parametrize(
    ("providers", "devices", "gpu", "state"),
    [
        (["CPUExecutionProvider"], ["cpu"], False, OK),
        (["CPUExecutionProvider"], [], True, WARNING),
        (["CPUExecutionProvider"], ["cuda"], True, PROBLEM),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], ["cuda", "cpu"], True, OK),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], ["tensorrt"], True, PROBLEM),
    ],
)
def test_providers_against_devices(providers: list[str], devices: list[str], gpu: bool, state: str) -> None:
    found = judge_providers("onnxruntime 1", providers, devices, gpu)
    assert found.state == state
    assert (found.remedy != "") == (state != OK)


def test_how_pictures_are_resized() -> None:
    assert check_resizing(compiled=True).state == OK
    slower = check_resizing(compiled=False)
    assert (slower.state, "C compiler" in slower.remedy) == (WARNING, True)
    assert check_resizing() == check_resizing(compiled=passes() is not None)


def test_a_taken_port(free_port: int) -> None:
    assert check_port("127.0.0.1", free_port).state == OK
    with socket.create_server(("127.0.0.1", free_port)):
        taken = check_port("127.0.0.1", free_port)
        if sys.platform == "linux":
            assert f"process {os.getpid()}" in taken.what, "it says who holds the port"
    assert (taken.state, "--port" in taken.remedy) == (PROBLEM, True)


def test_a_gateway_that_runs_is_named_and_not_called_free() -> None:
    class Gateway(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"name": "tidegate"}')

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        answering = threading.Thread(target=server.handle_request)
        answering.start()
        found = check_port("127.0.0.1", server.server_port)
        answering.join()
    assert found.state == WARNING
    assert "a Tidegate gateway that runs already" in found.what


def test_who_listens_is_found_in_proc(tmp_path: Path) -> None:
    """Port 8700 (0x21FC), inode 77, held by process 4321."""
    (tmp_path / "net").mkdir()
    row = "0: 0100007F:21FC 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 77 1 0 100 0 0 10 0"
    (tmp_path / "net" / "tcp").write_text(f"  sl  local_address rem_address   st tx rx tr tm re uid to inode\n{row}\n")
    (tmp_path / "net" / "tcp6").write_text("")
    (tmp_path / "4321" / "fd").mkdir(parents=True)
    (tmp_path / "4321" / "fd" / "3").symlink_to("socket:[77]")
    (tmp_path / "4321" / "cmdline").write_bytes(b"python\0-m\0gateway\0")
    assert holder(8700, tmp_path) == ": python -m gateway, process 4321"
    assert holder(8701, tmp_path) == ""
    assert holder(8700, tmp_path / "nowhere") == ""


def test_a_redis_that_is_not_there(free_port: int) -> None:
    found = asyncio.run(check_board(f"redis://127.0.0.1:{free_port}/0"))
    assert (found.state, "TIDEGATE_REDIS_URL" in found.remedy) == (PROBLEM, True)
    assert asyncio.run(check_board("nonsense")).state == PROBLEM


def test_models_of_a_deployment(tmp_path: Path) -> None:
    file = tmp_path / "zoo.toml"
    file.write_text(
        'name = "zoo"\n[services.zoo]\nvariants = ["lost", "unknown", "null"]\nrequirement_ms = 10\n'
        '[[workers]]\nname = "a"\ninstances = [{variant="lost"}, {variant="unknown"}, {variant="null"}]\n'
    )
    entries = tmp_path / "entries"
    entries.mkdir()
    (entries / "lost.toml").write_text(
        'name = "lost"\nservice = "zoo"\nruntime = "onnxruntime"\nlabels = 2\npath = "lost.onnx"\n'
    )
    findings, loadable = check_models(read_deployment(file), [entries])
    assert [(one.check, one.state) for one in findings] == [("model lost", PROBLEM), ("model unknown", PROBLEM)]
    assert "tidegate models export lost" in findings[0].remedy
    assert [variant.name for variant, _ in loadable] == ["null"]
    assert check_loading(loadable[0][0], "cpu").state == OK


def test_a_broken_entry_and_a_broken_model(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('name = "bad"\nservice = "zoo"\nruntime = "magic"\nlabels = 2\n')
    findings, _ = check_models(None, [tmp_path])
    assert (findings[0].state, "runtime" in findings[0].what) == (PROBLEM, True)
    (tmp_path / "bad.toml").write_text(
        'name = "bad"\nservice = "zoo"\nruntime = "onnxruntime"\nlabels = 2\npath = "bad.onnx"\n'
    )
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    assert check_loading(load_catalog([tmp_path])["bad"], "cpu").state == PROBLEM


def test_the_command_reports_and_fails_where_something_will_not_work(tmp_path: Path, free_port: int) -> None:
    code, text = run("-f", str(DEPLOY / "paper-t4.toml"), "--port", str(free_port), "--json")
    report = json.loads(text)
    assert (code, report["healthy"]) == (0, True)
    wanted = {"python", "cpu", "resizing", "port", "redis", "model pnasnet5large_t4"}
    assert {one["check"] for one in report["findings"]} >= wanted
    broken = tmp_path / "x.toml"
    broken.write_text("name = 3")
    code, text = run("-f", str(broken), "--port", str(free_port))
    assert code == 1
    assert "problem" in text
