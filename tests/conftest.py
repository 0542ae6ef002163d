"""A toy search problem that every agent can be tried on: no network, and the best policy is known."""

import os

# The networks of the tests are tiny: more threads would only wait for each other. torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from secateur.envs.core import Budget, CompressionPolicy, Episode, Evaluation, Sensitivities, Simulation

LEVELS = np.linspace(0, 1, 5)


class ToySpace:
    """Six steps with two choices of five levels each; the last step lacks the second choice.

    The cost is the mean strength that is left (1 = nothing compressed). Top-1 falls with the squared distance to
    `best`, which lies on the edge of the budget "half".
    """

    num_steps, action_dim, observation_dim = 6, 2, 4
    objectives = ("top1", "cost")
    dense_top1 = 1.0
    dense_costs = {"cost": 1.0}
    unit_magnitudes = tuple(np.random.default_rng(0).random((6, 8)))  # one group per step; the first choice is its prune ratio
    producer_macs = np.arange(1.0, 7.0)
    level_actions = (LEVELS,) * 11
    sensitivities = Sensitivities(np.random.default_rng(1).uniform(0.5, 1, (11, 1)) * np.linspace(0, 1, 65) ** 2)
    best = np.array([[1, 0], [0.25, 0.75], [0.5, 1], [0, 0.25], [0.75, 0.25], [1, 0]])

    def __init__(self):
        self.used = np.ones((6, 2), bool)
        self.used[5, 1] = False

    def cost(self, sequence):
        """Mean strength left over the used entries."""
        return float(np.mean(1 - sequence[self.used]))

    def execute(self, sequence, budget):
        """Round; then the wall: no choice may leave more to the later ones than their strongest levels can do."""
        rounded = np.where(self.used, _round(np.asarray(sequence, float)), 0.0)
        if self.cost(rounded) <= budget.limits["cost"]:
            return rounded
        actions = rounded[self.used]
        missing = len(actions) * (1 - budget.limits["cost"])
        for i in range(len(actions)):
            later = len(actions) - i - 1
            least = missing - later - actions[:i].sum()
            actions[i] = max(actions[i], LEVELS[np.searchsorted(LEVELS, least - 1e-9)] if least > 0 else 0.0)
        executed = np.zeros(self.used.shape)
        executed[self.used] = actions
        return executed

    def scale_to_budget(self, sequence, budget):
        """Shift all actions alike, as far towards no compression as the budget lets them."""
        shifts = np.linspace(-1, 1, 401)
        left = 1 - _round(np.asarray(sequence)[self.used] + shifts[:, None]).mean(axis=1)
        return self.execute(sequence + shifts[np.argmax(left <= budget.limits["cost"])], budget)

    def with_prune_ratios(self, sequence, ratios):
        """Round the ratios to levels; column 0 holds them."""
        sequence = np.array(sequence, float)
        sequence[:, 0] = _round(ratios)
        return sequence

    def decode(self, sequence):
        """The level numbers stand in for widths and bits."""
        numbers = np.rint(4 * np.where(self.used, sequence, 0)).astype(int)
        return CompressionPolicy(tuple(numbers[:, 0].tolist()), tuple(numbers[:, 1].tolist()), ())

    def observe(self, step, sequences, limits):
        """How far, what is left if nothing more is compressed, the last first choice, and the limit."""
        left = np.mean(1 - sequences[:, self.used], axis=1)
        last = sequences[:, step - 1, 0] if step else np.zeros(len(sequences))
        return np.column_stack([np.full(len(sequences), step / self.num_steps), left, last, limits])

    def simulate(self, act, budgets, sequences=None, starts=None):
        """The wall of `execute`, one entry after the other, for all rows at once."""
        rows, size = len(budgets), self.used.sum()
        limits = np.array([budget.limits["cost"] for budget in budgets])
        starts = np.zeros(rows, int) if starts is None else starts
        executed, observations = np.zeros((rows, *self.used.shape)), []
        for step in range(self.num_steps):
            observations.append(self.observe(step, executed, limits))
            free = np.flatnonzero(starts <= step)
            wanted = np.zeros((rows, self.action_dim)) if sequences is None else np.array(sequences[:, step], float)
            if len(free):
                wanted[free] = _round(act(observations[-1][free], executed[free], step, free))
            for column in np.flatnonzero(self.used[step]):
                later = size - 1 - np.flatnonzero(self.used.ravel()).tolist().index(step * self.action_dim + column)
                least = size * (1 - limits) - later - executed[:, self.used].sum(axis=1)
                walled = np.maximum(wanted[:, column], LEVELS[np.searchsorted(LEVELS, np.clip(least - 1e-9, 0, 1))])
                executed[:, step, column] = np.where(starts <= step, walled, wanted[:, column])
        observations = np.stack([*observations, self.observe(self.num_steps, executed, limits)], axis=1).astype(np.float32)
        return Simulation(observations, executed.astype(np.float32), self.cost_shares(executed))

    def cost_shares(self, sequences):
        """The cost of each sequence."""
        return np.mean(1 - sequences[:, self.used], axis=1, keepdims=True)

    def scale_all_to_budgets(self, sequences, budgets):
        """`fit` of one after the other."""
        return np.stack([self.scale_to_budget(sequence, budget) for sequence, budget in zip(sequences, budgets, strict=True)])

    def with_limits(self, observations, budgets):
        """Only the last entry knows the budget."""
        changed = np.array(observations)
        changed[:, -1] = [budget.limits["cost"] for budget in budgets]
        return changed

    def score(self, sequence):
        """Top-1 of an executed sequence."""
        return 1 - float(np.mean((sequence - self.best)[self.used] ** 2))

    def episode(self, actor, top1=None):
        """The episode of an actor; `top1` overrides the toy's own score."""
        wanted = np.array([actor.act(np.zeros(self.observation_dim), step) for step in range(self.num_steps)])
        executed = self.execute(wanted, actor.budget)
        cost = self.cost(executed)
        score = self.score(executed) if top1 is None else top1
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


