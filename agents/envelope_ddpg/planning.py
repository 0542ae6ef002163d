"""Targets of stored transitions: completions in the simulated environment, valued at their end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.agents.envelope_ddpg.replay import sample_preferences
from secateur.agents.envelope_ddpg.targets import envelope_target, pessimistic
from secateur.envs.core import ActionSpace, Budget

TARGET_NOISE = 0.1
"""Standard deviation of the noise on the first action of a completion, clipped at 2.5 of them (TD3)."""

SHIFT = 0.1
"""By how much an action is changed, in both directions, to measure the slope of the costs of its completion."""

Policy = Callable[[np.ndarray, np.ndarray, int, np.ndarray], np.ndarray]
"""Actions, (n, action_dim), from observations, sequences so far, the step and preferences, (n, num_objectives)."""


@dataclass(frozen=True, eq=False)
class Transitions:
    """Steps of stored episodes under practiced preferences and budgets.

    Attributes:
        sequences: of their episodes, (n, num_steps, action_dim).
        steps: (n,); the last step needs no target, because its return is known.
        observations: before these steps, (n, observation_dim), under the practiced budgets.
        preferences: (n, num_objectives).
        budgets: n of them.
    """

    sequences: np.ndarray
    steps: np.ndarray
    observations: np.ndarray
    preferences: np.ndarray
    budgets: Sequence[Budget]


def plan_targets(
    space: ActionSpace,
    rng: np.random.Generator,
    transitions: Transitions,
    policy: Policy,
    predict: Callable[[np.ndarray], np.ndarray],
    alternatives: int,
    mixing: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return target qualities of each transition, (n,), and the slope of its weighted costs by its action, (n, action_dim).

    Args:
        space: simulates.
        rng: draws preferences and noise.
        transitions: n of them.
        policy: completes the sequences.
        predict: quality of complete sequences, (critics, m).
        alternatives: preferences per transition whose completions the envelope compares, its own included.
        mixing: share of the envelope target.
    """
    count, k, objectives = len(transitions.steps), alternatives, len(space.objectives)
    own = transitions.preferences
    others = sample_preferences(rng, count * k, objectives).reshape(count, k, objectives)
    others[:, 0] = own
    costly = np.flatnonzero((own[:, 1:] > 0).any(axis=1))
    signs = rng.choice([-1.0, 1.0], size=(len(costly), space.action_dim))

    # Rows: k completions after the action of every transition; then two with a changed action where costs count.
    owner, plain = np.concatenate([np.repeat(np.arange(count), k), costly, costly]), count * k
    preferences = np.concatenate([others.reshape(-1, objectives), own[costly], own[costly]])
    starts = transitions.steps[owner] + (np.arange(len(owner)) < plain)
    offsets = np.clip(rng.normal(size=(len(owner), space.action_dim)), -2.5, 2.5) * TARGET_NOISE
    offsets[plain:] = np.concatenate([SHIFT * signs, -SHIFT * signs])

    def act(observations: np.ndarray, sequences: np.ndarray, step: int, rows: np.ndarray) -> np.ndarray:
        actions = policy(observations, sequences, step, preferences[rows])
        return np.clip(actions + np.where((starts[rows] == step)[:, None], offsets[rows], 0), 0, 1)

    ahead = space.simulate(act, [transitions.budgets[i] for i in owner], transitions.sequences[owner], starts)
    quality = predict(ahead.sequences[:plain])
    vectors = pessimistic(quality, ahead.costs[:plain], np.repeat(own, k, axis=0)).reshape(count, k, objectives)
    high, low = np.split(ahead.costs[plain:], 2)
    slopes = np.zeros((count, space.action_dim))
    slopes[costly] = signs * ((high - low) * own[costly, 1:]).sum(axis=1, keepdims=True) / (2 * SHIFT)
    return envelope_target(vectors, own, mixing)[:, 0], slopes
