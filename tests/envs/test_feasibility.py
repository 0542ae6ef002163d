"""Simulated episodes are those of the environment; batches are treated like single sequences."""

import numpy as np
import pytest

from secateur.envs.compression_env import CompressionEnv
from secateur.envs.core import Budget, Evaluation
from secateur.envs.costs import PolicyCosts
from secateur.envs.feasibility import FeasibleSpace
from secateur.envs.metric import TOP1
from secateur.envs.rollout import rollout

BUDGETS = (
    Budget("half", {"macs": 2000.0}),
    Budget("both", {"macs": 3000.0, "weight_bytes": 900.0}),
    Budget("memory", {"peak_activation_bytes": 300.0}),
    Budget("free", {}),
)


class Costs:
    """Any score; the costs are what counts here."""

    def __init__(self, space):
        self.space = space

    def evaluate(self, policy):
        return Evaluation(0.5, self.space.costs.of_policy(policy))


class Bumpy:
    """A cost that is not monotone: fewer kept units can cost more."""

    name = "latency_ms"

    def total(self, shapes):
        return shapes.widths.sum(axis=1) + 3.0 * (shapes.widths[:, 0] % 3)


class Replay:
    """Asks for the rows of a sequence, whatever is executed."""

    def __init__(self, sequence, budget):
        self.sequence, self.budget = sequence, budget

    def act(self, observation, step):
        return self.sequence[step]


@pytest.fixture
def space(feasible_space):
    space = feasible_space(prune_ratio=(0.0, 0.8), weight_bits=(8, 6, 4), activation_bits=(8, 4))
    costs = PolicyCosts(space.policy_space, {**space.costs.models, "latency_ms": Bumpy()})
    return FeasibleSpace(costs, ("top1", "macs"), TOP1, 0.9)


def rows_of(space, budgets, count=15, seed=0):
    rng = np.random.default_rng(seed)
    sequences = rng.random((count * len(budgets), *space.used.shape))
    return sequences, [budgets[i % len(budgets)] for i in range(len(sequences))]


@pytest.mark.parametrize("budgets", [BUDGETS, (Budget("bumpy", {"latency_ms": 9.0, "macs": 4000.0}),)], ids=["usual", "bumpy"])
def test_simulation_equals_the_environment_step_by_step(space, budgets):
    sequences, rows = rows_of(space, budgets)
    shown = space.simulate(lambda observations, so_far, step, which: sequences[which, step], rows)
    env = CompressionEnv(space, Costs(space), budgets)
    for i, budget in enumerate(rows):
        episode = rollout(env, Replay(sequences[i], budget))
        np.testing.assert_array_equal(episode.actions, shown.sequences[i])
        np.testing.assert_allclose(episode.observations, shown.observations[i], atol=1e-6)
        np.testing.assert_allclose(-episode.reward[1:], shown.costs[i], rtol=1e-6)


def test_actors_see_what_the_environment_shows(space):
    sequences, rows = rows_of(space, BUDGETS)
    seen = []

    def act(observations, so_far, step, which):
        assert (so_far[:, step:] == 0).all()
        seen.append(observations)
        return observations[:, -space.action_dim :]

    shown = space.simulate(act, rows)
    env = CompressionEnv(space, Costs(space), BUDGETS)

    class Follow:
        budget = rows[1]

        def act(self, observation, step):
            return observation[-space.action_dim :]

    np.testing.assert_array_equal(rollout(env, Follow()).actions, shown.sequences[1])
    np.testing.assert_array_equal(np.stack(seen, axis=1), shown.observations[:, :-1])


def test_rows_start_where_they_are_told_to(space):
    sequences, rows = rows_of(space, BUDGETS)
    whole = space.simulate(lambda observations, so_far, step, which: sequences[which, step], rows)
    starts = np.arange(len(rows)) % (space.num_steps + 1)
    asked = np.zeros((len(rows), space.num_steps), bool)

    def act(observations, so_far, step, which):
        asked[which, step] = True
        return sequences[which, step]

    again = space.simulate(act, rows, whole.sequences, starts)
    np.testing.assert_array_equal(again.sequences, whole.sequences)
    seen = np.arange(space.num_steps + 1) >= starts[:, None]
    np.testing.assert_array_equal(again.observations, np.where(seen[..., None], whole.observations, 0))
    np.testing.assert_array_equal(asked, np.arange(space.num_steps) >= starts[:, None])


def test_observations_under_other_limits(space):
    sequences, rows = rows_of(space, BUDGETS[:1])
    shown = space.simulate(lambda observations, so_far, step, which: sequences[which, step], rows)
    other = Budget("other", {"macs": 2500.0, "weight_bytes": 1000.0})
    wanted = space.simulate(lambda observations, so_far, step, which: shown.sequences[which, step], [other] * len(rows))
    np.testing.assert_array_equal(wanted.sequences, shown.sequences)  # the other budget is looser
    for step in range(space.num_steps + 1):
        changed = space.with_limits(shown.observations[:, step], [other] * len(rows))
        np.testing.assert_array_equal(changed, wanted.observations[:, step])


@pytest.mark.parametrize("method", ["execute", "scale_to_budget"])
def test_batches_are_treated_like_single_sequences(space, method):
    sequences, rows = rows_of(space, BUDGETS)
    apply = getattr(space, method)
    alone = np.stack([apply(sequence, budget) for sequence, budget in zip(sequences, rows, strict=True)])
    np.testing.assert_array_equal(apply(sequences, rows), alone)
    np.testing.assert_array_equal(space.execute(alone, rows), alone)
    under_one = apply(sequences, BUDGETS[0])
    np.testing.assert_array_equal(under_one[:: len(BUDGETS)], alone[:: len(BUDGETS)])


def test_budgets_are_keys():
    again = Budget("both", {"weight_bytes": 900.0, "macs": 3000.0})
    assert {BUDGETS[1]: 1}[again] == 1 and len({*BUDGETS, again}) == len(BUDGETS)
    assert Budget("both", {"macs": 3000.0}) != again
