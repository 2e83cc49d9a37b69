"""Requests through a host on a fake clock: timers that do not drift, one device, and every way to end."""

import json
import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from models.preprocess import Prepared
from models.runtime import EmulatedRuntime
from protocol.outcomes import Attempt
from protocol.records import BOUNCE, EXPIRE, TENSORS, InstanceState
from workers.instance import Instance

Bench = Any  # of this folder's conftest.py, which importlib mode does not let tests import


def test_emulated_timers_do_not_drift(make_bench: Callable[..., Bench]) -> None:
    """1000 services of 10 ms with timers that fire 0 to 3 ms late: the last one ends at exactly 10 s."""
    rng = random.Random(7)
    bench = make_bench(lambda: rng.uniform(0.0, 0.003))
    instance = bench.add("steady", 0.01, capacity=1000)
    for _ in range(1000):
        bench.send("steady")
    bench.clock.advance_to(20.0)
    assert len(bench.replies) == 1000
    last_s, _, reply, _ = bench.replies[-1]
    assert abs(instance.ends_s - 10.0) < 1e-9
    assert last_s - 10.0 < 0.0031
    assert abs(reply.queue_s - 9.99) < 1e-9


def test_after_a_stall_the_timers_catch_up(make_bench: Callable[..., Bench]) -> None:
    """One timer is 2 s late (the host was stopped): services that were due meanwhile end at once, not later."""
    lateness = iter([2.0] + [0.0] * 100)
    bench = make_bench(lambda: next(lateness))
    bench.add("steady", 0.1)
    for _ in range(10):
        bench.send("steady")
    bench.clock.advance_to(2.2)
    assert [round(when_s, 6) for when_s, *_ in bench.replies] == [2.1] * 10


def _shared_device(bench: Bench, sends: list[tuple[int, str]]) -> None:
    takes = {"slow": 0.5, "fast": 0.125}  # exact in binary, so that ends can be compared exactly
    for name, service_s in takes.items():
        bench.add(name, service_s, capacity=100)
    now_s, end_s, expected = 0.0, 0.0, []
    for gap, name in sends:
        now_s += gap / 32
        bench.clock.advance_to(now_s)
        bench.send(name)
        end_s = max(now_s, end_s) + takes[name]
        expected.append(end_s)
    bench.clock.advance_to(1e6)
    assert [when_s for when_s, *_ in bench.replies] == expected


def test_shared_device_random_arrivals(make_bench: Callable[..., Bench]) -> None:
    """Two instances, one executor: each service starts at max(arrival, previous end), in order of arrival."""
    rng = random.Random(3)
    for _ in range(100):
        sends = [(rng.randint(1, 20), rng.choice(["slow", "fast"])) for _ in range(40)]
        _shared_device(make_bench(), sends)


def test_an_instance_that_waits_for_company_does_not_hold_the_device(bench: Bench) -> None:
    """`batch` needs three and has two, older ones; `single` is served meanwhile."""
    bench.add("batch", 1.0, batch=(3, 3))
    bench.add("single", 1.0)
    bench.send("batch")
    bench.send("batch")
    single = bench.send("single")
    bench.clock.advance_to(1.0)
    assert bench.reply_to(single).attempt == Attempt.OK
    assert len(bench.replies) == 1
    bench.send("batch")
    bench.clock.advance_to(10.0)
    assert [reply.batch for _, _, reply, _ in bench.replies] == [1, 3, 3, 3]


def test_backlog_and_status(bench: Bench) -> None:
    """Half a second into a service of 1 s, with one behind it and a 3 s one of the other instance."""
    bench.add("a", 1.0)
    bench.add("b", 3.0)
    for id in ("a", "a", "b"):
        bench.send(id)
    bench.clock.advance_to(0.5)
    a, b = bench.host.status()
    assert (a.length, a.batch, a.elapsed_s, a.ages_s) == (2, 1, 0.5, (0.5, 0.5))
    assert (b.length, b.batch, b.elapsed_s) == (1, 0, 0.0)
    assert a.backlog_s == b.backlog_s == 0.5 + 1.0 + 3.0
    assert (a.service_s, b.service_s) == (1.0, 3.0)


