"""Cross-layer ranking: the prune ratio of each layer follows from the magnitudes of its weights, without any search.

With m_j the mean |w| of the filter that produces unit j, and f the multiply-accumulates of its layer,

    score_j = m_j / f ** exponent,    prune ratio of a group = share of its units with score_j < t                (1)

with one threshold t for all groups: the least that meets the budget.

Source: Lin et al. 2022 (CLR-RNF), TNNLS, cross-layer ranking. Its filter selection is the importance `clr_rnf`.

Where we differ and why:
1. t is found by bisection for any budget on any costs; the paper sets a global prune rate.
2. Of a coupled group, the mean magnitude and the mean multiply-accumulates of its producers count.
3. Bits are those of the baseline `uniform`, and its family of divisions between pruning and bits is tried here too; see
   agents/uniform.py. Where only widths are chosen, there is one policy per budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from secateur.agents.fixed import FixedPolicies
from secateur.agents.uniform import uniform_family
from secateur.cost_models.core import Count, NonNegative, check_fields
from secateur.envs.core import ActionSpace, Budget


@dataclass(frozen=True)
class ClrRnfConfig:
    """Options of cross-layer ranking.

    Attributes:
        exponent: lambda of eq. (1): 0 ranks by magnitude alone, large values prune the most expensive layers first. The paper
            tunes it to each network and fine-tunes afterwards: 0.5 for VGG-16, 5 for ResNet-110, 10 for ResNet-56, whose
            layers cost nearly the same. Without fine-tuning small values are better (ResNet-56 on CIFAR-10 at half the
            MACs, L1 norm, refitted, 8,000 test images: 67.1, 66.2, 58.4 and 49.0 % with 0, 0.5, 1 and 10; `uniform` 85.6).
        splits: number of exponents that each kind of choice tries, as `exponents` of `uniform`.
    """

    exponent: NonNegative = 0.5
    splits: Count = 7

    def __post_init__(self) -> None:
        check_fields(self, "the agent `clr_rnf`")


class ClrRnf(FixedPolicies):
    """The ranked policies of every budget; see the module. It draws nothing at random."""

    def __init__(self, config: ClrRnfConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        super().__init__(space, budgets, uniform_family(space, config.splits))
        self._scores = unit_scores(space, config.exponent)
        self._thresholds = np.append(np.unique(np.concatenate([*self._scores, np.empty(0)])), np.inf)

    def sequence(self, recipe: np.ndarray, budget: Budget) -> np.ndarray:
        """Return the bits that `uniform` takes from this sequence of its family, with ranked prune ratios."""
        return self._allocate(self.space.scale_to_budget(recipe, budget), budget)

    def _allocate(self, sequence: np.ndarray, budget: Budget) -> np.ndarray:
        """Return the sequence with the prune ratios of the least threshold that the feasibility projection leaves unchanged."""
        low, high = 0, len(self._thresholds) - 1
        while low < high:
            middle = (low + high) // 2
            pruned = self._pruned(sequence, middle)
            if np.array_equal(self.space.execute(pruned, budget), pruned):
                high = middle
            else:
                low = middle + 1
        return self.space.execute(self._pruned(sequence, high), budget)

    def _pruned(self, sequence: np.ndarray, index: int) -> np.ndarray:
        ratios = np.array([np.mean(scores < self._thresholds[index]) for scores in self._scores])
        return self.space.with_prune_ratios(sequence, ratios)


def unit_scores(space: ActionSpace, exponent: float) -> tuple[np.ndarray, ...]:
    """Return the score of every unit in eq. (1), per group (units,)."""
    macs = np.maximum(space.producer_macs, 1.0)
    relative = macs / macs.max(initial=1.0)
    return tuple(m / f**exponent for m, f in zip(space.unit_magnitudes, relative, strict=True))
