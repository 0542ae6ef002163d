"""The loop that all trainings share: batches in random order, one step of the optimizer after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.envs.memory import TRAINING, halving, join_outputs
from secateur.envs.tasks.core import Batch, map_tensors
from secateur.envs.training.samples import Samples

LossOf = Callable[[Any, Batch], Tensor]
"""The loss of a model for a batch, a scalar; the model is a `Forward`."""


class Forward:
    """A network that computes in a number format and returns float32.

    A second call with the same tensors returns the outputs of the first, so that several losses of a batch need one pass.

    Attributes:
        outputs: of the last call.
    """

    def __init__(self, network: Callable[..., Any], dtype: torch.dtype) -> None:
        self.network, self.dtype, self.outputs = network, dtype, None
        self._inputs: tuple[Any, ...] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = (*args, *kwargs.values())
        same = self._inputs is not None and len(inputs) == len(self._inputs)
        if not same or any(one is not other for one, other in zip(inputs, self._inputs or (), strict=True)):
            with autocast(self.dtype, inputs):
                outputs = self.network(*args, **kwargs)
            self.outputs, self._inputs = map_tensors(Tensor.float, outputs), inputs
        return self.outputs


@dataclass
class Descent:
    """A network in training, with everything that changes while it is trained.

    Attributes:
        network: in training mode.
        optimizer: of its parameters.
        schedule: learning-rate schedule; it makes one step after every batch.
        generator: random generator for the order of the samples and their augmentation.
        call: what computes the network's outputs for whole batches; None: the network.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator
    call: Callable[..., Any] | None = None

    def epoch(
        self,
        samples: Samples,
        batch_size: int,
        loss_of: LossOf,
        dtype: torch.dtype,
        after: Callable[[Any, Batch, float], None] = lambda outputs, batch, loss: None,
    ) -> float:
        """Train on all samples once, and return their mean loss.

        Args:
            samples: what is learned from.
            batch_size: largest number of samples per batch. All batches have equal sizes, because batch norm has no variance
                for a batch of one sample.
            loss_of: the loss of a batch.
            dtype: number format of activations and products; the loss is computed in float32.
            after: called after every batch, with the outputs of its last forward pass, the batch and its loss.
        """
        total = 0.0
        for indices in torch.randperm(samples.count, generator=self.generator).tensor_split(batches(samples, batch_size)):
            batch = samples.batch(indices, self.generator)
            outputs, loss = halving(TRAINING, partial(self._backward, batch, loss_of, dtype), max(len(indices) // 2, 1))
            self.optimizer.step()
            self.schedule.step()
            total += loss * len(indices)
            after(outputs, batch, loss)
        return total / samples.count

    def _backward(self, batch: Batch, loss_of: LossOf, dtype: torch.dtype, parts: int) -> tuple[Any, float]:
        """Compute the gradients of a batch, in parts if memory is short; return its outputs and its loss."""
        self.optimizer.zero_grad()
        outputs: list[Any] = []
        total = 0.0
        call = self.call if self.call is not None and parts == 1 else self.network
        for part in _divided(batch, parts):
            forward = Forward(call, dtype)
            loss = loss_of(forward, part) * (len(part.inputs) / len(batch.inputs))
            loss.backward()
            outputs.append(forward.outputs)
            total += loss.item()
        return outputs[0] if parts == 1 else join_outputs(outputs), total


def _divided(batch: Batch, parts: int) -> list[Batch]:
    """Return a batch in parts of at least two samples, because batch norm has no variance for one."""
    if parts == 1:
        return [batch]
    count = len(batch.inputs)
    ends = [round(count * number / parts) for number in range(parts + 1)]
    slices = [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]
    return [Batch(batch.inputs[part], None if batch.targets is None else batch.targets[part]) for part in slices]


def batches(samples: Samples, batch_size: int) -> int:
    """Return the number of batches of an epoch."""
    return -(-samples.count // batch_size)


def autocast(dtype: torch.dtype, inputs: Sequence[Any]) -> AbstractContextManager[Any]:
    """Return a context in which networks compute in `dtype` on the device of their inputs; weights stay in float32."""
    if dtype == torch.float32:
        return nullcontext()
    device = next(x.device.type for x in inputs if isinstance(x, Tensor))
    return torch.autocast(device, dtype, cache_enabled=device != "cuda")  # CUDA graphs allow no cache of converted weights
