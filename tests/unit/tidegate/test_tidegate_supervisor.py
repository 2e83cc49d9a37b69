"""The supervisor over tiny children: restarted with growing pauses, ended in order, never left behind."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import ClassVar, Self

import msgspec
import pytest

from protocol.deployment import DeploymentError, DeploymentFile, GatewaySettings
from protocol.records import Deployment, InstanceSpec, ServiceSpec, WorkerSpec
from tidegate import supervisor
from tidegate.check import refuse_unknown
from tidegate.supervisor import Child, Supervisor

SCRIPT = Path(__file__).parents[2] / "fakes" / "tiny_child.py"


class Watched:
    """A child and everything that was said of it."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.starts = folder / "starts"
        self.said: list[str] = []
        self._news = asyncio.Event()
        self.child = Child(
            "child", [sys.executable, str(SCRIPT), str(self.starts), mode], folder / "log", dict(os.environ), self._note
        )

    def _note(self, text: str) -> None:
        self.said.append(text)
        self._news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something that is said, or that a child writes."""
        while not condition():
            self._news.clear()
            try:
                async with asyncio.timeout(0.02):
                    await self._news.wait()
            except TimeoutError:
                continue

    @property
    def pids(self) -> list[int]:
        """Of all lives so far."""
        return [int(line) for line in self.starts.read_text().split()] if self.starts.exists() else []


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of milliseconds."""
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE_S", 0.04)
    monkeypatch.setattr(supervisor, "STOP_PATIENCE_S", 10.0)


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60.0):
            await body()

    asyncio.run(bounded())


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_child_that_keeps_dying_is_restarted_after_doubling_pauses(tmp_path: Path) -> None:
    async def body() -> None:
        watched = Watched(tmp_path, "die")
        await watched.child.start()
        await watched.until(lambda: len(watched.said) >= 5)
        await watched.child.stop()
        pauses = [text.split("restarting in ")[1].split(" s")[0] for text in watched.said[:5]]
        assert pauses == ["0.01", "0.02", "0.04", "0.04", "0.04"]
        assert all("exit code 3" in text and str(tmp_path / "log") in text for text in watched.said)
        assert watched.child.statistics().restarts >= 5
        assert "child in mode die" in watched.child.last_words()
        assert not any(alive(pid) for pid in watched.pids), "stopped is stopped"

    run(body)


def test_health_forgives_earlier_deaths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "HEALTHY_AFTER_S", 0.0)

    async def body() -> None:
        watched = Watched(tmp_path, "die")
        await watched.child.start()
        await watched.until(lambda: len(watched.said) >= 3)
        await watched.child.stop()
        assert all("restarting in 0.01 s" in text for text in watched.said)

    run(body)


def test_a_killed_child_comes_back_and_a_stopped_one_does_not(tmp_path: Path) -> None:
    async def body() -> None:
        watched = Watched(tmp_path, "serve")
        await watched.child.start()
        await watched.until(lambda: len(watched.pids) == 1)
        os.kill(watched.pids[0], signal.SIGKILL)
        await watched.until(lambda: len(watched.pids) == 2)
        assert "SIGKILL" in watched.said[0]
        await watched.child.stop()
        assert [alive(pid) for pid in watched.pids] == [False, False]
        assert watched.child.statistics().pid is None
        assert len(watched.said) == 1, "an orderly end is no news"

    run(body)


def test_a_child_that_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STOP_PATIENCE_S", 0.1)

    async def body() -> None:
        watched = Watched(tmp_path, "deaf")
        await watched.child.start()
        await watched.until(lambda: len(watched.pids) == 1)
        await watched.child.stop()
        assert not alive(watched.pids[0])
        assert "killing it" in watched.said[0]

    run(body)


def test_a_child_is_out_of_reach_of_ctrl_c(tmp_path: Path) -> None:
    """It has a session of its own: the terminal's SIGINT goes to the supervisor only, which ends it in order."""

    async def body() -> None:
        watched = Watched(tmp_path, "serve")
        await watched.child.start()
        await watched.until(lambda: len(watched.pids) == 1)
        assert os.getsid(watched.pids[0]) != os.getsid(0)
        await watched.child.stop()

    run(body)


def test_a_start_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        watched = Watched(tmp_path, "serve")
        await watched.child.start()
        await watched.until(lambda: len(watched.pids) == 1)
        spawn, failures = asyncio.create_subprocess_exec, 2

        async def scarce(*command: str, **settings: object) -> asyncio.subprocess.Process:
            nonlocal failures
            if failures:
                failures -= 1
                raise OSError(11, "Resource temporarily unavailable")
            return await spawn(*command, **settings)  # type: ignore[arg-type]

        monkeypatch.setattr(asyncio, "create_subprocess_exec", scarce)
        os.kill(watched.pids[0], signal.SIGKILL)
        await watched.until(lambda: len(watched.pids) == 2)
        assert sum("cannot be started" in text for text in watched.said) == 2
        await watched.child.stop()
        assert not alive(watched.pids[1])

    run(body)


