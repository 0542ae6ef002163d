"""Decisions, the feasibility projection, and sequences scaled to a budget, on a geometry small enough to check by enumeration."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.cost_models import COST_MODELS
from secateur.envs.core import Budget, InputError
from secateur.envs.costs import PolicyCosts
from secateur.envs.feasibility import FeasibleSpace
from secateur.envs.metric import TOP1
from secateur.envs.model_graph import analyze
from secateur.envs.policy_space import PolicySpace, SpaceConfig, document_to_policy, policy_to_document


def project(space, levels, budget):
    """The executed levels of one episode."""
    return space.projection.rows([budget]).project(levels[None])[0]


def one_by_one(space, wanted, budget):
    """The same by its definition: one decision after the other."""
    rows, levels = space.projection.rows([budget]), wanted.copy()
    for decision in range(len(wanted)):
        levels[decision] = rows.admit(levels[None], decision, wanted[decision : decision + 1], np.zeros(1, int))[0]
    return levels


def slack(space, levels, budget):
    return space.projection.slack(np.atleast_2d(levels), budget)


def make_space(policy_space, costs, objectives):
    return FeasibleSpace(PolicyCosts(policy_space, costs), objectives, TOP1, 0.9)


def all_levels(space):
    return np.array(list(itertools.product(*(range(n) for n in space.policy_space.num_levels))))


def test_decisions_follow_the_layers_and_only_where_there_is_a_choice(chain_graph):
    space = PolicySpace(chain_graph(), SpaceConfig((0.0, 0.5), weight_bits=(8, 4), activation_bits=(8,), exclude=("b",)))
    assert [d.name for d in space.decisions] == [
        "prune_ratio/a", "weight_bits/a", "prune_ratio/b", "weight_bits/c",
    ]  # fmt: skip
    assert space.kinds == ("prune_ratio", "weight_bits")
    assert space.used.tolist() == [[True, True], [True, False], [False, True]]
    policy = space.levels_to_policy(space.strongest)
    assert policy.widths == (4, 3)
    assert policy.weight_bits == (4, 32, 4)
    assert policy.activation_bits == (8, 32, 8)


def test_widths_keep_the_channel_multiple_or_stay_dense(chain_graph):
    space = PolicySpace(chain_graph((10, 6)), SpaceConfig((0.0, 0.9), channel_multiple=4))
    assert [d.levels for d in space.decisions] == [(10, 8, 4), (6, 4)]


class SplitAndConcatenate(nn.Module):
    """A block as in YOLO's C2f: half of the channels passes by, and all parts are concatenated."""

    def __init__(self, first):
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, first, 1), nn.Conv2d(first // 2, 16, 3, padding=1)
        self.last, self.head = nn.Conv2d(first + 16, 32, 1), nn.Linear(32, 10)

    def forward(self, x):
        left, right = F.relu(self.first(x)).chunk(2, 1)
        x = torch.cat([left, right, F.relu(self.inner(right))], 1)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("first", "groups"), [(32, ["first", "inner", "last"]), (24, ["first", "inner", "last"]), (16, ["inner", "last"])]
)
def test_every_layer_of_a_group_keeps_the_channel_multiple_or_stays_dense(first, groups):
    graph = analyze(SplitAndConcatenate(first), (torch.zeros(1, 3, 8, 8),))
    assert [group.name for group in graph.groups] == ["first", "inner", "last"]
    space = PolicySpace(graph, SpaceConfig(channel_multiple=8))
    assert [decision.name for decision in space.decisions] == [f"prune_ratio/{name}" for name in groups]
    dense = graph.geometry.shapes()
    shapes = space.shapes(np.array(list(np.ndindex(*space.num_levels))))
    for channels, full in ((shapes.in_channels, dense.in_channels), (shapes.out_channels, dense.out_channels)):
        assert ((channels % 8 == 0) | (channels == full)).all()
    assert set(shapes.out_channels[:, 1]) == {8, 16}


