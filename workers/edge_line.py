"""The line before a node's executor: how much work is ahead of a request (H of Eq. 5), and when its own is done.

Two clocks run side by side. The real one goes by what computations took so far: it says how long the device is busy.
The emulated one, where it is on, goes by the placement table's operations and the node's capacity: it says when an
answer may leave. Requests are in line from their arrival at the decided node. Pure: time is an argument.
"""

from collections.abc import Callable

from policies.routing.service_time import ServiceTimes
from workers.edge_fifo import Fifo, Span
from workers.edge_view import Task


class Turn:
    """One request's place in line. `span`: its emulated time, if that is on; `expected_s`: of its real computation."""

    __slots__ = ("begun_s", "expected_s", "span", "waiting_tflop")

    def __init__(self, waiting_tflop: float, expected_s: float, span: Span | None) -> None:
        self.waiting_tflop = waiting_tflop
        self.expected_s = expected_s
        self.span = span
        self.begun_s: float | None = None

    @property
    def ends_s(self) -> float:
        """No answer leaves before; 0 where nothing is emulated."""
        return self.span.ends_s if self.span is not None else 0.0

    @property
    def emulated_queue_s(self) -> float:
        """Time behind others by the node's emulated capacity; 0 where that is not emulated."""
        return self.span.queue_s if self.span is not None else 0.0

    @property
    def emulated_compute_s(self) -> float:
        """Its own time by the node's emulated capacity; 0 where that is not emulated."""
        return self.span.service_s if self.span is not None else 0.0


class Line:
    """State: the emulated clock, who is in line, and the running means of computations by variant and frames."""

    def __init__(
        self, tflops: float, *, emulated: bool, beside_s: Callable[[float], float] = lambda now_s: 0.0
    ) -> None:
        """`beside_s(now)`: what else the device has to do, in seconds."""
        self._tflops = tflops
        self._fifo = Fifo(tflops) if emulated else None
        self._beside_s = beside_s
        self._times: dict[str, ServiceTimes] = {}
        self._turns: set[Turn] = set()

    def waiting_tflop(self, now_s: float) -> float:
        """Work that is still to be done; where nothing is emulated, predicted real time in the node's operations."""
        if self._fifo is not None:
            return self._fifo.waiting(now_s)
        return (self.backlog_s(now_s) + self._beside_s(now_s)) * self._tflops

    def late_s(self, task: Task, now_s: float, deadline_s: float) -> float:
        """How long after its deadline a request would be done that came now, if that is certain; else not above 0."""
        return self._fifo.ends_s(task.work_tflop, now_s) - deadline_s if self._fifo is not None else 0.0

    def arrive(self, task: Task, frames: int, now_s: float) -> Turn:
        """A request takes its place, with so many frames. A variant that never ran is taken to be as the table says."""
        times = self._times.get(task.variant)
        expected_s = times.mean_s(frames) if times is not None else task.work_tflop / self._tflops
        waiting_tflop = self.waiting_tflop(now_s)
        span = self._fifo.arrive(task.work_tflop, now_s) if self._fifo is not None else None
        turn = Turn(waiting_tflop, expected_s, span)
        self._turns.add(turn)
        return turn

    def begin(self, turn: Turn, now_s: float) -> None:
        """Its computation begins."""
        turn.begun_s = now_s

    def computed(self, turn: Turn, task: Task, frames: int, duration_s: float) -> None:
        """Its computation took so long, for so many frames."""
        self._turns.discard(turn)
        self._times.setdefault(task.variant, ServiceTimes()).observe(frames, duration_s)

    def leave(self, turn: Turn, now_s: float) -> None:
        """It ends without an answer: what was not served of it is given back."""
        self._turns.discard(turn)
        if self._fifo is not None and turn.span is not None:
            self._fifo.withdraw(turn.span, now_s)

    def backlog_s(self, now_s: float) -> float:
        """Predicted real time of those in line; a computation over its time counts as ending."""
        total_s = 0.0
        for turn in list(self._turns):  # metrics are read from another thread
            run_s = now_s - turn.begun_s if turn.begun_s is not None else 0.0
            total_s += max(0.0, turn.expected_s - run_s)
        return total_s
