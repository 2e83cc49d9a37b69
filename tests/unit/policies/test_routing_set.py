"""`learned-set`: one network for any number of instances, in numpy as in torch, whatever their order."""

import numpy as np
import pytest
import torch

from policies.routing.contract import InstanceKind, RoutingError, observation_of
from policies.routing.environment import SlotEnvironments
from policies.routing.presets import PAPER_KINDS
from policies.routing.queueing_model import LENGTH, paper_arrivals
from policies.routing.set_network import START_HEAVY, SetPolicy, describe, spread
from policies.routing.set_training import SetActorCritic, Size, paper_mix, score, three_variants


@pytest.fixture
def network() -> SetActorCritic:
    torch.manual_seed(0)
    made = SetActorCritic(describe(PAPER_KINDS).layout.per_instance)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
    return made


@pytest.mark.parametrize("each", [1, 3, 16])
def test_numpy_gives_what_torch_gives_at_every_size(network: SetActorCritic, each: int) -> None:
    service, scale = three_variants(each)
    envs = SlotEnvironments(service, paper_arrivals(scale), 5, 1)
    policy = SetPolicy(network.tensors(), service.kinds)
    for _ in range(20):
        seen, length = envs.observe(), envs.state.queue[:, :, LENGTH]
        shares = policy.shares(seen)
        expected = torch.softmax(network(torch.from_numpy(seen), policy.shape)[0], 1).detach().numpy()
        assert np.abs(shares - expected).max() < 1e-5
        table = policy.tables(seen, length)
        assert np.allclose(table.sum(axis=1), 1.0)
        rank = policy.shape.rank
        assert np.allclose([table[:, rank == r].sum(axis=1) for r in range(3)], shares.T)
        envs.step(table)


def test_the_order_of_instances_does_not_matter(network: SetActorCritic) -> None:
    kinds = three_variants(4)[0].kinds
    rng = np.random.default_rng(2)
    order = rng.permutation(12)
    length = rng.integers(0, 15, 12)
    ages = [rng.uniform(0.0, 0.3, k) for k in length]

    def table(which: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        policy = SetPolicy(network.tensors(), [kinds[i] for i in which])
        seen = observation_of(
            [int(length[i]) for i in which], [0.01] * 12, [ages[i].tolist() for i in which], [1] * 12, [True] * 12
        )
        return policy.act(seen, rng).probabilities

    assert np.allclose(table(list(range(12)))[order], table(order.tolist()), atol=1e-6)


def test_free_places_share_within_a_variant() -> None:
    shape = describe(PAPER_KINDS)
    table = spread(shape, np.array([[0.8, 0.2]]), np.array([[15, 12, 0, 0]]))
    assert table[0] == pytest.approx([0.8 / 5, 0.8 * 4 / 5, 0.1, 0.1])


def test_untrained_it_leans_heavy_at_every_size() -> None:
    torch.manual_seed(0)
    made = SetActorCritic(describe(PAPER_KINDS).layout.per_instance)
    for service, scale in (paper_mix(2), paper_mix(16), three_variants(3)):
        size = Size(service, scale, 3, 1)
        seen, log_y, _, _, _ = size.collect(made, torch.Generator().manual_seed(1))
        assert len(seen) == len(log_y) == 150
        shares = SetPolicy(made.tensors(), service.kinds).shares(seen.numpy())
        assert shares[:, 0].mean() == pytest.approx(START_HEAVY, abs=0.02)


def test_scores_repeat_by_seed(network: SetActorCritic) -> None:
    service, scale = paper_mix(2)
    policy = SetPolicy(network.tensors(), service.kinds)
    first, again = (score(policy, service, scale, slots=2000, seed=3)["overall"] for _ in range(2))
    assert first == again
    assert first.requests > 10_000


def test_what_does_not_fit_is_named(network: SetActorCritic) -> None:
    with pytest.raises(RoutingError, match="two or more variants"):
        describe((PAPER_KINDS[0],) * 3)
    broken = network.tensors()
    broken["weigh.2.weight"] = broken["weigh.2.weight"][:5]
    with pytest.raises(RoutingError, match=r"weigh\.2\.weight"):
        SetPolicy(broken, PAPER_KINDS)
    other = tuple(InstanceKind(k.variant, k.rank, k.service_s, k.accuracy, 7) for k in PAPER_KINDS)
    with pytest.raises(RoutingError, match=r"look\.weight"):
        SetPolicy(network.tensors(), other)
