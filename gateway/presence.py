"""Whether the client of a request is still there: told by its connection, without a task that waits for it.

ASGI tells of a client's leaving only to who awaits `receive`, which would take a task for every request that waits.
So the connection puts a `Presence` into the scope, and calls `leave` when it closes.
"""

from collections.abc import Callable, MutableMapping
from typing import Any, Final

_KEY: Final = "tidegate.presence"


class Presence:
    """One request's client. `gone` once it has left."""

    __slots__ = ("_on_leave", "gone")

    def __init__(self) -> None:
        self.gone = False
        self._on_leave: Callable[[], None] | None = None

    def watch(self, on_leave: Callable[[], None]) -> None:
        """`on_leave` is called when the client leaves; at once if it already has."""
        self._on_leave = on_leave
        if self.gone:
            on_leave()

    def forget(self) -> None:
        """Nobody needs to know any more."""
        self._on_leave = None

    def leave(self) -> None:
        """The client has left."""
        self.gone = True
        if self._on_leave is not None:
            self._on_leave()


def announce(scope: MutableMapping[str, Any], presence: Presence) -> None:
    """Puts `presence` where `presence_of` finds it."""
    scope.setdefault("extensions", {})[_KEY] = presence


def presence_of(scope: MutableMapping[str, Any]) -> Presence:
    """The presence that the connection announced; one that never leaves if the server is not ours."""
    found = scope.get("extensions", {}).get(_KEY)
    return found if isinstance(found, Presence) else Presence()