def test_every_reply_has_the_status_after_it(bench: Bench) -> None:
    """The first reply already shows the second request in service."""
    bench.add("a", 1.0)
    bench.send("a")
    bench.send("a")
    bench.clock.advance_to(1.0)
    status = bench.replies[0][2].status
    assert (status.length, status.batch, status.arrived, sum(status.counts)) == (1, 1, 2, 1)


def test_late_is_told_from_ok(bench: Bench) -> None:
    """The second of two 1 s services ends at 2 s: late for a budget of 1.5 s, without the flag to expire."""
    bench.add("a", 1.0)
    first, second = bench.send("a", budget_s=1.5), bench.send("a", budget_s=1.5)
    bench.clock.advance_to(5.0)
    assert bench.reply_to(first).attempt == Attempt.OK
    assert bench.reply_to(second).attempt == Attempt.LATE
    assert bench.replies[1][3], "a late answer is still an answer"


def test_what_is_late_by_a_timer_is_late(make_bench: Callable[..., Bench]) -> None:
    """The ideal clock says 1 s, the answer leaves at 1.5 s: that is what a client with 1.2 s sees."""
    bench = make_bench(lambda: 0.5)
    bench.add("a", 1.0)
    request = bench.send("a", budget_s=1.2)
    bench.clock.advance_to(5.0)
    assert bench.reply_to(request).attempt == Attempt.LATE


def test_a_batch_teaches_the_time_of_its_size(bench: Bench) -> None:
    """Three together take 3 s: one alone is still expected to take 1 s."""
    instance = bench.add("a", 1.0, batch=(3, 3))
    for _ in range(3):
        bench.send("a")
    bench.clock.advance_to(5.0)
    assert bench.replies[0][2].batch == 3
    assert (instance.times.mean_s(1), instance.times.mean_s(3)) == (1.0, 3.0)


def test_nothing_is_left_of_a_service_that_ended_before_its_foretold_end(bench: Bench) -> None:
    instance = bench.add("a", 1.0)
    bench.send("a")
    bench.clock.advance_to(1.0)
    instance.ends_s = 9.0  # as foretold of a real model, which ended early
    assert bench.host.backlog_s(1.0) == 0.0


def test_bounce_and_expiry_on_arrival(bench: Bench) -> None:
    """Behind a 1 s service, 1.5 s of budget is too little: told at once, by the flag that was set."""
    bench.add("a", 1.0)
    bench.send("a")
    bounced = bench.send("a", budget_s=1.5, flags=BOUNCE | EXPIRE)
    expired = bench.send("a", budget_s=1.5, flags=EXPIRE)
    kept = bench.send("a", budget_s=2.5, flags=BOUNCE | EXPIRE)
    assert bench.reply_to(bounced).attempt == Attempt.BOUNCED
    assert bench.reply_to(expired).attempt == Attempt.EXPIRED
    assert bench.reply_to(kept) is None


def test_an_idle_instance_takes_what_its_estimate_says_is_too_long(bench: Bench) -> None:
    """A wrong estimate (one hiccup) must not shut the door for ever: one request corrects it."""
    instance = bench.add("a", 0.1)
    for _ in range(100):
        instance.times.observe(1, 50.0)
    taken = bench.send("a", budget_s=1.0, flags=BOUNCE | EXPIRE)
    before_s = instance.times.mean_s(1)
    bench.clock.advance_to(1.0)
    assert bench.reply_to(taken).attempt == Attempt.OK
    assert instance.times.mean_s(1) < before_s


def test_a_request_expires_while_it_waits(bench: Bench) -> None:
    """It waits for company that never comes: answered as soon as it cannot finish, long before anything starts."""
    bench.add("a", 1.0, batch=(3, 3))
    waiting = bench.send("a", budget_s=4.0, flags=EXPIRE)
    bench.clock.advance_to(2.9)
    assert bench.reply_to(waiting) is None
    bench.clock.advance_to(3.1)
    assert bench.reply_to(waiting).attempt == Attempt.EXPIRED
    assert bench.host.status()[0].length == 0


