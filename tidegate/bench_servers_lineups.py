"""The servers of `tidegate bench servers` as an able user would set each of them up, and how each is started and asked.

All have four emulated devices: heavy ones of 43 ms and 82.78%, light ones of 11.5 ms and 77.69%. What differs is who
chooses between them: nobody, the client, an ingress of the user's own, or Tidegate.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from loadgen.answers import Answer, outcome_of
from loadgen.sender import SendOptions
from protocol.deployment import DeploymentFile, read_deployment
from tidegate.bench_servers_footprint import descendants
from tidegate.running import RunningGateway
from tidegate.supervisor import Supervisor, free_port
from tidegate.up_command import StartFailed, until_ready, with_address

ROOT: Final = Path(__file__).parent.parent
APPS: Final = ROOT / "bench" / "servers"
REQUIREMENTS: Final = ("ray[serve]==2.60.0", "nvidia-pytriton==0.7.0")
TIMEOUT_S: Final = 5.0
"""When the client gives up: far later than any request can still be in time."""
STOP_PATIENCE_S: Final = 10.0


class Lineup(msgspec.Struct, frozen=True, kw_only=True):
    """One server in one set-up. `models`: the models that it offers, each with its instances by variant.

    `asks`: models that a request is sent to: the first, and after a refusal the next ("?": one of them at random).
    expire: the service's setting (deploy/paper-t4.toml has it off, as the paper; by default it is on).
    """

    name: str
    server: str
    chooses: str
    router: str = ""
    expire: bool = False
    models: Mapping[str, Mapping[str, int]] = {}
    asks: str = ""


def _tidegate(name: str, chooses: str, router: str, expire: bool) -> Lineup:
    return Lineup(name=f"tidegate-{name}", server="tidegate", chooses=chooses, router=router, expire=expire)


def _triton(name: str, chooses: str, asks: str, **models: dict[str, int]) -> Lineup:
    return Lineup(name=f"triton-{name}", server="triton", chooses=chooses, models=models, asks=asks)


def _ray(name: str, chooses: str, **instances: int) -> Lineup:
    return Lineup(name=f"ray-{name}", server="ray", chooses=chooses, models={"": instances})


_HEAVY, _LIGHT = {"heavy": 2}, {"light": 2}
LINEUPS: Final = {
    one.name: one
    for one in (
        _tidegate("deadline", "gateway, by request", "deadline", expire=False),
        _tidegate("deadline-expire", "the same, hopeless ones dropped", "deadline", expire=True),
        _tidegate("learned-po", "learned, every second", "learned-po", expire=False),
        _triton("heavy-2", "nobody: 2 heavy", "heavy", heavy=_HEAVY),
        _triton("heavy-4", "nobody: 4 heavy", "heavy", heavy={"heavy": 4}),
        _triton("light-4", "nobody: 4 light", "light", light={"light": 4}),
        _triton("half", "client, by lot", "?heavy,light", heavy=_HEAVY, light=_LIGHT),
        _triton("retry", "client: light if heavy refuses", "heavy,light", heavy=_HEAVY, light=_LIGHT),
        _triton("first-idle", "one model: the first idle instance", "mixed", mixed={**_HEAVY, **_LIGHT}),
        _ray("heavy-4", "nobody: 4 heavy", heavy=4),
        _ray("light-4", "nobody: 4 light", light=4),
        _ray("ingress", "ingress: light if heavy is full", heavy=2, light=2),
    )
}


class Target(msgspec.Struct, frozen=True):
    """A server: where requests go, how they are sent and read, and its last words if it has ended by itself."""

    url: str
    options: SendOptions
    last_words: Callable[[], str] = str


@contextlib.asynccontextmanager
async def started(lineup: Lineup, python: Path, slower: float, seed: int) -> AsyncIterator[Target]:
    """The server from its start until its end; it need not answer yet. Raises `StartFailed`, `GatewayError`.

    slower: services take so many times longer than the queues of Triton and Ray Serve are set up for.
    """
    folder = Path(tempfile.mkdtemp(prefix="tidegate-"))
    port = free_port()
    try:
        if lineup.server == "tidegate":
            file = with_address(read_deployment(ROOT / "deploy" / "paper-t4.toml"), None, port)
            supervisor = Supervisor(slowed(_expiring(file, lineup.expire), slower, folder))
            async with supervisor:
                await until_ready(supervisor)
                async with RunningGateway(supervisor.url) as gateway:
                    await gateway.set_router("imagenet", lineup.router)
                yield Target(f"{supervisor.url}/v1/imagenet", SendOptions(timeout_s=TIMEOUT_S))
            return
        command = [str(python), *_arguments(lineup, port, folder), "--slower", str(slower)]
        async with _process(command, folder / "log") as last_words:
            yield target_of(lineup, f"http://127.0.0.1:{port}", seed, last_words)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _expiring(file: DeploymentFile, expire: bool) -> DeploymentFile:
    services = {name: msgspec.structs.replace(one, expire=expire) for name, one in file.services.items()}
    return msgspec.structs.replace(file, services=services)


def slowed(file: DeploymentFile, slower: float, folder: Path) -> DeploymentFile:
    """The deployment over variants like its own, under other names, whose services take longer."""
    if slower == 1.0:
        return file
    names = {name: f"{name}_slower" for service in file.services.values() for name in service.variants}
    for name, other in names.items():
        text = (ROOT / "models" / "catalog" / f"{name}.toml").read_text().replace(f'"{name}"', f'"{other}"')
        text = re.sub(r"(?<=^service_ms = )[\d.]+", lambda found: str(float(found[0]) * slower), text, flags=re.M)
        (folder / f"{other}.toml").write_text(text)
    replace = msgspec.structs.replace
    services = {
        key: replace(one, variants=tuple(names[name] for name in one.variants)) for key, one in file.services.items()
    }
    workers = tuple(
        replace(worker, instances=tuple(replace(one, variant=names[one.variant]) for one in worker.instances))
        for worker in file.workers
    )
    return replace(file, services=services, workers=workers, catalog=(str(folder),))


def _arguments(lineup: Lineup, port: int, folder: Path) -> list[str]:
    told = ["--port", str(port), "--folder", str(folder)]
    if lineup.server == "ray":
        (instances,) = lineup.models.values()
        return [str(APPS / "ray_app.py"), *told, *(f"--{name}={count}" for name, count in instances.items())]
    for name, instances in lineup.models.items():
        told += ["--model", f"{name}={','.join(f'{variant}:{count}' for variant, count in instances.items())}"]
    first, _, further = lineup.asks.partition(",")
    if further and not first.startswith("?"):
        told += ["--retried", first]
    return [str(APPS / "triton_start.py"), *told]


def target_of(lineup: Lineup, url: str, seed: int, last_words: Callable[[], str]) -> Target:
    if lineup.server == "ray":
        return Target(f"{url}/", SendOptions(timeout_s=TIMEOUT_S), last_words)
    urls = tuple(f"{url}/v2/models/{model}/infer" for model in lineup.asks.removeprefix("?").split(","))
    lots = np.random.default_rng(seed).permutation(1 << 16) if lineup.asks.startswith("?") else None

    def urls_of(request: int) -> tuple[str, ...]:
        return urls if lots is None else (urls[lots[request % len(lots)] % len(urls)],)

    options = SendOptions(
        timeout_s=TIMEOUT_S,
        headers={"Inference-Header-Content-Length": "0"},  # the whole body is the one input tensor
        urls_of=urls_of,
        reader=read_triton,
    )
    return Target(urls[0], options, last_words)


def read_triton(status: int, late: bool, body: bytes, label: int | None, label_name: str | None) -> Answer:
    """What Triton's answer means: the rank of the model is the one output tensor, an INT32 at the body's end."""
    if status != 200:
        return Answer(outcome_of(status, late))
    rank = int.from_bytes(body[-4:], "little")
    return Answer(outcome_of(status, late), rank=rank, variant=("heavy", "light")[rank])


def environment_python(folder: Path) -> Path:
    """The Python of an environment that has the other servers. Raises `StartFailed` with what makes it one."""
    python = folder / "bin" / "python"
    found = (
        python.exists()
        and not subprocess.run(
            [str(python), "-c", "import ray.serve, pytriton"], check=False, capture_output=True
        ).returncode
    )
    if not found:
        wanted = " ".join(f"'{one}'" for one in REQUIREMENTS)
        raise StartFailed(
            f"{folder} has not both Ray Serve and Triton: python3.11 -m venv {folder} &&"
            f" {folder}/bin/pip install {wanted}, or name another with --environment"
        )
    return python


@contextlib.asynccontextmanager
async def _process(command: list[str], log: Path) -> AsyncIterator[Callable[[], str]]:
    """A server's process with all that it starts, none of which outlives this; tells its last words once it ended."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, start_new_session=True, stdout=output, stderr=output
        )
    try:
        yield lambda: "" if process.returncode is None else log.read_text(errors="replace")[-800:] or "nothing"
    finally:
        family = [process.pid, *descendants(process.pid)]
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_PATIENCE_S):
                await process.wait()
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await process.wait()
