"""Episodes without their evaluation: what is executed and observed, many episodes at once, each under a budget of its own.

Both are deterministic functions of the actions, so agents may simulate as often as they like; only the accuracy at the end has to
be measured. `CompressionEnv` steps a batch of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.envs.core import Budget
from secateur.envs.observation import Observer
from secateur.envs.projection import FeasibilityProjection


class EpisodeBatch:
    """n episodes that step together.

    Args:
        projection: of the space onto its feasible policies.
        observer: of the same space.
        budgets: one per episode; satisfiable.

    Attributes:
        step: the step that comes next; `num_steps` at the end.
        levels: (n, decisions); executed up to this step, the strongest compression from here on.
        sequences: (n, num_steps, action_dim) float32 executed actions; zero from this step on.
    """

    def __init__(self, projection: FeasibilityProjection, observer: Observer, budgets: Sequence[Budget]):
        self._space, self._observer = projection.costs.policy_space, observer
        self._rows = projection.rows(budgets)
        self._limits = observer.limits(budgets)
        self.step = self._decision = 0
        self.levels = np.tile(self._space.strongest, (len(budgets), 1))
        self.sequences = np.zeros((len(budgets), self._space.num_steps, self._space.action_dim), np.float32)

    def observe(self, rows: np.ndarray) -> np.ndarray:
        """Return what these episodes observe before the step, (len(rows), observation_dim)."""
        before = self.sequences[rows, self.step - 1] if self.step else np.zeros((len(rows), self._space.action_dim))
        return self._observer.observe(self.step, self._decision, self.levels[rows], before, self._limits[rows])

    def advance(self, actions: np.ndarray, projected: np.ndarray) -> None:
        """Execute one step of all episodes.

        Args:
            actions: (n, action_dim) in [0, 1].
            projected: indices of the episodes whose actions are projected; the others have been executed before.
        """
        for column in np.flatnonzero(self._space.used[self.step]):
            meanings = self._space.level_actions[self._decision]
            wanted = np.abs(actions[:, column, None] - meanings).argmin(axis=1)
            self.levels[:, self._decision] = wanted
            admitted = self._rows.admit(self.levels[projected], self._decision, wanted[projected], projected)
            self.levels[projected, self._decision] = admitted
            self.sequences[:, self.step, column] = meanings[self.levels[:, self._decision]]
            self._decision += 1
        self.step += 1
