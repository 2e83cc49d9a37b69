"""The decided node's part of a request: a place, memory, a turn in line, the computation, the answer.

    arrive ─► QUEUE_FULL, EXPIRED, UNAVAILABLE (no memory) at once, or
           ─► the variant is there or gets loaded ─► its turn on the executor ─► computed ─► its emulated end ─► answer

Computations are done in the order in which requests became ready: one whose variant is still being loaded does not
hold up the others. The emulated clock (Eq. 5) goes by arrival alone.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from models.adapt import AdaptedFrames
from models.edge_runtime import EdgeRuntime
from models.preprocess import InvalidInput
from protocol.edge_records import EdgeRun
from protocol.outcomes import Attempt
from workers.device import Clock, Device
from workers.edge_answers import encode_found
from workers.edge_journey import Body, Journey, Refused, sleep_until
from workers.edge_line import Line, Turn
from workers.edge_memory import NoRoom
from workers.edge_variants import EdgeVariants, InUse, LoadFailed
from workers.edge_view import NodeView, Task

log = logging.getLogger(__name__)


class Computed(NamedTuple):
    """What the executor's thread gives back."""

    payload: bytes
    frames: int
    decode_s: float
    compute_s: float


class EdgeQueue:
    """One view's queue. State: how many hold a place, and the line."""

    def __init__(
        self,
        clock: Clock,
        device: Device,
        variants: EdgeVariants,
        view: NodeView,
        beside_s: Callable[[float], float] = lambda now_s: 0.0,
    ) -> None:
        """`beside_s(now)`: what else the device has to do, in seconds."""
        self.length = 0
        self.line = Line(view.tflops, emulated=view.emulate.compute == "table", beside_s=beside_s)
        self._clock = clock
        self._device = device
        self._variants = variants
        self._view = view

    async def serve(self, journey: Journey, task: Task, run: EdgeRun, body: Body) -> tuple[Attempt, bytes]:
        """OK or LATE, and the answer. Raises `Refused` for every other end."""
        arrived_s, loaded_before_s = self._clock.now_s(), journey.spent.load_s
        self._admit(journey, task, arrived_s)
        try:
            use = self._variants.take(task.variant, task.memory_mb, journey.adapted_mb)
        except NoRoom as error:
            raise Refused(Attempt.UNAVAILABLE, f"no memory on node {self._view.name}: {error}") from error
        self.length += 1
        turn = self.line.arrive(task, len(run.frame_numbers), arrived_s)
        journey.waiting_tflop, journey.new_instance = turn.waiting_tflop, use.new
        try:
            runtime = await self._loaded(journey, use)
            computed = await self._computed(journey, turn, runtime, run, body)
            self.line.computed(turn, task, computed.frames, computed.compute_s)
            await sleep_until(self._clock, turn.ends_s)
        except BaseException:
            self.line.leave(turn, self._clock.now_s())
            raise
        finally:
            use.release()
            self.length -= 1
        ended_s = self._clock.now_s()
        busy_s = journey.spent.load_s - loaded_before_s + computed.decode_s + computed.compute_s
        journey.spend(
            decode_s=computed.decode_s,
            wait_s=ended_s - arrived_s - busy_s,
            compute_s=computed.compute_s,
            emulated_queue_s=turn.emulated_queue_s,
            emulated_compute_s=turn.emulated_compute_s,
        )
        return Attempt.OK if ended_s <= journey.deadline_s else Attempt.LATE, computed.payload

    def _admit(self, journey: Journey, task: Task, now_s: float) -> None:
        view = self._view
        if self.length >= view.queue_capacity:
            raise Refused(Attempt.QUEUE_FULL, f"node {view.name} holds {self.length} requests already")
        if journey.left_s(now_s) <= 0.0:
            raise Refused(Attempt.EXPIRED, f"its time was over when it came to node {view.name}")
        if (late_s := self.line.late_s(task, now_s, journey.deadline_s)) > 0.0:
            raise Refused(Attempt.EXPIRED, f"node {view.name} would be done {late_s:.3g} s after the deadline")

    async def _loaded(self, journey: Journey, use: InUse) -> EdgeRuntime:
        begun_s = self._clock.now_s()
        try:
            async with asyncio.timeout(journey.left_s(begun_s)):
                return await use.runtime()
        except LoadFailed as error:
            raise Refused(Attempt.UNAVAILABLE, f"node {self._view.name}: {error}") from error
        except TimeoutError as error:
            raise Refused(Attempt.EXPIRED, "its time was over before the variant was loaded") from error
        finally:
            journey.spend(load_s=self._clock.now_s() - begun_s)

    async def _computed(self, journey: Journey, turn: Turn, runtime: EdgeRuntime, run: EdgeRun, body: Body) -> Computed:
        def work() -> Computed:
            return self._compute(turn, runtime, run, body)

        future = self._device.submit(work)
        try:
            return await _result(future, journey.left_s(self._clock.now_s()))
        except (Refused, asyncio.CancelledError):
            raise
        except InvalidInput as error:
            raise Refused(Attempt.INVALID, error.reason, error.status) from error
        except Exception as error:  # a model raises whatever it likes; the node stays up
            log.exception("a computation failed", extra={"node": self._view.name})
            raise Refused(Attempt.FAILED, f"the variant failed on node {self._view.name}: {error!r}"[:500]) from error

    def _compute(self, turn: Turn, runtime: EdgeRuntime, run: EdgeRun, body: Body) -> Computed:
        """In the executor's thread."""
        begun_s = self._clock.now_s()
        self.line.begin(turn, begun_s)
        frames = AdaptedFrames(body.take())
        if len(frames) != len(run.frame_numbers):
            raise InvalidInput(f"{len(frames)} frames came, and the numbers of {len(run.frame_numbers)}")
        if not runtime.variant.tracker and len(frames) != 1:
            raise InvalidInput(f"{run.service} takes one image at a time, not a clip of {len(frames)} frames", 415)
        found = runtime.run(frames)
        answer = encode_found(found, runtime.variant.labels, run)
        compute_s = self._clock.now_s() - begun_s - frames.decode_s
        return Computed(answer, len(frames), frames.decode_s, compute_s)


async def _result(future: "Future[Computed]", left_s: float) -> Computed:
    """What the thread gives. One that has not begun in time is taken back; one that has is waited for, come what may:

    until then its variant is in use.
    """
    waiter = asyncio.wrap_future(future)
    try:
        await asyncio.wait([waiter], timeout=max(0.0, left_s))
        if not waiter.done() and future.cancel():
            raise Refused(Attempt.EXPIRED, "its time was over before its turn came")
        await asyncio.wait([waiter])
    except asyncio.CancelledError:
        if not future.cancel():
            await asyncio.wait([waiter])
            waiter.exception()
        raise
    return waiter.result()