def test_every_encoding_of_a_policy_has_an_inverse(feasible_space):
    space = feasible_space(prune_ratio=(0.0, 0.8), weight_bits=(8, 6, 4), activation_bits=(8, 4)).policy_space
    rng = np.random.default_rng(0)
    levels = rng.integers(space.num_levels, size=(50, len(space.num_levels)))
    sequences = space.levels_to_sequence(levels)
    np.testing.assert_array_equal(space.sequence_to_levels(sequences), levels)
    for row, sequence in zip(levels, sequences, strict=True):
        np.testing.assert_array_equal(space.levels_to_sequence(row), sequence)
        np.testing.assert_array_equal(space.sequence_to_levels(sequence), row)
        policy = space.levels_to_policy(row)
        np.testing.assert_array_equal(space.policy_to_levels(policy), row)
        choices = space.policy_to_choices(policy)
        assert list(choices.values()) == [d.values[level] for d, level in zip(space.decisions, row, strict=True)]
        assert space.choices_to_policy(choices) == policy
        assert document_to_policy(json.loads(json.dumps(policy_to_document(policy)))) == policy


def test_policies_of_another_space_are_refused(feasible_space):
    space = feasible_space(prune_ratio=(0.0, 0.8), weight_bits=(8, 6, 4)).policy_space
    choices = space.policy_to_choices(space.levels_to_policy(space.strongest))
    with pytest.raises(ValueError, match="no value is given for the decision 'weight_bits/c'"):
        space.choices_to_policy({name: value for name, value in choices.items() if name != "weight_bits/c"})
    with pytest.raises(ValueError):
        space.choices_to_policy({**choices, "weight_bits/c": 5})
    with pytest.raises(ValueError):
        space.policy_to_levels(replace(space.levels_to_policy(space.strongest), widths=(7, 7)))


def test_empty_space_is_refused(chain_graph):
    with pytest.raises(InputError, match="search space is empty"):
        PolicySpace(chain_graph(), SpaceConfig(prune_ratio=None, weight_bits=(8,)))


def test_a_budget_on_multiply_accumulates_that_are_not_known_is_refused(feasible_space):
    space = feasible_space(prune_ratio=(0.0, 0.8))
    geometry = space.policy_space.geometry
    space.policy_space.geometry = replace(geometry, uncounted=("fft_rfft2 in `mixer`",))
    with pytest.raises(
        InputError, match="Budget 'phone' limits bops, but the multiply-accumulates of fft_rfft2 in `mixer` are not"
    ):
        space.check(Budget("phone", {"weight_bytes": 900.0, "bops": 1e9}))
    space.check(Budget("memory", {"weight_bytes": 900.0}))


BUDGETS = [
    Budget("macs", {"macs": 2000.0}),
    Budget("both", {"macs": 3000.0, "weight_bytes": 900.0}),
    Budget("memory", {"peak_activation_bytes": 300.0}),
]


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: b.name)
def test_every_projection_is_feasible_and_the_least_compression(budget, feasible_space):
    space = feasible_space(prune_ratio=(0.0, 0.8), weight_bits=(8, 4), activation_bits=(8, 4))
    space.check(budget)
    rng = np.random.default_rng(1)
    for _ in range(100):
        wanted = rng.integers(space.policy_space.num_levels)
        executed = project(space, wanted, budget)
        assert slack(space, executed, budget)[0] <= 0
        assert (executed >= wanted).all()
        for decision in np.flatnonzero(executed > wanted):
            weaker = np.concatenate([executed[:decision], [executed[decision] - 1], space.policy_space.strongest[decision + 1 :]])
            assert slack(space, weaker, budget)[0] > 0, "it compressed more than necessary"


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: b.name)
def test_feasible_policies_are_projected_onto_themselves(budget, feasible_space):
    space = feasible_space(prune_ratio=(0.0, 0.5), weight_bits=(8, 4), activation_bits=(8, 4))
    levels = all_levels(space)
    for policy in levels[slack(space, levels, budget) <= 0][::37]:
        assert (project(space, policy, budget) == policy).all()


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: b.name)
def test_the_projection_is_one_admission_after_the_other(feasible_space, budget):
    space = feasible_space(prune_ratio=(0.0, 0.8), weight_bits=(8, 4), activation_bits=(8, 4))
    rng = np.random.default_rng(4)
    wanted = rng.integers(space.policy_space.num_levels, size=(50, len(space.policy_space.num_levels)))
    expected = [one_by_one(space, row, budget) for row in wanted]
    np.testing.assert_array_equal(space.projection.rows([budget] * 50).project(wanted), expected)
    np.testing.assert_array_equal([project(space, row, budget) for row in wanted], expected)


