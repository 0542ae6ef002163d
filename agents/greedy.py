"""Greedy allocation by sensitivities: every step of compression is the one with the least harm per saving.

Let d_i(a) be the divergence of the outputs when choice i alone has action a (envs/sensitivity.py). Start without compression and

    take the step of one choice with the least  (d_i(a') ** p - d_i(a) ** p) / saving,                             (1)

where the saving is the reduction of the costs that still exceed the budget, each as a share of its limit. When all limits are
met, single levels are undone where that helps most, as long as the limits are still met.

Source: marginal analysis, Fox 1966 (Operations Research 14), on sensitivities that are added up as in ZeroQ (Cai et al. 2020) and
HAWQ-V2 (Dong et al. 2020), for costs that need not be additive: they are computed again after each step. A small p makes only
the order of the d_i count, a large p only the largest of them: 0.75 predicts top-1 best, other powers are tried after it. Nothing
is learned from evaluations: a baseline for agents that learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from secateur.agents.fixed import FixedPolicies
from secateur.cost_models.core import Range, check_fields
from secateur.envs.core import ActionSpace, Budget, InputError, Sensitivities


@dataclass(frozen=True)
class GreedyConfig:
    """Options of the greedy allocation.

    Attributes:
        powers: p of eq. (1), one policy per budget each.
    """

    powers: Annotated[tuple[float, ...], Range(above=0)] = (0.75, 1.0, 0.5, 0.85, 0.65, 1.5)

    needs_sensitivities: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self, "the greedy baseline")
        if not self.powers:
            raise InputError("`powers` of the greedy baseline must be at least one number, but got none.")


class Greedy(FixedPolicies):
    """The greedy policies of every budget; see the module. It draws nothing at random."""

    def __init__(self, config: GreedyConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        if space.sensitivities is None:
            raise ValueError("The greedy allocation needs a space whose sensitivities have been measured.")
        self._sensitivities = space.sensitivities
        super().__init__(space, budgets, config.powers)

    def sequence(self, recipe: float, budget: Budget) -> np.ndarray:
        """Return the greedy sequence with this power of the divergences."""
        return allocate(self.space, self._sensitivities, budget, recipe)


def allocate(space: ActionSpace, sensitivities: Sensitivities, budget: Budget, power: float) -> np.ndarray:
    """Return the greedy sequence, (num_steps, action_dim), executed; see the module.

    Args:
        space: of the choices.
        sensitivities: of all choices.
        budget: satisfiable; costs that are not among the objectives are left to the feasibility projection.
        power: of the divergences.
    """
    limits = np.array([budget.limits.get(name, np.inf) / space.dense_costs[name] for name in space.objectives[1:]])
    harms, last = _harms(space, sensitivities, power), np.array([len(actions) - 1 for actions in space.level_actions])
    strides = [np.maximum(1, last // part) for part in (8, 4, 2)]  # single levels of a hundred would take too long
    levels, entries = np.zeros(len(last), int), np.arange(len(last))
    while (over := _excess(space, levels[None], limits)[0]) > 0:
        offers = np.stack([np.minimum(levels + stride, last) for stride in strides])  # (strides, entries)
        choices = np.concatenate([_single_changes(levels, offer) for offer in offers])
        saved = over - _excess(space, choices, limits)
        harm = (harms[entries, offers] - harms[entries, levels]).ravel()
        saves = saved > 1e-12
        if not saves.any():  # no single step saves anything: undo steps of the strongest feasible policy
            levels = _levels(space, space.execute(_sequences(space, last[None])[0], budget))
            break
        levels = choices[saves][(np.maximum(harm[saves], 1e-9) / saved[saves]).argmin()]
    levels = _undo(space, levels, limits, harms)
    return space.execute(_sequences(space, levels[None])[0], budget)


def _undo(space: ActionSpace, levels: np.ndarray, limits: np.ndarray, harms: np.ndarray) -> np.ndarray:
    """Return levels (entries,) with less compression, undone one by one where the limits leave room."""
    entries = np.arange(len(levels))
    while True:
        weaker = np.maximum(levels - 1, 0)
        harm = harms[entries, levels] - harms[entries, weaker]  # may be negative: measured curves need not rise
        fits = (_excess(space, _single_changes(levels, weaker), limits) <= 0) & (levels > 0) & (harm >= 0)
        if not fits.any():
            return levels
        levels = levels.copy()
        levels[np.where(fits, harm, -np.inf).argmax()] -= 1


def _single_changes(levels: np.ndarray, offer: np.ndarray) -> np.ndarray:
    """Return the levels with one entry at a time changed to the offered one, (entries, entries)."""
    choices = np.tile(levels, (len(levels), 1))
    np.fill_diagonal(choices, offer)
    return choices


def _harms(space: ActionSpace, sensitivities: Sensitivities, power: float) -> np.ndarray:
    """Return the divergence ** power of every level, (entries, most levels)."""
    most = max(len(actions) for actions in space.level_actions)
    padded = np.stack([np.pad(actions, (0, most - len(actions)), mode="edge") for actions in space.level_actions])
    return sensitivities(padded.T).T ** power


def _sequences(space: ActionSpace, levels: np.ndarray) -> np.ndarray:
    """Return sequences (n, num_steps, action_dim) of levels (n, entries)."""
    sequences = np.zeros((len(levels), *space.used.shape))
    sequences[:, space.used] = np.stack([actions[at] for actions, at in zip(space.level_actions, levels.T, strict=True)], axis=1)
    return sequences


def _levels(space: ActionSpace, sequence: np.ndarray) -> np.ndarray:
    """Return the levels of an executed sequence, (entries,)."""
    entries = zip(space.level_actions, sequence[space.used], strict=True)
    return np.array([np.abs(actions - action).argmin() for actions, action in entries])


def _excess(space: ActionSpace, levels: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Return by how much the costs of levels exceed the limits, as shares of them, summed, (n,)."""
    share = space.cost_shares(_sequences(space, levels)) / limits - 1
    return np.where(share > ROUNDING, share, 0.0).sum(axis=1)


ROUNDING = 1e-9
"""Rounding of summed costs, as a share."""
