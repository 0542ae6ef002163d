"""The interface of scores: what a search maximizes, measured on the network of every candidate."""

from __future__ import annotations

from typing import Protocol, Self

import torch

from secateur.envs.metric import Metric
from secateur.envs.tasks.core import Metrics, Model, Stop


class ScoreConfig(Protocol):
    """Options of a score."""

    def held_out(self, calibration: int) -> int:
        """Return how many of the last calibration samples the score needs for itself; recoveries do not see them.

        Args:
            calibration: number of calibration samples.
        """
        ...


class Score(Protocol):
    """Scores candidates in the search. Made of (config, task, dense model, its validation score); picklable."""

    @property
    def metric(self) -> Metric:
        """Name, direction and range of the scores."""
        ...

    @property
    def split(self) -> str:
        """Samples that candidates are scored on: "validation" or "calibration"."""
        ...

    @property
    def dense(self) -> float:
        """Score of the dense model."""
        ...

    def on(self, device: torch.device) -> Self:
        """Return the score for networks on a device."""
        ...

    def measure(self, model: Model, stop: Stop | None = None) -> Metrics:
        """Return the score of a network in eval mode.

        Args:
            model: takes the task's inputs.
            stop: asked after every batch whether the rest can be left out; scores may ignore it.
        """
        ...
