"""The artificial bee colony: its moves, its phases, and that it finds what random search does not."""

from dataclasses import replace

import numpy as np
import pytest

from secateur.agents.bee_colony import BeeColony, BeeColonyConfig, Colony, Source, neighbor, regress
from secateur.agents.greedy import GreedyConfig, allocate
from secateur.agents.random_search import RandomConfig, RandomSearch
from secateur.envs.core import Budget, InputError, Sensitivities

TOP1 = np.array([1.0, 0.0])
GENES = np.ones((8, 1), bool)


class FreeSpace:
    """No budget and no levels: what a move draws is what comes out."""

    num_steps, action_dim, observation_dim = 8, 1, 1
    objectives = ("top1", "cost")
    dense_quality = 1.0
    sensitivities = None
    used = GENES

    def execute(self, sequences, budgets):
        return sequences

    scale_to_budget = execute

    def decode(self, sequence):
        return sequence.tobytes()


def sequences(count=10, seed=1):
    return 0.3 + 0.4 * np.random.default_rng(seed).random((count, 8, 1))


def colony_of(space, seed=0, **options):
    """A colony whose sources are random sequences with constructed utilities, the first the best."""
    colony = Colony(BeeColonyConfig(**options), space, Budget("b", {}), TOP1, np.random.default_rng(seed))
    colony.sources = [Source(sequence, 0.0, -float(i)) for i, sequence in enumerate(sequences(colony.config.sources))]
    colony.best = colony.sources[0]
    colony.trials[:] = 0
    return colony


def run_phase(colony, toy, top1=None):
    """Evaluate one whole phase; return its episodes."""
    actors = [colony.next() for _ in range(colony.config.sources)]
    episodes = [toy.episode(actor, top1) for actor in actors]
    for actor, episode in reversed(list(zip(actors, episodes, strict=True))):
        colony.learn(actor, episode)
    return episodes


def test_finds_better_policies_than_random_search(toy):
    budget, evaluations = toy.budgets[:1], 100
    bees, random = [], []
    for seed in range(4):
        colony = BeeColony(BeeColonyConfig(), toy, budget, np.random.default_rng(seed))
        bees.append(max(episode.evaluation.score for episode in toy.run(colony, evaluations)))
        baseline = RandomSearch(RandomConfig(), toy, budget, np.random.default_rng(seed))
        random.append(max(episode.evaluation.score for episode in toy.run(baseline, evaluations)))
    assert np.mean(bees) > 0.98, "the best policy has 1"
    assert np.mean(bees) > np.mean(random) + 0.03


def test_a_source_never_gets_worse_before_it_is_given_up(toy):
    colony = Colony(BeeColonyConfig(limit=1000), toy, toy.budgets[0], TOP1, np.random.default_rng(0))
    run_phase(colony, toy)
    for _ in range(8):
        before = [source.rank_key for source in colony.sources]
        run_phase(colony, toy)
        after = [source.rank_key for source in colony.sources]
        assert all(new <= old for new, old in zip(after, before, strict=True))
    assert after < before or min(after) < (0.0, -0.9)


def test_a_violated_constraint_outweighs_any_utility():
    feasible, violating = Source(np.zeros(1), 0.0, 0.1), Source(np.zeros(1), 0.01, 0.9)
    assert feasible.better_than(violating) and not violating.better_than(feasible)
    assert violating.better_than(Source(np.zeros(1), 0.02, 1.0))
    assert not feasible.better_than(feasible)


def test_first_phase_holds_the_uniform_sequence_and_random_ones(toy):
    colony = Colony(BeeColonyConfig(sensitivity=False), toy, toy.budgets[0], TOP1, np.random.default_rng(0))
    episodes = run_phase(colony, toy)
    assert len(episodes) == 10
    assert len(np.unique(episodes[0].actions[toy.used])) == 1
    assert all(len(np.unique(episode.actions[toy.used])) > 1 for episode in episodes[1:])


def test_first_phase_holds_what_greedy_would_try(toy):
    budget = toy.budgets[0]
    colony = Colony(BeeColonyConfig(), toy, budget, TOP1, np.random.default_rng(0))
    policies = [episode.policy for episode in run_phase(colony, toy)]
    greedy = {toy.decode(allocate(toy, toy.sensitivities, budget, power)) for power in GreedyConfig.powers[:5]}
    assert greedy <= set(policies[:6]) and len(set(policies)) == 10


