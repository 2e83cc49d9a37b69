"""What `tidegate doctor` looks at. Each check gives `Finding`s: what was found and, if it is wrong, the remedy.

A check looks and reports; it changes nothing and raises nothing. Facts about the machine are read here and judged by
small pure functions, which the tests feed with other machines.
"""

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import os
import resource
import shutil
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from models.catalog import Variant, VariantError, kind_and_index, load_catalog
from protocol.board import BOARD_ERRORS, Board
from protocol.deployment import DeploymentFile
from protocol.link import LONGEST_SOCKET_PATH
from tidegate.supervisor import socket_path_length

OK, WARNING, PROBLEM = "ok", "warning", "problem"
NEEDED: Final = {
    "aiohttp": "aiohttp",
    "fastapi": "fastapi",
    "msgspec": "msgspec",
    "numpy": "numpy",
    "PIL": "pillow",
    "prometheus_client": "prometheus-client",
    "redis": "redis",
    "simplejpeg": "simplejpeg",
    "uvicorn": "uvicorn",
    "uvloop": "uvloop",
}
"""Modules that serving needs, and the packages that bring them."""
LOWEST_PYTHON: Final = (3, 11)
FEW_FILES: Final = 4096


class Finding(msgspec.Struct, frozen=True):
    """One thing looked at. `state` is ok, warning (works, but not as well as it could) or problem (will not work)."""

    check: str
    state: str
    what: str
    remedy: str = ""


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """The interpreter."""
    shown = ".".join(map(str, version))
    if version < LOWEST_PYTHON:
        return Finding("python", PROBLEM, f"Python {shown}", "use 3.11 or newer: make PYTHON=/path/to/python3.11")
    return Finding("python", OK, f"Python {shown} in {sys.prefix}")


def check_packages(needed: dict[str, str] = NEEDED) -> Finding:
    """Whether everything that serving imports is installed."""
    missing = sorted(package for module, package in needed.items() if importlib.util.find_spec(module) is None)
    if missing:
        return Finding("packages", PROBLEM, f"missing: {', '.join(missing)}", "pip install --editable '.[cpu]'")
    return Finding("packages", OK, f"{len(needed)} packages that serving needs are there")


def usable_cpus() -> float:
    """CPUs that this process may use: its affinity, or its container's quota if that is less."""
    cpus = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, int(quota) / int(period))
    return cpus


def check_cpu(cpus: float, file: DeploymentFile | None) -> Finding:
    """Cores against the threads that the deployment's CPU workers ask for."""
    shown = f"{cpus:g} usable CPU{'s' if cpus != 1 else ''}"
    threads = sum(worker.threads for worker in file.workers if worker.device == "cpu") if file else 0
    if threads > cpus:
        remedy = "workers will slow each other down: measure them together (tidegate models profile) or use fewer"
        return Finding("cpu", WARNING, f"{shown}, but the workers ask for {threads} threads", remedy)
    return Finding("cpu", OK, shown)


def check_files(limit: int | None = None) -> Finding:
    """The limit on open files: each connection takes one."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    if 0 <= soft < FEW_FILES:
        return Finding("open files", WARNING, f"at most {soft}", "raise it for many clients: ulimit -n 65536")
    return Finding("open files", OK, "no limit" if soft < 0 else f"at most {soft}")


def check_sockets(folder: str = tempfile.gettempdir(), longest_name: int = 64) -> Finding:
    """Whether unix sockets of workers fit below the folder for temporary files."""
    if socket_path_length(longest_name, folder) > LONGEST_SOCKET_PATH:
        return Finding("sockets", PROBLEM, f"paths below {folder} are too long", "set TMPDIR=/tmp or another short one")
    if not os.access(folder, os.W_OK):
        return Finding("sockets", PROBLEM, f"{folder} cannot be written", "set TMPDIR to a folder that can")
    return Finding("sockets", OK, f"in {folder}")


def check_runtime(devices: Iterable[str], gpu_present: bool | None = None) -> list[Finding]:
    """onnxruntime, its providers, and whether they cover the devices that workers ask for."""
    wheels = []
    for wheel in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            wheels.append(f"{wheel} {importlib.metadata.version(wheel)}")
    if not wheels:
        remedy = "pip install --editable '.[cpu]', or '.[gpu]' on a GPU host (emulated variants need neither)"
        return [Finding("onnxruntime", WARNING, "not installed", remedy)]
    if len(wheels) == 2:
        remedy = "they overwrite each other: uninstall both, then install one"
        return [Finding("onnxruntime", PROBLEM, " and ".join(wheels), remedy)]
    import onnxruntime

    present = shutil.which("nvidia-smi") is not None if gpu_present is None else gpu_present
    return [judge_providers(wheels[0], onnxruntime.get_available_providers(), sorted(set(devices)), present)]


def judge_providers(wheel: str, providers: Sequence[str], devices: Sequence[str], gpu_present: bool) -> Finding:
    """Whether `providers` cover `devices` (cpu, cuda, tensorrt). Pure."""
    short = [name.removesuffix("ExecutionProvider").lower() for name in providers]
    what = f"{wheel} with {', '.join(short)}"
    lacking = sorted({kind for kind, _ in map(kind_and_index, devices) if kind not in ("cpu", *short)})
    if lacking:
        remedy = "install the GPU wheel (pip install --editable '.[gpu]') and NVIDIA's driver, or set device = \"cpu\""
        return Finding("onnxruntime", PROBLEM, f"{what}: no {', '.join(lacking)}", remedy)
    if gpu_present and "cuda" not in short:
        remedy = "to use the GPU: pip uninstall onnxruntime, then pip install --editable '.[gpu]'"
        return Finding("onnxruntime", WARNING, f"{what}, though this host has an NVIDIA GPU", remedy)
    return Finding("onnxruntime", OK, what)


def check_resizing(compiled: bool | None = None) -> Finding:
    """Whether pictures are resized by the compiled part or, with the same pixels, by Pillow."""
    from models.compiled_resizing import passes

    if passes() is not None if compiled is None else compiled:
        return Finding("resizing", OK, "compiled: Pillow's pixels in vector instructions")
    remedy = "install a C compiler (apt-get install gcc libc6-dev) and reinstall: pip install --editable '.[cpu]'"
    return Finding("resizing", WARNING, "by Pillow: the same pixels, several times slower", remedy)


def check_port(host: str, port: int) -> Finding:
    """Whether a gateway could listen; if not, who holds the port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror
        else:
            return Finding("port", OK, f"{host}:{port} is free")
    remedy = "choose another: tidegate up --port N (0 takes a free one)"
    near = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
    with contextlib.suppress(urllib.error.URLError, OSError, ValueError):
        answer = urllib.request.urlopen(f"http://{near}:{port}/v2", timeout=1.0)
        with answer:
            if b'"tidegate"' in answer.read(4096):
                what = f"{host}:{port} is held by a Tidegate gateway that runs already{holder(port)}"
                return Finding("port", WARNING, what, f"to start a second one, {remedy}; to use that one, nothing")
    return Finding("port", PROBLEM, f"{host}:{port} cannot be used ({reason}){holder(port)}", remedy)


