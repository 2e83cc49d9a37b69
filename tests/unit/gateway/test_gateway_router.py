"""The router's arrays: true to what was sent and answered, whoever comes and goes."""

import random

import msgspec
import pytest

from gateway.router import HOLD, REJECT, ROUTERS, ServiceRouter, Target
from protocol.records import InstanceRecord, InstanceState, PolicyStatus, ServiceSpec, Table

SERVICE = "imagenet"
HERE = {"unix:/a", "unix:/b", "unix:/c"}


def spec(router: str = "uniform", variants: tuple[str, ...] = ("heavy", "light"), **settings: object) -> ServiceSpec:
    return ServiceSpec(variants=variants, requirement_ms=300.0, router=router, **settings)  # type: ignore[arg-type]


def record(id: str, variant: str = "light", **changes: object) -> InstanceRecord:
    worker = id.partition("/")[0]
    settings: dict[str, object] = {
        "id": id, "worker": worker, "address": f"unix:/{worker}", "service": SERVICE, "variant": variant,
        "capacity": 3, "state": InstanceState.READY, "epoch": "1", "service_s": 0.1,
    }  # fmt: skip
    return InstanceRecord(**{**settings, **changes})  # type: ignore[arg-type]


def router_of(*records: InstanceRecord, router: str = "uniform", connected: set[str] = HERE) -> ServiceRouter:
    made = ServiceRouter(SERVICE, spec(router))
    made.set_instances(records, connected)
    return made


def table(weights: dict[str, float], version: int = 1, valid_for_s: float = 3.0) -> Table:
    ids = tuple(sorted(weights))
    return Table(
        service=SERVICE,
        version=version,
        valid_for_s=valid_for_s,
        instances=ids,
        weights=tuple(weights[one] for one in ids),
        policy="threshold",
    )


def shares(router: ServiceRouter, now_s: float = 0.0, draws: int = 4000) -> dict[str, float]:
    rng = random.Random(3)
    counts: dict[str, int] = {}
    for _ in range(draws):
        target = router.route(now_s, 1.0, rng.random())
        assert isinstance(target, Target)
        counts[target.id] = counts.get(target.id, 0) + 1
    return {id: number / draws for id, number in counts.items()}


# who is there


def test_an_instance_that_was_loading_is_believed_about_its_service_time_once_it_is_ready() -> None:
    router = ServiceRouter(SERVICE, spec("deadline"))
    router.set_instances([record("a/heavy", "heavy", state=InstanceState.LOADING, service_s=0.0)], HERE)
    router.set_instances([record("a/heavy", "heavy", service_s=0.08)], HERE)
    assert router.service_s == [0.08]


def test_what_this_gateway_observes_counts_until_an_instance_is_idle() -> None:
    """Then its worker's own measurement does: an instance that seemed too slow once is not passed over for ever."""
    router = router_of(record("a/heavy", "heavy", service_s=0.5), router="deadline")
    [target] = router.targets
    router.sent(target, 0.0)
    router.set_instances([record("a/heavy", "heavy", service_s=0.2)], HERE)
    assert router.service_s == [0.5], "a request is there"
    router.answered(target, 0.4, 0, 0.0, 0.4)
    observed = list(router.service_s)
    router.set_instances([record("a/heavy", "heavy", service_s=0.2)], HERE)
    assert router.service_s == observed, "it has just answered"
    router.set_instances([record("a/heavy", "heavy", service_s=0.2)], HERE)
    assert router.service_s == [0.2]


@pytest.mark.parametrize(("heavy_s", "margin"), [(0.043, 0.3), (0.1, 1.25 / 3.0), (0.2, 0.8)])
def test_the_margin_starts_low_but_in_reach_of_the_heaviest(heavy_s: float, margin: float) -> None:
    router = ServiceRouter(SERVICE, spec("deadline"))
    assert router.margin[0] == 0.8
    router.set_instances([record("b/light", service_s=0.01)], HERE)
    router.set_instances([record("a/heavy", "heavy", service_s=heavy_s), record("b/light", service_s=0.01)], HERE)
    assert router.margin[0] == pytest.approx(margin)
    router.learn(0.9 * margin * 0.3, float("inf"), 0.3)
    learned = router.margin[0]
    router.set_instances([record("a/heavy", "heavy", service_s=heavy_s)], HERE)
    assert router.margin[0] == learned < margin