def _round(sequence):
    return np.rint(4 * np.clip(sequence, 0, 1)) / 4


class KnownFront(ToySpace):
    """Separable losses, so that dynamic programming knows the best top-1 of every cost; `bend` shapes the front."""

    losses = np.linspace(0.2, 1.8, 11)
    bend = staticmethod(lambda kept: kept)

    def score(self, sequence):
        return float(self.bend(1 - np.mean(self.losses * sequence[self.used] ** 2) / np.mean(self.losses)))

    def front(self):
        """(costs, top-1) of every total strength."""
        best = np.full(4 * len(self.losses) + 1, np.inf)
        best[0] = 0.0
        for weight in self.losses:
            options = [np.concatenate([np.full(k, np.inf), best[: len(best) - k]]) + weight * (k / 4) ** 2 for k in range(5)]
            best = np.min(options, axis=0)
        kept = 1 - best / self.losses.sum()
        return 1 - np.arange(len(best)) / (len(best) - 1), self.bend(kept)


class ConvexFront(KnownFront):
    """Each step costs more accuracy than the one before."""


class PartlyConcaveFront(KnownFront):
    """Accuracy falls off a cliff and recovers nothing below it: no linear weighting reaches the middle."""

    bend = staticmethod(lambda kept: 0.5 + 0.5 * np.tanh(6 * (kept - 0.75)) / np.tanh(1.5))


@pytest.fixture
def known_fronts():
    """{name: class} of toy problems whose Pareto front is known."""
    return {"convex": ConvexFront, "partly_concave": PartlyConcaveFront}


@pytest.fixture
def toy():
    space = ToySpace()
    half = space.cost(space.best)
    space.budgets = (Budget("half", {"cost": half}), Budget("quarter", {"cost": half / 2}))
    return space
