from types import SimpleNamespace

import numpy as np
import pytest
import torch

from secateur.agents.clr_rnf import ClrRnf, ClrRnfConfig, unit_scores
from secateur.agents.uniform import Uniform, UniformConfig
from secateur.cost_models import COST_MODELS
from secateur.envs.core import Budget, CompressionPolicy, InputError
from secateur.envs.costs import PolicyCosts
from secateur.envs.feasibility import FeasibleSpace
from secateur.envs.metric import TOP1
from secateur.envs.model_graph import analyze
from secateur.envs.policy_space import PolicySpace, SpaceConfig
from secateur.envs.tasks.synthetic import synthetic_net


@pytest.fixture(scope="module")
def graph():
    """Groups conv1 (with conv3), conv2 and conv4 of 8, 8 and 16 units."""
    return analyze(synthetic_net().eval(), (torch.zeros(1, 3, 8, 8),))


@pytest.fixture
def make_space(graph):
    def make(**config):
        costs = {name: model() for name, model in COST_MODELS.items()}
        rng = np.random.default_rng(0)
        magnitudes = [rng.random(group.units) for group in graph.groups]
        return FeasibleSpace(
            PolicyCosts(PolicySpace(graph, SpaceConfig(**config)), costs), ("top1", "macs"), TOP1, 0.9, magnitudes
        )

    return make


def make(space, budgets, **options):
    return ClrRnf(ClrRnfConfig(**options), space, budgets, np.random.default_rng(0))


def test_scores_are_magnitudes_over_a_power_of_the_macs():
    magnitudes = tuple(np.random.default_rng(0).random((6, 8)))
    space = SimpleNamespace(unit_magnitudes=magnitudes, producer_macs=np.arange(1.0, 7.0))
    plain, ranked = unit_scores(space, 0.0), unit_scores(space, 2.0)
    for index, (same, scores) in enumerate(zip(plain, ranked, strict=True)):
        np.testing.assert_array_equal(same, magnitudes[index])
        np.testing.assert_allclose(scores * (index + 1) ** 2, same * 36)  # relative to the largest: 6


def test_one_threshold_for_all_groups_just_meets_the_budget(make_space):
    space = make_space(prune_ratio=(0.0, 0.9))
    budget = Budget("half", {"macs": 0.5 * space.dense_costs["macs"]})
    agent = make(space, [budget], exponent=0.0)
    (actor,) = agent.ask(5)
    assert agent.ask(1) == []
    bits = (32,) * len(space.policy_space.geometry.layers)
    for threshold in np.sort(np.concatenate(space.unit_magnitudes)):
        least = [1, 1, 2]  # at most 90 % of the units go
        widths = [max(int((m >= threshold).sum()), w) for m, w in zip(space.unit_magnitudes, least, strict=True)]
        policy = CompressionPolicy(tuple(widths), bits, bits)
        if space.costs.of_policy(policy)["macs"] <= budget.limits["macs"]:
            break
    assert space.decode(actor.sequence) == policy


def test_large_exponents_prune_the_costly_layer_first(make_space):
    space = make_space(prune_ratio=(0.0, 0.9))
    budget = Budget("most", {"macs": 0.8 * space.dense_costs["macs"]})
    (actor,) = make(space, [budget], exponent=200.0).ask(1)
    widths = space.decode(actor.sequence).widths
    assert widths[0] == 8 and widths[1] < 8 and widths[2] == 16


def test_producer_macs_are_those_of_the_dense_layers(make_space):
    np.testing.assert_array_equal(make_space().producer_macs, [(3 + 8) / 2 * 8 * 9 * 64, 8 * 8 * 9 * 64, 8 * 16 * 9 * 16])


def test_bits_are_those_of_uniform_and_only_then_there_is_a_family(make_space):
    space = make_space(prune_ratio=(0.0, 0.9), weight_bits=(2, 4, 8))
    budget = Budget("small", {"weight_bytes": 0.12 * space.dense_costs["weight_bytes"]})
    rng = np.random.default_rng(0)
    even = Uniform(UniformConfig(), space, [budget], rng).ask(1)[0].sequence
    actors = make(space, [budget]).ask(100)
    assert len(actors) > 1
    first = space.decode(actors[0].sequence)
    assert first.weight_bits == space.decode(even).weight_bits
    for actor in actors:
        assert space.costs.of_policy(space.decode(actor.sequence))["weight_bytes"] <= budget.limits["weight_bytes"]
    assert len({space.decode(actor.sequence) for actor in actors}) == len(actors)


def test_prune_ratios_go_to_the_nearest_level_and_leave_bits_alone(make_space):
    space = make_space(prune_ratio=(0.0, 0.5), weight_bits=(2, 8))
    policy = space.decode(space.with_prune_ratios(np.ones(space.used.shape), np.array([0.26, 1.0, 0.0])))
    assert policy.widths == (6, 4, 16) and policy.weight_bits == (2,) * 5


@pytest.mark.parametrize(("option", "value"), [("exponent", -0.1), ("exponent", float("nan")), ("splits", 0)])
def test_options_out_of_range(option, value):
    with pytest.raises(InputError, match=f"`{option}` of the agent `clr_rnf`"):
        ClrRnfConfig(**{option: value})
