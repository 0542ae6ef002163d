"""Training of a compressed network with knowledge distillation from the dense model.

The loss of a batch, with the weight w and the temperature T of the configuration:

    (1 - w) * task loss + w * T^2 * KL(softmax(dense / T) || softmax(compressed / T))                                  (1)

where both networks see the same augmented samples. Source: Hinton et al. 2015, arXiv:1503.02531; T^2 keeps the gradient of the
second term the same size for all T. Where the outputs are no class scores, the task's divergence takes the place of T^2 KL.
Samples without targets have the second term alone.

A training that is killed continues from its last checkpoint with the same result, bit for bit on the same machine: a checkpoint
holds the network, the momentum of the optimizer, the running average and the states of the random generators.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.cost_models.core import InputError
from secateur.envs.devices import device_of
from secateur.envs.inputs import call_model, tensors_of_inputs
from secateur.envs.quantization.trainable import make_quantized, make_trainable, set_progress
from secateur.envs.tasks.core import Batch, Model, Task, kl_divergence, map_tensors
from secateur.envs.training.checkpoint import State, capture, network_tensors, read_checkpoint, restore, write_checkpoint
from secateur.envs.training.descent import Descent, autocast, batches
from secateur.envs.training.graphs import with_graphs
from secateur.envs.training.recipe import DistillationConfig
from secateur.envs.training.samples import Samples


@dataclass(frozen=True)
class EpochRecord:
    """What is known of an epoch.

    Attributes:
        epoch: number of finished epochs.
        loss: mean loss on the training samples.
        score: the metric on the validation split, for information; None: not measured.
        learning_rate: at the end of the epoch.
        seconds: duration, with the validation.
    """

    epoch: int
    loss: float
    score: float | None
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class BatchProgress:
    """Where a training is after a batch.

    Attributes:
        epoch: the current epoch, from 1 on.
        epochs: number of all epochs.
        loss: of the batch.
        done: share of all batches that are done, of all epochs.
        seconds_left: estimated time until the end.
    """

    epoch: int
    epochs: int
    loss: float
    done: float
    seconds_left: float


@dataclass(frozen=True)
class Watch:
    """Callbacks of a training.

    Attributes:
        batch: called after every batch.
        epoch: called after every epoch, when its checkpoint is written; after a resumption first for the earlier epochs.
        score: network in eval mode -> its score on the validation split, or None; None: it is not scored.
    """

    batch: Callable[[BatchProgress], None] = lambda progress: None
    epoch: Callable[[EpochRecord], None] = lambda record: None
    score: Callable[[nn.Module], float | None] | None = None


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Attributes:
        network: after the last epoch, in eval mode.
        epochs: a record of each epoch.
        note: why the training stopped early, in one sentence; "": it did not.
    """

    network: nn.Module
    epochs: tuple[EpochRecord, ...]
    note: str = ""


class _NotFiniteError(Exception):
    """A loss or a weight is NaN or infinite."""


@dataclass(frozen=True)
class Training:
    """A training, ready to run.

    Attributes:
        task: gives the loss, and compares outputs.
        teacher: the dense model, in eval mode; None: there is no distillation.
        samples: what is learned from.
        config: the recipe.
        checkpoint: file of the checkpoint; None: no checkpoint is written.
        identity: JSON values that tell this training from others; a checkpoint with other values is refused. The recipe is
            always compared.
    """

    task: Task
    teacher: nn.Module | None
    samples: Samples
    config: DistillationConfig
    checkpoint: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)

    def run(self, network: nn.Module, watch: Watch = Watch()) -> Trained:
        """Return a trained copy of a network, in eval mode; a checkpoint of the same training is continued.

        Quantized weights train on their grids, and are exactly quantized at the end. If a loss is NaN or infinite, training
        stops with the network of the epoch before.

        Raises:
            InputError: if the checkpoint is damaged or that of another training, or the network has no gradients.
        """
        identity = {**self.identity, "recipe": asdict(self.config)}
        stored = None if self.checkpoint is None else read_checkpoint(self.checkpoint, identity)
        network = copy.deepcopy(network).train()
        make_trainable(network, self.config.estimator)
        network = network.to(memory_format=torch.channels_last)
        average = {name: x.detach().clone() for name, x in network_tensors(network) if self.config.ema and x.is_floating_point()}
        device = device_of(network)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.config.seed)  # for dropout
            descent = self._descent(network)
            descent.call = with_graphs(network, device)
            state = self._continued(stored, descent, average) if stored is not None else capture(descent, average)
            for record in state.epochs:
                watch.epoch(EpochRecord(**record))
            faster = replace(self, teacher=self.teacher and with_graphs(self.teacher, device))
            state = faster._descend(descent, average, state, identity, watch)
        _exchange(network, average)
        make_quantized(network)
        return Trained(network.eval(), tuple(EpochRecord(**record) for record in state.epochs), state.note)

    def _descent(self, network: nn.Module) -> Descent:
        config = self.config
        optimizer = torch.optim.SGD(
            network.parameters(), lr=1.0, momentum=config.momentum, weight_decay=config.weight_decay
        )  # the schedule sets the learning rate
        schedule = config.make_schedule(optimizer, config.epochs * batches(self.samples, config.batch_size))
        return Descent(network, optimizer, schedule, torch.Generator().manual_seed(config.seed))

    def _continued(self, stored: State, descent: Descent, average: Mapping[str, Tensor]) -> State:
        try:
            restore(stored, descent, average)
        except (KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.checkpoint} is the checkpoint of another network: {reason}. Remove it to train anew."
            ) from None
        return stored

    def _descend(
        self, descent: Descent, average: Mapping[str, Tensor], state: State, identity: Mapping[str, Any], watch: Watch
    ) -> State:
        """Return the state after the last epoch, and leave the network and the average in it."""
        timer = _Timer(self.config, batches(self.samples, self.config.batch_size), len(state.epochs), watch)
        for epoch in range(len(state.epochs) + 1, self.config.epochs + 1):
            if state.note:
                break
            records, start = state.epochs, time.monotonic()
            try:
                loss = self._epoch(descent, average, epoch, timer)
            except _NotFiniteError as error:
                restore(state, descent, average)
                state = replace(state, note=_stopped(error, epoch))
            else:
                with _averaged(descent.network, average):
                    score = None if watch.score is None else watch.score(descent.network.eval())
                descent.network.train()
                rate = descent.schedule.get_last_lr()[0]
                record = EpochRecord(epoch, loss, score, float(rate), time.monotonic() - start)
                state = replace(capture(descent, average), epochs=[*records, asdict(record)])
            if self.checkpoint is not None:
                write_checkpoint(self.checkpoint, state, identity)
            if not state.note:
                watch.epoch(record)
        return state

    def _epoch(self, descent: Descent, average: Mapping[str, Tensor], epoch: int, timer: _Timer) -> float:
        """Train for one epoch, and return the mean loss."""

        def after(outputs: Any, batch: Batch, loss: float) -> None:
            timer.count(epoch, loss)
            set_progress(descent.network, timer.done)
            _follow(average, descent.network, self.config.ema, timer.steps)

        set_progress(descent.network, timer.done)  # after a resumption too
        loss = descent.epoch(self.samples, self.config.batch_size, self._loss, getattr(torch, self.config.precision), after)
        if not all(bool(tensor.isfinite().all()) for _, tensor in network_tensors(descent.network)):
            raise _NotFiniteError("A weight became NaN or infinite")
        return loss

    def _loss(self, model: Model, batch: Batch) -> Tensor:
        """Return the loss of a model for a batch, eq. (1)."""
        weight = 1.0 if batch.targets is None else self.config.distillation
        parts = []
        if weight < 1:
            parts.append((1 - weight) * task_loss(self.task, model, batch, self.config.label_smoothing))
        if weight > 0 and self.teacher is not None:
            with torch.no_grad(), autocast(getattr(torch, self.config.precision), tensors_of_inputs(batch.inputs)):
                wanted = map_tensors(Tensor.float, call_model(self.teacher, batch.inputs))
            outputs = call_model(model, batch.inputs)
            parts.append(weight * imitation_loss(self.task, wanted, outputs, self.config.temperature))
        loss = torch.stack(parts).sum() if len(parts) > 1 else parts[0]
        if not math.isfinite(loss.item()):
            raise _NotFiniteError(f"The loss became {loss.item()}")
        return loss


