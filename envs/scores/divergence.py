"""Divergence from the dense model's outputs, on calibration samples that no recovery has seen. No labels are needed.

    score = mean over samples of D(outputs of the dense model, outputs of the candidate)                                  (1)

D is the task's own divergence: KL divergence in nats for class scores, the relative squared error of all outputs otherwise.

Source: the objective of knowledge distillation (Hinton et al. 2015, arXiv:1503.02531, at temperature 1), used for ranking as in
ZeroQ (Cai et al. 2020, arXiv:2001.00281, eq. 6) and EvoPress (Sieberling et al. 2024, arXiv:2410.14649, section 4).

Why: accuracy counts only samples whose answer changes, divergence uses all outputs of all samples, so it needs fewer samples. The
validation split remains unused by the search and decides among the finalists.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import nn

from secateur.cost_models.core import InputError, Range, check_fields
from secateur.envs.devices import move, move_tree
from secateur.envs.inputs import map_inputs
from secateur.envs.memory import run_model
from secateur.envs.metric import DIVERGENCE, Metric
from secateur.envs.tasks.core import Metrics, Model, Stop, Task, all_samples, map_tensors

LARGEST_SHARE = 4
"""At most one of this many calibration samples is held out."""


@dataclass(frozen=True)
class DivergenceScoreConfig:
    """Samples of the score `divergence`.

    Attributes:
        images: largest number of calibration samples that are kept for the score, at most a quarter of them; recoveries and
            calibration use the others.
    """

    images: Annotated[int, Range(least=1)] = 256

    def __post_init__(self) -> None:
        check_fields(self, "the score `divergence`")

    def held_out(self, calibration: int) -> int:
        """Return the number of samples for the score; see `ScoreConfig.held_out`.

        Raises:
            InputError: if there are too few calibration samples.
        """
        if calibration < LARGEST_SHARE:
            raise InputError(
                f"The score `divergence` compares outputs on calibration samples, but there are {calibration}. Set "
                f"`data.calibration` to {LARGEST_SHARE} or more, or use `search.score: metric`."
            )
        return min(self.images, calibration // LARGEST_SHARE)


class DivergenceScore:
    """Scores candidates by eq. (1); lower is better, and the dense model has 0. A `Score`."""

    split: ClassVar[str] = "calibration"
    metric: ClassVar[Metric] = DIVERGENCE
    dense: ClassVar[float] = 0.0

    def __init__(self, config: DivergenceScoreConfig, task: Task, model: nn.Module, dense: float):
        count = config.held_out(task.samples("calibration"))
        inputs, _ = all_samples(task, "calibration")
        size = len(next(iter(task.batches("calibration"))).inputs)
        held = inputs[len(inputs) - count :]
        self.task, self._batches = task, tuple(held.split(size))
        with torch.inference_mode():
            outputs = [run_model(model, batch) for batch in self._batches]
        self._outputs = [map_tensors(torch.clone, tree) for tree in outputs]  # of their own memory: the score is pickled

    def on(self, device: torch.device) -> DivergenceScore:
        """See `Score.on`."""
        moved = copy.copy(self)
        moved.task = self.task.on(device)
        moved._batches = tuple(map_inputs(lambda x: move(x, device), batch) for batch in self._batches)
        moved._outputs = [move_tree(tree, device) for tree in self._outputs]
        return moved

    @torch.inference_mode()
    def measure(self, model: Model, stop: Stop | None = None) -> Metrics:
        """See `Score.measure`; the samples are few, so `stop` is not asked.

        Raises:
            ValueError: if the outputs are not finite.
        """
        found = [
            self.task.divergence(wanted, run_model(model, batch))
            for wanted, batch in zip(self._outputs, self._batches, strict=True)
        ]
        each = torch.cat(found).double().cpu().numpy()
        if not np.isfinite(each).all():
            raise ValueError(f"the outputs of {int((~np.isfinite(each)).sum())} of {len(each)} samples are not finite")
        return Metrics(float(each.mean()), len(each), each)
