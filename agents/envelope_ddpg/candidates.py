"""Candidates for one choice: changes of the best evaluated policies, rollouts of the actor, uniform and random policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from secateur.agents.envelope_ddpg.learner import Learner
from secateur.agents.envelope_ddpg.replay import meets
from secateur.agents.noise import truncated_normal
from secateur.agents.random_search import random_sequence
from secateur.agents.uniform import UniformConfig, uniform_family
from secateur.envs.core import ActionSpace, Budget

ELITE = 10
"""How many of the best evaluated policies of a budget, or of the candidates, are changed."""

SHIFT = 0.3
"""Largest common step of all entries of a kind, in half of the changes; a level or two of bit-widths."""


class Candidates:
    """Makes executed sequences, (n, num_steps, action_dim), one per preference, (n, num_objectives), and budget.

    Args:
        space: of the decisions.
        learner: whose actor is rolled out and whose best episodes are changed.
        unguided: share of uniform and random policies beside the rollouts, in [0, 1].
        rng: every random choice.
    """

    def __init__(self, space: ActionSpace, learner: Learner, unguided: float, rng: np.random.Generator):
        self.space, self.learner, self.unguided, self.rng = space, learner, unguided, rng
        self._family = np.stack(uniform_family(space, UniformConfig().exponents))

    def make(self, preferences: np.ndarray, budgets: Sequence[Budget], noise: float, changed: int) -> np.ndarray:
        """Return one candidate per preference and budget.

        Args:
            preferences: n of them.
            budgets: n of them; satisfiable.
            noise: standard deviation of the noise on the actor's actions.
            changed: how many are changes of evaluated policies.
        """
        count = len(budgets)
        rolled = count - changed - round(self.unguided * (count - changed))
        sequences = [
            self._changes_of_best(preferences[:changed], budgets[:changed]),
            self._unguided(count - changed - rolled),
            self._roll_out(preferences[count - rolled :], budgets[count - rolled :], noise),
        ]
        return self._repair(np.concatenate(sequences), preferences, budgets)

    def refine(
        self,
        sequences: np.ndarray,
        preferences: np.ndarray,
        budgets: Sequence[Budget],
        value: Callable[[np.ndarray], np.ndarray],
        rounds: int,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Change the best candidates for a few rounds: an evolutionary search that needs no evaluation.

        Args:
            sequences: n candidates.
            preferences, budgets: for which they were made.
            value: of sequences, (m,) of (m, num_steps, action_dim).
            rounds: how often.
        Returns:
            All sequences, their values, and the index of the candidate that each was made from.
        """
        values, origin, count = value(sequences), np.arange(len(sequences)), max(1, len(sequences) // 2)
        for _ in range(rounds if len(sequences) > 1 else 0):
            best = np.argsort(-values, kind="stable")[:ELITE]
            starts = best[(len(best) * self.rng.random(count) ** 2).astype(int)]
            changed = self._change(sequences[starts], sequences[self.rng.choice(best, count)], sequences[best[:1]])
            changed = self._repair(changed, preferences[origin[starts]], [budgets[i] for i in origin[starts]])
            sequences, values = np.concatenate([sequences, changed]), np.append(values, value(changed))
            origin = np.append(origin, origin[starts])
        return sequences, values, origin

    def _unguided(self, count: int) -> np.ndarray:
        """Return sequences that do not depend on what was learned: at most half uniform, the rest random."""
        sequences = np.empty((count, *self.space.used.shape))
        if count:
            uniform = self._family[self.rng.permutation(len(self._family))[: count // 2]]
            sequences[: len(uniform)] = uniform
            for row in sequences[len(uniform) :]:
                row[:] = random_sequence(self.space, self.rng)
        return sequences

    def _roll_out(self, preferences: np.ndarray, budgets: Sequence[Budget], noise: float) -> np.ndarray:
        """Return the actor's executed sequences with truncated normal noise."""

        def act(observations: np.ndarray, sequences: np.ndarray, step: int, rows: np.ndarray) -> np.ndarray:
            actions = self.learner.actions(observations, sequences, step, preferences[rows])
            return truncated_normal(actions, noise, self.rng)

        return self.space.simulate(act, budgets).sequences if len(budgets) else np.empty((0, *self.space.used.shape))

    def _changes_of_best(self, preferences: np.ndarray, budgets: Sequence[Budget]) -> np.ndarray:
        """Return changes of the best evaluated sequences of each budget; of all, where none meets the budget."""
        if not budgets:
            return np.empty((0, *self.space.used.shape))
        memories = self.learner.memories
        starts, partners, bests = np.empty((3, len(budgets), *self.space.used.shape))
        rewards = np.stack([memory.reward for memory in memories])
        meeting: dict[Budget, np.ndarray] = {}
        for i, budget in enumerate(budgets):
            if budget not in meeting:
                found = np.flatnonzero([meets(self.space, reward, budget) for reward in rewards])
                meeting[budget] = found if len(found) else np.arange(len(rewards))
            rows = meeting[budget]
            order = rows[np.argsort(-(rewards[rows] @ preferences[i]), kind="stable")][:ELITE]
            starts[i] = memories[order[int(len(order) * self.rng.random() ** 2)]].sequence
            partners[i] = memories[order[self.rng.integers(len(order))]].sequence
            bests[i] = memories[order[0]].sequence
        return self._change(starts, partners, bests)

    def _change(self, starts: np.ndarray, partners: np.ndarray, bests: np.ndarray) -> np.ndarray:
        """Return changed sequences: the guided moves of the bee colony, normal steps, and steps of a whole kind of choice."""
        rng, used, (count, _, kinds) = self.rng, self.space.used, starts.shape
        size = used.sum()
        here = rng.random(starts.shape) < rng.integers(1, size + 1, size=(count, 1, 1)) / size
        guided = rng.uniform(-1, 1, starts.shape) * (starts - partners) + rng.uniform(0, 1.5, starts.shape) * (bests - starts)
        normal = rng.normal(size=starts.shape) * 10 ** rng.uniform(-2, -0.5, (count, 1, 1))
        common = rng.normal(size=(count, 1, kinds)) * 0.1 * (rng.random((count, 1, 1)) < 0.5)
        which = rng.random((count, 1, 1))  # a third guided, a third normal, a third both
        change = np.where(which < 2 / 3, guided, 0) + np.where(which > 1 / 3, normal + common, 0)
        changed = starts + np.where(here, change, 0)
        # A quarter also moves towards the mean of each kind: good policies have few extremes.
        means = starts.sum(axis=1, keepdims=True) / np.maximum(used.sum(axis=0), 1)
        changed += (means - starts) * rng.random((count, 1, 1)) * (rng.random((count, 1, 1)) < 0.25)
        if used.any(axis=0).sum() > 1:  # with one kind of choice, scaling to the budget would undo a common step
            changed += rng.uniform(-SHIFT, SHIFT, (count, 1, kinds)) * (rng.random((count, 1, 1)) < 0.5)
        return np.where(used, np.clip(changed, 0, 1), 0.0)

    def _repair(self, sequences: np.ndarray, preferences: np.ndarray, budgets: Sequence[Budget]) -> np.ndarray:
        """Return executed sequences: scaled to the budget where lower costs have no weight, else projected only."""
        costly = (preferences[:, 1:] > 0).any(axis=1)
        repaired = np.zeros(sequences.shape, np.float32)
        for rows, repair in ((~costly, self.space.scale_to_budget), (costly, self.space.execute)):
            if rows.any():
                repaired[rows] = repair(sequences[rows], [budgets[i] for i in np.flatnonzero(rows).tolist()])
        return repaired
