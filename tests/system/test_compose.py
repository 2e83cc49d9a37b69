"""The compose files without an engine: validated, and their own commands run as local processes.

How they run without Docker: tests/fakes/compose_host.py.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import tomllib
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from loadgen.payloads import digits
from models.clips import encode_jpeg
from models.edge_items import scene_clips
from protocol.deployment import read_deployment
from tests.fakes.compose_host import (
    CPU,
    GPU,
    ONE_SHOT,
    POSTING,
    ROOT,
    Host,
    composed,
    fetch,
    need,
    running,
    seconds,
    until_ready,
    with_what_it_needs,
)

TRIES = 4  # runs of the load generator until the machine keeps one up
OURS = ("tidegate:cpu", "tidegate:gpu", "tidegate:export", "tidegate:loadgen")


@pytest.mark.parametrize("files", [GPU, CPU], ids=["gpu", "cpu"])
def test_every_service_is_hardened_restarted_watched_and_given_time_to_drain(files: tuple[str, ...]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    services = composed(files)["services"]
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        if service["image"] in OURS:
            stage = dockerfile.split(f"AS {service['build']['target']}\n")[1].partition("\nFROM ")[0]
            assert "\nUSER 10001:10001\n" in stage, name
        else:
            assert service["user"].split(":")[0] not in ("0", "root"), name
            assert re.fullmatch(r".+:v?\d+\.\d+\.\d+.*", service["image"]), f"{name}: pin {service['image']}"
        assert service["restart"] == ("no" if name in ONE_SHOT else "unless-stopped"), name
        assert ("healthcheck" in service) == (name not in ONE_SHOT | POSTING), name
        command = service["command"]
        if "--drain-s" in command:
            drain_s = float(command[command.index("--drain-s") + 1])
            assert seconds(service["stop_grace_period"]) > drain_s + 5, name
    for base in re.findall(r"^FROM (\S+:\S+)", dockerfile, re.MULTILINE):
        assert re.search(r":\d+\.\d+\.\d+", base), f"pin {base}"


def test_the_gpu_file_has_what_a_host_with_four_gpus_needs() -> None:
    services = composed(GPU)["services"]
    workers = {name: service for name, service in services.items() if name.startswith("worker-")}
    assert len(workers) == 4
    reserved = [one["deploy"]["resources"]["reservations"]["devices"][0] for one in workers.values()]
    assert [device["device_ids"] for device in reserved] == [["0"], ["1"], ["2"], ["3"]]
    assert all(device["capabilities"] == ["gpu"] for device in reserved)
    assert {"redis", "gateway", "scheduler", "prometheus", "deployment", "export"} <= services.keys()
    assert services["loadgen"]["profiles"] == ["load"]
    assert {"engines:/engines:rw", "models:/models:ro"} <= set(services["worker-gpu0"]["volumes"])
    assert composed(GPU, TIDEGATE_GPU_3="0")["services"]["worker-gpu3"]["deploy"]["resources"]["reservations"][
        "devices"
    ][0]["device_ids"] == ["0"]


def test_the_cpu_override_starts_no_gpu_service() -> None:
    services = composed(CPU)["services"]
    started = {name for name, service in services.items() if not service.get("profiles")}
    assert started == {"redis", "deployment", "gateway", "scheduler", "prometheus", "worker-a", "worker-b"}


def test_the_edge_profile_starts_the_nodes_of_its_deployment_and_no_other_worker() -> None:
    composition = composed(GPU)
    posted = composition["services"]["edge"]["command"]
    deployment = read_deployment(ROOT / posted[posted.index("-f") + 1])
    assert deployment.edge is not None
    started = with_what_it_needs(composition, "edge")
    nodes = {name for name in started if name.startswith("node-")}
    assert started == nodes | {"redis", "gateway", "scheduler", "edge"}
    commands = [composition["services"][name]["command"] for name in nodes]
    assert {worker.name for worker in deployment.workers} == {line[line.index("--name") + 1] for line in commands}
    profiled = {name for name, service in composition["services"].items() if "edge" in service.get("profiles", ())}
    assert profiled == nodes | {"edge"}
    for files in (GPU, CPU):
        scheduler = composed(files)["services"]["scheduler"]["command"]
        assert scheduler[scheduler.index("--advertise") + 1] == "tcp:scheduler:7001"


def test_the_image_of_nodes_has_the_edge_packages_and_no_torch() -> None:
    stage = (ROOT / "Dockerfile").read_text().split("AS build-cpu\n")[1].partition("\nFROM ")[0]
    extras = re.findall(r'--editable "\.\[(.+?)\]"', stage)[0].split(",")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {re.split(r"[^\w-]", one)[0] for extra in extras for one in declared[extra]}
    assert {"onnxruntime", "av", "opencv-python-headless", "supervision"} <= packages
    assert not {one for one in packages if "torch" in one or one == "opencv-python"}
    makefile = (ROOT / "Makefile").read_text()
    pinned = re.search(r"trackers==[\d.]+", makefile)
    assert pinned is not None
    assert f"pip install --no-deps {pinned[0]}" in stage


@pytest.mark.parametrize("files", [GPU, CPU], ids=["gpu", "cpu"])
def test_the_default_deployment_exists_and_names_the_files_workers(files: tuple[str, ...]) -> None:
    services = composed(files)["services"]
    posted = services["deployment"]["command"]
    deployment = read_deployment(ROOT / posted[posted.index("-f") + 1])
    commands = [
        one["command"] for name, one in services.items() if name.startswith("worker-") and not one.get("profiles")
    ]
    assert {worker.name for worker in deployment.workers} == {line[line.index("--name") + 1] for line in commands}


def test_the_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    assert hadolint.is_file(), 'pip install -e ".[test]" brings hadolint'
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE):
        for one in source.split():
            assert (ROOT / one).exists(), one
            assert f"!{one}" in ignored, one


def test_the_images_bring_what_is_compiled_and_no_compiler() -> None:
    """Without setup.py or gcc the build would succeed, too: optional, and slower."""
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    with_gcc = [stage for stage in stages if " gcc " in stage]
    assert [stage.partition("\n")[0] for stage in with_gcc] == ["base AS build"]
    assert re.search(r"^COPY .*\bsetup\.py\b", with_gcc[0], re.MULTILINE)
    started = [stage.partition("\n")[0] for stage in stages if "\nUSER " in stage]
    assert started == ["base AS export", "base AS loadgen", "base AS gpu", "base AS cpu"]
    assert "**/*.so" in (ROOT / ".dockerignore").read_text().splitlines(), "one built here may not fit there"


def test_prometheus_scrapes_every_part() -> None:
    for what, file in (("config", "deploy/prometheus.yml"), ("rules", "deploy/alerts.yml")):
        done = subprocess.run([need("promtool"), "check", what, file], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    scraped = set()
    for job in yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())["scrape_configs"]:
        for found in job.get("dns_sd_configs", []):
            scraped |= {(name, found["port"]) for name in found["names"]}
    serving = set()
    for name, service in (composed(GPU)["services"] | composed(CPU)["services"]).items():
        command = service["command"]
        for option in ("--metrics-port",) if name != "gateway" else ("--port",):
            if option in command:
                serving.add((name, int(command[command.index(option) + 1])))
    assert scraped == serving


def test_the_export_service_does_nothing_twice(tmp_path: Path) -> None:
    for name in ("efficientnet_b0", "pnasnet5large"):
        (tmp_path / f"{name}.toml").touch()
    command = [part.replace("/models", str(tmp_path)) for part in composed(GPU)["services"]["export"]["command"]]
    subprocess.run(command, env={"PATH": "/usr/bin:/bin", "TIDEGATE_WEIGHTS": "none"}, check=True, timeout=10)


@pytest.mark.redis
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("files", "settings", "service"),
    [
        (CPU, {}, "digits"),
        (GPU, {"TIDEGATE_DEPLOYMENT": "deploy/paper-t4.toml", "TIDEGATE_PAYLOAD": "emulated:4000"}, "imagenet"),
    ],
    ids=["cpu", "gpu-file-emulated"],
)
def test_the_files_own_commands_serve_requests(
    files: tuple[str, ...], settings: dict[str, str], service: str, tmp_path: Path
) -> None:
    settings = {**settings, "TIDEGATE_DURATION_S": "3"}
    with running(files, tmp_path, **settings) as host:
        url = f"http://127.0.0.1:{host.port('gateway', '8700')}"
        until_ready(url)
        loadgen = composed(files, **settings)["services"]["loadgen"]["command"]
        for _ in range(TRIES):
            done = subprocess.run(
                host.command("loadgen", loadgen),
                cwd=ROOT,
                env=host.environment("loadgen"),
                capture_output=True,
                timeout=60,
                check=True,
            )
            told = json.loads(done.stdout)
            if told["comparable"]:
                break
        (results,) = told["results"].values()
        state = json.loads(fetch(f"{url}/state"))
        assert results["overall"]["requests"] > 20
        # Seven processes with 250 ms for an answer need some of a machine. Where other programs take it, even the load
        # generator cannot send in time, and says so: four runs seen to break the bound had 19 to 49% of the requests
        # sent late; eight under the same load that kept up had no violation at all.
        if told["comparable"]:
            assert results["overall"]["violation_ratio"] < 0.1, (results["overall"], state, os.getloadavg())
        assert state["outcomes"][service]["OK"] > 20
        assert state["arrived"] == sum(sum(ends.values()) for ends in state["outcomes"].values())
        assert b'"ready":true' in fetch(f"{url}/v2/models/{service}/ready")
        _alerts_speak_of_metrics_that_exist(host, url)
        if files == CPU:
            _prometheus_reads_every_part(host, service)


@pytest.mark.redis
@pytest.mark.timeout(300)
def test_the_edge_profile_answers_images_and_clips_on_its_nodes(tmp_path: Path) -> None:
    with running(GPU, tmp_path, only="edge") as host:
        url = f"http://127.0.0.1:{host.port('gateway', '8700')}"
        until_ready(url)
        ends_s = time.monotonic() + 40.0
        while notices := json.loads(fetch(f"{url}/readyz"))["notices"]:
            assert time.monotonic() < ends_s, notices
            time.sleep(0.1)
        clip = next(iter(scene_clips(1, 900_000))).media
        frames = [encode_jpeg(frame, 95) for frame in clip.frames]
        image = json.loads(fetch(f"{url}/v1/detection", frames[0], "image/jpeg"))
        assert image["decision"]["decided_by"] == "scheduler"
        assert image["detections"]
        tracked = json.loads(fetch(f"{url}/v1/tracking", b"".join(frames[:10]), "video/x-motion-jpeg; fps=15"))
        assert tracked["tracks"]
        digit = fetch(f"{url}/v1/digits", digits(ROOT / "models" / "pretrained" / "digits_split.json").payloads[0].body)
        assert json.loads(digit)["predictions"]
        state = json.loads(fetch(f"{url}/state"))
        assert state["outcomes"] == {name: {"OK": 1} for name in ("detection", "tracking", "digits")}
        _alerts_speak_of_metrics_that_exist(host, url, edge=True)
        _prometheus_reads_every_part(host, "digits", at_least=1)


def _prometheus_reads_every_part(host: Host, service: str, at_least: int = 21) -> None:
    url = host.local_prometheus()

    def asked(path: str) -> Any:
        return json.loads(fetch(f"{url}/api/v1/{path}"))["data"]

    query = urllib.parse.urlencode({"query": f'tidegate_requests_total{{service="{service}",outcome="OK"}}'})
    targets, states, counted, firing = set[tuple[str, str]](), set[str](), 0.0, set[str]()
    ends_s = time.monotonic() + 40.0
    while counted < at_least or states != {"ok"} or {health for _, health in targets} != {"up"}:
        assert time.monotonic() < ends_s, (targets, states, counted, host.log("prometheus"))
        time.sleep(0.2)
        with contextlib.suppress(OSError):
            targets = {(one["labels"]["job"], one["health"]) for one in asked("targets")["activeTargets"]}
            states = {rule["health"] for group in asked("rules")["groups"] for rule in group["rules"]}
            counted = sum(float(one["value"][1]) for one in asked(f"query?{query}")["result"])
            firing = {one["labels"]["alertname"] for one in asked("alerts")["alerts"] if one["state"] == "firing"}
    assert {job for job, _ in targets} == {"gateway", "scheduler", "workers", "prometheus"}
    assert not firing


def _alerts_speak_of_metrics_that_exist(host: Host, url: str, *, edge: bool = False) -> None:
    text = fetch(f"{url}/metrics") + fetch(f"http://127.0.0.1:{host.port('scheduler', '9200')}/metrics")
    named = set(re.findall(r"\btidegate_\w+", (ROOT / "deploy/alerts.yml").read_text()))
    if not edge:  # told of where there is an edge network
        named = {name for name in named if not name.startswith("tidegate_edge_")}
    assert {name for name in named if f"# TYPE {name} " not in text.decode()} == set()


@pytest.mark.redis
@pytest.mark.timeout(300)
def test_a_redis_that_loses_its_memory_is_filled_again(tmp_path: Path) -> None:
    with running(CPU, tmp_path) as host:
        url = f"http://127.0.0.1:{host.port('gateway', '8700')}"
        until_ready(url)
        redis = host.processes.pop("redis")
        redis.kill()
        redis.wait()
        host.start("redis")
        host.until_healthy("redis")
        ask = ["redis-cli", "-p", str(host.port("redis", "6379")), "get", "deployment"]
        ends_s = time.monotonic() + 15.0
        while b"digits" not in subprocess.run(ask, capture_output=True, check=True).stdout:
            assert time.monotonic() < ends_s, host.log("deployment")
            time.sleep(0.1)
        until_ready(url)