def test_expiry_goes_before_compute(bench: Bench) -> None:
    """Services ahead take 3 s and not 1 s as foretold; what became hopeless is dropped, the next one is served."""
    instance = bench.add("a", 1.0)
    instance.runtime = EmulatedRuntime(_slower(instance.runtime.variant))
    bench.send("a")
    bench.send("a")
    hopeless, patient = bench.send("a", budget_s=5.5, flags=EXPIRE), bench.send("a", budget_s=9.5, flags=EXPIRE)
    assert not bench.replies
    bench.clock.advance_to(20.0)
    assert bench.reply_to(hopeless).attempt == Attempt.EXPIRED
    assert bench.reply_to(patient).attempt == Attempt.OK
    assert bench.host.status()[0].counts[Attempt.OK] == 3


def test_expiry_does_not_wait_for_its_timer(make_bench: Callable[..., Bench]) -> None:
    """The expiry timer is very late (a busy loop): the end of the service ahead finds the hopeless one all the same."""
    lateness = iter([0.0, 100.0] + [0.0] * 10)
    bench = make_bench(lambda: next(lateness))
    instance = bench.add("a", 1.0)
    instance.runtime = EmulatedRuntime(_slower(instance.runtime.variant))
    bench.send("a")
    bench.send("a")
    hopeless = bench.send("a", budget_s=5.5, flags=EXPIRE)
    bench.clock.advance_to(5.9)
    assert not bench.reply_to(hopeless), "its timer is late"
    bench.clock.advance_to(6.0)
    assert bench.reply_to(hopeless).attempt == Attempt.EXPIRED


def _slower(variant: Any) -> Any:
    return msgspec.structs.replace(variant, emulated=msgspec.structs.replace(variant.emulated, service_ms=3000.0))


def test_cancel_frees_the_place_at_once_unless_in_service(bench: Bench) -> None:
    """Two places: one in service, one waiting. Cancelling the waiting one lets another in at once."""
    bench.add("a", 1.0, capacity=2)
    served, waiting = bench.send("a"), bench.send("a")
    assert bench.reply_to(bench.send("a")).attempt == Attempt.QUEUE_FULL
    bench.host.cancel(waiting)
    assert bench.reply_to(waiting).attempt == Attempt.CANCELLED
    replacement = bench.send("a")
    assert bench.reply_to(replacement) is None
    bench.host.cancel(served)
    assert bench.reply_to(served) is None
    bench.clock.advance_to(1.0)
    assert bench.reply_to(served).attempt == Attempt.CANCELLED
    bench.host.cancel(served)  # once more changes nothing
    bench.clock.advance_to(5.0)
    assert bench.reply_to(replacement).attempt == Attempt.OK


def test_who_was_held_back_by_one_that_leaves_starts_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """First come, first served: the second is decoded first and waits for the first, whose client then goes."""
    decoded: list[Callable[[Prepared], None]] = []
    monkeypatch.setattr(Instance, "emulated", False)
    monkeypatch.setattr(bench.host._preparer, "submit", lambda request, runtime, done: decoded.append(done))
    bench.add("a", 1.0)
    first, second = bench.send("a"), bench.send("a")
    decoded[1](Prepared(label=1))
    bench.clock.advance_to(3.0)
    assert not bench.replies
    bench.host.cancel(first)
    bench.clock.advance_to(4.0)
    assert bench.reply_to(first).attempt == Attempt.CANCELLED
    assert bench.reply_to(second).attempt == Attempt.OK


def test_a_model_that_raises_fails_its_batch_only(bench: Bench, raising_runtime: EmulatedRuntime) -> None:
    """FAILED with the reason; the next request is served."""
    bench.add("a", 1.0, runtime=raising_runtime)
    bad, good = bench.send("a", payload=b"tidegate-label:2\n"), bench.send("a", payload=b"tidegate-label:1\n")
    bench.clock.advance_to(5.0)
    assert bench.reply_to(bad).attempt == Attempt.FAILED
    assert "the model broke" in bench.reply_to(bad).reason
    assert bench.reply_to(good).attempt == Attempt.OK


def test_a_bad_payload_is_invalid_and_takes_no_time(bench: Bench) -> None:
    """An empty body: INVALID with the status for HTTP, and the place is free."""
    bench.add("a", 1.0)
    reply = bench.reply_to(bench.send("a", payload=b""))
    assert (reply.attempt, reply.http_status) == (Attempt.INVALID, 400)
    assert reply.reason
    assert reply.status.length == 0


