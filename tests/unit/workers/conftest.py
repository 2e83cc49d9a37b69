"""A clock that moves only when told, and a bench to put instances on: worker tests without sleeping."""

import asyncio
import heapq
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence

import pytest

from models.catalog import Accuracy, Emulation, Variant
from models.preprocess import Prepared
from models.runtime import Answer, EmulatedRuntime
from protocol.records import Infer, InstanceSpec, InstanceState, Reply
from tests.fakes.edge_models import open_bright
from workers.device import Device
from workers.edge_node import EdgeNode
from workers.host import Host
from workers.instance import Instance, Request
from workers.preparing import Preparer


class FakeTimer:
    """A callback that can be cancelled."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """It will not be called."""
        self.callback = None


class FakeClock:
    """Time that stands still until `advance_to`. Timers fire `lateness_s()` after they are due."""

    def __init__(self, lateness_s: Callable[[], float] = lambda: 0.0) -> None:
        self._now_s = 0.0
        self._lateness_s = lateness_s
        self._timers: list[tuple[float, int, FakeTimer]] = []
        self._numbers = itertools.count()

    def now_s(self) -> float:
        """The time."""
        return self._now_s

    def call_at(self, when_s: float, callback: Callable[[], None]) -> FakeTimer:
        """Call back when the time has come, but not before the next `advance_to`."""
        timer = FakeTimer(callback)
        due_s = max(when_s, self._now_s) + self._lateness_s()
        heapq.heappush(self._timers, (due_s, next(self._numbers), timer))
        return timer

    def advance_to(self, when_s: float) -> None:
        """Fire everything that is due up to `when_s`, in order, and stop there."""
        while self._timers and self._timers[0][0] <= when_s:
            self._now_s, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()
        self._now_s = when_s


class Bench:
    """A host on a fake clock, with emulated instances of given service times, and every reply that came."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        device, preparer = Device(clock), Preparer(1)
        self.host = Host(clock, device, preparer)
        self.node = EdgeNode(clock, device, preparer, open_bright)
        self.replies: list[tuple[float, Request, Reply, bytes]] = []
        self._ids = itertools.count(1)

    def add(
        self,
        id: str,
        service_s: float,
        *,
        capacity: int = 15,
        batch: tuple[int, int] = (1, 1),
        fixed_share: float = 0.0,
        runtime: EmulatedRuntime | None = None,
    ) -> Instance:
        """A ready emulated instance whose batch of b takes service_s * (a + (1 - a) * b), a = fixed_share."""
        instance = Instance(id, InstanceSpec(variant=id, capacity=capacity, batch=batch), "things")
        instance.runtime = runtime or EmulatedRuntime(emulated_variant(id, service_s, fixed_share))
        for size in (1, 3, 5):
            instance.times.observe(size, service_s * (fixed_share + (1.0 - fixed_share) * size))
        instance.queue.open()
        instance.state = InstanceState.READY
        self.host.instances[id] = instance
        return instance

    def send(self, id: str, *, budget_s: float = 1e9, flags: int = 0, payload: bytes = b"x") -> Request:
        """A request arrives now."""
        request = Request(Infer(id, budget_s, "", flags), payload, self.clock.now_s(), next(self._ids), self._respond)
        self.host.arrive(request)
        return request

    def reply_to(self, request: Request) -> Reply | None:
        """The one reply to a request, or None so far. More than one is a fault."""
        replies = [reply for _, asked, reply, _ in self.replies if asked is request]
        assert len(replies) <= 1, "answered twice"
        return replies[0] if replies else None

    def _respond(self, request: Request, reply: Reply, payload: bytes) -> None:
        self.replies.append((self.clock.now_s(), request, reply, payload))


def emulated_variant(name: str, service_s: float, fixed_share: float = 0.0, accuracy: float = 1.0) -> Variant:
    """A catalog entry with a deterministic service time."""
    return Variant(
        name=name,
        service="things",
        runtime="emulated",
        labels=("cat", "dog", "cow"),
        accuracy=Accuracy(accuracy, "modelled"),
        emulated=Emulation(service_s * 1e3, fixed_share=fixed_share),
    )


class RaisingRuntime(EmulatedRuntime):
    """An emulated variant that raises whenever the batch holds an input of class `bad`."""

    def __init__(self, variant: Variant, bad: int) -> None:
        super().__init__(variant)
        self._bad = bad

    def execute(self, batch: Sequence[Prepared]) -> list[Answer]:
        """Answers, or `ArithmeticError`."""
        if any(prepared.label == self._bad for prepared in batch):
            raise ArithmeticError("the model broke")
        return super().execute(batch)


Eventually = Callable[[Callable[[], bool]], Awaitable[None]]


@pytest.fixture
def eventually() -> Eventually:
    """Lets the event loop (and its threads) run until a condition holds; `AssertionError` after 5 s."""

    async def wait_until(condition: Callable[[], bool]) -> None:
        end_s = time.monotonic() + 5.0
        while not condition():
            assert time.monotonic() < end_s, "it never came"
            await asyncio.sleep(0)

    return wait_until


@pytest.fixture
def make_bench() -> Callable[..., Bench]:
    """Makes a bench; `lateness_s` is called for each timer."""
    return lambda lateness_s=lambda: 0.0: Bench(FakeClock(lateness_s))


@pytest.fixture
def bench() -> Bench:
    """A bench whose timers are punctual."""
    return Bench(FakeClock())


@pytest.fixture
def raising_runtime() -> EmulatedRuntime:
    """Takes 1 s; raises on class 2."""
    return RaisingRuntime(emulated_variant("raising", 1.0), bad=2)
