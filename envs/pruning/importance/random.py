"""Random importance: the baseline for all other importances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from secateur.envs.pruning.importance.core import DenseModel


@dataclass(frozen=True)
class RandomConfig:
    """No options."""


@dataclass(frozen=True)
class Random:
    """Uniform scores in [0, 1), drawn once per search."""

    config: RandomConfig = RandomConfig()
    needs_images: ClassVar[bool] = False

    def scores(self, dense: DenseModel) -> tuple[np.ndarray, ...]:
        """See `Importance.scores`; reads nothing but `rng`."""
        return tuple(dense.rng.random(group.units) for group in dense.graph.groups)
