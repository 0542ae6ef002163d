"""Semantic segmentation: class scores for every pixel, mean intersection over union (mIoU).

Source: Everingham et al. 2015, "The Pascal Visual Object Classes Challenge: A Retrospective", Section 3.3 (intersection over
union of each class over all images of a split, then the mean over classes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from secateur.cost_models.core import InputError
from secateur.envs.inputs import call_model
from secateur.envs.metric import Metric
from secateur.envs.tasks.core import Batch, Metrics, Model, kl_divergence
from secateur.envs.tasks.splits import Split
from secateur.envs.tasks.supervised import PerSampleTask, shape_of


@dataclass(frozen=True)
class SegmentationConfig:
    """Options.

    Attributes:
        ignore: label of pixels that do not count.
        output: key of the class scores, if the model returns a dict (torchvision's return {"out": scores, ...}).
    """

    ignore: Annotated[int, Field(ge=0, le=255)] = 255
    output: str = "out"


@dataclass(frozen=True)
class Segmentation(PerSampleTask):
    """Outputs (images, classes, H, W), or a dict that holds them; targets (images, H, W) integers."""

    config: SegmentationConfig = SegmentationConfig()

    @property
    def metric(self) -> Metric:
        """Mean intersection over union of the classes that occur."""
        return Metric("miou", unit="%", worst=0.0, best=1.0)

    def statistics(self, outputs: Any, targets: Tensor) -> np.ndarray:
        """Return intersection and union of every class in each image, (images, classes, 2), in pixels."""
        scores, classes = self._scores(outputs), self.data.num_classes
        counts = []
        for predicted, target in zip(scores.argmax(1), targets.long(), strict=True):
            known = target != self.config.ignore
            pairs = torch.bincount((target[known] * classes + predicted[known]).flatten(), minlength=classes**2)
            table = pairs.view(classes, classes)
            hits = table.diagonal()
            counts.append(torch.stack([hits, table.sum(0) + table.sum(1) - hits], dim=1))
        return torch.stack(counts).cpu().numpy()

    def summarize(self, statistics: np.ndarray) -> Metrics:
        """Return the mean over classes of intersection over union, both summed over all images."""
        intersection, union = statistics.sum(0).T
        occurs = union > 0
        score = float((intersection[occurs] / union[occurs]).mean()) if occurs.any() else 0.0
        return Metrics(
            score,
            len(statistics),
            None,
            {"iou_worst_class": float((intersection / np.maximum(union, 1))[occurs].min(initial=1.0))},
        )

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Return the mean cross-entropy over pixels."""
        scores = self._scores(call_model(model, batch.inputs))
        return F.cross_entropy(scores, batch.targets.long(), ignore_index=self.config.ignore)

    def divergence(self, reference: Any, outputs: Any) -> Tensor:
        """Return KL(reference || outputs) in nats, the mean over pixels, (images,)."""
        return kl_divergence(self._scores(reference), self._scores(outputs))

    def agreement(self, reference: Any, outputs: Any) -> np.ndarray:
        """Return the share of pixels with the same class, (images,)."""
        same = self._scores(reference).argmax(1) == self._scores(outputs).argmax(1)
        return same.float().flatten(1).mean(1).cpu().numpy()

    def check(self, outputs: Any) -> None:
        """Raise InputError unless the targets are classes of pixels, and there is one score per class and pixel."""
        for name, split in self.data.splits.items():
            self._check_targets(name, split)
        scores, (_, height, width) = self._scores(outputs), self.data.image_shape
        wanted = (1, self.data.num_classes, height, width)
        if not isinstance(scores, Tensor) or tuple(scores.shape) != wanted:
            raise InputError(
                f"A model for `task: segmentation` must give class scores of every pixel, {wanted}, but gives {shape_of(scores)}."
            )

    def _check_targets(self, name: str, split: Split) -> None:
        wanted, labels = (len(split), *self.data.image_shape[1:]), split.labels
        if labels.shape != wanted or labels.dtype.kind not in "iu":
            raise InputError(
                f"`task: segmentation` needs the class of every pixel, whole numbers {wanted}, but the targets of `data.{name}` "
                f"are {labels.shape} in {labels.dtype}. Set `task`, or check `data.name`."
            )
        classes = labels[labels != self.config.ignore]
        low, high = int(classes.min(initial=0)), int(classes.max(initial=0))
        if low < 0 or high >= self.data.num_classes:
            raise InputError(
                f"Classes of pixels of `data.{name}` must be in 0..{self.data.num_classes - 1}, or {self.config.ignore} for no "
                f"class, but are in {low}..{high}."
            )

    def _scores(self, outputs: Any) -> Tensor:
        if isinstance(outputs, Mapping):
            if self.config.output not in outputs:
                raise InputError(
                    f"The model returns a dict with {', '.join(map(str, outputs))}, but not `{self.config.output}`. "
                    "Set the option `output` of `task: segmentation`."
                )
            return outputs[self.config.output]
        return outputs
