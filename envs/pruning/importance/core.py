"""What an importance is: a score per prunable unit of every group, from the dense network."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor, nn

from envs.model_graph.plan import ModelGraph


class Importance(Protocol):
    """Ranks the units of each group; scores of different groups are not compared with each other.

    Instances are made from their frozen config alone, pickle, and leave the model and its gradients as they were.
    """

    def scores(
        self, model: nn.Module, graph: ModelGraph, images: Tensor, labels: Tensor, rng: np.random.Generator
    ) -> tuple[np.ndarray, ...]:
        """Return one float64 array (units,) per group, in the order of `graph.groups`; larger = keep.

        Args:
            model: the dense network, in eval mode.
            graph: its plan.
            images, labels: calibration images (N, C, H, W) float32 normalised and their classes (N,).
            rng: the only source of randomness.
        """
        ...
