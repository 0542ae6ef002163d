"""Training from scratch, with cached weights, for the small networks of secateur, and fine-tuning of any network."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.cost_models.core import Count, Positive, Range, check_fields
from secateur.envs.core import InputError
from secateur.envs.tasks.classification import Classification
from secateur.envs.tasks.core import Batch, map_tensors
from secateur.envs.tasks.splits import Split, TaskData
from secateur.envs.tasks.supervised import PerSampleTask, SupervisedTask

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingProgress:
    """The state of a training after an epoch.

    Attributes:
        epoch: number of finished epochs.
        epochs: number of all epochs.
        loss: mean loss on the training images.
        score: the task's metric on the training images, counted while the network is trained; None: the task counts nothing per
            sample.
    """

    epoch: int
    epochs: int
    loss: float
    score: float | None


Progress = Callable[[TrainingProgress], None]
"""A function that is called after every epoch."""


@dataclass(frozen=True)
class Recipe:
    """How to train, under a one-cycle learning rate.

    Attributes:
        shift: images are shifted by up to this many pixels in each direction; the border is filled with black. The
            targets are not shifted, so it must be 0 for tasks whose targets are images.
        optimizer: SGD with momentum 0.9, or AdamW.
        seed: random seed for initialization, order of the images and shifts.
    """

    epochs: int
    batch_size: int = 50
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    shift: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    seed: int = 0


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


def cache_directory() -> Path:
    """Return $SECATEUR_CACHE, or ~/.cache/secateur."""
    return Path(os.environ.get("SECATEUR_CACHE") or "~/.cache/secateur").expanduser()


def cached_weights(
    name: str,
    model: nn.Module,
    task: SupervisedTask,
    recipe: Recipe,
    progress: Progress | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """Return a safetensors file with the weights of a trained network of the architecture `model`.

    The file's name holds a hash of the recipe, the architecture, the task and its training split: if one of them changes, a
    network is trained again. `model` is not changed.
    """
    path = Path(cache_dir or cache_directory()) / f"{name}-{_recipe_hash(model, task, recipe)}.safetensors"
    if path.is_file():
        return path
    trained = train(model, task, recipe, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two searches may train at the same time: each writes its own file, and the rename is atomic.
    handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".unfinished")
    os.close(handle)
    save_file(trained.state_dict(), unfinished)
    os.replace(unfinished, path)
    logger.info("Trained weights are stored in %s.", path)
    return path


def train(model: nn.Module, task: SupervisedTask, recipe: Recipe, progress: Progress | None = None) -> nn.Module:
    """Return a network of the architecture `model`, trained from scratch on the task's training split, in eval mode.

    Raises:
        InputError: if there are no training images.
    """
    images, targets = task.data.tensors(_training_images(task.data, "Training"))
    generator = torch.Generator().manual_seed(recipe.seed)
    model = _fresh(model, recipe.seed).train()
    steps = -(-len(targets) // recipe.batch_size) * recipe.epochs
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), recipe.learning_rate, 0.9, weight_decay=recipe.weight_decay)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps)

    def batch_at(indices: Tensor) -> Batch:
        return Batch(_shifted(images[indices], recipe.shift, generator), targets[indices])

    return _descend(model, task, batch_at, len(targets), recipe, optimizer, schedule, generator, torch.float32, progress)


def fine_tune(network: nn.Module, data: TaskData, config: FineTuning, progress: Progress | None = None) -> nn.Module:
    """Return a copy of a classifier, fine-tuned on all of `data.train`, in eval mode.

    Quantized weights would not stay on their grids: fine-tune the float network and quantize it afterwards.

    Raises:
        InputError: if there are no training images.
    """
    train = _training_images(data, "Fine-tuning")
    # Convolutions are fastest with channels last.
    network = copy.deepcopy(network).to(memory_format=torch.channels_last).train()
    generator = torch.Generator().manual_seed(config.seed)
    steps = config.epochs * -(-len(train) // config.batch_size)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def batch_at(indices: Tensor) -> Batch:
        images, labels = data.tensors(Split(train.images[indices.numpy()], train.labels[indices.numpy()]))
        if config.flip:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        images = _shifted(images, config.shift, generator)
        return Batch(images.contiguous(memory_format=torch.channels_last), labels)

    dtype = getattr(torch, config.precision)
    task = Classification(data)
    return _descend(network, task, batch_at, len(train), config, optimizer, schedule, generator, dtype, progress)


def _descend(
    model: nn.Module,
    task: SupervisedTask,
    batch_at: Callable[[Tensor], Batch],
    count: int,
    recipe: Recipe | FineTuning,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
    dtype: torch.dtype,
    progress: Progress | None,
) -> nn.Module:
    """Return the model after `recipe.epochs` epochs of `count` images each, in eval mode.

    Args:
        task: gives the loss, and the score of the training images.
        batch_at: image indices -> augmented images and their targets.
        count: number of training images.
        recipe: number of epochs, largest batch size, and random seed for the network's own random numbers.
        schedule: learning-rate schedule; it makes one step after every batch.
        generator: random generator for the order of the images.
        dtype: number format of activations and products.
        progress: called after every epoch.
    """
    batches = -(-count // recipe.batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # for dropout
        for epoch in range(1, recipe.epochs + 1):
            loss_sum, counted = 0.0, []
            # Batches of equal size, because batch norm has no variance for a batch of one image.
            for indices in torch.randperm(count, generator=generator).tensor_split(batches):
                batch, recorded = batch_at(indices), _Recorded(model, dtype)
                loss = task.loss(recorded, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                loss_sum += loss.item() * len(indices)
                if isinstance(task, PerSampleTask):
                    counted.append(task.statistics(map_tensors(Tensor.detach, recorded.outputs), batch.targets))
            if progress is not None:
                score = task.summarize(np.concatenate(counted)).score if isinstance(task, PerSampleTask) else None
                progress(TrainingProgress(epoch, recipe.epochs, loss_sum / count, score))
    return model.eval()


class _Recorded:
    """A model that computes in a number format and returns float32; `outputs` holds what it returned last."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype, self.outputs = model, dtype, None

    def __call__(self, *inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            outputs = self.model(*inputs)
        self.outputs = map_tensors(Tensor.float, outputs)
        return self.outputs


def _training_images(data: TaskData, what: str) -> Split:
    if data.train is None:
        raise InputError(f"{what} needs training images: set `data.train`, for example to `rest`.")
    return data.train


def _fresh(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy of `model` with new initial weights from `seed`; the result depends on nothing else."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return model


def _shifted(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Return the images (N, C, H, W), each shifted by its own random offset of up to `shift` pixels."""
    if not shift:
        return images
    count, channels, height, width = images.shape
    # Black is the smallest value of the normalized images, not 0.
    padded = F.pad(images, (shift,) * 4, value=float(images.min()))
    top, left = torch.randint(2 * shift + 1, (2, count), generator=generator)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    index = torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return padded[index[0], index[1], rows, columns]


def _recipe_hash(model: nn.Module, task: SupervisedTask, recipe: Recipe) -> str:
    digest = hashlib.sha256()
    # The printed module tree holds layers and settings; the cache name distinguishes different forward passes.
    options = vars(task).get("config")
    digest.update(f"{model}{asdict(recipe)}{type(task).__name__}{options}{task.data.mean}{task.data.std}".encode())
    train = _training_images(task.data, "Training")
    digest.update(train.images.tobytes())
    digest.update(train.labels.tobytes())
    return digest.hexdigest()[:16]