def test_instances_are_numbered_in_sorted_order_and_ranked_by_the_service() -> None:
    router = router_of(record("c/light"), record("a/heavy", "heavy"), record("b/other", "other"))
    assert [target.id for target in router.targets] == ["a/heavy", "b/other", "c/light"]
    assert [target.index for target in router.targets] == [0, 1, 2]
    assert router.rank == [0, 2, 1]
    assert router.capacity == [3, 0, 3], "a variant that the service does not name gets no request"
    assert router.routable == 2


@pytest.mark.parametrize("state", [one for one in InstanceState if one is not InstanceState.READY])
def test_only_ready_instances_get_requests(state: InstanceState) -> None:
    router = router_of(record("a/light", state=state))
    assert router.route(0.0, 1.0, 0.5) == REJECT


def test_an_unreachable_worker_gets_none_until_it_is_reached() -> None:
    router = router_of(record("a/light"), connected=set())
    assert router.route(0.0, 1.0, 0.5) == REJECT
    router.set_connected(HERE)
    assert isinstance(router.route(0.0, 1.0, 0.5), Target)


def test_arrivals_and_departures_keep_what_is_known_of_those_who_stay() -> None:
    router = router_of(record("b/light"))
    kept = router.targets[0]
    router.sent(kept, 0.0)
    router.set_instances([record("a/light"), record("b/light"), record("c/light")], HERE)
    assert router.targets[1] is kept
    assert (router.length, kept.index) == ([0, 1, 0], 1)
    router.set_instances([record("b/light")], HERE)
    assert (router.length, kept.index) == ([1], 0)


def test_a_restarted_instance_starts_afresh_and_late_replies_of_the_old_one_harm_nobody() -> None:
    router = router_of(record("a/light"))
    old = router.targets[0]
    router.sent(old, 0.0)
    router.set_instances([record("a/light", epoch="2")], HERE)
    [new] = router.targets
    assert new is not old
    assert (router.length, new.in_flight, old.index) == ([0], 0, -1)
    router.lost(old)
    router.answered(Target(record("x/light")), 0.0, 5, 1.0, 0.1)
    assert router.length == [0]


def test_one_that_comes_back_holds_what_is_still_in_flight_there() -> None:
    router = router_of(record("a/light"))
    [target] = router.targets
    router.sent(target, 0.0)
    router.sent(target, 0.0)
    router.close(target)
    assert router.routable == 0
    router.answered(target, 0.1, 1, 0.1, 0.1)
    router.set_connected(HERE)
    assert (router.length, router.capacity) == ([1], [3])


def test_what_was_foretold_of_one_that_comes_back_is_no_longer_believed() -> None:
    """It was predicted to be busy for 50 s when it went; its successor on that address has nothing to do."""
    router = router_of(record("a/light"))
    router.clear_s[0] = 50.0
    router.close(router.targets[0])
    router.set_connected(HERE)
    assert router.clear_s == [0.0]
    router.clear_s[0] = 50.0
    router.set_connected(HERE)
    assert router.clear_s == [50.0], "it never went"


def test_a_late_reply_of_one_that_has_gone_is_not_taken_for_its_neighbours() -> None:
    """The numbers of those that stay move up: what is left of the one that went must not point at them."""
    router = router_of(record("a/light"), record("b/light"))
    gone, stays = router.targets
    router.sent(gone, 0.0)
    router.sent(gone, 0.0)
    router.set_instances([record("b/light")], HERE)
    before = (list(router.length), list(router.clear_s), list(router.service_s))
    router.answered(gone, 0.5, 7, 9.0, 3.0)
    router.lost(gone)
    router.close(gone)
    assert (router.length, router.clear_s, router.service_s) == before
    assert router.targets == [stays]
    assert (router.capacity, router.routable, gone.in_flight) == ([3], 1, 0)


# counting


