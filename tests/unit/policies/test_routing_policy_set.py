"""Which trained policy acts for which instances, and what is said of artifacts that cannot serve."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from policies.routing.artifact import PRETRAINED, write_artifact
from policies.routing.contract import InstanceKind, RoutingError, observation_of
from policies.routing.features import layout_for
from policies.routing.policy_set import load_policies
from policies.routing.presets import PAPER_KINDS

H, L = InstanceKind("heavy", 0, 0.04, 0.8), InstanceKind("light", 1, 0.01, 0.7)


def artifact(
    folder: Path, name: str, kinds: tuple[InstanceKind, ...], favourite: int, router: str = "learned-po"
) -> Path:
    """A network that gives nearly everything to one place of its layout, whatever it sees."""
    layout = layout_for(kinds)
    rng = np.random.default_rng(0)
    sizes = [(8, layout.size), (8, 8), (len(kinds), 8)]
    tensors: dict[str, NDArray[np.float32]] = {}
    for key, size in zip((0, 2, 4), sizes, strict=True):
        tensors[f"{key}.weight"] = (0.01 * rng.standard_normal(size)).astype(np.float32)
        tensors[f"{key}.bias"] = np.zeros(size[0], dtype=np.float32)
    tensors["4.bias"][favourite] = 20.0
    written = write_artifact(folder, router, layout, tensors, slot_s=1.0, workload="test", training={})
    for path in (written, written.with_suffix(".safetensors")):
        path.rename(path.with_name(name + path.suffix))
    return folder / f"{name}.json"


def chosen(kinds: tuple[InstanceKind, ...], ready: list[bool], source: Path) -> int:
    """The instance that gets nearly everything."""
    n = len(kinds)
    seen = observation_of([0] * n, [0.0] * n, [()] * n, [0] * n, ready)
    action = load_policies(source, kinds, "learned-po").act(seen, np.random.default_rng(0))
    assert action.probabilities.sum() == pytest.approx(1.0)
    assert action.probabilities.max() > 0.99
    return int(action.probabilities.argmax())


def test_a_policy_trained_for_exactly_the_ready_instances_is_chosen_else_the_whole_sets_is_masked(
    tmp_path: Path,
) -> None:
    whole = artifact(tmp_path, "learned-po", (H, H, L, L), favourite=1)
    artifact(tmp_path / "learned-po", "one-heavy-less", (H, L, L), favourite=2)
    kinds = (H, H, L, L)
    assert chosen(kinds, [True] * 4, whole) == 1
    assert chosen(kinds, [False, True, True, True], whole) == 3, "the third of those that are left"
    assert chosen(kinds, [True, False, True, True], whole) == 3
    assert chosen(kinds, [True, True, True, False], whole) == 1, (
        "no policy for two heavy and one light: the whole set's"
    )
    policies = load_policies(whole, kinds)
    assert policies.remark(np.array([True] * 4)) == ""
    assert "exactly them" in policies.remark(np.array([False, True, True, True]))
    assert "masked" in policies.remark(np.array([True, True, True, False]))


def test_the_order_of_ids_does_not_matter(tmp_path: Path) -> None:
    path = artifact(tmp_path, "learned-po", (H, L, L), favourite=0)
    assert chosen((L, H, L), [True] * 3, path) == 1


def test_a_folder_of_artifacts_is_a_set_and_an_empty_one_is_named(tmp_path: Path) -> None:
    artifact(tmp_path / "runs", "a", (H, L), favourite=1)
    artifact(tmp_path / "runs", "b", (L,), favourite=0)
    assert chosen((H, L), [True, True], tmp_path / "runs") == 1
    assert chosen((H, L), [False, True], tmp_path / "runs") == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(RoutingError, match="holds no artifact"):
        load_policies(tmp_path / "empty", (H, L))
    with pytest.raises(RoutingError, match="no trained policy is shipped for learned-xx"):
        load_policies("learned-xx", (H, L))


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ((H, L, L), "trained for 1 heavy \\+ 1 light, but 1 heavy \\+ 2 light exist"),
        ((InstanceKind("other", 0, 0.04, 0.8), L), "but 1 light \\+ 1 other exist"),
        ((InstanceKind("heavy", 0, 0.04, 0.8, capacity=99), L), "capacity = 99 of heavy: .* at most 15 places"),
    ],
)
def test_instances_that_it_was_not_trained_for_are_named(
    tmp_path: Path, kinds: tuple[InstanceKind, ...], message: str
) -> None:
    path = artifact(tmp_path, "learned-po", (H, L), favourite=0)
    with pytest.raises(RoutingError, match=message):
        chosen(kinds, [True] * len(kinds), path)


def test_another_routers_artifact_is_named(tmp_path: Path) -> None:
    path = artifact(tmp_path, "x", (H, L), favourite=0, router="learned-fo")
    with pytest.raises(RoutingError, match=r"x.* is a learned-fo, but the service's router is learned-po"):
        load_policies(path, (H, L), "learned-po")


def test_of_a_folder_the_routers_own_artifacts_are_taken(tmp_path: Path) -> None:
    artifact(tmp_path, "a", (H, L), favourite=0, router="learned-fo")
    with pytest.raises(RoutingError, match="holds no artifact of learned-po, but of learned-fo"):
        load_policies(tmp_path, (H, L), "learned-po")
    artifact(tmp_path, "b", (H, L), favourite=0)
    assert load_policies(tmp_path, (H, L), "learned-po").name == "learned-po"
    assert load_policies(f"{PRETRAINED}/", PAPER_KINDS, "learned-po-batch").name == "learned-po-batch"


def test_broken_artifacts_are_named(tmp_path: Path) -> None:
    path = artifact(tmp_path, "learned-po", (H, L), favourite=0)
    record, weights = json.loads(path.read_text()), path.with_suffix(".safetensors").read_bytes()

    def fails(match: str) -> None:
        with pytest.raises(RoutingError, match=match):
            load_policies(path, (H, L), "learned-po")

    for text, match in (
        ("[]", "format = none"),
        (json.dumps({**record, "format": 2}), "format = 2"),
        (json.dumps({key: value for key, value in record.items() if key != "slot_s"}), "slot_s is missing"),
        (json.dumps({**record, "layout": {**record["layout"], "colour": 1}}), "another feature layout"),
        (json.dumps({**record, "layout": {**record["layout"], "places": 7}}), "layout_hash"),
    ):
        path.write_text(text)
        fails(match)
    path.write_text(json.dumps(record))
    path.with_suffix(".safetensors").write_bytes(weights[:100])
    fails("broken")
    path.with_suffix(".safetensors").unlink()
    fails(r"artifact .*learned-po\.safetensors does not exist beside learned-po\.json$")
    path.unlink()
    fails(r"artifact .*learned-po\.json does not exist$")
