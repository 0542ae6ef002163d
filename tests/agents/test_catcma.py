"""CatCMA: kinds of choices, the first distribution around greedy's policy, and the move towards better members."""

import pickle

import numpy as np
import pytest

from secateur.agents.catcma import CatCma, CatCmaConfig, Kinds, make_optimizer
from secateur.agents.greedy import GreedyConfig, allocate
from secateur.agents.random_search import RandomConfig, RandomSearch
from tests.agents.problems import pruned_and_quantized_space, scored, share_budget
from tests.conftest import ToySpace, with_budgets


def levels_of(*lengths):
    return [np.linspace(0, 1, length) for length in lengths]


def search(space, budget, seed=0, **options):
    agent = CatCma(CatCmaConfig(**options), space, [budget], np.random.default_rng(seed))
    return agent, agent.searchers[budget.name]


def test_choices_are_continuous_integer_or_categorical_by_their_levels():
    kinds = Kinds(levels_of(2, 30, 7, 2, 3, 7, 9))
    assert kinds.categorical.tolist() == [0, 3]
    assert kinds.integer.tolist() == [2, 5]
    assert kinds.continuous.tolist() == [1, 4, 6], "many levels, and integers with fewer levels than others"


@pytest.mark.parametrize("lengths", [(2, 2), (5, 5), (30,), (2, 5, 30)])
def test_members_decode_to_actions_of_their_choices(lengths):
    kinds = Kinds(levels_of(*lengths))
    optimizer = make_optimizer(CatCmaConfig(), kinds, None)
    optimizer.reseed_rng(0)
    drawn = np.array([kinds.actions(optimizer.ask()) for _ in range(50)])
    assert drawn.min() >= 0 and drawn.max() <= 1
    for column, length in zip(drawn.T, lengths, strict=True):
        assert len(set(column)) > 1
        if length < 9:
            assert set(column) <= set(np.linspace(0, 1, length))


def test_the_first_distribution_is_around_greedys_policy():
    kinds = Kinds(levels_of(2, 5, 30, 2))
    optimizer = make_optimizer(CatCmaConfig(certainty=0.9, spread=0.05), kinds, np.array([1.0, 0.5, 0.2, 0.0]))
    optimizer.reseed_rng(0)
    mean = np.mean([kinds.actions(optimizer.ask()) for _ in range(2000)], axis=0)
    np.testing.assert_allclose(mean, [0.9, 0.5, 0.2, 0.1], atol=0.03)


def test_greedys_policy_comes_first_and_is_not_told(toy):
    budget = toy.budgets[0]
    agent, searcher = search(toy, budget, population=6)
    actors = agent.ask(10)
    assert len(actors) == 7, "a population and greedy's policy"
    np.testing.assert_array_equal(actors[0].sequence, allocate(toy, toy.sensitivities, budget, GreedyConfig().powers[0]))
    agent.tell([(actor, toy.episode(actor)) for actor in actors])
    assert searcher._optimizer.generation == 1 and len(agent.ask(10)) == 6


def test_without_sensitivities_nothing_is_preferred(toy):
    _, searcher = search(toy, toy.budgets[0], sensitivity=False)
    assert searcher.first is None and not CatCmaConfig(sensitivity=False).needs_sensitivities
    np.testing.assert_array_equal(searcher._optimizer._mean, 0.5)


def test_generations_without_scores_are_not_told(toy):
    agent, searcher = search(toy, toy.budgets[0])
    before = searcher._optimizer._mean.copy()
    actors = agent.ask(50)
    agent.tell([(actor, toy.episode(actor, top1=float("nan"))) for actor in actors])
    assert searcher._optimizer.generation == 0
    np.testing.assert_array_equal(searcher._optimizer._mean, before)


def test_failed_members_rank_last(toy):
    """Members whose first choice is kept weak fail: the distribution moves away from them."""
    agent, searcher = search(toy, toy.budgets[0], population=30, sensitivity=False)
    for _ in range(4):
        actors = agent.ask(30)
        members = [searcher.kinds.actions(member) for member in searcher._members]
        agent.tell(
            [
                (actor, toy.episode(actor, top1=float("nan") if member[0] < 0.5 else 0.5))
                for actor, member in zip(actors, members, strict=True)
            ]
        )
    assert searcher._optimizer._mean[0] > 0.6


@pytest.mark.parametrize("bits", [(8, 4), (8, 7, 6, 5, 4)])
def test_finds_better_policies_than_random_search(bits):
    wins = 0
    for seed in range(4):
        space = with_budgets(ToySpace(weight_bits=bits))
        # Without sensitivities, because those of the toy have nothing to do with its best policy.
        own = CatCma(CatCmaConfig(sensitivity=False), space, space.budgets[:1], np.random.default_rng(seed))
        other = RandomSearch(RandomConfig(), space, space.budgets[:1], np.random.default_rng(seed))
        best = [max(episode.evaluation.score for episode in space.run(agent, 120)) for agent in (own, other)]
        wins += best[0] >= best[1]
    assert wins >= 3


def test_improves_on_greedys_policy_where_sensitivities_mislead(pruning_toy):
    budget = pruning_toy.budgets[0]
    for seed in range(3):
        scores = [episode.evaluation.score for episode in pruning_toy.run(search(pruning_toy, budget, seed)[0], 120)]
        assert max(scores) > scores[0] + 0.02


def test_pruning_and_bits_together_move_to_what_scores_well():
    """The score is least compression of the widths; the limits can be met by fewer bits."""
    space = pruned_and_quantized_space(0)
    agent, searcher = search(space, share_budget(space, weight_bytes=0.2))
    assert len(searcher.kinds.categorical) == 5 and len(searcher.kinds.ordered) == 3
    means = []
    for _ in range(12):
        actors = agent.ask(20)
        kept = [1 - float(actor.sequence[space.used][searcher.kinds.ordered].mean()) for actor in actors]
        means.append(np.mean(kept))
        agent.tell([(actor, scored(actor, value)) for actor, value in zip(actors, kept, strict=True)])
    assert np.mean(means[-3:]) > np.mean(means[:3]) + 0.02


def test_draws_are_alike_after_pickling_between_generations(toy):
    agent, _ = search(toy, toy.budgets[0], population=6)
    actors = agent.ask(7)
    agent.tell([(actor, toy.episode(actor)) for actor in actors])
    restored = pickle.loads(pickle.dumps(agent))
    for one, other in zip(agent.ask(6), restored.ask(6), strict=True):
        np.testing.assert_array_equal(one.sequence, other.sequence)
