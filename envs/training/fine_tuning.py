"""Fine-tuning of a float network with its labels alone, as `secateur benchmark prediction` measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from torch import nn

from secateur.cost_models.core import Count, InputError, Positive, Range, check_fields
from secateur.envs.tasks.classification import Classification
from secateur.envs.tasks.splits import TaskData
from secateur.envs.training.distillation import EpochRecord, Training, Watch
from secateur.envs.training.recipe import DistillationConfig
from secateur.envs.training.samples import labeled_samples


@dataclass(frozen=True)
class FineTuning:
    """How to fine-tune a network: SGD with momentum; the learning rate falls to zero along half a cosine.

    Attributes:
        shift: images are shifted by up to this many pixels in each direction; the border is filled with black.
        flip: whether half of the images, drawn in every epoch, are mirrored left to right.
        precision: number format of activations and products; weights are float32 with "bfloat16" (autocast) too.
        seed: random seed for the order of the images, shifts and flips.
    """

    epochs: Count = 1
    batch_size: Annotated[int, Range(least=2)] = 128
    learning_rate: Positive = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    shift: Annotated[int, Range(least=0)] = 4
    flip: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "the fine-tuning")


def fine_tune(
    network: nn.Module, data: TaskData, config: FineTuning, progress: Callable[[EpochRecord], None] = lambda record: None
) -> nn.Module:
    """Return a copy of a classifier, fine-tuned on all of `data.train`, in eval mode.

    Raises:
        InputError: if there are no training images.
    """
    if data.train is None:
        raise InputError("Fine-tuning needs training images: set `data.train`, for example to `rest`.")
    samples = labeled_samples(data, data.train, config.shift, config.flip)
    recipe = DistillationConfig(**asdict(config), schedule="cosine", distillation=0.0)
    return Training(Classification(data), None, samples, recipe).run(network, Watch(epoch=progress)).network
