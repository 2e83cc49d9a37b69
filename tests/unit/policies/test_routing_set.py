"""`learned-set`: one network for any number of instances, in numpy as in torch, whatever their order."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from policies.routing.artifact import PRETRAINED, read_artifact, write_record
from policies.routing.contract import AGES, InstanceKind, Observation, RoutingError, observation_of
from policies.routing.network import Scheduler
from policies.routing.presets import PAPER_KINDS, paper_service
from policies.routing.queueing_model import HEAD, LENGTH, NOW_S, RING, SERVING, STARTED_S, paper_arrivals
from policies.routing.set_environment import SetEnvironments
from policies.routing.set_features import PER_ROLE, PLACES, SIZE, SLOT_S, describe, shares, spread
from policies.routing.set_network import NAME, SetPolicy, load_set_policy, observed
from policies.routing.set_sizes import MIDDLE, PER_THIRD, sized

SIZES = ("1+1", "2x2", "2x7", "3x1", "3x16", "1+2", "5+1")


@pytest.fixture
def network() -> Scheduler:
    torch.manual_seed(0)
    made = Scheduler(SIZE, 2)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
    return made


def tensors_of(network: Scheduler) -> dict[str, NDArray[np.float32]]:
    return {k: v.detach().numpy().copy() for k, v in network.actor.state_dict().items()}


def random_observation(n: int, seed: int) -> Observation:
    rng = np.random.default_rng(seed)
    length = rng.integers(0, 18, n)
    ages = [np.sort(rng.uniform(0.0, 0.9, k))[::-1].tolist() for k in length]
    return observation_of(length.tolist(), (0.02 * (length > 0)).tolist(), ages, [1] * n, [True] * n)


def chosen(observation: Observation, which: list[int]) -> Observation:
    """Some of the instances of an observation, in this order; one named twice is there twice."""
    fields = ("length", "elapsed_s", "ages_s", "in_service", "ready")
    return Observation(*(getattr(observation, name)[which] for name in fields))


@pytest.mark.parametrize("size", SIZES)
def test_numpy_gives_what_torch_gives_at_every_size(network: Scheduler, size: str) -> None:
    service, load = sized(size)
    environments = SetEnvironments(service, paper_arrivals(load), 5, 1)
    policy = SetPolicy(tensors_of(network), service.kinds)
    for _ in range(20):
        seen, length = environments.observe(), environments.slots.state.queue[:, :, LENGTH]
        with torch.no_grad():
            expected = torch.softmax(network.actor(torch.from_numpy(seen)), 1)[:, 0].numpy()
        heavy = policy.heavy(seen)
        assert np.abs(heavy - expected).max() < 1e-5
        table = policy.tables(seen, length)
        assert np.allclose(table.sum(axis=1), 1.0)
        assert np.allclose(table[:, policy.shape.variant == 0].sum(axis=1), heavy)
        environments.step(heavy)


@pytest.mark.parametrize("size", SIZES)
def test_simulated_and_live_observations_give_one_vector(size: str) -> None:
    service, load = sized(size)
    environments = SetEnvironments(service, paper_arrivals(8.0 * load), 10, 4)
    for _ in range(30):
        environments.step(np.full(10, 0.9))
    vectors, state = environments.observe(), environments.slots.state
    ring = (state.queue.shape[2] - RING) // 2
    n = len(service.kinds)
    assert state.queue[:, :, LENGTH].max() > 2
    for e in range(10):
        now_s = state.clock[e, NOW_S]
        length = state.queue[e, :, LENGTH].tolist()
        ages = [
            [now_s - state.times[e, i, RING + (state.queue[e, i, HEAD] + k) % ring] for k in range(length[i])]
            for i in range(n)
        ]
        serving = state.queue[e, :, SERVING].tolist()
        elapsed = [now_s - state.times[e, i, STARTED_S] if serving[i] else 0.0 for i in range(n)]
        live = observation_of(length, elapsed, ages, serving, [True] * n)
        assert np.allclose(observed(environments.shape, live, live.ready), vectors[e], atol=1e-6)


def test_the_vector_holds_averages_by_role() -> None:
    """Against numpy's own means, role by role."""
    kinds = sized("3x4")[0].kinds
    seen = random_observation(12, 3)
    vector = observed(describe(kinds), seen, seen.ready)
    for role in range(3):
        part, mine = vector[role * PER_ROLE : (role + 1) * PER_ROLE], slice(4 * role, 4 * role + 4)
        hot = np.eye(PLACES + 1)[np.minimum(seen.length[mine], PLACES)]
        assert np.allclose(part[: PLACES + 1], hot.mean(axis=0))
        elapsed = seen.elapsed_s[mine] / kinds[4 * role].service_s
        assert part[PLACES + 1] == pytest.approx(np.minimum(elapsed, 1.0).mean())
        ages = np.minimum(seen.ages_s[mine] / (15 * 0.043), 1.0)
        assert np.allclose(part[PLACES + 2 : PLACES + 2 + AGES], ages.mean(axis=0), atol=1e-6)
        speed = [4 / 0.043, 4 / MIDDLE.service_s, 4 / 0.0115]
        assert part[-2:] == pytest.approx([0.5, speed[role] / sum(speed)])