class _Timer:
    """Counts batches and estimates the time left."""

    def __init__(self, config: DistillationConfig, batches: int, done: int, watch: Watch):
        self._config, self._total, self._watch = config, batches * config.epochs, watch
        self._before = self.steps = batches * done
        self._start = time.monotonic()

    @property
    def done(self) -> float:
        """Share of all batches that are done."""
        return self.steps / self._total

    def count(self, epoch: int, loss: float) -> None:
        """Count one batch."""
        self.steps += 1
        seconds = (time.monotonic() - self._start) / (self.steps - self._before) * (self._total - self.steps)
        self._watch.batch(BatchProgress(epoch, self._config.epochs, loss, self.done, seconds))


def _stopped(error: Exception, epoch: int) -> str:
    kept = f"the network is that of epoch {epoch - 1}" if epoch > 1 else "the network is as it was before"
    return f"{error} in epoch {epoch}: training stopped, and {kept}. Lower `learning_rate`."


# ------------------------------------------------------------------------------------------------------------ loss


def are_class_scores(task: Task, outputs: Any) -> bool:
    """Return whether outputs are one tensor of class scores, (samples, classes, ...)."""
    return isinstance(outputs, Tensor) and outputs.dim() >= 2 and task.agreement(outputs[:1], outputs[:1]) is not None


def task_loss(task: Task, model: Model, batch: Batch, label_smoothing: float) -> Tensor:
    """Return the task's loss of a model; a share of it is spread over all classes."""
    loss = task.loss(model, batch)
    if label_smoothing and are_class_scores(task, outputs := call_model(model, batch.inputs)):
        everywhere = -F.log_softmax(outputs, dim=1).mean()
        loss = (1 - label_smoothing) * loss + label_smoothing * everywhere
    return loss


def imitation_loss(task: Task, wanted: Any, outputs: Any, temperature: float) -> Tensor:
    """Return how far outputs are from those of the dense model: the second term of eq. (1) without its weight."""
    if are_class_scores(task, outputs):
        return temperature**2 * kl_divergence(wanted / temperature, outputs / temperature).mean()
    return task.divergence(wanted, outputs).mean()


# ------------------------------------------------------------------------------------------------ running average


def _follow(average: Mapping[str, Tensor], network: nn.Module, decay: float, steps: int) -> None:
    """Move the average towards the network, in place; the first steps move it more, so that the start is forgotten."""
    if not average:
        return
    moved = 1 - min(decay, (1 + steps) / (10 + steps))
    with torch.no_grad():
        for name, tensor in network_tensors(network):
            if name in average:
                average[name].lerp_(tensor, moved)


@contextmanager
def _averaged(network: nn.Module, average: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, the network has the averaged weights."""
    _exchange(network, average)
    try:
        yield
    finally:
        _exchange(network, average)


@torch.no_grad()
def _exchange(network: nn.Module, average: Mapping[str, Tensor]) -> None:
    for name, tensor in network_tensors(network):
        if name in average:
            kept = tensor.clone()
            tensor.copy_(average[name])
            average[name].copy_(kept)
