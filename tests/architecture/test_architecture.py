"""The house's rules as tests: who may import whom, what a process loads, what an `__init__` is."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("protocol", "models", "policies", "workers", "scheduler", "gateway", "loadgen", "tidegate")
HEAVY = ("torch", "onnxruntime", "numba", "PIL", "simplejpeg", "torchvision")


def _sources(*packages: str) -> Iterator[Path]:
    for package in packages or PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def _imported(source: Path) -> set[str]:
    """Top-level names of everything that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_imports_point_down_only() -> None:
    """The contracts of pyproject.toml, by import-linter."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "KEPT" in done.stdout


def test_the_contracts_name_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(settings["tool"]["importlinter"]["root_packages"]) == set(PACKAGES)
    found = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in found} == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_resolves_inside_the_repository(package: str) -> None:
    """The owner's short names could collide with something installed."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).is_relative_to(ROOT)


@pytest.mark.parametrize("source", [path for path in _sources() if path.name == "__init__.py"], ids=str)
def test_an_init_is_one_docstring(source: Path) -> None:
    [only] = ast.parse(source.read_text()).body
    assert isinstance(only, ast.Expr)
    assert isinstance(only.value, ast.Constant)
    assert isinstance(only.value.value, str)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_with_code_is_a_package(package: str) -> None:
    for folder in {path.parent for path in _sources(package)}:
        assert (folder / "__init__.py").exists(), folder


@pytest.mark.parametrize(
    ("process", "forbidden"),
    [
        ("gateway.__main__", HEAVY),
        ("scheduler.__main__", HEAVY),
        ("workers.__main__", ("torch", "numba", "fastapi")),
        ("loadgen.__main__", ("torch", "numba", "fastapi", "onnxruntime")),
        ("tidegate.main", ("torch", "numba", "onnxruntime")),
    ],
)
def test_a_process_loads_nothing_heavy(process: str, forbidden: tuple[str, ...]) -> None:
    """A command that only starts must stay small and quick: what it does not need may not be imported by anybody."""
    code = f"import sys, {process}; print(' '.join(name for name in {forbidden!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_fastapi_is_imported_in_one_file() -> None:
    assert [str(path.relative_to(ROOT)) for path in _sources() if "fastapi" in _imported(path)] == ["gateway/app.py"]


def test_frames_and_records_know_nothing_of_ours() -> None:
    for source in _sources("protocol"):
        assert not _imported(source) & (set(PACKAGES) - {"protocol"}), source


def test_no_room_is_called_after_nothing() -> None:
    vague = re.compile(r"(^|_)(utils?|common|helpers?|misc|manager)(_|$)")
    for source in _sources():
        assert not vague.search(source.stem), source
        names = [node.name for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.ClassDef)]
        assert not [name for name in names if name.endswith(("Manager", "Helper", "Utils"))], source


@pytest.mark.parametrize("source", list(_sources()), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_opens_with_a_docstring(source: Path) -> None:
    assert ast.get_docstring(ast.parse(source.read_text()))
