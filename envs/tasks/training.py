"""Training from scratch, with cached weights, for the small networks of secateur."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.envs.core import InputError
from secateur.envs.tasks.core import Batch, map_tensors
from secateur.envs.tasks.splits import Split, TaskData
from secateur.envs.tasks.supervised import PerSampleTask, SupervisedTask
from secateur.envs.training.descent import Descent, batches
from secateur.envs.training.samples import labeled_samples

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
    _training_images(task.data)
    return _trained(_fresh(model, recipe.seed).train(), task, recipe, progress)


def _trained(model: nn.Module, task: SupervisedTask, recipe: Recipe, progress: Progress | None) -> nn.Module:
    """Train a network in place, and return it in eval mode."""
    samples = labeled_samples(task.data, _training_images(task.data), recipe.shift, channels_last=False)
    steps = batches(samples, recipe.batch_size) * recipe.epochs
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), recipe.learning_rate, 0.9, weight_decay=recipe.weight_decay)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps)
    descent = Descent(model, optimizer, schedule, torch.Generator().manual_seed(recipe.seed))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # for dropout
        for epoch in range(1, recipe.epochs + 1):
            counted: list[np.ndarray] = []

            def count(outputs: Any, batch: Batch, loss: float, counted: list[np.ndarray] = counted) -> None:
                if isinstance(task, PerSampleTask):
                    counted.append(task.statistics(map_tensors(Tensor.detach, outputs), batch.targets))

            loss = descent.epoch(samples, recipe.batch_size, task.loss, torch.float32, count)
            if progress is not None:
                score = task.summarize(np.concatenate(counted)).score if isinstance(task, PerSampleTask) else None
                progress(TrainingProgress(epoch, recipe.epochs, loss, score))
    return model.eval()


def _training_images(data: TaskData) -> Split:
    if data.train is None:
        raise InputError("Training needs training images: set `data.train`, for example to `rest`.")
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


def _recipe_hash(model: nn.Module, task: SupervisedTask, recipe: Recipe) -> str:
    digest = hashlib.sha256()
    # The printed module tree holds layers and settings; the cache name distinguishes different forward passes.
    options = vars(task).get("config")
    digest.update(f"{model}{asdict(recipe)}{type(task).__name__}{options}{task.data.mean}{task.data.std}".encode())
    train = _training_images(task.data)
    digest.update(train.images.tobytes())
    digest.update(train.labels.tobytes())
    return digest.hexdigest()[:16]
