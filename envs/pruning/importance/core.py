"""What an importance is: a score per prunable unit of every group, from the dense network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from torch import Tensor, nn

from secateur.envs.calibration.core import Calibration
from secateur.envs.model_graph.plan import ModelGraph


@dataclass(frozen=True)
class DenseModel:
    """What an importance may look at.

    Attributes:
        model: the dense network, in eval mode.
        graph: its plan.
        calibration: statistics of every layer's input; None if the importance does not need images.
        images, labels: calibration images (N, C, H, W) float32 normalised and their classes (N,); None likewise.
        rng: the only source of randomness.
    """

    model: nn.Module
    graph: ModelGraph
    calibration: Calibration | None
    images: Tensor | None
    labels: Tensor | None
    rng: np.random.Generator


class Importance(Protocol):
    """Ranks the units of each group; scores of different groups are not compared with each other.

    Instances are made from their frozen config alone, pickle, and leave the model and its gradients as they were.
    """

    needs_images: ClassVar[bool]
    """Whether it uses `calibration`, `images` or `labels`."""

    def scores(self, dense: DenseModel) -> tuple[np.ndarray, ...]:
        """Return one float64 array (units,) per group, in the order of `graph.groups`; larger = keep."""
        ...
