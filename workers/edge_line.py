"""The line before a node's executor: how much work is ahead of a request (H of Eq. 5), and when its own is done.

`EmulatedLine` says so by the placement table's operations and the node's capacity, `MeasuredLine` by what the real
computations took so far. Requests are in line from their arrival at the decided node. Pure: the clock is an argument.
"""

from typing import Protocol

from workers.edge_fifo import Fifo, Span
from workers.edge_view import Task
from workers.service_time import ServiceTimes


class Turn:
    """One request's place in line. `ends_s`: nobody is answered before; `expected_s`: what the line counts on."""

    __slots__ = ("begun_s", "ends_s", "expected_s", "span", "waiting_tflop")

    def __init__(self, waiting_tflop: float, expected_s: float, span: Span | None = None) -> None:
        self.waiting_tflop = waiting_tflop
        self.expected_s = expected_s
        self.span = span
        self.ends_s = span.ends_s if span is not None else 0.0
        self.begun_s: float | None = None

    @property
    def emulated_queue_s(self) -> float:
        """Time behind others by the node's emulated capacity; 0 where that is not emulated."""
        return self.span.queue_s if self.span is not None else 0.0

    @property
    def emulated_compute_s(self) -> float:
        """Its own time by the node's emulated capacity; 0 where that is not emulated."""
        return self.span.service_s if self.span is not None else 0.0


class Line(Protocol):
    """What both kinds can do."""

    def waiting_tflop(self, now_s: float) -> float:
        """Work that is still to be done."""

    def late_s(self, task: Task, now_s: float, deadline_s: float) -> float:
        """How long after its deadline a request would be done that came now, if that is certain; else not above 0."""

    def arrive(self, task: Task, frames: int, now_s: float) -> Turn:
        """A request takes its place, with so many frames."""

    def leave(self, turn: Turn, now_s: float) -> None:
        """It will not be computed."""

    def begin(self, turn: Turn, now_s: float) -> None:
        """Its computation begins."""

    def end(self, turn: Turn, task: Task, frames: int, duration_s: float) -> None:
        """Its computation took so long, for so many frames."""


class EmulatedLine:
    """The node of Eq. 5: a constant number of operations per second, first come, first served."""

    def __init__(self, tflops: float) -> None:
        self._fifo = Fifo(tflops)

    def waiting_tflop(self, now_s: float) -> float:
        return self._fifo.waiting(now_s)

    def late_s(self, task: Task, now_s: float, deadline_s: float) -> float:
        return self._fifo.ends_s(task.work_tflop, now_s) - deadline_s

    def arrive(self, task: Task, frames: int, now_s: float) -> Turn:
        span = self._fifo.arrive(task.work_tflop, now_s)
        return Turn(span.waiting, span.service_s, span)

    def leave(self, turn: Turn, now_s: float) -> None:
        assert turn.span is not None
        self._fifo.withdraw(turn.span, now_s)

    def begin(self, turn: Turn, now_s: float) -> None:
        turn.begun_s = now_s

    def end(self, turn: Turn, task: Task, frames: int, duration_s: float) -> None:
        """Nothing: an emulated node does not learn."""


class MeasuredLine:
    """The executor as it is. State: who is in line, and the running means of computations by variant and frames.

    A variant that has never run is taken to need what the table and the node's capacity say.
    """

    def __init__(self, tflops: float) -> None:
        self._tflops = tflops
        self._times: dict[str, ServiceTimes] = {}
        self._turns: set[Turn] = set()

    def waiting_tflop(self, now_s: float) -> float:
        """Predicted real time, in the node's operations."""
        return self._backlog_s(now_s) * self._tflops

    def late_s(self, task: Task, now_s: float, deadline_s: float) -> float:
        """Nothing is certain: a prediction refuses nobody."""
        return 0.0

    def arrive(self, task: Task, frames: int, now_s: float) -> Turn:
        turn = Turn(self.waiting_tflop(now_s), self._expected_s(task, frames))
        self._turns.add(turn)
        return turn

    def leave(self, turn: Turn, now_s: float) -> None:
        self._turns.discard(turn)

    def begin(self, turn: Turn, now_s: float) -> None:
        turn.begun_s = now_s

    def end(self, turn: Turn, task: Task, frames: int, duration_s: float) -> None:
        self._turns.discard(turn)
        self._times.setdefault(task.variant, ServiceTimes()).observe(frames, duration_s)

    def _expected_s(self, task: Task, frames: int) -> float:
        times = self._times.get(task.variant)
        return times.mean_s(frames) if times is not None else task.work_tflop / self._tflops

    def _backlog_s(self, now_s: float) -> float:
        total_s = 0.0
        for turn in list(self._turns):  # metrics are read from another thread
            run_s = now_s - turn.begun_s if turn.begun_s is not None else 0.0
            total_s += max(0.0, turn.expected_s - run_s)
        return total_s