def test_rows_under_different_budgets_are_projected_apart(feasible_space):
    space = feasible_space(prune_ratio=(0.0, 0.8), weight_bits=(8, 4), activation_bits=(8, 4))
    rng = np.random.default_rng(5)
    budgets = [BUDGETS[index] for index in rng.integers(len(BUDGETS), size=40)]
    wanted = rng.integers(space.policy_space.num_levels, size=(40, len(space.policy_space.num_levels)))
    expected = [project(space, row, budget) for row, budget in zip(wanted, budgets, strict=True)]
    np.testing.assert_array_equal(space.projection.rows(budgets).project(wanted), expected)


class Staircase:
    """A cost that is not monotone: odd widths are as slow as the next multiple of four."""

    name = "staircase"

    def total(self, shapes):
        return np.where(shapes.widths % 4 == 0, shapes.widths, shapes.widths + 4).sum(axis=1).astype(float)


def test_budgets_hold_for_a_cost_that_is_not_monotone(chain_graph):
    space = PolicySpace(chain_graph((16, 16)), SpaceConfig((0.0, 0.9)))
    feasible = make_space(space, {"staircase": Staircase()}, ("top1",))
    least = feasible.costs.of_levels(space.strongest[None])["staircase"][0]
    rng = np.random.default_rng(2)
    for limit in np.linspace(least, 32, 12):
        budget = Budget("s", {"staircase": limit})
        for _ in range(20):
            assert slack(feasible, project(feasible, rng.integers(space.num_levels), budget), budget)[0] <= 0


class RandomCosts:
    """A cost by a table of random numbers: one for each width of each group, times one for each bit-width of each layer."""

    name = "random"

    def __init__(self, rng):
        self.width_costs = rng.uniform(0.2, 1, (2, 32))
        self.bit_costs = rng.uniform(0.2, 1, (3, 33))

    def total(self, shapes):
        groups = [self.width_costs[g][shapes.widths[:, g]] for g in range(2)]
        layers = [self.bit_costs[i][np.maximum(shapes.weight_bits, shapes.activation_bits)[:, i]] for i in range(3)]
        return groups[0] * layers[0] + groups[1] * layers[1] + groups[0] * groups[1] * layers[2]


@pytest.mark.parametrize("seed", range(12))
def test_projections_under_random_costs_are_feasible_or_the_budget_is_refused(chain_graph, seed):
    rng = np.random.default_rng(seed)
    space = PolicySpace(chain_graph(), SpaceConfig((0.0, 0.8), weight_bits=(8, 4), activation_bits=(32, 8)))
    costs = {"random": RandomCosts(rng), "macs": COST_MODELS["macs"]()}
    feasible = make_space(space, costs, ("top1", "random", "macs"))
    sample = rng.integers(space.num_levels, size=(500, len(space.num_levels)))
    values = feasible.costs.of_levels(sample)["random"]
    refused = 0
    for limit in np.linspace(0.5 * values.min(), values.max(), 12):
        budget = Budget("b", {"random": limit, "macs": 0.6 * feasible.dense_costs["macs"]})
        try:
            feasible.check(budget)
        except InputError:
            refused += 1
            assert (slack(feasible, sample, budget) <= 0).mean() < 0.01, "many policies fit"
            continue
        for _ in range(10):
            wanted = rng.integers(space.num_levels)
            executed = project(feasible, wanted, budget)
            assert slack(feasible, executed, budget)[0] <= 1e-12
            assert (executed == one_by_one(feasible, wanted, budget)).all()
            sequence = feasible.scale_to_budget(rng.uniform(size=(space.num_steps, space.action_dim)), budget)
            assert slack(feasible, space.sequence_to_levels(sequence), budget)[0] <= 1e-12
    assert 0 < refused < 12


