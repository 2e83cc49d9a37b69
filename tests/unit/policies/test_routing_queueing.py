"""The bounded queue against a brute-force model, the conservation law, and each rule by itself."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.routing.queueing import BoundedQueue, Entry, EntryState
from protocol.outcomes import Attempt

INF = float("inf")


def admitted(queue: BoundedQueue, now_s: float, *, ready: bool = True, **flags: bool) -> Entry:
    """An entry that has arrived now and got a place."""
    entry = Entry(now_s, INF, **flags)
    assert queue.arrive(entry, now_s, 1.0, 1.0) is None
    if ready:
        assert queue.ready(entry, now_s)
    return entry


def open_queue(capacity: int = 15, minimum: int = 1, maximum: int = 1) -> BoundedQueue:
    """A queue of a ready instance."""
    queue = BoundedQueue(capacity, minimum, maximum)
    queue.open()
    return queue


# Tan's rule, written down independently of policies/routing/rules.py from section 5.2.2.
def paper_size(waiting: int, minimum: int, maximum: int) -> int:
    """The batch that starts when `waiting` requests wait; 0 when the instance has to wait."""
    if waiting < minimum:
        return 0
    return maximum if waiting >= maximum else max(size for size in (1, 3, 5) if size <= waiting)


limits = st.sampled_from([(1, 1), (1, 3), (1, 5), (3, 3), (3, 5), (5, 5)])


@settings(max_examples=300, deadline=None)
@given(
    gaps=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    capacity=st.integers(5, 15),
    limits=limits,
    service=st.integers(1, 10),
)
def test_queue_equals_brute_force(gaps: list[int], capacity: int, limits: tuple[int, int], service: int) -> None:
    """Whole runs in integer time: who is refused, who starts when and with whom."""
    minimum, maximum = limits
    arrivals = [sum(gaps[: i + 1]) for i in range(len(gaps))]

    def takes(size: int) -> int:
        return service * (1 + size) // 2

    # Brute force: tick by tick, plain lists; at one tick an end comes before arrivals, arrivals before a start.
    expected: dict[int, str | int] = {}
    line: list[int] = []
    serving: list[int] = []
    ends = 0
    for tick in range(arrivals[-1] + len(arrivals) * takes(5) + 2):
        if serving and ends == tick:
            serving = []
        if not serving and (size := paper_size(len(line), minimum, maximum)):
            serving, line, ends = line[:size], line[size:], tick + takes(size)
            expected |= dict.fromkeys(serving, tick)
        for number in [i for i, when in enumerate(arrivals) if when == tick]:
            if len(line) + len(serving) >= capacity:
                expected[number] = "full"
                continue
            line.append(number)
            if not serving and (size := paper_size(len(line), minimum, maximum)):
                serving, line, ends = line[:size], line[size:], tick + takes(size)
                expected |= dict.fromkeys(serving, tick)

    # The queue, event by event.
    queue = open_queue(capacity, minimum, maximum)
    numbers: dict[Entry, int] = {}
    found: dict[int, str | int] = {}
    free_s, busy_until = 0.0, INF

    def start() -> None:
        nonlocal busy_until
        at = queue.start_s(free_s)
        if busy_until == INF and at is not None:
            batch = queue.start(at)
            found.update({numbers[entry]: int(at) for entry in batch})
            busy_until = at + takes(len(batch))

    def end_until(now: float) -> None:
        nonlocal free_s, busy_until
        while busy_until <= now:
            free_s, busy_until = busy_until, INF
            queue.finish(free_s)
            start()

    for number, when in enumerate(arrivals):
        end_until(when)
        entry = Entry(when, INF)
        if queue.arrive(entry, when, 0.0, 0.0) is None:
            numbers[entry] = number
            queue.ready(entry, when)
            start()
        else:
            found[number] = "full"
    end_until(1e9)
    assert found == expected


@settings(max_examples=150, deadline=None)
@given(data=st.data(), capacity=st.integers(1, 8), limits=limits)
def test_queue_conserves_requests(data: st.DataObject, capacity: int, limits: tuple[int, int]) -> None:
    """Under any order of events: arrived = sum(counts) + length, one end per entry, capacity respected, FCFS."""
    queue = open_queue(capacity, min(limits[0], capacity), max(limits[1], 1))
    held: list[Entry] = []
    begun: list[float] = []
    now_s = 0.0
    for _ in range(data.draw(st.integers(1, 60))):
        now_s += 1.0
        event = data.draw(st.sampled_from(["arrive"] * 4 + ["ready"] * 2 + ["cancel", "serve", "end", "expire", "die"]))
        if event == "arrive":
            entry = Entry(now_s, now_s + data.draw(st.integers(0, 20)), bounce=data.draw(st.booleans()), expire=True)
            refused = queue.arrive(entry, now_s + data.draw(st.integers(0, 9)), 2.0, 1.0)
            if refused is None:
                held.append(entry)
            assert refused is None or refused in {Attempt.BOUNCED, Attempt.QUEUE_FULL, Attempt.EXPIRED}
        elif event == "ready" and held:
            queue.ready(data.draw(st.sampled_from(held)), now_s)
        elif event == "cancel" and held:
            queue.cancel(data.draw(st.sampled_from(held)))
        elif event == "serve":
            begun += [entry.arrived_s for entry in queue.start(now_s)]
        elif event == "end":
            queue.finish(now_s, failed=data.draw(st.booleans()))
        elif event == "expire":
            queue.expire(now_s, 1.0)
        elif event == "die":
            queue.end_all(Attempt.UNAVAILABLE)
        held = [entry for entry in held if entry.state is not EntryState.GONE]
        statistics = queue.statistics()
        assert statistics.arrived == sum(statistics.counts) + statistics.length
        assert statistics.length == queue.length == len(held) <= capacity
        assert len(queue.ages_s(now_s)) == queue.length
    assert begun == sorted(begun)
    queue.end_all(Attempt.UNAVAILABLE)
    assert queue.arrived == sum(queue.counts)


def test_capacity_counts_what_is_in_service() -> None:
    """With 2 places, one in service and one waiting, the third is refused; a finished service makes room."""
    queue = open_queue(capacity=2)
    admitted(queue, 0.0)
    assert queue.start_s(0.0) == 0.0
    queue.start(0.0)
    admitted(queue, 1.0)
    assert queue.arrive(Entry(2.0, INF), 2.0, 1.0, 1.0) is Attempt.QUEUE_FULL
    queue.finish(3.0)
    admitted(queue, 3.0)


def test_first_come_first_served_whatever_is_decoded_first() -> None:
    """The second's input is there first, but nothing starts before the first's."""
    queue = open_queue()
    first, second = admitted(queue, 0.0, ready=False), admitted(queue, 1.0)
    assert queue.start_s(2.0) is None
    assert queue.start(2.0) == []
    queue.ready(first, 5.0)
    assert queue.start_s(2.0) == 5.0
    assert queue.start(5.0) == [first]
    queue.finish(6.0)
    assert queue.start(6.0) == [second]


def test_a_head_that_leaves_lets_the_next_one_start() -> None:
    """Cancelled while its input is being prepared: the place is free, and a late preparation changes nothing."""
    queue = open_queue()
    first, second = admitted(queue, 0.0, ready=False), admitted(queue, 1.0)
    assert queue.cancel(first)
    assert not queue.ready(first, 2.0)
    assert queue.length == 1
    assert queue.start(2.0) == [second]


def test_a_batch_holds_only_who_was_there_at_its_ideal_start() -> None:
    """The device was free at 10; who came at 10.5 is not part of the batch that started then."""
    queue = open_queue(maximum=5)
    early = admitted(queue, 9.0)
    admitted(queue, 9.5)
    admitted(queue, 10.5)
    assert queue.start_s(10.0) == 10.0
    assert queue.start(10.0) == [early], "two were there: a batch of one, not of three"


def test_a_minimum_is_met_by_the_last_of_them() -> None:
    """Three are needed: the batch starts when the third is ready."""
    queue = open_queue(minimum=3, maximum=5)
    admitted(queue, 1.0)
    admitted(queue, 2.0)
    assert queue.start_s(0.0) is None
    admitted(queue, 4.0)
    assert queue.start_s(0.0) == 4.0
    assert len(queue.start(4.0)) == 3


@pytest.mark.parametrize(
    ("start_s", "deadline_s", "flag", "expected"),
    [
        (10.0, 11.9, "bounce", None),  # the device is free: its own queue makes nothing late
        (10.1, 12.0, "bounce", Attempt.BOUNCED),  # 10.1 + 2 > 12
        (10.1, 12.2, "bounce", None),
        (14.0, 14.9, "expire", Attempt.EXPIRED),  # 14 + 1 > 14.9 even at the shortest service time
        (14.0, 15.0, "expire", None),
        (14.0, 14.9, None, None),  # neither flag: served late, as in the paper
        (8.0, 10.5, "expire", Attempt.EXPIRED),  # a start in the past counts as now
    ],
)
def test_decisions_on_arrival(start_s: float, deadline_s: float, flag: str | None, expected: Attempt | None) -> None:
    """At 10, with a predicted service time of 2 and a shortest one of 1."""
    entry = Entry(10.0, deadline_s, bounce=flag == "bounce", expire=flag == "expire")
    assert open_queue().arrive(entry, start_s, 2.0, 1.0) is expected


def test_a_full_queue_bounces_what_it_would_make_late() -> None:
    """With the flag the gateway may try elsewhere; without it the answer is QUEUE_FULL."""
    queue = open_queue(capacity=1)
    admitted(queue, 0.0)
    assert queue.arrive(Entry(0.0, 1.5, bounce=True), 1.0, 1.0, 1.0) is Attempt.BOUNCED
    assert queue.arrive(Entry(0.0, 9.0, bounce=True), 1.0, 1.0, 1.0) is Attempt.QUEUE_FULL
    assert queue.arrive(Entry(0.0, 1.5), 1.0, 1.0, 1.0) is Attempt.QUEUE_FULL


def test_a_margin_shortens_what_a_bounce_may_plan_with() -> None:
    """Four seconds of budget at a margin of a half: a predicted sojourn of 2 s is kept, one of 2.1 s is not."""
    entry = Entry(10.0, 14.0, bounce=True, margin=0.5)
    assert open_queue().arrive(entry, 11.0, 1.0, 1.0) is None
    entry = Entry(10.0, 14.0, bounce=True, margin=0.5)
    assert open_queue().arrive(entry, 11.1, 1.0, 1.0) is Attempt.BOUNCED


def test_unavailable_before_ready_and_while_draining() -> None:
    """A closed queue admits nobody, and a drained one starts what is left without waiting for company."""
    queue = BoundedQueue(15, 3, 5)
    assert queue.arrive(Entry(0.0, INF), 0.0, 1.0, 1.0) is Attempt.UNAVAILABLE
    queue.open()
    last = admitted(queue, 1.0)
    assert queue.start_s(1.0) is None
    queue.drain()
    assert queue.arrive(Entry(2.0, INF), 2.0, 1.0, 1.0) is Attempt.UNAVAILABLE
    assert queue.start(2.0) == [last]


def test_expiry_takes_only_the_hopeless() -> None:
    """At 5 with a shortest service of 2: deadlines 6 (expires), 7 (just possible), 6 without the flag (stays)."""
    queue = open_queue()
    entries = [Entry(0.0, 6.0, expire=True), Entry(0.0, 7.0, expire=True), Entry(0.0, 6.0)]
    for entry in entries:
        assert queue.arrive(entry, 0.0, 2.0, 2.0) is None
    assert queue.next_expiry_s(2.0) == 4.0
    assert queue.expire(5.0, 2.0) == [entries[0]]
    assert queue.next_expiry_s(2.0) == 5.0
    assert queue.counts[Attempt.EXPIRED] == 1


def test_how_a_service_ends() -> None:
    """In time, late, and cancelled while it ran; a model that raised fails the rest."""
    queue = open_queue(maximum=3)
    entries = [Entry(0.0, 10.0), Entry(0.0, 4.0), Entry(0.0, 10.0)]
    for entry in entries:
        queue.arrive(entry, 0.0, 1.0, 1.0)
        queue.ready(entry, 0.0)
    queue.start(0.0)
    assert not queue.cancel(entries[2])
    assert queue.length == 3, "the place is taken until the device is done with it"
    assert [attempt for _, attempt in queue.finish(5.0)] == [Attempt.OK, Attempt.LATE, Attempt.CANCELLED]
    admitted(queue, 6.0)
    queue.start(6.0)
    assert [attempt for _, attempt in queue.finish(7.0, failed=True)] == [Attempt.FAILED]


def test_limits_are_checked() -> None:
    """A minimum above the maximum is refused, one above the capacity cut: it could never be met."""
    with pytest.raises(ValueError, match="minimum"):
        BoundedQueue(15, 5, 3)
    with pytest.raises(ValueError, match="capacity"):
        BoundedQueue(0)
    assert BoundedQueue(2, 3, 5).minimum == 2
