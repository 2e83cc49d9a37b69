"""What an operator relies on: start, readiness, documents, metrics, memory, drain; over the real command."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import aiohttp
import pytest

from protocol.outcomes import HTTP_STATUS
from tests.fakes.running_system import (
    IMAGENET,
    LABEL,
    Load,
    RunningSystem,
    any_port,
    client,
    deployment,
    until,
)

ROOT = Path(__file__).parents[2]
TWO_GATEWAYS = """
name = "operations"
[services.imagenet]
variants = ["efficientnet_b0_t4"]
requirement_ms = 2000
[services.digits]
variants = ["digits_light"]
requirement_ms = 2000
[[workers]]
name = "a"
instances = [{ variant = "efficientnet_b0_t4" }]
[[workers]]
name = "b"
instances = [{ variant = "digits_light" }]
"""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSystem]:
    file = deployment(tmp_path_factory.mktemp("operations") / "operations.toml", TWO_GATEWAYS, processes=2)
    with RunningSystem(file) as running:
        yield running


def test_metrics_add_up_over_the_gateways_of_one_port(system: RunningSystem) -> None:
    async def scrape(session: aiohttp.ClientSession) -> Counter[str]:
        async with session.get(f"{system.url}/metrics") as response:
            text = await response.text()
        assert set(re.findall(r'tidegate_instance_ready\{instance="([^"]+)",service="\w+"\} 1.0', text)) == {
            "a/efficientnet_b0_t4",
            "b/digits_light",
        }
        attempts = re.findall(r'tidegate_attempts_total\{end="OK",instance="a/efficientnet_b0_t4"\} ([\d.]+)', text)
        found = re.findall(r'tidegate_requests_total\{outcome="(\w+)",service="imagenet"\} ([\d.]+)', text)
        found.append(("attempts", *(attempts or ["0"])))
        return Counter({outcome: int(float(number)) for outcome, number in found if float(number)})

    async def run() -> None:
        async with client() as session:
            before = await scrape(session)
        processes: Counter[str] = Counter()
        for _ in range(30):  # each on a connection of its own: the kernel spreads them over the processes
            async with (
                client() as session,
                session.post(f"{system.url}/v1/imagenet", data=LABEL, headers=IMAGENET) as response,
            ):
                assert response.status == 200
                processes[(await response.json())["id"].partition("-")[0]] += 1
        assert len(processes) == 2, "both processes took part"

        async def all_agree() -> bool:
            for _ in range(10):
                async with client() as session:
                    if await scrape(session) - before != {"OK": 30, "attempts": 30}:
                        return False  # what the other process counted is up to a second old
            return True

        await until(all_agree, 5.0, "a process does not hear of what the other counts")
        for _ in range(10):
            async with client() as session:
                assert (await system.state(session))["arrived"] in processes.values()

    asyncio.run(run())


def test_documents_need_nothing_from_outside(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            pages, seen = [f"{system.url}/docs"], set()
            while pages:
                page = pages.pop()
                if page in seen:
                    continue
                seen.add(page)
                async with session.get(page) as response:
                    assert response.status == 200, page
                    text = await response.text(errors="replace")
                for link in (
                    re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)["']""", text) if page[-4:] == "docs" else ()
                ):
                    target = urljoin(page, link)
                    assert urlsplit(target).netloc == f"127.0.0.1:{system.port}", f"{page} refers to {link}"
                    pages.append(target)
            assert len(seen) >= 3

    asyncio.run(run())


