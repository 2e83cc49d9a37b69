"""The curl commands of README.md and the guide and the examples of docs/api.md, run as they stand on a real gateway.

Only the port is replaced. `digit.png` is a held-out digit, as README makes one.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadgen.payloads import digits
from protocol.deployment import read_deployment
from tests.fakes.running_system import RunningSystem, any_port
from tidegate.up_command import with_address

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(file: str, language: str) -> list[str]:
    """The code blocks of a page."""
    return [body for kind, body in BLOCK.findall((ROOT / file).read_text()) if kind == language]


def curls(file: str) -> list[str]:
    """Its curl commands, continued lines joined."""
    lines = [line for block in blocks(file, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("curl ")]


@pytest.fixture(scope="module")
def system() -> Iterator[RunningSystem]:
    file = with_address(read_deployment(ROOT / "deploy" / "digits.toml"), None, any_port())
    with RunningSystem(file) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the commands run: with the picture that they send."""
    picture = digits(ROOT / "models" / "pretrained" / "digits_split.json").payloads[0].body
    (tmp_path / "digit.png").write_bytes(picture)
    return tmp_path


@pytest.mark.parametrize("command", [*curls("README.md"), *curls("docs/api.md")])
def test_curl(system: RunningSystem, folder: Path, command: str) -> None:
    command = command.replace(":8700", f":{system.port}")
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, timeout=30, check=True)
    # Binary outputs follow the JSON where they were asked for.
    answer, _ = json.JSONDecoder().raw_decode(done.stdout.decode(errors="replace"))
    assert "error" not in answer, answer
    assert answer.get("predictions") or answer.get("outputs")


@pytest.mark.parametrize("number", range(2))
def test_python(system: RunningSystem, folder: Path, number: int) -> None:
    text = blocks("docs/api.md", "python")[number].replace(":8700", f":{system.port}")
    done = subprocess.run([sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.search(r"digits_(heavy|light)", done.stdout)


def test_the_guides_changes_of_a_running_system(system: RunningSystem, folder: Path) -> None:
    """The router alone, then the whole deployment: its blocks in order, as one script; all is as it was afterwards."""

    def state() -> tuple[str, float]:
        done = subprocess.run(["curl", "-sf", f"{system.url}/admin/deployment"], capture_output=True, check=True)
        spec = json.loads(done.stdout)["services"]["digits"]
        return spec["router"], spec["requirement_ms"]

    assert state() == ("deadline", 250.0)
    router, whole = [block for block in blocks("docs/guide.md", "sh") if "/admin/" in block]
    for block, expected in ((router, ("light-only", 250.0)), (whole, ("deadline", 400.0))):
        script = block.replace(":8700", f":{system.port}")
        done = subprocess.run(["bash", "-ec", script], cwd=folder, capture_output=True, timeout=30, check=True)
        assert "error" not in json.loads(done.stdout), done.stdout
        until_s = time.monotonic() + 10.0
        while state() != expected:
            assert time.monotonic() < until_s, state()
            time.sleep(0.1)


def test_curl_without_a_content_type_is_refused_as_the_pages_say(system: RunningSystem, folder: Path) -> None:
    command = ["curl", "-s", "--data-binary", "@digit.png", f"{system.url}/v1/digits"]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=30, check=True)
    assert "content type" in json.loads(done.stdout)["error"]


def test_both_pages_have_examples() -> None:
    assert curls("README.md")
    assert len(curls("docs/api.md")) >= 2
    assert len(blocks("docs/api.md", "python")) == 2
