"""The supervisor over tiny children: restarted with growing pauses, ended in order, never left behind."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from protocol.deployment import DeploymentError, DeploymentFile, GatewaySettings
from protocol.records import InstanceSpec, ServiceSpec, WorkerSpec
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
