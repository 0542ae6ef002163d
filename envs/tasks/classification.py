"""Classification: one tensor of class scores per image, top-1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.cost_models.core import InputError
from secateur.envs.inputs import call_model
from secateur.envs.metric import TOP1, Metric
from secateur.envs.tasks.core import Batch, Metrics, Model, kl_divergence
from secateur.envs.tasks.supervised import PerSampleTask, shape_of


@dataclass(frozen=True)
class ClassificationConfig:
    """Classification has no options."""


@dataclass(frozen=True)
class Classification(PerSampleTask):
    """Outputs (images, classes); targets (images,) int64."""

    config: ClassificationConfig = ClassificationConfig()

    stoppable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, split in self.data.splits.items():
            if split.labels.ndim != 1 or split.labels.dtype != np.int64:
                raise InputError(
                    f"`task: classification` needs one class per image, (N,) in int64, but the labels of `data.{name}` are "
                    f"{split.labels.shape} in {split.labels.dtype}. Set `task`, or check `data.name`."
                )
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= self.data.num_classes:
                raise InputError(f"Labels of `data.{name}` must be in 0..{self.data.num_classes - 1}, but are in {low}..{high}.")

    @property
    def metric(self) -> Metric:
        """Top-1; a model that guesses has one over the number of classes."""
        return replace(TOP1, chance=1 / self.data.num_classes)

    def statistics(self, outputs: Tensor, targets: Tensor) -> np.ndarray:
        """Return which images are classified correctly, (images,) bool."""
        return (outputs.argmax(dim=1) == targets).cpu().numpy()

    def summarize(self, statistics: np.ndarray) -> Metrics:
        """Return the share of images that are classified correctly."""
        return Metrics(float(statistics.mean()), len(statistics), statistics)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(call_model(model, batch.inputs), batch.targets)

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """Return KL(reference || outputs) in nats, (images,)."""
        return kl_divergence(reference, outputs)

    def agreement(self, reference: Tensor, outputs: Tensor) -> np.ndarray:
        """Return whether the most likely class is the same, (images,)."""
        return (reference.argmax(1) == outputs.argmax(1)).cpu().numpy()

    def check(self, outputs: Any) -> None:
        """Raise InputError unless the outputs are (1, classes) of the data's classes."""
        if not isinstance(outputs, torch.Tensor) or outputs.dim() != 2:
            raise InputError(
                f"`model.factory` must give one tensor of scores (images, classes), but its output is {shape_of(outputs)}."
            )
        if outputs.shape[1] != self.data.num_classes:
            raise InputError(
                f"The model has {outputs.shape[1]} outputs, but the data has {self.data.num_classes} classes. "
                "Set the number of classes in `model.args`, or check `data.name`."
            )
