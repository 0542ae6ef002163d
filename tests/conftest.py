"""A toy search problem that every agent can be tried on: no network, and the best policy is known."""

import os

# The networks of the tests are tiny: more threads would only wait for each other. torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from envs.core import Budget, CompressionPolicy, Episode, Evaluation  # noqa: E402

LEVELS = np.linspace(0, 1, 5)


class ToySpace:
    """Six steps with two choices of five levels each; the last step lacks the second choice.

    The cost is the mean strength that is left (1 = nothing compressed). Top-1 falls with the squared distance to
    `best`, which lies on the edge of the budget "half".
    """

    num_steps, action_dim, observation_dim = 6, 2, 1
    objectives = ("top1", "cost")
    dense_top1 = 1.0
    unit_magnitudes = tuple(np.random.default_rng(0).random((6, 8)))  # one group per step; the first choice is its prune ratio
    producer_macs = np.arange(1.0, 7.0)
    best = np.array([[1, 0], [0.25, 0.75], [0.5, 1], [0, 0.25], [0.75, 0.25], [1, 0]])

    def __init__(self):
        self.used = np.ones((6, 2), bool)
        self.used[5, 1] = False

    def cost(self, table):
        """Mean strength left over the used entries."""
        return float(np.mean(1 - table[self.used]))

    def execute(self, table, budget):
        """Round; then the wall: no choice may leave more to the later ones than their strongest levels can do."""
        rounded = np.where(self.used, _round(np.asarray(table, float)), 0.0)
        if self.cost(rounded) <= budget.limits["cost"]:
            return rounded
        strengths = rounded[self.used]
        missing = len(strengths) * (1 - budget.limits["cost"])
        for i in range(len(strengths)):
            later = len(strengths) - i - 1
            least = missing - later - strengths[:i].sum()
            strengths[i] = max(strengths[i], LEVELS[np.searchsorted(LEVELS, least - 1e-9)] if least > 0 else 0.0)
        executed = np.zeros(self.used.shape)
        executed[self.used] = strengths
        return executed

    def fit(self, table, budget):
        """Shift all strengths alike, as far towards no compression as the budget lets them."""
        shifts = np.linspace(-1, 1, 401)
        left = 1 - _round(np.asarray(table)[self.used] + shifts[:, None]).mean(axis=1)
        return self.execute(table + shifts[np.argmax(left <= budget.limits["cost"])], budget)

    def with_prune_ratios(self, table, ratios):
        """Round the ratios to levels; column 0 holds them."""
        table = np.array(table, float)
        table[:, 0] = _round(ratios)
        return table

    def decode(self, table):
        """The level numbers stand in for widths and bits."""
        numbers = np.rint(4 * np.where(self.used, table, 0)).astype(int)
        return CompressionPolicy(tuple(numbers[:, 0].tolist()), tuple(numbers[:, 1].tolist()), ())

    def episode(self, actor, top1=None):
        """The episode of an actor; `top1` overrides the toy's own score."""
        wanted = np.array([actor.act(np.zeros(1), step) for step in range(self.num_steps)])
        executed = self.execute(wanted, actor.budget)
        cost = self.cost(executed)
        score = 1 - float(np.mean((executed - self.best)[self.used] ** 2)) if top1 is None else top1
        constraints = {"cost": cost / actor.budget.limits["cost"] - 1}
        if actor.budget.top1_drop is not None:
            constraints["top1_drop"] = (self.dense_top1 - score) / actor.budget.top1_drop - 1
        return Episode(
            actor.budget.name,
            self.decode(executed),
            Evaluation(score, {"cost": cost}),
            constraints,
            actions=executed.astype(np.float32),
            reward=np.array([score, -cost], np.float32),
        )

    def run(self, agent, evaluations, slots=4):
        """The episodes of a search, in the order in which they were asked for."""
        episodes = []
        while len(episodes) < evaluations and (actors := agent.ask(min(slots, evaluations - len(episodes)))):
            found = [(actor, self.episode(actor)) for actor in actors]
            episodes += [episode for _, episode in found]
            agent.tell(found)
        return episodes


def _round(table):
    return np.rint(4 * np.clip(table, 0, 1)) / 4


@pytest.fixture
def toy():
    space = ToySpace()
    half = space.cost(space.best)
    space.budgets = (Budget("half", {"cost": half}), Budget("quarter", {"cost": half / 2}))
    return space
