"""Detection: boxes with classes and scores, mean average precision (mAP) as COCO computes it.

Source: Lin et al. 2014, "Microsoft COCO: Common Objects in Context", and its evaluation: average precision at intersection over
union 0.50, 0.55, ... 0.95, the mean over thresholds and classes. Computed by torchmetrics, with pycocotools (extra `metrics`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from secateur.cost_models.core import InputError
from secateur.envs.inputs import ImageList, tensors_of_inputs
from secateur.envs.memory import run_model
from secateur.envs.metric import Metric
from secateur.envs.tasks.core import Batch, Metrics, Model, Stop
from secateur.envs.tasks.supervised import SupervisedTask

NO_BOX = -1
"""Class of the rows that fill up the targets of an image."""


@dataclass(frozen=True)
class DetectionConfig:
    """Options.

    Attributes:
        first_class: class number of the data's first class in the model's answers; torchvision's models have the background as 0.
    """

    first_class: Annotated[int, Field(ge=0)] = 1


@dataclass(frozen=True)
class Detection(SupervisedTask):
    """Models take a list of images (C, H, W) and return {"boxes": (n, 4), "labels": (n,), "scores": (n,)} of each.

    This is how torchvision's detectors are called.

    Targets (images, most, 5) float32: x1, y1, x2, y2 in pixels and the class 0, 1, ...; rows with class -1 are no boxes.
    """

    config: DetectionConfig = DetectionConfig()

    @property
    def metric(self) -> Metric:
        """Mean average precision over classes and thresholds."""
        return Metric("map", unit="%", worst=0.0, best=1.0)

    def parts_of(self, model: nn.Module) -> tuple[str, ...]:
        """Return the parts of one of torchvision's detectors that can be traced; () for other models."""
        if not type(model).__module__.startswith("torchvision.models.detection."):
            return ()
        known = dict(model.named_modules())
        return tuple(path for path in ("backbone", "head", "rpn.head") if path in known)

    def batches(self, split: str, size: int | None = None) -> Any:
        """Return the batches of a split: lists of images."""
        for images, targets in super().batches(split, size):
            yield Batch(ImageList(tuple(tensors_of_inputs(images))), targets)

    @torch.no_grad()
    def evaluate(self, model: Model, split: str, stop: Stop | None = None) -> Metrics:
        """Return mAP, and average precision at an overlap of 0.5."""
        measure = _mean_average_precision()
        count = 0
        for inputs, targets in self.batches(split):
            found = [
                {name: answer[name].detach().cpu() for name in ("boxes", "labels", "scores")}
                for answer in run_model(model, inputs)
            ]
            measure.update(found, self.annotations(targets.cpu()))
            count += len(targets)
        values = measure.compute()
        return Metrics(max(float(values["map"]), 0.0), count, None, {"map_50": max(float(values["map_50"]), 0.0)})

    def annotations(self, targets: Tensor) -> list[dict[str, Tensor]]:
        """Return targets as torchvision's models take them for training."""
        rows = [target[target[:, 4] != NO_BOX] for target in targets]
        return [{"boxes": boxes[:, :4].float(), "labels": boxes[:, 4].long() + self.config.first_class} for boxes in rows]

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Return the sum of the losses that torchvision's detectors return in training mode."""
        (images,) = tensors_of_inputs(batch.inputs)
        with _giving_losses(model):
            losses = model(list(images), self.annotations(batch.targets))
        return torch.stack(list(losses.values())).sum()

    def check(self, outputs: Any) -> None:
        """Raise InputError unless the targets are boxes, and there is a dict of boxes, labels and scores for each image."""
        for name, split in self.data.splits.items():
            if split.labels.ndim != 3 or split.labels.shape[2] != 5 or split.labels.dtype != np.float32:
                raise InputError(
                    "`task: detection` needs targets (images, most, 5) in float32, x1, y1, x2, y2 and the class, but those of "
                    f"`data.{name}` are {split.labels.shape} in {split.labels.dtype}."
                )
        if not isinstance(outputs, list) or not outputs or not {"boxes", "labels", "scores"} <= set(outputs[0]):
            raise InputError(
                "A model for `task: detection` must return a list with {boxes, labels, scores} of each image, as torchvision's "
                f"detectors do, but returns {type(outputs).__name__}."
            )


@contextmanager
def _giving_losses(model: Model) -> Iterator[None]:
    """Let a detector return its losses, as in training; batch norms and dropout stay as they are."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    before = [module.training for module in modules]
    try:
        for module in modules:
            if not isinstance(module, _BatchNorm | _DropoutNd):
                module.training = True
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training


def _mean_average_precision() -> Any:
    try:
        from torchmetrics.detection import MeanAveragePrecision

        return MeanAveragePrecision(box_format="xyxy", iou_type="bbox")
    except ImportError:
        raise InputError("`task: detection` needs torchmetrics and pycocotools: pip install 'secateur[metrics]'.") from None
