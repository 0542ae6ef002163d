"""Small allocation problems whose best policies are found by trying all of them."""

from functools import cache
from itertools import product

import numpy as np
import torch

from secateur.cost_models import COST_MODELS
from secateur.envs.core import Budget, Episode, Evaluation, Sensitivities
from secateur.envs.costs import PolicyCosts
from secateur.envs.feasibility import FeasibleSpace
from secateur.envs.metric import TOP1
from secateur.envs.model_graph import analyze
from secateur.envs.policy_space import PolicySpace, SpaceConfig
from secateur.envs.tasks.synthetic import synthetic_net
from tests.conftest import toy_graph


class UnitWeights:
    """An additive cost: the kept units of each group times its weight."""

    def __init__(self, name, weights):
        self.name, self.weights = name, np.array(weights, float)

    def per_layer(self, shapes):
        return shapes.widths * self.weights

    def total(self, shapes):
        return self.per_layer(shapes).sum(axis=1)


def additive_space(seed, limits=1, free=0):
    """Six groups of five levels, with random whole weights and random sensitivities, which rise but need not be convex.

    The first `free` groups cost nothing.
    """
    rng = np.random.default_rng(seed)
    policy_space = PolicySpace(toy_graph(6), SpaceConfig((0.0, 0.8)))
    names = [f"cost{i}" for i in range(limits)]
    costs = PolicyCosts(
        policy_space, {name: UnitWeights(name, rng.integers(3, 30, 6) * (np.arange(6) >= free)) for name in names}
    )
    curves = np.concatenate([np.zeros((6, 1)), np.cumsum(rng.exponential(1.0, (6, 4)) ** 2, axis=1)], axis=1)
    return FeasibleSpace(costs, ("top1", *names), TOP1, 1.0, sensitivities=Sensitivities(curves))


def share_budget(space, name="it", **shares):
    """A budget with limits that are shares of the dense costs."""
    return Budget(name, {cost: share * space.dense_costs[cost] for cost, share in shares.items()})


def all_levels(space):
    """The levels of every policy, (policies, entries)."""
    return np.array(list(product(*(range(len(actions)) for actions in space.level_actions))))


def harms(space, levels, power=1.0):
    """The sum of the sensitivities ** power of levels (n, entries), (n,)."""
    actions = np.stack([actions[at] for actions, at in zip(space.level_actions, levels.T, strict=True)], axis=1)
    return (space.sensitivities(actions) ** power).sum(axis=1)


def least_harm(space, budget, power=1.0):
    """The least sum of sensitivities ** power of all policies within a budget."""
    levels = all_levels(space)
    return float(harms(space, levels[space.projection.slack(levels, budget) <= 0], power).min())


def harm_of(space, sequence, power=1.0):
    """The sum of the sensitivities ** power of one sequence."""
    return float(harms(space, space.policy_space.sequence_to_levels(sequence)[None], power)[0])


def scored(actor, score):
    """The episode of an actor that scored this."""
    return Episode("it", None, Evaluation(score, {}), {}, actions=actor.sequence, reward=np.array([score, -0.5]))


def search_by_harm(space, agent, evaluations):
    """The least sum of sensitivities of the policies of a search whose score is minus that sum."""
    found = []
    while len(found) < evaluations:
        actors = agent.ask(5)
        harm = [harm_of(space, actor.sequence) for actor in actors]
        agent.tell([(actor, scored(actor, -value)) for actor, value in zip(actors, harm, strict=True)])
        found += harm
    return min(found)


@cache
def synthetic_graph():
    """The graph of the synthetic task's network."""
    return analyze(synthetic_net().eval(), (torch.zeros(1, 3, 8, 8),))


def pruned_and_quantized_space(seed):
    """Three prune ratios, of 8, 8 and 16 units, and the bits of five layers: their costs are not additive."""
    policy_space = PolicySpace(synthetic_graph(), SpaceConfig(prune_ratio=(0.0, 0.9), weight_bits=(4, 8)))
    costs = PolicyCosts(policy_space, {name: COST_MODELS[name]() for name in ("macs", "weight_bytes")})
    weights = np.random.default_rng(seed).uniform(0.05, 0.5, (len(policy_space.decisions), 1))
    sensitivities = Sensitivities(weights * np.linspace(0, 1, 65) ** 2)
    return FeasibleSpace(costs, ("top1", "macs", "weight_bytes"), TOP1, 0.9, sensitivities=sensitivities)
