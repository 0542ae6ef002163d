"""The greedy allocation against all policies of a space that is small enough, and on sensitivities that are easy to read."""

from itertools import product

import numpy as np
import pytest
import torch

from secateur.agents.greedy import Greedy, GreedyConfig, allocate
from secateur.cost_models import COST_MODELS
from secateur.envs.core import Budget, InputError, Sensitivities
from secateur.envs.costs import PolicyCosts
from secateur.envs.feasibility import FeasibleSpace
from secateur.envs.metric import TOP1
from secateur.envs.model_graph import analyze
from secateur.envs.policy_space import PolicySpace, SpaceConfig
from secateur.envs.tasks.synthetic import synthetic_net


@pytest.fixture
def space():
    """Three prune ratios, of 8, 8 and 16 units, and the bits of five layers."""
    graph = analyze(synthetic_net().eval(), (torch.zeros(1, 3, 8, 8),))
    costs = {name: model() for name, model in COST_MODELS.items()}
    decisions = PolicySpace(graph, SpaceConfig(prune_ratio=(0.0, 0.9), weight_bits=(4, 8)))
    weights = np.random.default_rng(0).uniform(0.05, 0.5, (len(decisions.level_actions), 1))
    sensitivities = Sensitivities(weights * np.linspace(0, 1, 65) ** 2)
    objectives = ("top1", "macs", "weight_bytes")
    return FeasibleSpace(PolicyCosts(decisions, costs), objectives, TOP1, 0.9, sensitivities=sensitivities)


def budgets(space, **shares):
    return [Budget("it", {name: share * space.dense_costs[name] for name, share in shares.items()})]


def harm(space, levels, power=1.0):
    actions = np.array([actions[level] for actions, level in zip(space.level_actions, levels, strict=True)])
    return float((space.sensitivities(actions) ** power).sum())


@pytest.mark.parametrize("shares", [{"macs": 0.5}, {"macs": 0.2}, {"macs": 0.4, "weight_bytes": 0.1}])
def test_nearly_the_best_of_all_policies(space, shares):
    (budget,) = budgets(space, **shares)
    everything = np.array(list(product(*(range(len(actions)) for actions in space.level_actions))))
    fitting = everything[space.projection.slack(everything, budget) <= 0]
    best = min(harm(space, levels) for levels in fitting)
    worst = max(harm(space, levels) for levels in fitting)
    sequence = allocate(space, space.sensitivities, budget, 1.0)
    levels = space.policy_space.sequence_to_levels(sequence)
    assert space.projection.slack(levels[None], budget)[0] <= 0
    assert harm(space, levels) - best < 0.05 * (worst - best)


def test_no_step_can_be_undone(space):
    (budget,) = budgets(space, macs=0.4)
    sequence = allocate(space, space.sensitivities, budget, 0.75)
    levels = space.policy_space.sequence_to_levels(sequence)
    for index in np.flatnonzero(levels):
        weaker = levels.copy()
        weaker[index] -= 1
        assert space.projection.slack(weaker[None], budget)[0] > 0


def test_curves_need_not_rise(space):
    rng = np.random.default_rng(0)
    for _ in range(5):
        space.sensitivities = Sensitivities(np.hstack([np.zeros((8, 1)), rng.choice([0.01, 0.1, 10.0], (8, 64))]))
        (budget,) = budgets(space, macs=0.5, weight_bytes=0.2)
        levels = space.policy_space.sequence_to_levels(allocate(space, space.sensitivities, budget, 0.75))
        assert levels.min() >= 0 and space.projection.slack(levels[None], budget)[0] <= 0


def test_costs_that_no_single_step_saves_are_left_to_the_projection(toy, monkeypatch):
    # A cost that only falls when everything is compressed.
    monkeypatch.setattr(
        toy, "cost_shares", lambda sequences: np.where((sequences[:, toy.used] == 1).all(axis=1), 0.0, 1.0)[:, None]
    )
    sequence = allocate(toy, toy.sensitivities, Budget("all", {"cost": 0.1}), 0.75)
    assert (toy.execute(sequence, Budget("all", {"cost": 0.1})) == sequence).all() and toy.cost(sequence) <= 0.1


def test_choices_without_harm_are_compressed_first(space):
    free = [decision.name for decision in space.policy_space.decisions].index("prune_ratio/conv2")
    space.sensitivities.curves[free] = 0
    sequence = allocate(space, space.sensitivities, *budgets(space, macs=0.8), 0.75)
    assert space.decode(sequence).widths[1] < 8 and space.decode(sequence).widths[::2] == (8, 16)


def test_only_choices_that_save_are_compressed(space):
    sequence = allocate(space, space.sensitivities, *budgets(space, macs=0.5), 0.75)
    assert set(space.decode(sequence).weight_bits) == {8}  # bits save no multiply-accumulates
    assert not allocate(space, space.sensitivities, *budgets(space, macs=1.0), 0.75).any()


def test_powers_are_tried_in_turn_and_equal_policies_handed_out_once(toy):
    agent = Greedy(GreedyConfig(powers=(1.0, 1.0, 3.0)), toy, toy.budgets, np.random.default_rng(0))
    actors = agent.ask(100)
    assert agent.ask(1) == [] and len(toy.budgets) < len(actors) <= 2 * len(toy.budgets)
    assert [actor.ticket for actor in actors] == list(range(len(actors)))
    assert len({(actor.budget.name, toy.decode(actor.sequence)) for actor in actors}) == len(actors)


def test_needs_sensitivities(toy, monkeypatch):
    monkeypatch.setattr(toy, "sensitivities", None)
    with pytest.raises(ValueError, match="needs a space whose sensitivities have been measured"):
        Greedy(GreedyConfig(), toy, toy.budgets, np.random.default_rng(0))


@pytest.mark.parametrize("powers", [(), (0.0,), (0.5, float("nan"))])
def test_powers_must_be_above_zero(powers):
    with pytest.raises(InputError, match="`powers` of the greedy baseline must be"):
        GreedyConfig(powers=powers)
