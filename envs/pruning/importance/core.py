"""The interface of importances: a score for each prunable unit of every group, from the dense network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from torch import Tensor, nn

from secateur.envs.calibration.core import Calibration, required
from secateur.envs.model_graph.plan import ModelGraph


@dataclass(frozen=True)
class DenseModel:
    """The input of an importance.

    Attributes:
        model: the dense network, in eval mode.
        graph: its plan.
        calibration: statistics of every layer's input; None if the importance does not need images.
        images, labels: calibration images (N, C, H, W) float32 normalized and their classes (N,); None if the importance does
            not need images.
        rng: the only source of randomness.
    """

    model: nn.Module
    graph: ModelGraph
    calibration: Calibration | None
    images: Tensor | None
    labels: Tensor | None
    rng: np.random.Generator

    def first_images(self, most: int) -> tuple[Tensor, Tensor]:
        """Return the first calibration images and their labels, at most `most`.

        Raises:
            ValueError: if there are none.
        """
        return required(self.images, "images")[:most], required(self.labels, "labels")[:most]


class Importance(Protocol):
    """Ranks the units of each group; scores of different groups are not compared with each other.

    Instances are made from a frozen config only and can be pickled. They do not change the model or its gradients.
    """

    needs_images: ClassVar[bool]
    """Whether it uses `calibration`, `images` or `labels`."""

    def scores(self, dense: DenseModel) -> tuple[np.ndarray, ...]:
        """Return one float64 array (units,) per group, in the order of `graph.groups`; units with larger scores are kept."""
        ...
