"""The compose files without an engine: what docker-compose makes of them, and their services as local processes.

What Docker would do is replaced as little as possible: a service's name becomes 127.0.0.1, each of its ports a free
one, a volume a folder, `python` this interpreter. Commands, environments, health checks and stop signals are the
files' own, read from `docker-compose config`; Redis is a real redis-server, Prometheus a real Prometheus.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from tests.fakes.running_system import any_port

ROOT = Path(__file__).parents[2]
GPU, CPU = ("docker-compose.yml",), ("docker-compose.yml", "docker-compose.cpu.yml")
ONE_SHOT = {"export", "loadgen"}
POSTING = {"deployment", "edge"}
"""Services that have nothing to be asked: they post a deployment and stay."""
DEBIAN = {
    "docker-compose": "docker-compose",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "redis-server": "redis-server",
}


def need(binary: str) -> str:
    """The binary's path. Without it: skipped with the remedy, or failed where nothing may be skipped (CI=true)."""
    found = shutil.which(binary)
    if found is None:
        remedy = f"no {binary} on this machine: apt-get install {DEBIAN[binary]}"
        if os.environ.get("CI", "").lower() in ("", "0", "false"):
            pytest.skip(remedy)
        pytest.fail(remedy, pytrace=False)
    return found


def composed(files: tuple[str, ...], **settings: str) -> dict[str, Any]:
    """What docker-compose makes of the files, every profile included."""
    command = [need("docker-compose")]
    for file in files:
        command += ["-f", file]
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **settings}
    command += ["--profile", "load", "--profile", "gpu", "--profile", "edge", "config"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = yaml.safe_load(done.stdout.replace("$$", "$"))
    return found


def seconds(text: str) -> float:
    return float(re.fullmatch(r"(\d+)s", text).group(1))  # type: ignore[union-attr]


class Host:
    """The services of a composition as local processes."""

    def __init__(self, composition: dict[str, Any], folder: Path) -> None:
        self._services = composition["services"]
        self._folder = folder
        self._ports: dict[tuple[str, str], int] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def local_prometheus(self) -> str:
        """Starts Prometheus with the files' own configuration, names resolved as Docker's DNS would; its URL.

        A service that does not run has no address, and so no target: that is what `dns_sd_configs` does, too.
        """
        config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
        config["rule_files"] = [str(ROOT / "deploy" / file) for file in config["rule_files"]]
        own = any_port()
        for job in config["scrape_configs"]:
            for found in job.pop("dns_sd_configs", []):
                here = [name for name in found["names"] if name in self.processes]
                targets = [f"127.0.0.1:{self.port(name, str(found['port']))}" for name in here]
                job.setdefault("static_configs", []).append({"targets": targets})
            if job["job_name"] == "prometheus":
                job["static_configs"] = [{"targets": [f"127.0.0.1:{own}"]}]
        file = self._folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        command = [str(word) for word in self._services["prometheus"]["command"]]
        command = [word.replace("/etc/prometheus/prometheus.yml", str(file)) for word in command]
        command = [word.replace("=/prometheus", f"={self._folder / 'prometheus'}") for word in command]
        with (self._folder / "prometheus.log").open("wb") as log:
            command = [need("prometheus"), *command, f"--web.listen-address=127.0.0.1:{own}"]
            self.processes["prometheus"] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        return f"http://127.0.0.1:{own}"

    def port(self, service: str, port: str) -> int:
        """The free port that stands for a container's."""
        return self._ports.setdefault((service, port), any_port())

    def local(self, service: str, text: str) -> str:
        """A word of a command or environment, as it must read without Docker's names, ports and volumes."""
        names = "|".join(map(re.escape, self._services))
        text = re.sub(rf"\b({names}):(\d+)", lambda m: f"127.0.0.1:{self.port(m[1], m[2])}", text)
        mine = {str(port) for one, port in self._ports if one == service} | {"6379", "8700", "9200", "9101", "7001"}
        inside = rf"(0\.0\.0\.0|127\.0\.0\.1):({'|'.join(sorted(mine))})\b"
        text = re.sub(inside, lambda m: f"127.0.0.1:{self.port(service, m[2])}", text)
        if text in mine:
            text = str(self.port(service, text))
        text = re.sub(r"^/(models|engines)\b", lambda m: str(self._folder / m[1]), text)
        return sys.executable if text == "python" else text.replace("0.0.0.0", "127.0.0.1")

    def command(self, service: str, words: list[str]) -> list[str]:
        return [self.local(service, str(word)) for word in words]

    def environment(self, service: str) -> dict[str, str]:
        """The service's own, and nothing of this process but where programs lie."""
        own = self._services[service].get("environment", {})
        return {"PATH": os.environ["PATH"]} | {name: self.local(service, str(value)) for name, value in own.items()}

    def start(self, service: str) -> None:
        for volume in ("models", "engines"):
            (self._folder / volume).mkdir(exist_ok=True)
        with (self._folder / f"{service}.log").open("wb") as log:
            self.processes[service] = subprocess.Popen(
                self.command(service, self._services[service]["command"]),
                cwd=ROOT,
                env=self.environment(service),
                stdout=log,
                stderr=log,
            )

    def healthy(self, service: str) -> bool:
        """What the service's health check says now."""
        kind, *words = self._services[service]["healthcheck"]["test"]
        assert kind == "CMD"
        done = subprocess.run(
            self.command(service, words), cwd=ROOT, env=self.environment(service), capture_output=True, check=False
        )
        return done.returncode == 0

    def until_healthy(self, service: str, patience_s: float = 60.0) -> None:
        ends_s = time.monotonic() + patience_s
        while not self.healthy(service):
            assert self.processes[service].poll() is None, f"{service} ended: {self.log(service)}"
            assert time.monotonic() < ends_s, f"{service} is not healthy: {self.log(service)}"
            time.sleep(0.1)

    def log(self, service: str) -> str:
        return (self._folder / f"{service}.log").read_text()[-2000:]

    def stop(self, service: str) -> int:
        """SIGTERM, as `docker stop` does; the exit code. Killed (and failed) past the grace period."""
        process = self.processes.pop(service)
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(seconds(self._services[service].get("stop_grace_period", "10s")))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"{service} did not end within its grace period: {self.log(service)}")


