"""Tasks with arrays of inputs and targets: a task in the box says what it counts per sample, and how that becomes a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from secateur.envs.core import InputError
from secateur.envs.devices import CPU
from secateur.envs.memory import run_model
from secateur.envs.metric import Metric
from secateur.envs.tasks.core import Batch, Metrics, Model, Stop, relative_error, tensors_of
from secateur.envs.tasks.splits import TaskData

PIXELS = 65536
"""Of a batch: its activations have about the size of the processor's cache. 64 images of 32 x 32 pixels."""


GPU_PIXELS = 256 * 224 * 224
"""Of a batch on another device than the CPU: enough work for a large one; the widest layer of VGG-16 takes 3.3 GB in float32."""


@dataclass(frozen=True)
class SupervisedTask(ABC):
    """A task on a `TaskData`. Subclasses are frozen dataclasses with one more field, `config`: the task's options.

    Attributes:
        data: the splits.
    """

    data: TaskData

    @property
    @abstractmethod
    def metric(self) -> Metric:
        """What models are scored with."""

    @abstractmethod
    def evaluate(self, model: Model, split: str, stop: Stop | None = None) -> Metrics:
        """Return the scores of a model; see `Task.evaluate`."""

    @abstractmethod
    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Return the training loss of a batch, a scalar."""

    @abstractmethod
    def check(self, outputs: Any) -> None:
        """Raise InputError unless data and outputs suit the task; see `Task.check`."""

    def divergence(self, reference: Any, outputs: Any) -> Tensor:
        """Return the relative squared error of all output tensors, (samples,)."""
        return relative_error(reference, outputs)

    def agreement(self, reference: Any, outputs: Any) -> np.ndarray | None:
        """Return the share of equal answers of each sample, (samples,); None: the outputs are no choices among answers."""
        return None

    def parts_of(self, model: nn.Module) -> tuple[str, ...]:
        """Return the parts to compress if the configuration names none; () means the whole model."""
        return ()

    def on(self, device: torch.device) -> Self:
        """Return the task with its batches on a device; see `Task.on`."""
        return replace(self, data=self.data.on(device))

    def without_training_data(self) -> Self:
        """Return the task without its training split, which the workers of a search do not need."""
        return replace(self, data=replace(self.data, train=None))

    @property
    def source(self) -> str:
        """One sentence that says which data are in which split."""
        return self.data.source

    def samples(self, split: str) -> int:
        """Return the number of samples of a split."""
        return len(self.data.splits.get(split, ()))

    def batches(self, split: str, size: int | None = None) -> Iterator[Batch]:
        """Return the batches of a split.

        Validation images come in a fixed random order, so the first of them are a random sample of the split.
        """
        order = np.arange(self.samples(split))
        if split == "validation":
            order = np.random.default_rng(0).permutation(order)
        size = size or self._batch_size(split)
        for start in range(0, len(order), size):
            yield Batch(*self.data.at(split, order[start : start + size]))

    def _batch_size(self, split: str) -> int:
        """Return how many samples are in one batch of an evaluation."""
        return evaluation_batch(self.data.splits[split].images.shape, self.data.device)


@dataclass(frozen=True)
class PerSampleTask(SupervisedTask):
    """A task whose score follows from what is counted for each sample."""

    stoppable: ClassVar[bool] = False
    """Whether the score is the mean of the statistics, so that the first samples estimate it."""

    @abstractmethod
    def statistics(self, outputs: Any, targets: Tensor) -> np.ndarray:
        """Return what is counted for each sample of a batch, (samples, ...)."""

    @abstractmethod
    def summarize(self, statistics: np.ndarray) -> Metrics:
        """Return the scores from the statistics of all samples, (samples, ...)."""

    @torch.inference_mode()
    def evaluate(self, model: Model, split: str, stop: Stop | None = None) -> Metrics:
        """Return the scores of a model; see `Task.evaluate`."""
        total = -(-self.samples(split) // self._batch_size(split))
        counted: list[np.ndarray] = []
        for number, (inputs, targets) in enumerate(self.batches(split), start=1):
            outputs = run_model(model, inputs)
            if broken := sum(not bool(x.isfinite().all()) for x in tensors_of(outputs)):
                raise InputError(f"{broken} output tensors of the network hold NaN or infinite values, so it has no score.")
            counted.append(self.statistics(outputs, targets))
            if self.stoppable and stop is not None and stop(np.concatenate(counted), number, total):
                return replace(self.summarize(np.concatenate(counted)), stopped=True)
        return self.summarize(np.concatenate(counted))


def shape_of(outputs: Any) -> str:
    """Return the shape of an output, or its type if it is no tensor, for a message."""
    return str(tuple(outputs.shape)) if isinstance(outputs, Tensor) else type(outputs).__name__


def evaluation_batch(shape: Sequence[int], device: torch.device = CPU) -> int:
    """Return how many images (N, C, H, W), or other arrays of this shape, are in one batch of an evaluation."""
    pixels = int(np.prod(shape[2:]))
    return int(np.clip(PIXELS // pixels, 8, 256)) if device == CPU else int(np.clip(GPU_PIXELS // pixels, 8, 4096))
