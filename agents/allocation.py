"""Allocation of compression by harms that add up: harms and costs of levels, and steps of single levels to the edge of a budget.

A policy is a vector of levels, (entries,), one for each entry of `np.nonzero(space.used)`. With d_i the divergence of the outputs
when choice i alone is compressed (envs/sensitivity.py), its *harm* is

    H(x) = sum over i of h_i(x_i),  h_i = d_i ** power.                                                             (1)

Costs need not be additive. They are exact, and computed in batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from secateur.envs.core import ActionSpace, Budget, Sensitivities

ROUNDING = 1e-9
"""Rounding of summed costs, as a share."""

COARSE = (8, 4, 2)
"""Parts of an entry's levels that a step takes: single levels of a hundred would take too long."""
FINE = (100, *COARSE)
"""The same with single levels, where few steps are needed."""

LinearSolver = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray | None]
"""Levels, (entries,), with little harm under linear limits; None: none were found. Arguments: harms, (entries, most levels),
infinite where a level must not be chosen; costs, (limits, entries, most levels), as shares of the limits; what all costs together
may use, (limits,)."""


def measured_sensitivities(space: ActionSpace, owner: str) -> Sensitivities:
    """Return the sensitivities of a space.

    Args:
        space: of the choices.
        owner: how the message calls the agent.
    Raises:
        ValueError: if they have not been measured.
    """
    if space.sensitivities is None:
        raise ValueError(f"{owner} needs a space whose sensitivities have been measured.")
    return space.sensitivities


def level_harms(space: ActionSpace, sensitivities: Sensitivities, power: float) -> np.ndarray:
    """Return the harm of every level, (entries, most levels); entries with fewer levels repeat their last one."""
    most = max(len(actions) for actions in space.level_actions)
    padded = np.stack([np.pad(actions, (0, most - len(actions)), mode="edge") for actions in space.level_actions])
    return sensitivities(padded.T).T ** power