def with_what_it_needs(composition: dict[str, Any], service: str) -> set[str]:
    """What `docker compose up SERVICE` starts: it, and whatever it depends on."""
    found = {service}
    for other in composition["services"][service].get("depends_on", {}):
        found |= with_what_it_needs(composition, other)
    return found


@contextlib.contextmanager
def running(files: tuple[str, ...], folder: Path, only: str = "", **settings: str) -> Iterator[Host]:
    """Everything without a profile, or what `only` needs: started in the order of `depends_on`, everything healthy."""
    composition = composed(files, **settings)
    host = Host(composition, folder)
    chosen = with_what_it_needs(composition, only) if only else None
    services = [
        name
        for name, service in composition["services"].items()
        if (name in chosen if chosen is not None else not service.get("profiles"))
        and name not in ONE_SHOT | {"prometheus"}
    ]
    try:
        host.start("redis")
        host.until_healthy("redis")
        for name in services:
            if name != "redis":
                host.start(name)
        for name in services:
            if name not in POSTING:
                host.until_healthy(name)
        yield host
        further = [name for name in host.processes if name not in services]
        for name in [*further, "gateway", *(name for name in services if name not in ("gateway", "redis")), "redis"]:
            # uvicorn drains, then ends by the very signal that it got.
            assert host.stop(name) == 0, f"{name}: {host.log(name)}"
    finally:
        for process in host.processes.values():
            process.kill()
            process.wait()


def fetch(url: str, body: bytes | None = None, content_type: str = "image/png") -> bytes:
    request = urllib.request.Request(url, body, {"content-type": content_type})
    with urllib.request.urlopen(request, timeout=10) as response:
        data: bytes = response.read()
        return data


def until_ready(url: str, patience_s: float = 40.0) -> None:
    ends_s = time.monotonic() + patience_s
    while True:
        with contextlib.suppress(OSError):
            fetch(f"{url}/readyz")
            return
        assert time.monotonic() < ends_s, f"{url} is not ready"
        time.sleep(0.1)