def test_the_order_of_instances_does_not_matter(network: Scheduler) -> None:
    kinds = sized("3x4")[0].kinds
    order = np.random.default_rng(2).permutation(12).tolist()
    seen, rng = random_observation(12, 5), np.random.default_rng(0)
    straight = SetPolicy(tensors_of(network), kinds).act(seen, rng).probabilities
    mixed = SetPolicy(tensors_of(network), [kinds[i] for i in order]).act(chosen(seen, order), rng).probabilities
    assert straight.std() > 0.01
    assert np.allclose(straight[order], mixed, atol=1e-7)


def test_a_service_twice_as_large_in_the_same_state_looks_the_same_but_larger(network: Scheduler) -> None:
    kinds, seen = sized("3x2")[0].kinds, random_observation(6, 7)
    twice = [0, 1, 2, 3, 4, 5] * 2
    one = observed(describe(kinds), seen, seen.ready)
    many = chosen(seen, twice)
    two = observed(describe([kinds[i] for i in twice]), many, many.ready)
    counts = np.arange(SIZE) % PER_ROLE == PER_ROLE - 2
    assert np.allclose(one[~counts], two[~counts], atol=1e-6)
    assert np.allclose(one[counts], np.sqrt(2.0) * two[counts])
    policies = [SetPolicy(tensors_of(network), [kinds[i] for i in which]) for which in (twice[:6], twice)]
    assert policies[0]._layers[0][0].shape == policies[1]._layers[0][0].shape == (SIZE, 90)


def test_instances_that_are_not_ready_are_as_if_they_were_not_there(network: Scheduler) -> None:
    kinds, seen = sized("3x2")[0].kinds, random_observation(6, 8)
    rng, left = np.random.default_rng(0), [0, 2, 5]
    seen.ready[[1, 3, 4]] = False
    policy = SetPolicy(tensors_of(network), kinds)
    table = policy.act(seen, rng).probabilities
    fewer = SetPolicy(tensors_of(network), [kinds[i] for i in left]).act(chosen(seen, left), rng).probabilities
    assert np.allclose(table[left], fewer)
    assert table[[1, 3, 4]].sum() == 0.0
    assert "3 of 6" in policy.remark(seen.ready)
    seen.ready[:] = [False, False, False, True, True, False]  # no heavy instance: the middle one is the heaviest now
    assert policy.act(seen, rng).probabilities.sum() == pytest.approx(1.0)
    seen.ready[:] = [True, True, False, False, False, False]  # one variant gets all
    assert policy.act(seen, rng).probabilities[:2].sum() == pytest.approx(1.0)
    seen.ready[:] = False
    assert policy.act(seen, rng).probabilities.sum() == 0.0
    assert policy.remark(np.ones(6, dtype=np.bool_)) == ""


def test_shares_keep_variants_equally_safe() -> None:
    """The heaviest at load u: the others' (1 - load) over service time equals (1 - SAFE_LOAD) over its own, scaled."""
    shape = describe(sized("3x4")[0].kinds)
    found = shares(shape, np.array([0.1, 0.5, 1.0, 0.0]))
    middle = 0.1 * (0.043 / 0.022) * (1.0 - 0.4 * 0.022 / 0.043) / 0.6
    assert found[0] == pytest.approx([0.1, middle, 0.9 - middle])
    assert found[1] == pytest.approx([0.5, 0.5, 0.0])
    assert found[2] == pytest.approx([1.0, 0.0, 0.0])
    assert found[3] == pytest.approx([0.0, 0.0, 1.0])
    assert shares(describe(PAPER_KINDS[:2]), np.array([0.3])) == pytest.approx(np.array([[1.0]]))