def test_sums_of_sensitivities_predict_from_few_evaluations():
    """The score follows from the sum; eight evaluations do not determine twenty single genes."""
    rng = np.random.default_rng(0)
    sensitivities = Sensitivities(rng.uniform(0.1, 2, (20, 1)) * np.linspace(0, 1, 65) ** 2)

    def loss(genes):
        return np.stack([np.zeros(len(genes)), (sensitivities(genes) ** 0.75).sum(axis=1)], axis=1)

    genes, wanted = rng.random((8, 20)), rng.random((50, 20))

    def correlation(known):
        return np.corrcoef(regress(genes, loss(genes), wanted, 0.3, known)[:, 1], loss(wanted)[:, 1])[0, 1]

    assert correlation(sensitivities) > 0.95 > correlation(None) + 0.2


def test_scouts_replace_every_exhausted_source_and_the_best_is_remembered(toy):
    colony = Colony(BeeColonyConfig(limit=3), toy, toy.budgets[0], TOP1, np.random.default_rng(0))
    run_phase(colony, toy)
    run_phase(colony, toy)  # onlookers
    best, sources = colony.best, list(colony.sources)
    colony.trials[:] = [3, 0, 3, 3] + [0] * 6
    run_phase(colony, toy, top1=0.0)  # worse than all there is
    replaced = [new is not old for new, old in zip(colony.sources, sources, strict=True)]
    assert replaced == [True, False, True, True] + [False] * 6
    np.testing.assert_array_equal(colony.trials, [0, 1, 0, 0] + [1] * 6)
    assert colony.best is best


def test_trials_count_failures_and_start_anew_with_an_improvement(toy):
    colony = Colony(BeeColonyConfig(), toy, toy.budgets[0], TOP1, np.random.default_rng(0))
    run_phase(colony, toy)
    run_phase(colony, toy, top1=-1.0)  # onlookers
    assert colony.trials.sum() == 10
    run_phase(colony, toy, top1=2.0)  # every employed bee improves
    assert colony.trials.sum() == 0


def test_onlookers_prefer_better_sources():
    colony = colony_of(FreeSpace(), candidates=1)
    visits = np.bincount([visit.slot for _ in range(200) for visit in colony.onlookers()], minlength=10)
    assert visits[:3].sum() > 2 * visits[3:6].sum() > 2 * visits[6:].sum() > 0


def moves(count, config, used=GENES, seed=0, ends=None):
    """Changes of a source by `count` moves, (count, num_steps, action_dim)."""
    rng = np.random.default_rng(seed)
    source, partner, best = sequences(3) if ends is None else ends
    return np.array([neighbor(source, partner, best, used, config, rng) for _ in range(count)]) - source


def test_every_gene_moves_the_last_included():
    moved = moves(400, BeeColonyConfig(genes=1 / 8))[..., 0] != 0
    assert moved.sum(axis=1).max() == 1
    assert np.all(moved.sum(axis=0) > 400 / 8 / 2)


def test_a_move_changes_distinct_genes_from_one_to_all():
    counts = (moves(800, BeeColonyConfig()) != 0).sum(axis=(1, 2))
    assert set(counts) == set(range(1, 9))
    assert np.bincount(counts)[1:].min() > 800 / 8 / 2


def test_moves_are_unbiased_without_guidance():
    # The partner lies on one side, not so far that a move is clipped.
    ends = np.full((8, 1), 0.5), np.full((8, 1), 0.3), np.full((8, 1), 0.3)
    steps = moves(4000, BeeColonyConfig(guidance=0.0), ends=ends).mean(axis=(1, 2))
    assert abs(steps.mean()) < 4 * steps.std() / np.sqrt(len(steps))
    assert steps.std() > 0.01


def test_kinds_of_choices_are_traded_against_each_other():
    def common_step(kinds):
        """Largest step that all genes of a kind make together, over many moves of one gene."""
        used = np.zeros((8, 2), bool)
        used[:, :kinds] = True
        changes = moves(50, BeeColonyConfig(genes=1 / 100), used, ends=np.full((3, 8, 2), 0.5))
        return np.median(np.abs(changes[..., :kinds]), axis=1).max()

    assert 0.2 < common_step(kinds=2) <= 0.3
    assert common_step(kinds=1) == 0


def test_guidance_moves_towards_the_best_source():
    source, partner, best = sequences(3)

    def distance(guidance):
        mean = source + moves(2000, BeeColonyConfig(guidance=guidance), ends=(source, partner, best)).mean(axis=0)
        return np.abs(mean - best).mean()

    assert distance(1.5) < 0.8 * distance(0.0)


def test_no_policy_is_asked_for_twice(toy):
    agent = BeeColony(BeeColonyConfig(), toy, toy.budgets[:1], np.random.default_rng(0))
    episodes = toy.run(agent, 150)
    assert len({episode.policy for episode in episodes}) == 150