def test_every_status_of_the_handler_is_in_the_openapi_document(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session, session.get(f"{system.url}/openapi.json") as response:
            document = await response.json()
        operation = document["paths"]["/v1/{service}"]["post"]
        documented = {int(status) for status in operation["responses"]}
        sent = {status for status in HTTP_STATUS.values() if status != 499}
        source = (ROOT / "gateway" / "admission.py").read_text() + (ROOT / "gateway" / "handle.py").read_text()
        sent |= {int(status) for status in re.findall(r"\b(4\d\d|5\d\d)\)", source)}
        assert sent <= documented
        for status, headers in (("200", {"X-Request-Id", "X-Tidegate-Late"}), ("429", {"Retry-After"}),
                                ("503", {"Retry-After"}), ("405", {"Allow"})):  # fmt: skip
            assert headers <= operation["responses"][status]["headers"].keys()

    asyncio.run(run())


def test_memory_stays_within_the_promise(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session, Load(session, f"{system.url}/v1/imagenet", 40.0, bytes(40_000)) as load:
            await asyncio.sleep(1.5)
        assert load.statuses()[200] == len(load.sent)

    asyncio.run(run())
    gateway_mb = max(system.resident_mb(f"gateway-{number}") for number in (0, 1))
    worker_mb = system.resident_mb("worker-b")
    print(f"gateway {gateway_mb:.0f} MiB, digits worker {worker_mb:.0f} MiB")
    assert gateway_mb < 100.0
    assert worker_mb < 250.0


def test_readiness_means_it(system: RunningSystem) -> None:
    """Not ready while one service has nobody; ready again only when that service answers."""

    async def ready(session: aiohttp.ClientSession) -> tuple[bool, str]:
        async with session.get(f"{system.url}/readyz") as response:
            answer = await response.json()
            assert (response.status == 200) == answer["ready"]
            return answer["ready"], " ".join(answer["reasons"])

    async def run() -> None:
        async with client() as session:
            assert await ready(session) == (True, "")
            os.kill(system.pid("worker-a"), signal.SIGKILL)

            async def missed() -> bool:
                return (await ready(session))[0] is False

            await until(missed, 5.0, "the death went unnoticed")
            assert "imagenet" in (await ready(session))[1]
            async with session.post(f"{system.url}/v1/imagenet", data=LABEL, headers=IMAGENET) as response:
                assert response.status == 503
                assert int(response.headers["retry-after"]) >= 1
                assert (await response.json())["code"] == "UNAVAILABLE"
            async with session.post(f"{system.url}/v1/digits", data=b"x", headers=IMAGENET) as response:
                assert response.status == 400, "the other service is not disturbed"

            async def again() -> bool:
                return (await ready(session))[0]

            await until(again, 20.0, "the worker did not come back")
            async with session.post(f"{system.url}/v1/imagenet", data=LABEL, headers=IMAGENET) as response:
                assert response.status == 200, "the same process that says ready answers"

    asyncio.run(run())


def test_a_single_queue_is_refused_where_two_gateways_share_the_port(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            async with session.get(f"{system.url}/admin/deployment") as response:
                posted = await response.json()
            wanted = {**posted, "services": {**posted["services"]}}
            wanted["services"]["digits"] = {**posted["services"]["digits"], "router": "single-queue-random"}
            for path, body in (
                ("/admin/deployment", wanted),
                ("/admin/services/digits/router", {"router": "single-queue-random"}),
            ):
                async with session.put(f"{system.url}{path}", json=body) as response:
                    assert response.status == 409
                    error = (await response.json())["error"]
                assert "router = 'single-queue-random' needs one gateway, 2 are there" in error
            assert (await system.state(session))["services"]["digits"]["router"] == "deadline"

    asyncio.run(run())


def test_liveness_and_errors_of_other_paths_are_json(system: RunningSystem) -> None:
    async def run() -> None:
        async with client() as session:
            async with session.get(f"{system.url}/healthz") as response:
                assert response.status == 200
            for method, path, status in (("GET", "/nothing", 404), ("POST", "/healthz", 405), ("GET", "/v1", 404)):
                async with session.request(method, f"{system.url}{path}") as response:
                    assert response.status == status
                    answer = await response.json()
                    assert answer["code"] == "INVALID"
                    assert answer["error"]

    asyncio.run(run())


# the command itself


@pytest.fixture
def folder() -> Iterator[Path]:
    """For temporary files of a command: short, because paths of sockets are limited."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as name:
        yield Path(name)


def _up(file: Path, *options: str, folder: Path) -> subprocess.Popen[str]:
    """`tidegate up -f file`, its temporary folders below `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "tidegate.main", "up", "-f", str(file), *options],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder), "COLUMNS": "300"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.parametrize(
    ("line", "instead", "named"),
    [
        ("requirement_ms = 2000", "requirement_ms = 'soon'", ["services.imagenet.requirement_ms", "'soon'", "float"]),
        ("requirement_ms = 2000", "requirement_ms = 2000\nfrobs = 3", ["frobs = 3", "no such key", "percentile"]),
        ("requirement_ms = 2000", "requirement_ms = 2000\nrouter = 'best'", ["router = 'best'", "deadline"]),
        ('"efficientnet_b0_t4"', '"efficientnet_b9"', ["'efficientnet_b9'", "catalog", "efficientnet_b0_t4"]),
        ("", "", ["port", "in use", "--port"]),
    ],
    ids=["wrong type", "unknown key", "unknown router", "no such variant", "port in use"],
)
def test_a_bad_start_names_key_value_and_remedy_and_starts_nothing(
    tmp_path: Path, folder: Path, system: RunningSystem, line: str, instead: str, named: list[str]
) -> None:
    port = system.port if named[0] == "port" else any_port()
    text = TWO_GATEWAYS.replace(line, instead) if line else TWO_GATEWAYS
    (tmp_path / "x.toml").write_text(f"{text}\n[gateway]\nport = {port}\n")
    process = _up(tmp_path / "x.toml", "--embedded", folder=folder)
    _, said = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    for part in named:
        assert part in said, said
    assert "Traceback" not in said
    assert list(folder.iterdir()) == [], "no process has left a trace"


def test_a_folder_too_deep_for_sockets_is_refused_before_anything_starts(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "x.toml").write_text(f"{TWO_GATEWAYS}\n[gateway]\nport = {any_port()}\n")
    deep = folder / ("x" * 80)
    deep.mkdir()
    _, said = (process := _up(tmp_path / "x.toml", "--embedded", folder=deep)).communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "TMPDIR=/tmp" in said, said
    assert "Traceback" not in said
    assert list(deep.iterdir()) == []


def test_up_tells_what_is_not_ready_and_which_router_is_not_in_force(tmp_path: Path, folder: Path) -> None:
    """The heavy variant's file is no model; the learned router is for other instances; the port is a free one."""
    (tmp_path / "broken.toml").write_text(
        'name = "broken"\nservice = "digits"\nruntime = "onnxruntime"\nlabels = 10\npath = "broken.onnx"\n'
    )
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "x.toml").write_text(
        'name = "x"\ncatalog = [".."]\n[services.digits]\nvariants = ["broken", "digits_light"]\n'
        'requirement_ms = 250\nrouter = "learned-po"\n'
        '[[workers]]\nname = "a"\ninstances = [{ variant = "broken" }]\n'
        '[[workers]]\nname = "b"\ninstances = [{ variant = "digits_light" }]\n'
    )
    process = _up(tmp_path / "deploy" / "x.toml", "--embedded", "--port", "0", folder=folder)
    try:
        assert process.stderr is not None
        said: list[str] = []
        while not all(
            any(part in line for line in said)
            for part in (
                "ready after",
                "a/broken of digits is not ready: ",
                "digits is routed by deadline, not learned-po",
            )
        ):
            said.append(process.stderr.readline())
            assert said[-1], said
        assert not any("http://127.0.0.1:8700" in line for line in said)
        assert any("broken.onnx" in line for line in said), "the reason"
    finally:
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=30)[1]
    assert process.returncode == 0, rest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_everything(tmp_path: Path, folder: Path, number: signal.Signals) -> None:
    port = any_port()
    slow = TWO_GATEWAYS.replace("efficientnet_b0_t4", "pnasnet5large_t4").partition("[services.digits]")[0] + (
        '[[workers]]\nname = "a"\ninstances = [{ variant = "pnasnet5large_t4" }]\n'
    )
    (tmp_path / "x.toml").write_text(f"{slow}\n[gateway]\nport = {port}\n")
    process = _up(tmp_path / "x.toml", "--embedded", folder=folder)

    async def run() -> list[int]:
        async with client() as session:

            async def ready() -> bool:
                assert process.poll() is None, process.communicate()
                try:
                    async with session.get(f"http://127.0.0.1:{port}/readyz") as response:
                        return response.status == 200
                except aiohttp.ClientError:
                    return False

            await until(ready, 60.0, "not ready")

            async def one() -> int:
                async with session.post(f"http://127.0.0.1:{port}/v1/imagenet", data=LABEL, headers=IMAGENET) as got:
                    await got.read()
                    return got.status

            tasks = [asyncio.create_task(one()) for _ in range(12)]
            await asyncio.sleep(0.15)
            assert not all(task.done() for task in tasks), "some are under way"
            process.send_signal(number)
            return await asyncio.gather(*tasks)

    assert asyncio.run(run()) == [200] * 12
    started_s = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
    assert time.monotonic() - started_s < 12.0
    assert "killing" not in said
    assert "restarting" not in said
    assert list(folder.glob("tidegate-*")) == []


def test_children_end_when_the_supervisor_is_killed(tmp_path: Path, folder: Path) -> None:
    """kill -9 of `tidegate up` itself leaves nobody behind (Linux tells the children)."""
    port = any_port()
    (tmp_path / "x.toml").write_text(f"{TWO_GATEWAYS}\n[gateway]\nport = {port}\n")
    process = _up(tmp_path / "x.toml", "--embedded", folder=folder)
    assert process.stderr is not None
    for line in process.stderr:
        if "ready after" in line:
            break
    pids = _with_environment(f"TMPDIR={folder}")
    assert len(pids) == 6, "the command, board, scheduler, two workers, gateway"
    process.kill()
    process.communicate()
    ends_s = time.monotonic() + 20.0
    while _with_environment(f"TMPDIR={folder}"):
        assert time.monotonic() < ends_s, "some children live on"
        time.sleep(0.1)


def _with_environment(setting: str) -> list[int]:
    """Processes of this machine that were started with this in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            except OSError:
                continue
            if alive and setting.encode() in environment:
                found.append(int(entry.name))
    return found
