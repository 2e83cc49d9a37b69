"""A request on its way through the gateway, and the ways in which it ends: an answer, a refusal, nobody who waits.

Plain values that every surface and the dispatcher share.
"""

from collections.abc import Callable
from typing import Protocol

from gateway.router import Target
from protocol.outcomes import Outcome
from protocol.records import Reply


class ClientGone(Exception):
    """The client left while its request was on the way."""


class AnswerTimeout(Exception):
    """The worker holds the request far beyond its budget: it hangs."""


class Refused(Exception):
    """The request ends here with an outcome other than an answer."""

    def __init__(self, outcome: Outcome, reason: str, http_status: int = 0) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason
        self.http_status = http_status


class Stage(Protocol):
    """Where a request waits."""

    def abandon(self, why: Exception) -> None:
        """Nobody waits for it any more: give its place back and end it with `why`."""


class Request:
    """One admitted request. `arrived_s` and `deadline_s` are local monotonic times.

    `flags` (TENSORS, PREDICTIONS) say what the worker should answer; `variant` pins the request to its instances.
    `stage`, `ended` and `give_up_s` belong to the dispatcher while it has the request.
    """

    __slots__ = (
        "arrived_s",
        "body",
        "content_type",
        "deadline_s",
        "ended",
        "flags",
        "give_up_s",
        "id",
        "stage",
        "top_k",
        "variant",
    )

    def __init__(
        self,
        id: str,
        arrived_s: float,
        deadline_s: float,
        body: bytes,
        content_type: str,
        top_k: int,
        flags: int = 0,
        variant: str = "",
    ) -> None:
        self.id = id
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s
        self.body = body
        self.content_type = content_type
        self.top_k = top_k
        self.flags = flags
        self.variant = variant
        self.stage: Stage | None = None
        self.ended: OnEnd | None = None
        self.give_up_s = 0.0

    def abandon(self, why: Exception) -> None:
        """Nobody waits for this request any more (`ClientGone`) or it must not wait longer (`AnswerTimeout`).

        Ends it with `why`; nothing happens if it has ended already.
        """
        stage, self.stage = self.stage, None
        if stage is not None:
            stage.abandon(why)


class Answered:
    """A reply with an answer, and who gave it. `attempts` is 1 or 2."""

    __slots__ = ("attempts", "payload", "rank", "reply", "target")

    def __init__(self, target: Target, rank: int, reply: Reply, payload: bytes, attempts: int) -> None:
        self.target = target
        self.rank = rank
        self.reply = reply
        self.payload = payload
        self.attempts = attempts


End = Answered | Exception
"""How a request ends: an answer, or `Refused`, `ClientGone`, `AnswerTimeout`, or what went wrong in here."""

OnEnd = Callable[[End], None]