def test_the_prediction_is_the_sum_of_what_is_ahead() -> None:
    router = router_of(record("a/light", service_s=0.1))
    [target] = router.targets
    assert [round(router.sent(target, 5.0), 6) for _ in range(3)] == [0.1, 0.2, 0.3]
    router.answered(target, 5.1, length=2, backlog_s=0.0, service_s=0.1)
    assert router.clear_s[0] == pytest.approx(5.3)


def test_what_others_sent_is_in_the_reply_and_what_is_on_its_way_is_in_flight() -> None:
    router = router_of(record("a/light", service_s=0.1))
    [target] = router.targets
    for _ in range(3):
        router.sent(target, 0.0)
    router.answered(target, 0.1, length=0, backlog_s=0.0, service_s=0.1)
    assert router.length == [2], "the worker had not yet seen the two others"
    router.answered(target, 0.2, length=2, backlog_s=0.9, service_s=0.1)
    assert router.length == [2], "another gateway's, or ours"
    assert router.clear_s[0] == pytest.approx(1.1), "the device is busy with other instances' work"


def test_random_traffic_leaves_nothing_in_flight() -> None:
    rng = random.Random(1)
    router = router_of(record("a/light"), record("b/heavy", "heavy"), record("c/light"))
    under_way: list[Target] = []
    now_s = 0.0
    for _ in range(5000):
        now_s += 0.01
        if rng.random() < 0.5 or not under_way:
            target = router.route(now_s, 1.0, rng.random())
            assert isinstance(target, Target)
            router.sent(target, now_s)
            under_way.append(target)
        else:
            target = under_way.pop(rng.randrange(len(under_way)))
            if rng.random() < 0.3:
                router.lost(target)
            else:
                router.answered(target, now_s, target.in_flight - 1, 0.0, 0.1)
        if rng.random() < 0.01:
            router.set_instances([one.record for one in router.targets], HERE)
        assert min(router.length) >= 0
    for target in under_way:
        router.lost(target)
    assert [target.in_flight for target in router.targets] == [0, 0, 0]


# routing


def test_every_router_name_can_be_configured() -> None:
    router = router_of(record("a/light"), record("b/heavy", "heavy"))
    for name in ROUTERS:
        router.configure(spec(name))
        router.set_connected(HERE)
        assert isinstance(router.route(0.0, 10.0, 0.0), Target), name
    with pytest.raises(ValueError, match="must be one of"):
        router.configure(spec("best"))


def test_a_held_request_waits_while_all_are_busy() -> None:
    router = router_of(record("a/light"), router="single-queue")
    [target] = router.targets
    assert router.route(0.0, 1.0, 0.5) is target
    router.sent(target, 0.0)
    assert router.route(0.0, 1.0, 0.5) == HOLD


def test_the_second_attempt_avoids_the_first_and_a_pinned_one_stays_with_its_variant() -> None:
    router = router_of(record("a/light"), record("b/heavy", "heavy"), record("c/light"))
    first = router.targets[0]
    for draw in (0.0, 0.4, 0.99):
        second = router.route(0.0, 1.0, draw, avoid=first)
        assert isinstance(second, Target)
        assert second is not first
        pinned = router.route(0.0, 1.0, draw, variant="light", avoid=first)
        assert isinstance(pinned, Target)
        assert pinned.id == "c/light"
    assert router.route(0.0, 1.0, 0.5, variant="none") == REJECT


# tables


def test_a_table_is_drawn_from_in_its_proportions() -> None:
    router = router_of(record("a/light"), record("b/heavy", "heavy"), record("c/light"), router="threshold")
    assert router.set_table(table({"a/light": 0.2, "b/heavy": 0.7, "c/light": 0.1}), now_s=0.0)
    found = shares(router)
    assert found["a/light"] == pytest.approx(0.2, abs=0.03)
    assert found["b/heavy"] == pytest.approx(0.7, abs=0.03)


def test_an_expired_table_gives_way_to_deadline() -> None:
    router = router_of(record("a/light"), record("b/heavy", "heavy"), router="threshold")
    router.set_table(table({"a/light": 1.0, "b/heavy": 0.0}, valid_for_s=3.0), now_s=10.0, age_s=1.0)
    assert shares(router, now_s=11.9) == {"a/light": 1.0}
    assert router.statistics(11.9).routing_by == "threshold"
    assert shares(router, now_s=12.1) == {"b/heavy": 1.0}, "the heaviest that meets the deadline"
    assert router.statistics(12.1).routing_by == "deadline"