def test_a_used_up_space_repeats_itself_and_does_not_hang(one_choice):
    toy = one_choice
    agent = BeeColony(BeeColonyConfig(), toy, [Budget("loose", {"cost": 1.0})], np.random.default_rng(0))
    assert {episode.policy.widths[0] for episode in toy.run(agent, 30)} == {1, 2, 3, 4, 5}


def test_the_regression_recovers_a_quadratic():
    rng = np.random.default_rng(0)

    def truth(genes):
        return 1 - genes**2 @ np.array([[0.1, 0], [0.5, 0], [0.2, 0]]) + genes @ np.array([[0.1, 1], [0, 2], [0.3, 3]])

    genes, wanted = rng.random((60, 3)), rng.random((20, 3))
    np.testing.assert_allclose(regress(genes, truth(genes), wanted, 1e-6), truth(wanted), atol=1e-3)
    # All penalty and no data leave the mean.
    np.testing.assert_allclose(
        regress(genes, truth(genes), wanted, 1e9), truth(genes).mean(axis=0, keepdims=True).repeat(20, 0), atol=1e-6
    )


def test_bees_try_the_most_promising_of_their_moves():
    space = FreeSpace()
    colony = colony_of(space, candidates=8)
    evaluated = np.random.default_rng(5).random((100, 8, 1))
    colony.evaluated = [Source(sequence, 0.0, -float(sequence[2, 0])) for sequence in evaluated]  # the third gene decides
    screened = np.mean([colony.move(3).sequence[2] for _ in range(50)])
    colony.evaluated = []
    assert screened < np.mean([colony.move(3).sequence[2] for _ in range(50)]) - 0.05


def test_scores_are_remembered_by_what_was_executed(toy):
    colony = Colony(BeeColonyConfig(), toy, toy.budgets[0], TOP1, np.random.default_rng(0))
    executed = toy.execute(np.ones(toy.used.shape), toy.budgets[0])
    for actor in [colony.next() for _ in range(10)]:
        colony.learn(actor, replace(toy.episode(actor), actions=executed))
    for source in colony.sources:
        np.testing.assert_array_equal(source.sequence, executed)


def test_an_accuracy_limit_is_a_constraint(toy):
    """Below the limit on the drop the smallest violation leads, whatever the preference says."""
    budget = replace(toy.budgets[0], metric_drop=0.05)
    agent = BeeColony(BeeColonyConfig(preference=(0.0, 1.0)), toy, [budget], np.random.default_rng(0))
    feasible = [episode.feasible for episode in toy.run(agent, 150)]
    assert sum(feasible[-50:]) > sum(feasible[:50]) + 10


def test_a_preference_for_low_costs_leaves_the_edge(toy):
    def cheapest(**options):
        agent = BeeColony(BeeColonyConfig(**options), toy, toy.budgets[:1], np.random.default_rng(0))
        toy.run(agent, 100)
        return agent.searchers["half"].best

    assert toy.cost(cheapest(preference=(0.1, 0.9)).sequence) < 0.5 * toy.cost(cheapest().sequence)


def test_a_colony_does_not_depend_on_how_far_the_others_are(toy):
    def sequences_of_half(tell_quarter):
        agent, found = BeeColony(BeeColonyConfig(), toy, toy.budgets, np.random.default_rng(0)), []
        for _ in range(5):
            for actor in agent.ask(20):
                if actor.budget.name == "half":
                    found.append(actor.sequence.tolist())
                if actor.budget.name == "half" or tell_quarter:
                    agent.tell([(actor, toy.episode(actor))])
        return found

    alone, together = sequences_of_half(tell_quarter=False), sequences_of_half(tell_quarter=True)
    common = min(len(alone), len(together))
    assert common >= 30 and alone[:common] == together[:common]


def test_an_episode_comes_back_once(toy):
    agent = BeeColony(BeeColonyConfig(), toy, toy.budgets, np.random.default_rng(0))
    (actor,) = agent.ask(1)
    agent.tell([(actor, toy.episode(actor))])
    with pytest.raises(ValueError, match="ticket 0 is not out"):
        agent.tell([(actor, toy.episode(actor))])


@pytest.mark.parametrize(
    "options",
    [
        {"sources": 1},
        {"limit": 0},
        {"genes": 0},
        {"genes": 1.5},
        {"ridge": 0},
        {"preference": (0, 0)},
        {"preference": (2, -1)},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(InputError, match=f"`{next(iter(options))}` of the bee colony"):
        BeeColonyConfig(**options)


def test_a_preference_needs_one_weight_per_objective(toy):
    with pytest.raises(InputError, match="one weight for each of top1, cost, but got 3"):
        BeeColony(BeeColonyConfig(preference=(1, 0, 0)), toy, toy.budgets, np.random.default_rng(0))
