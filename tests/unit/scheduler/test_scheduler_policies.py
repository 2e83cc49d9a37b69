"""Which policy stands behind a router's name; `learned-set` behind any set of instances."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from policies.routing.artifact import write_record
from policies.routing.contract import InstanceKind, observation_of
from policies.routing.policy_set import PolicySet
from policies.routing.set_features import SIZE
from policies.routing.set_network import SetPolicy
from policies.routing.tables import Infaas, Stationary, Threshold
from protocol.records import ServiceSpec
from scheduler.policies import make_policy

KINDS = (InstanceKind("heavy", 0, 0.043, 0.8), *(InstanceKind("light", 1, 0.0115, 0.7),) * 4)
SPEC = ServiceSpec(variants=("heavy", "light"), requirement_ms=300.0)


def set_artifact(folder: Path, heavy: float) -> str:
    """A learned-set with an untrained network that gives this share to the heaviest variant whatever it sees."""
    tensors: dict[str, NDArray[np.float32]] = {}
    for key, outputs, inputs in (("0", 3, SIZE), ("2", 3, 3), ("4", 2, 3)):
        tensors[f"{key}.weight"] = np.zeros((outputs, inputs), dtype=np.float32)
        tensors[f"{key}.bias"] = np.zeros(outputs, dtype=np.float32)
    tensors["4.bias"][:] = np.log([heavy, 1.0 - heavy])
    return str(write_record(folder, "learned-set", tensors, {"slot_s": 1.0, "features": SIZE}))


def test_learned_set_serves_a_set_that_nobody_trained_for(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(SPEC, policy_file=set_artifact(tmp_path, 0.2))
    policy = make_policy("learned-set", KINDS, spec, 1.0)
    assert isinstance(policy, SetPolicy)
    ready = [True, True, False, True, False]
    table = policy.act(
        observation_of([0] * 5, [0.0] * 5, [[]] * 5, [0] * 5, ready), np.random.default_rng(0)
    ).probabilities
    assert table == pytest.approx([0.2, 0.4, 0.0, 0.4, 0.0], abs=1e-6)


def test_names_stand_for_what_they_say() -> None:
    assert make_policy("deadline", KINDS, SPEC, 1.0) is None
    assert isinstance(make_policy("threshold", KINDS, SPEC, 1.0), Threshold)
    assert isinstance(make_policy("infaas", KINDS, SPEC, 1.0), Infaas)
    assert isinstance(make_policy("learned-po", KINDS, SPEC, 1.0), PolicySet)
    with pytest.raises(ValueError, match="phase_rates"):
        make_policy("stationary", KINDS, SPEC, 1.0)
    told = msgspec.structs.replace(SPEC, phase_rates=(180.0, 10.0))
    assert isinstance(make_policy("stationary", KINDS, told, 1.0), Stationary)
    with pytest.raises(ValueError, match=r"nowhere\.json does not exist"):
        make_policy("learned-set", KINDS, msgspec.structs.replace(SPEC, policy_file="/nowhere"), 1.0)