def test_an_older_table_is_refused_unless_the_one_in_use_has_expired() -> None:
    router = router_of(record("a/light"), router="threshold")
    assert router.set_table(table({"a/light": 1.0}, version=7), now_s=0.0)
    assert not router.set_table(table({"a/light": 1.0}, version=6), now_s=1.0)
    assert router.set_table(table({"a/light": 1.0}, version=1), now_s=3.0), "the board lost its memory"


@pytest.mark.parametrize("weights", [{"a/light": 0.0}, {"a/light": -1.0}, {"a/light": float("nan")}, {"x/gone": 1.0}])
def test_an_unusable_table_changes_nothing(weights: dict[str, float]) -> None:
    router = router_of(record("a/light"), record("b/light"), router="threshold")
    assert router.set_table(table({"a/light": 0.0, "b/light": 1.0}, version=1), now_s=0.0)
    assert not router.set_table(table(weights, version=2), now_s=0.0)
    assert shares(router) == {"b/light": 1.0}


def test_a_table_that_points_at_a_dead_instance_is_bypassed() -> None:
    router = router_of(record("a/light"), record("b/light"), router="threshold")
    router.set_table(table({"a/light": 1.0, "b/light": 0.0}), now_s=0.0)
    router.close(router.targets[0])
    assert shares(router) == {"b/light": 1.0}


def test_a_table_survives_instances_that_come_and_go() -> None:
    router = router_of(record("b/light"), record("c/light"), router="threshold")
    router.set_table(table({"b/light": 0.0, "c/light": 1.0}), now_s=0.0)
    router.set_instances([record("a/light"), record("b/light"), record("c/light")], HERE)
    assert shares(router) == {"c/light": 1.0}


# what is told


def test_an_instance_that_gets_no_requests_says_why() -> None:
    router = router_of(
        record("a/light"),
        record("b/light", state=InstanceState.FAILED, reason="no such file"),
        record("c/light", state=InstanceState.WARMING),
        record("d/light"),
        record("a/other", "other"),
    )
    told = {view.id: (view.ready, view.reason) for view in router.statistics(0.0).instances}
    assert told["a/light"] == (True, "")
    assert told["b/light"] == (False, "no such file")
    assert told["c/light"] == (False, "warming")
    assert told["d/light"][1].startswith("its worker at unix:/d cannot be reached")
    assert "does not list the variant other" in told["a/other"][1]


def test_a_router_that_is_not_in_force_says_why() -> None:
    router = router_of(record("a/light"), router="threshold")

    def told(now_s: float) -> tuple[str, str]:
        statistics = router.statistics(now_s)
        assert statistics.router == "threshold"
        return statistics.routing_by, statistics.reason

    assert told(0.0) == ("deadline", "the scheduler has not sent a table yet: is one running?")
    router.policy = PolicyStatus(policy="threshold", in_force=False, reason="it knows one variant only")
    assert told(0.0) == ("deadline", "it knows one variant only")
    router.policy = PolicyStatus(policy="learned-po", in_force=False, reason="news of the router before this one")
    assert "not sent a table" in told(0.0)[1]
    router.set_table(msgspec.structs.replace(table({"a/light": 1.0}, version=3), policy="learned-po"), now_s=0.0)
    assert router.substituted(0.1) == "the scheduler has not sent a table of threshold yet, the last was learned-po's"
    router.set_table(table({"a/light": 1.0}, version=4, valid_for_s=3.0), now_s=0.0)
    assert told(2.9) == ("threshold", "")
    assert told(5.0) == ("deadline", "table 4 expired 2.0 s ago and the scheduler has not sent another")
    router.set_instances([record("b/light")], HERE)
    assert told(1.0) == ("deadline", "table 4 has no weight for an instance that is there")
    router.configure(spec("uniform"))
    assert router.statistics(9.0).reason == "", "a rule needs no table"
