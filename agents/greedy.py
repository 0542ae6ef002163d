"""Greedy allocation by sensitivities: every step of compression goes where it harms least for what it saves.

With d_i(s) the divergence of the outputs when choice i alone has strength s (envs/sensitivity.py), from no compression on,

    take the step of one choice with the least  (d_i(s') ** p - d_i(s) ** p) / saving,                             (1)

where the saving is how much it lowers the costs that still exceed the budget, each as a share of its limit. When all limits
hold, single levels are given back where that helps most, as long as they still hold.

Source: marginal analysis, Fox 1966 (Operations Research 14), on sensitivities that are added up as in ZeroQ (Cai et al. 2020) and
HAWQ-V2 (Dong et al. 2020), for costs that need not be additive: they are computed anew after each step. Only the order of the
d_i counts if p is small, the worst of them if it is large: 0.75 foretells top-1 best, other powers are walked after it. Nothing
is learned from evaluations: a baseline for agents that do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agents.fixed import FixedPolicies
from envs.core import ActionSpace, Budget, InputError, Sensitivities


@dataclass(frozen=True)
class GreedyConfig:
    """Options of the greedy allocation.

    Attributes:
        powers: p of eq. (1), above 0, one policy per budget each.
    """

    powers: tuple[float, ...] = (0.75, 1.0, 0.5, 0.85, 0.65, 1.5)

    needs_sensitivities = True

    def __post_init__(self):
        if not self.powers or not all(0 < power < float("inf") for power in self.powers):
            raise InputError(f"`powers` of the greedy baseline must be numbers above 0, but got {list(self.powers)}.")


class Greedy(FixedPolicies):
    """The greedy policies of every budget; see the module. It draws nothing at random."""

    def __init__(self, config: GreedyConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        if space.sensitivities is None:
            raise ValueError("The greedy allocation needs a space whose sensitivities have been measured.")
        super().__init__(space, budgets, config.powers)

    def table(self, recipe: float, budget: Budget) -> np.ndarray:
        """Return the greedy table with this power of the divergences."""
        return allocate(self.space, self.space.sensitivities, [budget], [recipe])[0]


def allocate(
    space: ActionSpace, sensitivities: Sensitivities, budgets: Sequence[Budget], powers: Sequence[float]
) -> list[np.ndarray]:
    """Return one greedy table per budget and power, each (num_steps, action_dim), executed; see the module.

    Args:
        space: of the decisions.
        sensitivities: of all choices.
        budgets: satisfiable; costs that are no objectives are left to the wall.
        powers: of the divergences, one per budget.
    """
    names = space.objectives[1:]
    limits = np.array([[b.limits.get(name, np.inf) / space.dense_costs[name] for name in names] for b in budgets])
    harms = [_harms(space, sensitivities, power) for power in powers]
    entries, last = len(space.strengths), np.array([len(strengths) - 1 for strengths in space.strengths])
    strides = [np.maximum(1, last // part) for part in (8, 4, 2)]  # single levels of a hundred would take for ever
    levels = np.zeros((len(budgets), entries), int)
    open_rows = np.arange(len(budgets))
    while len(open_rows):
        over = _excess(space, levels[open_rows], limits[open_rows])
        open_rows, over = open_rows[over > 0], over[over > 0]
        if not len(open_rows):
            break
        here = levels[open_rows]
        offers = np.stack([np.minimum(here + stride, last) for stride in strides], axis=1)  # (rows, strides, entries)
        choices = np.repeat(here[:, None, None], len(strides), axis=1).repeat(entries, axis=2)
        which = np.arange(entries)
        choices[:, :, which, which] = offers
        flat = choices.reshape(-1, entries)
        repeated = np.repeat(limits[open_rows], len(strides) * entries, axis=0)
        saved = over[:, None, None] - _excess(space, flat, repeated).reshape(offers.shape)
        harm = np.stack(
            [
                harms[row][which, offer] - harms[row][which, level]
                for row, offer, level in zip(open_rows, offers, here, strict=True)
            ]
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            price = np.where(saved > 1e-12, np.maximum(harm, 1e-9) / saved, np.inf).reshape(len(open_rows), -1)
        cheapest = price.argmin(axis=1)
        stuck = ~np.isfinite(price.min(axis=1))
        taken = choices.reshape(len(open_rows), -1, entries)[np.arange(len(open_rows)), cheapest]
        levels[open_rows] = taken
        for row in open_rows[stuck]:  # no step alone saves anything: give back from what the wall knows to fit
            levels[row] = _levels(space, space.execute(_tables(space, last[None])[0], budgets[row]))
        open_rows = open_rows[~stuck]
    levels = _give_back(space, levels, limits, harms)
    return [space.execute(table, budget) for table, budget in zip(_tables(space, levels), budgets, strict=True)]


def _give_back(space: ActionSpace, levels: np.ndarray, limits: np.ndarray, harms: Sequence[np.ndarray]) -> np.ndarray:
    """Return levels (rows, entries) with less compression, one level after the other, where the limits leave room."""
    levels, which = levels.copy(), np.arange(levels.shape[1])
    open_rows = np.arange(len(levels))
    while len(open_rows):
        here = levels[open_rows]
        weaker = np.repeat(here[:, None], len(which), axis=1)
        weaker[:, which, which] = np.maximum(here - 1, 0)
        excess = _excess(space, weaker.reshape(-1, len(which)), np.repeat(limits[open_rows], len(which), axis=0))
        fits = (excess.reshape(here.shape) <= 0) & (here > 0)
        harm = np.stack(
            [
                harms[row][which, level] - harms[row][which, np.maximum(level - 1, 0)]
                for row, level in zip(open_rows, here, strict=True)
            ]
        )
        fits &= harm >= 0  # curves are measured, and need not rise
        gain = np.where(fits, harm, -np.inf)
        best, any_fits = gain.argmax(axis=1), fits.any(axis=1)
        levels[open_rows[any_fits], best[any_fits]] -= 1
        open_rows = open_rows[any_fits]
    return levels


def _harms(space: ActionSpace, sensitivities: Sensitivities, power: float) -> np.ndarray:
    """Return the divergence ** power of every level, (entries, most levels)."""
    most = max(len(strengths) for strengths in space.strengths)
    padded = np.stack([np.pad(strengths, (0, most - len(strengths)), mode="edge") for strengths in space.strengths])
    return sensitivities(padded.T).T ** power


def _tables(space: ActionSpace, levels: np.ndarray) -> np.ndarray:
    """Return tables (n, num_steps, action_dim) of levels (n, entries)."""
    tables = np.zeros((len(levels), *space.used.shape))
    tables[:, space.used] = np.stack([strengths[at] for strengths, at in zip(space.strengths, levels.T, strict=True)], axis=1)
    return tables


def _levels(space: ActionSpace, table: np.ndarray) -> np.ndarray:
    """Return the levels of an executed table, (entries,)."""
    return np.array([np.abs(known - at).argmin() for known, at in zip(space.strengths, table[space.used], strict=True)])


def _excess(space: ActionSpace, levels: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Return by how much levels exceed their limits, as shares of them, summed, (n,)."""
    share = space.cost_shares(_tables(space, levels)) / limits - 1
    return np.where(share > ROUNDING, share, 0.0).sum(axis=1)


ROUNDING = 1e-9
"""What sums of costs differ by from call to call, as a share."""
