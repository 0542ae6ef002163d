"""The interface of importances: a score for each prunable unit of every group, from the dense network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.cost_models.core import InputError
from secateur.envs.calibration.core import Calibration
from secateur.envs.inputs import Inputs, call_model
from secateur.envs.model_graph.plan import ModelGraph
from secateur.envs.tasks.core import Batch


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of a batch with classes."""
    return F.cross_entropy(call_model(model, batch.inputs), batch.targets)


@dataclass(frozen=True)
class DenseModel:
    """The input of an importance.

    Attributes:
        model: the dense network, in eval mode.
        graph: its plan.
        calibration: statistics of every layer's input; None if the importance does not need images.
        images, labels: calibration inputs, usually (N, C, H, W) float32 normalized, and their targets, usually classes (N,); None
            if the importance does not need images.
        rng: the only source of randomness.
        loss: training loss of a model on a batch; by default the cross-entropy of classes.
        parts: number of parts that batches are divided into, because memory is short.
    """

    model: nn.Module
    graph: ModelGraph
    calibration: Calibration | None
    images: Inputs | None
    labels: Tensor | None
    rng: np.random.Generator
    loss: Callable[[nn.Module, Batch], Tensor] = cross_entropy
    parts: int = 1

    def fitting(self, size: int) -> int:
        """Return the batch size to use in place of `size`."""
        return max(size // self.parts, 1)

    def first_images(self, most: int) -> Inputs:
        """Return the first calibration inputs, at most `most`.

        Raises:
            ValueError: if there are none.
        """
        if self.images is None:
            raise ValueError("An importance needs images, but there are no calibration images.")
        return self.images[:most]

    def first_batches(self, most: int, size: int) -> list[Batch]:
        """Return the first calibration inputs, at most `most`, with their targets, `size` per batch.

        Raises:
            InputError: if there are no targets.
        """
        if self.labels is None:
            raise InputError(
                "This `importance` needs the targets of the calibration data. Choose another one, such as `l1_norm`."
            )
        images = self.first_images(most)
        return list(map(Batch, images.split(size), self.labels[:most].split(size)))


class Importance(Protocol):
    """Ranks the units of each group; scores of different groups are not compared with each other.

    Instances are made from a frozen config only and can be pickled. They do not change the model or its gradients.
    """

    needs_images: ClassVar[bool]
    """Whether it uses `calibration`, `images` or `labels`."""

    def scores(self, dense: DenseModel) -> tuple[np.ndarray, ...]:
        """Return one float64 array (units,) per group, in the order of `graph.groups`; units with larger scores are kept."""
        ...
