"""Decisions, the wall, and sequences bent to a budget, on a geometry small enough to check by enumeration."""

import itertools

import numpy as np
import pytest

from secateur.cost_models import COST_MODELS
from secateur.envs.core import Budget, InputError
from secateur.envs.feasibility import FeasibleSpace
from secateur.envs.policy_space import PolicySpace, SpaceConfig


def all_levels(space):
    return np.array(list(itertools.product(*(range(n) for n in space.policy_space.num_levels))))


def test_decisions_follow_the_layers_and_only_where_there_is_a_choice(chain_graph):
    space = PolicySpace(chain_graph(), SpaceConfig((0.0, 0.5), weight_bits=(8, 4), activation_bits=(8,), exclude=("b",)))
    assert [d.name for d in space.decisions] == [
        "prune_ratio/a", "weight_bits/a", "prune_ratio/b", "weight_bits/c",
    ]  # fmt: skip
    assert space.kinds == ("prune_ratio", "weight_bits")
    assert space.used.tolist() == [[True, True], [True, False], [False, True]]
    policy = space.policy(space.strongest)
    assert policy.widths == (4, 3)
    assert policy.weight_bits == (4, 32, 4)
    assert policy.activation_bits == (8, 32, 8)


def test_widths_keep_the_channel_multiple_or_stay_dense(chain_graph):
    space = PolicySpace(chain_graph((10, 6)), SpaceConfig((0.0, 0.9), channel_multiple=4))
    assert [d.levels for d in space.decisions] == [(10, 8, 4), (6, 4)]


def test_every_level_survives_the_way_through_a_table(feasible_space):
    space = feasible_space(prune_ratio=(0.0, 0.8), weight_bits=(8, 6, 4), activation_bits=(8, 4)).space
    rng = np.random.default_rng(0)
    for _ in range(50):
        levels = rng.integers(space.num_levels)
        assert (space.snap(space.sequence(levels)) == levels).all()
        policy = space.policy(levels)
        assert space.values(policy) == tuple(d.values[k] for d, k in zip(space.decisions, levels, strict=True))


def test_empty_space_is_refused(chain_graph):
    with pytest.raises(InputError, match="search space is empty"):
        PolicySpace(chain_graph(), SpaceConfig(prune_ratio=None, weight_bits=(8,)))


BUDGETS = [
    Budget("macs", {"macs": 2000.0}),
    Budget("both", {"macs": 3000.0, "weight_bytes": 900.0}),
    Budget("memory", {"peak_activation_bytes": 300.0}),
]


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: b.name)
def test_every_walk_ends_feasible_and_is_the_least_compression(budget, feasible_space):
    space = feasible_space(prune_ratio=(0.0, 0.8), weight_bits=(8, 4), activation_bits=(8, 4))
    space.check(budget)
    rng = np.random.default_rng(1)
    for _ in range(100):
        wanted = rng.integers(space.policy_space.num_levels)
        executed = space.walk(wanted, budget)
        assert space.slack(executed[None], budget)[0] <= 0
        assert (executed >= wanted).all()
        for decision in np.flatnonzero(executed > wanted):
            weaker = np.concatenate([executed[:decision], [executed[decision] - 1], space.policy_space.strongest[decision + 1 :]])
            assert space.slack(weaker[None], budget)[0] > 0, "the wall compressed more than it had to"


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: b.name)
def test_feasible_policies_pass_the_wall_unchanged(budget, feasible_space):
    space = feasible_space(prune_ratio=(0.0, 0.5), weight_bits=(8, 4), activation_bits=(8, 4))
    levels = all_levels(space)
    for policy in levels[space.slack(levels, budget) <= 0][::37]:
        assert (space.walk(policy, budget) == policy).all()


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: b.name)
def test_a_walk_is_one_admission_after_the_other(feasible_space, budget):
    space = feasible_space(prune_ratio=(0.0, 0.8), weight_bits=(8, 4), activation_bits=(8, 4))
    rng = np.random.default_rng(4)
    for _ in range(50):
        wanted = rng.integers(space.policy_space.num_levels)
        step_by_step = wanted.copy()
        for decision in range(len(wanted)):
            step_by_step[decision] = space.admit(step_by_step, decision, int(wanted[decision]), budget)
        assert (space.walk(wanted, budget) == step_by_step).all()


class Staircase:
    """A cost that is not monotone: odd widths are as slow as the next multiple of four."""

    name = "staircase"

    def total(self, shapes):
        return np.where(shapes.widths % 4 == 0, shapes.widths, shapes.widths + 4).sum(axis=1).astype(float)


def test_the_wall_holds_for_a_cost_that_is_not_monotone(chain_graph):
    space = PolicySpace(chain_graph((16, 16)), SpaceConfig((0.0, 0.9)))
    feasible = FeasibleSpace(space, {"staircase": Staircase()}, ("top1",), 0.9, 1)
    least = feasible.costs(space.strongest[None])["staircase"][0]
    rng = np.random.default_rng(2)
    for limit in np.linspace(least, 32, 12):
        budget = Budget("s", {"staircase": limit})
        for _ in range(20):
            assert feasible.slack(feasible.walk(rng.integers(space.num_levels), budget)[None], budget)[0] <= 0