# what is refused before any start


def deployment(router: str = "deadline", variant: str = "efficientnet_b0_t4", port: int = 8700) -> DeploymentFile:
    return DeploymentFile(
        name="x",
        services={"imagenet": ServiceSpec(variants=(variant,), requirement_ms=300.0, router=router)},
        workers=(WorkerSpec(name="a", instances=(InstanceSpec(variant=variant),)),),
        gateway=GatewaySettings(port=port),
    )


def test_what_exists_is_accepted() -> None:
    refuse_unknown(deployment())


@pytest.mark.parametrize(
    ("file", "named"),
    [
        (deployment(router="best"), ("services.imagenet.router", "'best'", "deadline")),
        (deployment(router="deadlin"), ("'deadlin'", "did you mean 'deadline'?")),
        (deployment(variant="nothing"), ("services.imagenet", "'nothing'", "efficientnet_b0_t4", "catalog = [...]")),
        (deployment(variant="digits_hevy"), ("'digits_hevy'", "did you mean 'digits_heavy'?")),
    ],
)
def test_what_does_not_exist_is_named_with_what_does(file: DeploymentFile, named: tuple[str, ...]) -> None:
    with pytest.raises(DeploymentError) as caught:
        refuse_unknown(file)
    assert all(part in str(caught.value) for part in named)


@pytest.mark.parametrize("case", ["router", "port taken", "port impossible"])
def test_a_refused_system_starts_nothing(case: str, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*command: str, **settings: object) -> None:
        raise AssertionError(f"started {command}")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", never)

    async def body() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", free_port))
            taken.listen()
            file = {
                "router": deployment(router="best"),
                "port taken": deployment(port=free_port),
                "port impossible": deployment(port=99_999),
            }[case]
            with pytest.raises((DeploymentError, OSError)) as caught:
                async with Supervisor(file):
                    pass
        assert str({"router": "best", "port taken": free_port}.get(case, 99_999)) in str(caught.value)

    run(body)


# the order of things


class Played:
    """Stands in for `Child`: notes what is asked of it; `broken` ones cannot be started. Ending takes a moment."""

    told: ClassVar[list[str]] = []
    broken: ClassVar[set[str]] = set()

    def __init__(self, name: str, *_: object) -> None:
        self.name = name

    async def start(self) -> None:
        """Noted."""
        if self.name in self.broken:
            raise OSError("no memory")
        self.told.append(f"start {self.name}")

    async def stop(self) -> None:
        """Noted when it is over."""
        await asyncio.sleep(0.005 if self.name.startswith("gateway") else 0)
        self.told.append(f"stop {self.name}")


class PlayedBoard:
    """Stands in for `Board`: takes everything."""

    def __init__(self, url: str) -> None:
        pass

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def ping(self) -> None:
        """There."""

    async def put_deployment(self, deployment: Deployment) -> Deployment:
        """Taken."""
        return deployment

    async def deployment(self) -> Deployment | None:
        """It has forgotten."""
        return None


@pytest.mark.parametrize("broken", ["", "gateway-1", "worker-a"])
def test_gateways_end_before_those_that_they_ask(broken: str, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They start last and drain first; so it is, too, when one of them cannot be started."""
    monkeypatch.setattr(supervisor, "Child", Played)
    monkeypatch.setattr(supervisor, "Board", PlayedBoard)
    Played.told.clear()
    monkeypatch.setattr(Played, "broken", {broken})
    gateways = GatewaySettings(port=free_port, processes=2)
    system = Supervisor(msgspec.structs.replace(deployment(), gateway=gateways), redis_url="redis://x")

    async def body() -> None:
        if not broken:
            async with system:
                assert system.folder.is_dir()
            return
        with pytest.raises(OSError, match="no memory"):
            await system.__aenter__()

    run(body)
    started = [one.removeprefix("start ") for one in Played.told if one.startswith("start")]
    everybody = ["worker-a", "scheduler", "gateway-0", "gateway-1"]
    assert started == everybody[: everybody.index(broken)] if broken else everybody
    ended = [one.removeprefix("stop ") for one in Played.told if one.startswith("stop")]
    assert sorted(ended[:2]) == ["gateway-0", "gateway-1"]
    assert sorted(ended[2:]) == ["scheduler", "worker-a"]
    assert not system.folder.exists()