class LevelProblem:
    """The levels of a space under one budget.

    Costs that are not among the objectives are left to the feasibility projection (`ActionSpace.execute`).

    Args:
        space: of the choices.
        budget: satisfiable.
    """

    def __init__(self, space: ActionSpace, budget: Budget):
        self.space, self.budget = space, budget
        self.last = np.array([len(actions) - 1 for actions in space.level_actions])
        """(entries,) the strongest levels."""
        names = space.objectives[1:]
        self._limited = [place for place, name in enumerate(names) if name in budget.limits]
        self._limits = np.array([budget.limits[names[place]] / space.dense_costs[names[place]] for place in self._limited])

    def sequences(self, levels: np.ndarray) -> np.ndarray:
        """Return action sequences (n, num_steps, action_dim) of levels (n, entries)."""
        sequences = np.zeros((len(levels), *self.space.used.shape))
        columns = [actions[at] for actions, at in zip(self.space.level_actions, levels.T, strict=True)]
        sequences[:, self.space.used] = np.stack(columns, axis=1)
        return sequences

    def levels(self, sequence: np.ndarray) -> np.ndarray:
        """Return the levels of an executed sequence, (entries,)."""
        entries = zip(self.space.level_actions, sequence[self.space.used], strict=True)
        return np.array([np.abs(actions - action).argmin() for actions, action in entries])

    def executed(self, levels: np.ndarray) -> np.ndarray:
        """Return the executed sequence of levels (entries,), (num_steps, action_dim)."""
        return self.space.execute(self.sequences(levels[None])[0], self.budget)

    def shares(self, levels: np.ndarray) -> np.ndarray:
        """Return the limited costs of levels (n, entries) as shares of their limits, (n, limits)."""
        return self.space.cost_shares(self.sequences(levels))[:, self._limited] / self._limits

    def excess(self, levels: np.ndarray) -> np.ndarray:
        """Return by how much the costs of levels (n, entries) exceed the limits, as shares of them, summed, (n,)."""
        over = self.shares(levels) - 1
        return np.where(over > ROUNDING, over, 0.0).sum(axis=1)

    def compress(self, levels: np.ndarray, harms: np.ndarray, parts: Sequence[int] = COARSE) -> np.ndarray:
        """Return levels (entries,) with more compression, which meet the limits.

        Every step is the one with the least harm per reduction of the excess.

        Args:
            levels: to begin with.
            harms: of all levels, (entries, most levels).
            parts: a step is one of these parts of an entry's levels, or a single level.
        """
        strides = [np.maximum(1, self.last // part) for part in parts]
        entries = np.arange(len(self.last))
        while (over := self.excess(levels[None])[0]) > 0:
            offers = np.stack([np.minimum(levels + stride, self.last) for stride in strides])  # (strides, entries)
            choices = np.concatenate([single_changes(levels, offer) for offer in offers])
            saved = over - self.excess(choices)
            harm = (harms[entries, offers] - harms[entries, levels]).ravel()
            saves = saved > 1e-12
            if not saves.any():  # no single step saves anything: start from the strongest feasible policy
                return self.levels(self.executed(self.last))
            levels = choices[saves][(np.maximum(harm[saves], 1e-9) / saved[saves]).argmin()]
        return levels

    def undo(self, levels: np.ndarray, gains: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return levels (entries,) with less compression, undone one by one where the limits leave room.

        Args:
            levels: that meet the limits.
            gains: returns what one level less of each entry of such levels gains, (entries,). The largest gain is taken;
                negative ones never are.
        """
        while True:
            gain = gains(levels)
            weaker = np.maximum(levels - 1, 0)
            fits = (self.excess(single_changes(levels, weaker)) <= 0) & (levels > 0) & (gain >= 0)
            if not fits.any():
                return levels
            levels = levels.copy()
            levels[np.where(fits, gain, -np.inf).argmax()] -= 1

    def to_edge(self, levels: np.ndarray, harms: np.ndarray, parts: Sequence[int] = COARSE) -> np.ndarray:
        """Return levels (entries,) at the edge of the budget, near the given ones and with little harm.

        Steps are added until the limits are met (`compress`). Then levels are undone where that helps most.
        """
        entries = np.arange(len(levels))

        def gains(levels: np.ndarray) -> np.ndarray:  # may be negative: measured curves need not rise
            return harms[entries, levels] - harms[entries, np.maximum(levels - 1, 0)]

        return self.levels(self.executed(self.undo(self.compress(levels, harms, parts), gains)))

    def single_costs(self, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the costs of levels (entries,), and by how much each level of each entry alone changes them.

        Returns:
            The costs as shares of their limits, (limits,), and the changes, (limits, entries, most levels); 0 for levels
            that an entry does not have.
        """
        entries = np.repeat(np.arange(len(levels)), self.last + 1)
        offered = np.concatenate([np.arange(last + 1) for last in self.last])
        choices = np.tile(levels, (len(entries), 1))
        choices[np.arange(len(entries)), entries] = offered
        base = self.shares(levels[None])[0]
        changes = np.zeros((len(base), len(levels), self.last.max() + 1))
        changes[:, entries, offered] = (self.shares(choices) - base).T
        return base, np.where(np.abs(changes) > ROUNDING, changes, 0.0)

    def solve(self, harms: np.ndarray, solver: LinearSolver, start: np.ndarray, rounds: int) -> np.ndarray:
        """Return levels (entries,) at the edge of the budget with little harm, by a series of linear problems.

        Each round replaces the costs by those of single changes of the best levels so far, solves that problem, and moves its
        solution to the edge of the budget by exact costs. In round r no action may move further than 0.5 ** (r - 1).

        Args:
            harms: of all levels, (entries, most levels).
            solver: of linear problems.
            start: levels that the first round starts from, which meet the limits.
            rounds: number of linear problems; one is exact if costs are additive.
        """
        entries = np.arange(len(start))
        actions = np.stack([a[np.minimum(np.arange(harms.shape[1]), len(a) - 1)] for a in self.space.level_actions])
        best = start
        for number in range(rounds):
            base, changes = self.single_costs(best)
            near = np.abs(actions - actions[entries, best][:, None]) <= 0.5**number + ROUNDING
            allowed = near & (np.arange(harms.shape[1]) <= self.last[:, None])
            solution = solver(np.where(allowed, harms, np.inf), changes, np.maximum(1 - base, 0))
            if solution is None:
                break
            found = self.to_edge(solution, harms, FINE)
            if harms[entries, found].sum() < harms[entries, best].sum():
                best = found
        return best


def single_changes(levels: np.ndarray, offer: np.ndarray) -> np.ndarray:
    """Return the levels with one entry at a time changed to the offered one, (entries, entries)."""
    choices = np.tile(levels, (len(levels), 1))
    np.fill_diagonal(choices, offer)
    return choices
