"""The task's own metric on the validation split."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from secateur.envs.metric import Metric
from secateur.envs.tasks.core import Metrics, Model, Stop, Task


@dataclass(frozen=True)
class MetricScoreConfig:
    """The score `metric` has no options."""

    def held_out(self, calibration: int) -> int:
        """Return 0: see `ScoreConfig.held_out`."""
        return 0


class MetricScore:
    """Scores candidates with the task's metric on the validation split; a `Score`."""

    split: ClassVar[str] = "validation"

    def __init__(self, config: MetricScoreConfig, task: Task, model: nn.Module, dense: float):
        self.task, self.dense = task, dense

    @property
    def metric(self) -> Metric:
        """The task's metric."""
        return self.task.metric

    def on(self, device: torch.device) -> MetricScore:
        """See `Score.on`."""
        moved = copy.copy(self)
        moved.task = self.task.on(device)
        return moved

    def measure(self, model: Model, stop: Stop | None = None) -> Metrics:
        """See `Score.measure`."""
        return self.task.evaluate(model, "validation", stop)
