"""Outcomes and records: what the wire and the board carry, and the one violation ratio."""

import msgspec
import pytest

from protocol.outcomes import HTTP_STATUS, NOT_COUNTED, VIOLATIONS, Attempt, Outcome, violation_ratio
from protocol.records import (
    Deployment,
    Infer,
    InstanceRecord,
    InstanceSpec,
    InstanceState,
    Reply,
    ServiceSpec,
    Status,
    Table,
    WorkerSpec,
)


def test_attempts_begin_with_the_outcomes() -> None:
    """A worker's code can be taken for the outcome without a table; two more end an attempt only."""
    assert [(one.name, one.value) for one in Outcome] == [(one.name, one.value) for one in Attempt][: len(Outcome)]
    assert {one.name for one in Attempt} - {one.name for one in Outcome} == {"BOUNCED", "LOST"}


def test_every_outcome_has_a_status_and_a_side() -> None:
    """OK keeps the promise, INVALID and CANCELLED are the client's doing, the rest breaks it."""
    assert set(HTTP_STATUS) == set(Outcome)
    assert set(Outcome) - VIOLATIONS - NOT_COUNTED == {Outcome.OK}
    assert not VIOLATIONS & NOT_COUNTED


@pytest.mark.parametrize(
    ("counts", "ratio"),
    [
        ({}, 0.0),
        ({Outcome.INVALID: 5, Outcome.CANCELLED: 5}, 0.0),
        ({Outcome.OK: 3, Outcome.LATE: 1, Outcome.INVALID: 90}, 0.25),
        (dict.fromkeys(Outcome, 1), 5 / 6),
    ],
)
def test_violation_ratio(counts: dict[Outcome, int], ratio: float) -> None:
    """By hand."""
    assert violation_ratio(counts) == pytest.approx(ratio)


def test_wire_structs_are_positional() -> None:
    """Arrays, not maps; and a newer sender's extra field does not break an older reader."""
    asked = Infer("w/a", 0.3, "image/png", 3, 2)
    data = msgspec.msgpack.encode(asked)
    assert msgspec.msgpack.decode(data) == ["w/a", 0.3, "image/png", 3, 2, 1.0]
    newer = msgspec.msgpack.encode(["w/a", 0.3, "image/png", 3, 2, 1.0, "something new"])
    assert msgspec.msgpack.decode(newer, type=Infer) == asked
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(["w/a", 0.3]), type=Infer) == Infer("w/a", 0.3)
    reply = Reply(Attempt.OK, Status("w/a", 2, 0.1, (0.3, 0.2), 1, 0.5, 0.04, 9, (7,)), shape=(1, 10))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(reply), type=Reply) == reply


def test_board_records_are_readable_json() -> None:
    """By key; unknown keys of a newer version are skipped where a record grows."""
    record = InstanceRecord(
        id="w/a",
        worker="w",
        address="unix:/x",
        service="s",
        variant="a",
        capacity=15,
        state=InstanceState.READY,
        epoch="e",
    )
    readable = msgspec.json.decode(msgspec.json.encode(record))
    assert (readable["id"], readable["state"]) == ("w/a", "ready")
    assert msgspec.convert(readable | {"something_new": 1}, InstanceRecord) == record
    table = Table(
        service="s",
        version=1,
        valid_for_s=2.0,
        instances=("w/a",),
        weights=(1.0,),
        policy="p",
        batch_limits={"a": (1, 3)},
    )
    assert msgspec.json.decode(msgspec.json.encode(table), type=Table) == table


def test_specs_refuse_unknown_keys() -> None:
    """What an operator misspells must not be ignored."""
    for spec, given in (
        (ServiceSpec, {"variants": ["a"], "requirement_ms": 1, "requirment_ms": 2}),
        (InstanceSpec, {"variant": "a", "capasity": 3}),
        (WorkerSpec, {"name": "w", "gpu": True}),
    ):
        with pytest.raises(msgspec.ValidationError, match="unknown field"):
            msgspec.convert(given, spec)


def test_a_deployment_survives_the_board() -> None:
    """Tuples and nested specs come back as they were."""
    deployment = Deployment(
        name="d",
        services={"s": ServiceSpec(variants=("a", "b"), requirement_ms=300)},
        workers=(WorkerSpec(name="w", instances=(InstanceSpec(variant="a", batch=(1, 5)),)),),
        version=3,
    )
    assert msgspec.json.decode(msgspec.json.encode(deployment), type=Deployment) == deployment