def test_unknown_instance(bench: Bench) -> None:
    """UNAVAILABLE, and counted by the host, since no instance can."""
    reply = bench.reply_to(bench.send("nobody"))
    assert reply.attempt == Attempt.UNAVAILABLE
    assert bench.host.statistics().unknown == 1


def test_the_answers_two_forms(bench: Bench) -> None:
    """JSON predictions, best first; or raw scores with their shape."""
    bench.add("a", 1.0)
    bench.send("a", payload=b"tidegate-label:1\n")
    bench.send("a", payload=b"tidegate-label:2\n", flags=TENSORS)
    bench.clock.advance_to(5.0)
    (_, _, _, predictions), (_, _, raw, scores) = bench.replies
    assert json.loads(predictions)["predictions"][0] == {"label": "dog", "class_id": 1, "score": 1.0}
    assert raw.shape == (3,)
    assert np.frombuffer(scores, "<f4").tolist() == [0.0, 0.0, 1.0]


def test_draining_starts_what_waited_for_company_and_says_when_empty(bench: Bench) -> None:
    """Two wait for a third; draining serves them, refuses others, and reports the empty queue."""
    instance = bench.add("a", 1.0, batch=(3, 3))
    for _ in range(3):
        bench.send("a")
    bench.clock.advance_to(5.0)
    assert not instance.emptied.is_set(), "empty, but not draining"
    bench.send("a")
    bench.send("a")
    instance.state = InstanceState.DRAINING
    bench.host.drain(instance)
    assert bench.reply_to(bench.send("a")).attempt == Attempt.UNAVAILABLE
    assert not instance.emptied.is_set()
    bench.clock.advance_to(20.0)
    assert instance.emptied.is_set()
    assert instance.queue.arrived == sum(instance.queue.counts) == 6


def test_draining_is_over_when_the_last_one_leaves_unserved(bench: Bench) -> None:
    """The other instance has the device; the one that waits here is cancelled."""
    bench.add("busy", 1.0)
    instance = bench.add("a", 1.0)
    bench.send("busy")
    waiting = bench.send("a")
    instance.state = InstanceState.DRAINING
    bench.host.drain(instance)
    assert not instance.emptied.is_set()
    bench.host.cancel(waiting)
    assert instance.emptied.is_set()


def test_conservation_random(make_bench: Callable[..., Bench]) -> None:
    """Random sends, cancels, waits and deaths: every request is answered exactly once, and the counts agree."""
    for seed in range(60):
        rng = random.Random(seed)
        bench = make_bench(lambda rng=rng: rng.uniform(0.0, 0.01))
        instances = [bench.add("a", 0.05, capacity=4), bench.add("b", 0.02, capacity=6, batch=(3, 5))]
        sent = []
        for _ in range(300):
            kind = rng.random()
            if kind < 0.6:
                flags = rng.choice([0, BOUNCE, EXPIRE, BOUNCE | EXPIRE])
                sent.append(bench.send(rng.choice("ab"), budget_s=rng.uniform(0.0, 0.5), flags=flags))
            elif kind < 0.75 and sent:
                bench.host.cancel(rng.choice(sent))
            elif kind < 0.76:
                bench.host.end_all(rng.choice(instances), Attempt.UNAVAILABLE)
            else:
                bench.clock.advance_to(bench.clock.now_s() + rng.uniform(0.0, 0.1))
        for instance in instances:
            bench.host.drain(instance)
        bench.clock.advance_to(1e3)
        assert all(bench.reply_to(request) is not None for request in sent)
        assert len(bench.replies) == len(sent) == sum(instance.queue.arrived for instance in instances)
        for code, count in enumerate(map(sum, zip(*(i.queue.counts for i in instances), strict=True))):
            assert count == sum(reply.attempt == code for _, _, reply, _ in bench.replies)


def test_what_else_the_device_has_to_do_counts_in_the_backlog(bench: Bench) -> None:
    """Edge requests of the same worker: gateways predict with it, and its own part stays known."""
    bench.add("a", 1.0)
    bench.send("a")
    bench.host.beside_s = lambda now_s: 2.0 - now_s
    bench.clock.advance_to(0.5)
    (status,) = bench.host.status()
    assert status.backlog_s == pytest.approx(0.5 + 1.5)
    assert bench.host.own_backlog_s(0.5) == pytest.approx(0.5)
