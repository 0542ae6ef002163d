"""Random importance: the baseline that every criterion has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from envs.model_graph.plan import ModelGraph


@dataclass(frozen=True)
class RandomConfig:
    """Nothing to set."""


@dataclass(frozen=True)
class Random:
    """Uniform scores in [0, 1), drawn once per search."""

    config: RandomConfig = RandomConfig()

    def scores(
        self, model: nn.Module, graph: ModelGraph, images: Tensor, labels: Tensor, rng: np.random.Generator
    ) -> tuple[np.ndarray, ...]:
        """See `Importance.scores`; reads nothing but `rng`."""
        return tuple(rng.random(group.units) for group in graph.groups)