class SlowIntegers:
    """A device without integer kernels: what is quantized takes twice as long."""

    name = "latency_ms"

    def total(self, shapes):
        return (shapes.out_channels * np.where(shapes.activation_bits < 32, 2.0, 1.0)).sum(axis=1)


def test_a_budget_that_only_weaker_compression_meets_is_not_refused(chain_graph):
    space = PolicySpace(chain_graph(), SpaceConfig((0.0, 0.5), activation_bits=(32, 8)))
    feasible = make_space(space, {"latency_ms": SlowIntegers()}, ("top1",))
    budget = Budget("phone", {"latency_ms": 0.7 * feasible.dense_costs["latency_ms"]})
    assert slack(feasible, space.strongest, budget)[0] > 0
    feasible.check(budget)
    policy = space.levels_to_policy(project(feasible, space.strongest, budget))
    assert 32 in policy.activation_bits, "floats are chosen where integers do not fit"
    assert (
        feasible.projection.least("latency_ms", budget.limits["latency_ms"]) == 4 + 3 + 5
    )  # half of the channels, nothing quantized


@pytest.mark.parametrize("cost", COST_MODELS)
def test_the_completion_of_monotone_costs_is_the_strongest_compression(feasible_space, cost):
    space = feasible_space(prune_ratio=(0.0, 0.8), weight_bits=(8, 4), activation_bits=(8, 4))
    assert (space.projection.completion(Budget("b", {cost: 1.0})) == space.policy_space.strongest).all()


def test_impossible_budget_says_what_is_needed(feasible_space):
    space = feasible_space(prune_ratio=(0.0, 0.5))
    with pytest.raises(InputError, match=r"Budget 'tiny' cannot be met: it needs at least [\d.]+ % of the dense macs"):
        space.check(Budget("tiny", {"macs": 1.0}))
    space.costs.models["macs"] = SlowIntegers()
    with pytest.raises(InputError, match=r"\(12 of [\d,]+\), but the limit is"):
        space.check(Budget("small", {"macs": 1.5}))


def test_scaling_reaches_the_edge_of_the_budget(chain_graph):
    space = PolicySpace(chain_graph((64, 64)), SpaceConfig((0.0, 0.9)))
    space = make_space(space, {"macs": COST_MODELS["macs"]()}, ("top1", "macs"))
    budget = Budget("half", {"macs": 0.5 * space.dense_costs["macs"]})
    rng = np.random.default_rng(3)
    for _ in range(20):
        sequence = space.scale_to_budget(rng.uniform(size=(space.num_steps, space.action_dim)), budget)
        cost = space.costs.of_levels(space.policy_space.sequence_to_levels(sequence)[None])["macs"][0] / space.dense_costs["macs"]
        assert 0.48 < cost <= 0.5
        assert np.array_equal(space.execute(sequence, budget), sequence)


def test_scaling_returns_the_dense_network_when_it_fits(feasible_space):
    space = feasible_space(prune_ratio=(0.0, 0.5))
    budget = Budget("all", {"macs": space.dense_costs["macs"]})
    sequence = space.scale_to_budget(np.full((space.num_steps, space.action_dim), 0.5), budget)
    assert (space.policy_space.sequence_to_levels(sequence) == 0).all()
