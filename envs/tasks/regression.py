"""Regression: numbers per sample, root of the mean squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.cost_models.core import InputError
from secateur.envs.inputs import call_model
from secateur.envs.metric import Metric
from secateur.envs.tasks.core import Batch, Metrics, Model
from secateur.envs.tasks.supervised import PerSampleTask, shape_of


@dataclass(frozen=True)
class RegressionConfig:
    """Regression has no options."""


@dataclass(frozen=True)
class Regression(PerSampleTask):
    """Outputs and targets (samples, ...) of one shape, or (samples, 1) for targets (samples,)."""

    config: RegressionConfig = RegressionConfig()

    @property
    def metric(self) -> Metric:
        """Root of the mean squared error, in the unit of the targets; lower is better."""
        return Metric("rmse", higher_is_better=False, best=0.0)

    def statistics(self, outputs: Tensor, targets: Tensor) -> np.ndarray:
        """Return the squared and the absolute error of each sample, (samples, 2)."""
        error = (outputs.view(targets.shape).float() - targets).reshape(len(targets), -1)
        return torch.stack([error.square().mean(1), error.abs().mean(1)], dim=1).cpu().numpy()

    def summarize(self, statistics: np.ndarray) -> Metrics:
        """Return the root of the mean squared error, with the mean absolute error."""
        squared, absolute = statistics.astype(float).mean(0)
        return Metrics(float(np.sqrt(squared)), len(statistics), None, {"mae": float(absolute)})

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Return the mean squared error."""
        return F.mse_loss(call_model(model, batch.inputs).view(batch.targets.shape), batch.targets)

    def check(self, outputs: Any) -> None:
        """Raise InputError unless targets are numbers, and there are as many per sample in the output."""
        for name, split in self.data.splits.items():
            if split.labels.dtype != np.float32:
                raise InputError(
                    f"`task: regression` needs targets in float32, but those of `data.{name}` are {split.labels.dtype}. "
                    "Set `task`, or check `data.name`."
                )
        targets = self.data.validation.labels.shape[1:]
        if not isinstance(outputs, Tensor) or outputs.numel() != int(np.prod(targets)):
            shown = shape_of(outputs)
            raise InputError(
                f"A model for `task: regression` must give numbers like the targets, {(1, *targets)}, but gives {shown}."
            )