def test_instances_share_by_what_they_can_still_serve_in_the_slot() -> None:
    shape = describe(PAPER_KINDS)
    table = spread(shape, np.array([[0.8, 0.2]]), np.array([[15, 3, 0, 10]]))
    heavy, light = 1 / 0.043, 1 / 0.0115
    expected = [
        *(0.8 * (heavy - np.array([15, 3])) / (2 * heavy - 18)),
        *(0.2 * (light - np.array([0, 10])) / (2 * light - 10)),
    ]
    assert table[0] == pytest.approx(expected)


def test_sizes_have_names() -> None:
    service, load = sized("2x2")
    assert (service, load) == (paper_service(), 1.0)
    assert sized("1+2", 0.2)[0].requirement_s == 0.2
    assert [k.rank for k in sized("1+2")[0].kinds] == [0, 1, 1]
    assert sized("2x2@0.7") == (paper_service(), 0.7)
    assert sized("2x8@0.5")[1] == 2.0
    assert sized("1+2@2")[1] == 2.0
    kinds, load = sized("3x2")[0].kinds, sized("3x2")[1]
    assert [k.rank for k in kinds] == [0, 0, 1, 1, 2, 2]
    assert load == 2 * PER_THIRD
    assert all(a.service_s >= b.service_s for a, b in pairwise(kinds))
    for wrong in ("4x2", "2x0", "0+2", "2x2@", "2x2@0", "2x2@-1", "2", "2x", "x2", ""):
        with pytest.raises(RoutingError, match="write 2xN"):
            sized(wrong)


def written(folder: Path, network: Scheduler, **about: object) -> Path:
    return write_record(folder, NAME, tensors_of(network), {"slot_s": SLOT_S, "features": SIZE, **about})


def test_an_artifact_serves_any_set(network: Scheduler, tmp_path: Path) -> None:
    path = written(tmp_path, network)
    for size in SIZES:
        kinds = sized(size)[0].kinds
        seen = random_observation(len(kinds), 1)
        policy = load_set_policy(path, kinds)
        expected = SetPolicy(tensors_of(network), kinds).act(seen, np.random.default_rng(0)).probabilities
        assert np.array_equal(policy.act(seen, np.random.default_rng(0)).probabilities, expected)
    with pytest.raises(RoutingError, match="observation of 4"):
        load_set_policy(path, PAPER_KINDS[:3]).act(random_observation(4, 1), np.random.default_rng(0))


def test_what_does_not_fit_is_named(network: Scheduler, tmp_path: Path) -> None:
    with pytest.raises(RoutingError, match=r"a learned-po with None features"):
        load_set_policy(PRETRAINED / "routing-learned-po.json", PAPER_KINDS)
    with pytest.raises(RoutingError, match="layout is missing"):
        read_artifact(written(tmp_path, network))
    with pytest.raises(RoutingError, match=r"99 features"):
        load_set_policy(written(tmp_path, network, features=99), PAPER_KINDS)
    with pytest.raises(RoutingError, match=r"slots of 0\.5 s"):
        load_set_policy(written(tmp_path, network, slot_s=0.5), PAPER_KINDS)
    with pytest.raises(RoutingError, match="does not exist"):
        load_set_policy(tmp_path / "nothing.json", PAPER_KINDS)
    path = written(tmp_path, network)
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "name"}))
    with pytest.raises(RoutingError, match="name is missing"):
        load_set_policy(path, PAPER_KINDS)
    good = tensors_of(network)
    for key, wrong, message in (
        ("2.weight", good["2.weight"][:, :5], r"2\.weight has shape"),
        ("0.weight", good["0.weight"][:, :-1], r"0\.weight has shape"),
        ("4.bias", good["4.bias"][:1], r"4\.bias"),
        ("4.weight", good["4.weight"] * np.nan, "NaN"),
    ):
        with pytest.raises(RoutingError, match=message):
            SetPolicy({**good, key: wrong}, PAPER_KINDS)
    with pytest.raises(RoutingError, match="lacks layer 2"):
        SetPolicy({key: one for key, one in good.items() if key != "2.bias"}, PAPER_KINDS)
    with pytest.raises(RoutingError, match="at least one instance"):
        SetPolicy(tensors_of(network), ())
    longer = tuple(InstanceKind(k.variant, k.rank, k.service_s, k.accuracy, 40) for k in PAPER_KINDS)
    deep = observation_of([40, 0, 0, 0], [0.0] * 4, [[0.1] * 40, [], [], []], [1] * 4, [True] * 4)
    policy = SetPolicy(tensors_of(network), longer)  # other capacities fit: longer queues count as full ones
    assert policy.act(deep, np.random.default_rng(0)).probabilities.sum() == pytest.approx(1.0)
