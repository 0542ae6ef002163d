"""The environment without its evaluation: many episodes at once, each under a budget of its own.

What is executed, observed and spent is a deterministic function of the actions (`FeasibleSpace`), so an agent may walk ahead
as often as it likes; only the accuracy at the end has to be measured. One step of all rows is one call of the actor, and a
few calls of the cost models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.envs.core import Act, Budget, Simulation
from secateur.envs.feasibility import FeasibleSpace
from secateur.envs.observation import Observer

_CHOICES = 8  # levels that are tried at once for rows whose wish the wall refuses


def simulate(
    space: FeasibleSpace,
    act: Act,
    budgets: Sequence[Budget],
    sequences: np.ndarray | None = None,
    starts: np.ndarray | None = None,
) -> Simulation:
    """Return what the environment would execute, observe and spend; see `ActionSpace.simulate`."""
    rows, wall, observer = len(budgets), Wall(space, budgets), Observer(space)
    forced = np.zeros((rows, *space.used.shape), np.float32) if sequences is None else np.asarray(sequences, np.float32)
    starts = np.zeros(rows, int) if starts is None else np.asarray(starts)
    forced_levels = space.policy_space.snap(forced)
    executed = np.zeros_like(forced)
    levels = np.tile(space.policy_space.strongest, (rows, 1))
    observations = np.zeros((rows, space.num_steps + 1, len(observer.names)), np.float32)
    limits = observer.limits(budgets)
    last = np.zeros((rows, space.action_dim), np.float32)
    decision = 0
    for step in range(space.num_steps):
        free = np.flatnonzero(starts <= step)
        wanted = np.zeros((rows, space.action_dim))
        if len(free):
            observations[free, step] = observer.rows(step, decision, levels[free], last[free], limits[free])
            wanted[free] = act(observations[free, step], executed[free], step, free)
        for column in np.flatnonzero(space.used[step]):
            actions = space.policy_space.decisions[decision].actions
            levels[:, decision] = forced_levels[:, decision]
            if len(free):
                wish = np.abs(wanted[free, column, None] - actions).argmin(axis=1)
                levels[free, decision] = wall.admit(levels[free], decision, wish, free)
            executed[:, step, column] = actions[levels[:, decision]]
            decision += 1
        last = executed[:, step]
    observations[:, -1] = observer.rows(space.num_steps, decision, levels, last, limits)
    return Simulation(observations, executed, space.cost_shares(executed))


def scale_all_to_budgets(
    space: FeasibleSpace, sequences: np.ndarray, budgets: Sequence[Budget], bends: int = 12, rounds: int = 3
) -> np.ndarray:
    """Return `FeasibleSpace.scale_to_budget` of many sequences, (n, num_steps, action_dim), each under a budget of its own.

    `bends` exponents are tried in each of the `rounds`: together they narrow the edge to 14 * bends ** -rounds.
    """
    wall, rows = Wall(space, budgets), len(sequences)
    actions = np.clip(sequences, 0.005, 0.995)
    low, high = np.full(rows, -7.0), np.full(rows, 7.0)
    best = np.empty((rows, len(space.policy_space.decisions)), int)
    for _ in range(rounds):
        exponents = np.linspace(low, high, bends, axis=1)
        bent = actions[:, None] ** (2.0**exponents)[..., None, None]
        population = space.policy_space.snap(bent)
        flat = population.reshape(rows * bends, -1)
        fits = wall.slack(flat, np.repeat(np.arange(rows), bends)).reshape(rows, bends) <= 0
        index = np.where(fits.any(axis=1), bends - 1 - fits[:, ::-1].argmax(axis=1), 0)
        best = population[np.arange(rows), index]
        low, high = exponents[np.arange(rows), index], exponents[np.arange(rows), np.minimum(index + 1, bends - 1)]
    return np.stack([space.policy_space.sequence(levels) for levels in wall.walk(best)])


class Wall:
    """`FeasibleSpace.admit` and `walk` for many rows with a budget each.

    Only what the budgets limit is computed, and the levels above a refused wish are tried a few at a time.
    """

    def __init__(self, space: FeasibleSpace, budgets: Sequence[Budget]):
        self.space = space
        distinct = {id(budget): budget for budget in budgets}
        place = {key: index for index, key in enumerate(distinct)}
        self._of_row = np.array([place[id(budget)] for budget in budgets], int)
        self._names = list(dict.fromkeys(name for budget in distinct.values() for name in budget.limits))
        self._limits = np.array([[b.limits.get(name, np.inf) for name in self._names] for b in distinct.values()])
        self._completions = np.array([space.completion(budget) for budget in distinct.values()])

    def slack(self, levels: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return `FeasibleSpace.slack` of levels (n, decisions), each under the budget of its row, (n,)."""
        if not self._names:
            return np.full(len(levels), -1.0)
        costs = self.space.costs(levels, self._names)
        limits = self._limits[self._of_row[rows]]
        return np.max([costs[name] / limits[:, i] - 1 for i, name in enumerate(self._names)], axis=0)

    def admit(self, levels: np.ndarray, decision: int, wanted: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the executed level of every row, (n,); arguments as in `FeasibleSpace.admit`, one row each."""
        admitted = wanted.copy()
        open_rows = np.arange(len(rows))
        last, chunk = self.space.policy_space.num_levels[decision] - 1, 1
        start = wanted.copy()
        while len(open_rows):  # upwards: first the wish itself, then the next stronger levels
            offered = start[open_rows, None] + np.arange(chunk)
            reachable = (offered <= last) & self._reachable(levels, decision, np.minimum(offered, last), rows, open_rows)
            found = reachable.any(axis=1)
            admitted[open_rows[found]] = (start[open_rows] + reachable.argmax(axis=1))[found]
            start += chunk
            stuck = open_rows[~found & (start[open_rows] > last)]
            if len(stuck):
                admitted[stuck] = self._weaker(levels, decision, wanted, rows, stuck)
            open_rows = open_rows[~found & (start[open_rows] <= last)]
            chunk = _CHOICES
        return admitted

    def _weaker(self, levels, decision, wanted, rows, stuck) -> np.ndarray:
        """The nearest reachable weaker level of rows that have no stronger one; see `FeasibleSpace.admit`."""
        offered = np.tile(np.arange(self.space.policy_space.num_levels[decision]), (len(stuck), 1))
        reachable = self._reachable(levels, decision, offered, rows, stuck) & (offered < wanted[stuck, None])
        weaker = offered.shape[1] - 1 - reachable[:, ::-1].argmax(axis=1)
        return np.where(reachable.any(axis=1), weaker, self._completions[self._of_row[rows[stuck]], decision])

    def _reachable(self, levels, decision, offered, rows, which) -> np.ndarray:
        """Whether the limits can still be kept with each offered level, (len(which), choices)."""
        count, choices = offered.shape
        population = np.repeat(self._completions[self._of_row[rows[which]]], choices, axis=0)
        population[:, :decision] = np.repeat(levels[which, :decision], choices, axis=0)
        population[:, decision] = offered.ravel()
        return self.slack(population, np.repeat(rows[which], choices)).reshape(count, choices) <= 0

    def walk(self, levels: np.ndarray) -> np.ndarray:
        """Return `FeasibleSpace.walk` of levels (rows, decisions), each under its own budget."""
        executed, rows = levels.copy(), np.arange(len(levels))
        decisions = levels.shape[1]
        taken = np.arange(decisions) <= np.arange(decisions)[:, None]  # row d: decisions 0..d as they are
        completions = self._completions[self._of_row]
        population = np.where(taken, levels[:, None], completions[:, None]).reshape(-1, decisions)
        blocked = self.slack(population, np.repeat(rows, decisions)).reshape(len(levels), decisions) > 0
        for row in np.flatnonzero(blocked.any(axis=1)):
            for decision in range(int(blocked[row].argmax()), decisions):
                one = rows[row : row + 1]
                executed[row, decision] = self.admit(executed[one], decision, levels[one, decision], one)[0]
        return executed
