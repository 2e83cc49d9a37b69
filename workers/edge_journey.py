"""One edge request on its way through a node: what it has spent, how long it may still take, how it ended."""

import asyncio
import math
from typing import NamedTuple

import msgspec

from protocol.edge_records import EdgeReply, Spent
from protocol.outcomes import Attempt
from workers.device import Clock

_REAL = ("decode_s", "adapt_s", "forward_s", "load_s", "wait_s", "compute_s")
_ON_LINKS = ("emulated_access_s", "emulated_uplink_queue_s", "emulated_transmission_s", "emulated_link_queue_s")


class Refused(Exception):
    """A request ends here, without an answer: how, and why. `http_status` refines INVALID."""

    def __init__(self, attempt: Attempt, reason: str, http_status: int = 0) -> None:
        super().__init__(reason)
        self.attempt = attempt
        self.reason = reason
        self.http_status = http_status


class Ended(NamedTuple):
    """What goes back to who sent the request."""

    reply: EdgeReply
    payload: bytes = b""


class Body:
    """Bytes on their way. Whoever uses them up takes them, so that nobody keeps them while an answer is awaited."""

    __slots__ = ("_payload",)

    def __init__(self, payload: bytes) -> None:
        self._payload = payload

    def __len__(self) -> int:
        return len(self._payload)

    def take(self) -> bytes:
        """The bytes; afterwards they are gone from here."""
        payload, self._payload = self._payload, b""
        return payload


class Journey:
    """One request at this node. All state is public; what it spent elsewhere before is in `spent`, too."""

    __slots__ = ("adapted_mb", "arrived_s", "deadline_s", "new_instance", "passed_on", "spent", "waiting_tflop")

    def __init__(self, now_s: float, budget_s: float, spent: Spent = Spent(), adapted_mb: float = 0.0) -> None:  # noqa: B008 - frozen
        self.arrived_s = now_s
        self.deadline_s = now_s + budget_s
        self.spent = spent
        self.adapted_mb = adapted_mb
        self.waiting_tflop = 0.0
        self.new_instance = False
        self.passed_on = False  # it is in another node's hands

    def spend(self, **seconds: float) -> None:
        """Adds to the named fields of `spent`."""
        self.spent = msgspec.structs.replace(
            self.spent, **{name: getattr(self.spent, name) + more for name, more in seconds.items()}
        )

    def left_s(self, now_s: float) -> float:
        """Time left until the deadline; below 0 once it has passed."""
        return self.deadline_s - now_s


def passed_s(before: Spent, after: Spent, *, waited_on_links: bool) -> float:
    """The real time that is accounted for between two readings; waits on emulated links are real where they are on."""
    names = _REAL + _ON_LINKS if waited_on_links else _REAL
    return float(sum(getattr(after, name) - getattr(before, name) for name in names))


async def sleep_until(clock: Clock, when_s: float) -> None:
    """Returns when the time has come, or up to about a millisecond later; at once if it has passed."""
    while (rest_s := when_s - clock.now_s()) > 0.0:  # noqa: ASYNC110 - timers may be early
        await asyncio.sleep(math.ceil(rest_s * 1e3) * 1e-3)