class RandomTable:
    """A cost by a sequence of any numbers: one for each width of each group, times one for each bit-width of each layer."""

    name = "random"

    def __init__(self, rng):
        self.width_costs = rng.uniform(0.2, 1, (2, 32))
        self.bit_costs = rng.uniform(0.2, 1, (3, 33))

    def total(self, shapes):
        groups = [self.width_costs[g][shapes.widths[:, g]] for g in range(2)]
        layers = [self.bit_costs[i][np.maximum(shapes.weight_bits, shapes.activation_bits)[:, i]] for i in range(3)]
        return groups[0] * layers[0] + groups[1] * layers[1] + groups[0] * groups[1] * layers[2]


@pytest.mark.parametrize("seed", range(12))
def test_every_walk_under_a_random_table_is_feasible_or_the_budget_is_refused(chain_graph, seed):
    rng = np.random.default_rng(seed)
    space = PolicySpace(chain_graph(), SpaceConfig((0.0, 0.8), weight_bits=(8, 4), activation_bits=(32, 8)))
    costs = {"random": RandomTable(rng), "macs": COST_MODELS["macs"]()}
    feasible = FeasibleSpace(space, costs, ("top1", "random", "macs"), 0.9, 1)
    sample = rng.integers(space.num_levels, size=(500, len(space.num_levels)))
    values = feasible.costs(sample)["random"]
    refused = 0
    for limit in np.linspace(0.5 * values.min(), values.max(), 12):
        budget = Budget("b", {"random": limit, "macs": 0.6 * feasible.dense_costs["macs"]})
        try:
            feasible.check(budget)
        except InputError:
            refused += 1
            assert (feasible.slack(sample, budget) <= 0).mean() < 0.01, "many policies fit"
            continue
        for _ in range(10):
            wanted = rng.integers(space.num_levels)
            executed = feasible.walk(wanted, budget)
            assert feasible.slack(executed[None], budget)[0] <= 1e-12
            step_by_step = wanted.copy()
            for decision in range(len(wanted)):
                step_by_step[decision] = feasible.admit(step_by_step, decision, int(wanted[decision]), budget)
            assert (executed == step_by_step).all()
            sequence = feasible.fit(rng.uniform(size=(space.num_steps, space.action_dim)), budget)
            assert feasible.slack(space.snap(sequence)[None], budget)[0] <= 1e-12
    assert 0 < refused < 12


class SlowIntegers:
    """A device without integer kernels: what is quantized takes twice as long."""

    name = "latency_ms"

    def total(self, shapes):
        return (shapes.out_channels * np.where(shapes.activation_bits < 32, 2.0, 1.0)).sum(axis=1)


def test_a_budget_that_only_weaker_compression_meets_is_not_refused(chain_graph):
    space = PolicySpace(chain_graph(), SpaceConfig((0.0, 0.5), activation_bits=(32, 8)))
    feasible = FeasibleSpace(space, {"latency_ms": SlowIntegers()}, ("top1",), 0.9, 1)
    budget = Budget("phone", {"latency_ms": 0.7 * feasible.dense_costs["latency_ms"]})
    assert feasible.slack(space.strongest[None], budget)[0] > 0
    feasible.check(budget)
    policy = space.policy(feasible.walk(space.strongest, budget))
    assert 32 in policy.activation_bits, "the wall goes back to floats where integers do not fit"
    assert feasible.least("latency_ms", budget.limits["latency_ms"]) == 4 + 3 + 5  # half of the channels, nothing quantized


@pytest.mark.parametrize("cost", COST_MODELS)
def test_the_completion_of_monotone_costs_is_the_strongest_compression(feasible_space, cost):
    space = feasible_space(prune_ratio=(0.0, 0.8), weight_bits=(8, 4), activation_bits=(8, 4))
    assert (space.completion(Budget("b", {cost: 1.0})) == space.policy_space.strongest).all()


def test_impossible_budget_says_what_is_needed(feasible_space):
    space = feasible_space(prune_ratio=(0.0, 0.5))
    with pytest.raises(InputError, match=r"Budget 'tiny' cannot be met: it needs at least [\d.]+ % of the dense macs"):
        space.check(Budget("tiny", {"macs": 1.0}))
    space.cost_models["macs"] = SlowIntegers()
    with pytest.raises(InputError, match=r"\(12 of [\d,]+\), but asks for"):
        space.check(Budget("small", {"macs": 1.5}))


def test_fit_reaches_the_edge_of_the_budget(chain_graph):
    space = FeasibleSpace(
        PolicySpace(chain_graph((64, 64)), SpaceConfig((0.0, 0.9))), {"macs": COST_MODELS["macs"]()}, ("top1", "macs"), 1, 1
    )
    budget = Budget("half", {"macs": 0.5 * space.dense_costs["macs"]})
    rng = np.random.default_rng(3)
    for _ in range(20):
        sequence = space.scale_to_budget(rng.uniform(size=(space.num_steps, space.action_dim)), budget)
        cost = space.costs(space.policy_space.snap(sequence)[None])["macs"][0] / space.dense_costs["macs"]
        assert 0.48 < cost <= 0.5
        assert np.array_equal(space.execute(sequence, budget), sequence)


def test_fit_returns_the_dense_network_when_it_fits(feasible_space):
    space = feasible_space(prune_ratio=(0.0, 0.5))
    budget = Budget("all", {"macs": space.dense_costs["macs"]})
    sequence = space.scale_to_budget(np.full((space.num_steps, space.action_dim), 0.5), budget)
    assert (space.policy_space.snap(sequence) == 0).all()