def holder(port: int, processes: Path = Path("/proc")) -> str:
    """Linux: `": NAME, process ID"` of who listens on this TCP port, as far as this user may see; else empty."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        rows = [
            line.split() for name in ("tcp", "tcp6") for line in (processes / "net" / name).read_text().splitlines()
        ]
        sockets = {
            f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port
        }
        for process in processes.iterdir():
            with contextlib.suppress(OSError):
                if process.name.isdigit() and any(os.readlink(one) in sockets for one in (process / "fd").iterdir()):
                    name = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    return f": {name[:80]}, process {process.name}"
    return ""


async def check_board(url: str) -> Finding:
    """The Redis at `url`, or what `tidegate up` would start without one."""
    if not url:
        found = shutil.which("redis-server")
        if found:
            return Finding("redis", OK, f"no address given; tidegate up starts a private {found}")
        remedy = "good enough on one machine; for more: apt-get install redis-server, or set TIDEGATE_REDIS_URL"
        return Finding("redis", WARNING, "no address given and no redis-server: an embedded board is used", remedy)
    try:
        async with asyncio.timeout(3.0), Board(url) as board:
            await board.ping()
            posted, instances = await board.deployment(), await board.instances()
    except (*BOARD_ERRORS, ValueError) as error:
        remedy = "start it, or correct TIDEGATE_REDIS_URL (redis://host:port/0)"
        return Finding("redis", PROBLEM, f"{url} does not answer ({error or type(error).__name__})", remedy)
    named = f"deployment {posted.name!r} version {posted.version}" if posted else "no deployment yet"
    return Finding("redis", OK, f"{url} answers: {named}, {len(instances)} instances")


def check_models(
    file: DeploymentFile | None, folders: Sequence[Path]
) -> tuple[list[Finding], list[tuple[Variant, str]]]:
    """The catalog, and every variant of the deployment: its entry and file. Also what could be loaded, and where."""
    try:
        catalog = load_catalog([*folders, *(Path(folder) for folder in (file.catalog if file else ()))])
    except VariantError as error:
        return [Finding("models", PROBLEM, f"{error.where}: {error.key} = {error.value!r}", error.remedy)], []
    if file is None:
        there = sum(1 for one in catalog.values() if one.runtime == "emulated" or Path(one.path).exists())
        return [Finding("models", OK, f"{len(catalog)} variants in the catalog, {there} of them can be loaded")], []
    findings: list[Finding] = []
    loadable: list[tuple[Variant, str]] = []
    wanted = {(instance.variant, worker.device) for worker in file.workers for instance in worker.instances}
    for name, device in sorted(wanted):
        variant = catalog.get(name)
        if variant is None:
            remedy = "add a folder with its TOML entry: catalog = [...] in the file, or --catalog"
            findings.append(Finding(f"model {name}", PROBLEM, "not in the catalog", remedy))
        elif variant.runtime != "emulated" and not Path(variant.path).exists():
            remedy = f"make it: tidegate models export {name}, or correct path in its entry"
            findings.append(Finding(f"model {name}", PROBLEM, f"no file {variant.path}", remedy))
        else:
            loadable.append((variant, device))
    return findings, loadable


def check_loading(variant: Variant, device: str) -> Finding:
    """Loads a variant and runs it once, as a worker would at its start."""
    from models.runtime import open_runtime

    try:
        runtime = open_runtime(variant, device=device)
        runtime.warm_up()
        runtime.close()
    except VariantError as error:
        return Finding(f"model {variant.name}", PROBLEM, f"{error.key} = {error.value!r}", error.remedy)
    except Exception as error:  # a model may raise anything
        return Finding(f"model {variant.name}", PROBLEM, f"raises {error!r}", "try another file, runtime or device")
    kind = "emulated" if variant.runtime == "emulated" else f"loads and runs on {device} ({variant.runtime})"
    return Finding(f"model {variant.name}", OK, kind)
