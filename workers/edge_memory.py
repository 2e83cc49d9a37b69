"""A node's memory in the table's megabytes: which variants are in it, who uses them, what leaves to make room. Pure.

Never beyond the budget: variants that are there or on their way, and the data of the requests that the node holds
(Huang, Eq. 14). To make room, variants leave that nobody uses and nobody pinned, the least recently used first, and no
more of them than needed. Each variant is there at most once (Eq. 13).
"""

from collections.abc import Iterable
from typing import NamedTuple


class NoRoom(Exception):
    """Something does not fit, even if every idle variant leaves; the message has the figures."""


class _Held:
    """One variant in memory. `used`: counts uses of the whole memory, so that ties cannot be."""

    __slots__ = ("memory_mb", "used", "users")

    def __init__(self, memory_mb: float) -> None:
        self.memory_mb = memory_mb
        self.users = 0
        self.used = 0


class Use(NamedTuple):
    """One user of a variant. `new`: it came for this one; `leaving`: what had to leave, gone from the ledger."""

    name: str
    data_mb: float
    new: bool
    leaving: tuple[str, ...]
    held: _Held


class Memory:
    """The ledger. State: variants by name, megabytes of requests' data, the pinned names, a counter of uses."""

    def __init__(self, budget_mb: float) -> None:
        self.budget_mb = budget_mb
        self.pinned: frozenset[str] = frozenset()
        self._held: dict[str, _Held] = {}
        self._data_mb = 0.0
        self._data_users = 0
        self._uses = 0

    @property
    def used_mb(self) -> float:
        """Of variants and data together."""
        return sum(one.memory_mb for one in list(self._held.values())) + self._data_mb

    @property
    def names(self) -> tuple[str, ...]:
        """What is there or on its way, sorted."""
        return tuple(sorted(self._held))

    @property
    def idle(self) -> tuple[str, ...]:
        """What could leave, the least recently used first."""
        # A copy first: metrics are read from another thread.
        free = [(one.used, name) for name, one in list(self._held.items()) if not one.users]
        return tuple(name for _, name in sorted(free) if name not in self.pinned)

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def take(self, name: str, memory_mb: float, data_mb: float = 0.0) -> Use:
        """One more user of a variant, with its data. Raises `NoRoom`, and nothing has changed."""
        new = name not in self._held
        leaving = self._leaving(name, data_mb + (memory_mb if new else 0.0))
        for other in leaving:
            del self._held[other]
        held = self._held.setdefault(name, _Held(memory_mb))
        held.users += 1
        self._data_mb += data_mb
        self._data_users += 1
        self._touch(held)
        return Use(name, data_mb, new, leaving, held)

    def release(self, use: Use) -> None:
        """A user has gone, and its data with it. The variant stays, and was used just now."""
        self._data_users -= 1
        # Sums of many decimal figures do not come back to nought by themselves.
        self._data_mb = self._data_mb - use.data_mb if self._data_users else 0.0
        use.held.users -= 1
        self._touch(use.held)

    def forget(self, name: str) -> None:
        """A variant is gone, users or not: it could not be loaded."""
        self._held.pop(name, None)

    def shrink(self, unknown: Iterable[str] = ()) -> tuple[str, ...]:
        """What has to leave because it is `unknown` by now or beyond the budget; it is out of the ledger already.

        Variants in use stay until a later call.
        """
        strange = set(unknown)
        leaving = [name for name in self.idle if name in strange]
        for name in leaving:
            del self._held[name]
        for name in self.idle:
            if self.used_mb <= self.budget_mb:
                break
            del self._held[name]
            leaving.append(name)
        return tuple(leaving)

    def _leaving(self, name: str, needed_mb: float) -> tuple[str, ...]:
        """The idle variants that leave, in order of their last use, until `needed_mb` fits."""
        used_mb = self.used_mb
        leaving: list[str] = []
        for other in self.idle:
            if used_mb + needed_mb <= self.budget_mb:
                break
            if other != name:
                leaving.append(other)
                used_mb -= self._held[other].memory_mb
        if used_mb + needed_mb > self.budget_mb:
            figures = f"needs {needed_mb:.4g} MB beside {used_mb:.4g} MB in use, of {self.budget_mb:.4g} MB"
            raise NoRoom(f"{name} with its data {figures}")
        return tuple(leaving)

    def _touch(self, held: _Held) -> None:
        self._uses += 1
        held.used = self._uses
