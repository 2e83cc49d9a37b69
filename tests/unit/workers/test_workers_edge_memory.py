"""The ledger of a node's memory: never beyond the budget; the least recently used leaves, nothing that is in use."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.edge_memory import Memory, NoRoom, Use

SIZES = {"a": 100.0, "b": 159.48, "c": 300.0, "d": 380.91, "e": 50.0}
BUDGET_MB = 700.0


class Ledger(RuleBasedStateMachine):
    """Any order of requests coming and going, loads failing, pins changing; a plain list says who must leave."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory(BUDGET_MB)
        self.uses: list[Use] = []
        self.recency: list[str] = []  # what is in memory, the least recently used first

    def _touched(self, name: str) -> None:
        if name in self.recency:
            self.recency.remove(name)
        self.recency.append(name)

    def _users(self, name: str) -> int:
        return sum(use.name == name and use.held is self.memory._held.get(name) for use in self.uses)

    @rule(name=st.sampled_from(sorted(SIZES)), data_mb=st.floats(0.0, 200.0))
    def take(self, name: str, data_mb: float) -> None:
        before_mb, there = self.memory.used_mb, list(self.recency)
        free = [one for one in there if not self._users(one) and one not in self.memory.pinned and one != name]
        needed_mb = data_mb + (0.0 if name in there else SIZES[name])
        expected: list[str] = []
        for one in free:
            if before_mb - sum(SIZES[gone] for gone in expected) + needed_mb <= BUDGET_MB:
                break
            expected.append(one)
        fits = before_mb - sum(SIZES[gone] for gone in expected) + needed_mb <= BUDGET_MB
        try:
            use = self.memory.take(name, SIZES[name], data_mb)
        except NoRoom as error:
            assert not fits
            assert name in str(error)  # noqa: PT017 - whether it raises is drawn
            assert self.memory.used_mb == before_mb
            assert self.memory.names == tuple(sorted(there))
            return
        assert fits
        assert list(use.leaving) == expected
        assert use.new == (name not in there)
        self.recency = [one for one in there if one not in expected]
        self._touched(name)
        self.uses.append(use)

    @precondition(lambda self: self.uses)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        use = self.uses.pop(data.draw(st.integers(0, len(self.uses) - 1)))
        self.memory.release(use)
        if self.memory._held.get(use.name) is use.held:
            self._touched(use.name)

    @precondition(lambda self: self.recency)
    @rule(data=st.data())
    def a_load_fails(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.recency))
        self.memory.forget(name)
        self.recency.remove(name)

    @rule(pinned=st.sets(st.sampled_from(sorted(SIZES)), max_size=2))
    def pin(self, pinned: set[str]) -> None:
        self.memory.pinned = frozenset(pinned)

    @invariant()
    def never_beyond_the_budget(self) -> None:
        data_mb = sum(use.data_mb for use in self.uses)
        assert self.memory.used_mb == pytest.approx(sum(SIZES[name] for name in self.recency) + data_mb, abs=1e-6)
        assert self.memory.used_mb <= BUDGET_MB + 1e-9

    @invariant()
    def everything_is_there_once(self) -> None:
        assert self.memory.names == tuple(sorted(self.recency))
        for use in self.uses:
            if self.memory._held.get(use.name) is use.held:
                assert use.name not in self.memory.idle


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_smaller_budget_is_kept_as_soon_as_that_is_possible() -> None:
    """Idle ones leave at once, oldest first; one in use when its user has gone; what is unknown leaves in any case."""
    memory = Memory(1000.0)
    for name in ("a", "b", "c"):
        memory.release(memory.take(name, SIZES[name]))
    use = memory.take("a", SIZES["a"], 10.0)
    memory.budget_mb = 100.0
    assert memory.shrink(unknown=["c"]) == ("c", "b")
    assert memory.used_mb == 110.0
    assert memory.shrink() == ()
    memory.release(use)
    assert memory.shrink() == ()
    memory.budget_mb = 99.0
    assert memory.shrink() == ("a",)
    assert memory.used_mb == 0.0


def test_what_can_never_fit_says_so_with_the_figures() -> None:
    memory = Memory(200.0)
    memory.pinned = frozenset({"a"})
    memory.release(memory.take("a", 100.0))
    with pytest.raises(NoRoom, match=r"b with its data needs 164.5 MB beside 100 MB in use, of 200 MB"):
        memory.take("b", SIZES["b"], 5.0)
