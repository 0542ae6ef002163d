"""Trains the small networks that come with secateur, and keeps them in a cache."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from envs.tasks.data import TaskData

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingProgress:
    """Where a training stands after an epoch: epochs done, of how many, mean loss and top-1 on its training images."""

    epoch: int
    epochs: int
    loss: float
    top1: float


Progress = Callable[[TrainingProgress], None]
"""Called after every epoch."""


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with momentum under a one-cycle learning rate.

    Attributes:
        shift: images are moved by up to this many pixels in each direction, filled with black.
        seed: of initialisation, order of the images and shifts.
    """

    epochs: int
    batch_size: int = 50
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    shift: int = 1
    seed: int = 0


def cache_directory() -> Path:
    """Return $SECATEUR_CACHE, or ~/.cache/secateur."""
    return Path(os.environ.get("SECATEUR_CACHE") or "~/.cache/secateur").expanduser()


def cached_weights(
    name: str,
    model: nn.Module,
    data: TaskData,
    recipe: Recipe,
    progress: Progress | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """Return a safetensors file with the weights of a network like `model`, trained now or earlier.

    The file's name holds a hash of the recipe, the architecture and the training images: when one of them changes, it
    is trained again. `model` is left alone.
    """
    path = Path(cache_dir or cache_directory()) / f"{name}-{_recipe_hash(model, data, recipe)}.safetensors"
    if path.is_file():
        return path
    trained = train(model, data, recipe, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two searches may train at once; each writes its own file, and the rename is atomic.
    handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".unfinished")
    os.close(handle)
    save_file(trained.state_dict(), unfinished)
    os.replace(unfinished, path)
    logger.info("Trained weights are kept in %s.", path)
    return path


def train(model: nn.Module, data: TaskData, recipe: Recipe, progress: Progress | None = None) -> nn.Module:
    """Return a network like `model` trained from scratch on `data.train`, in eval mode."""
    images, labels = data.tensors(data.train)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = _fresh(model, recipe.seed).train()
    steps = -(-len(labels) // recipe.batch_size) * recipe.epochs
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.learning_rate, momentum=0.9, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps)
    for epoch in range(1, recipe.epochs + 1):
        loss_sum, right = 0.0, 0
        for batch in torch.randperm(len(labels), generator=generator).split(recipe.batch_size):
            logits = model(_shifted(images[batch], recipe.shift, generator))
            loss = F.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(batch)
            right += int((logits.argmax(1) == labels[batch]).sum())
        if progress is not None:
            progress(TrainingProgress(epoch, recipe.epochs, loss_sum / len(labels), right / len(labels)))
    return model.eval()


def _fresh(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy of `model` initialised from `seed`, so that the result does not depend on what ran before."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return model


def _shifted(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Return each image moved by its own random offset of up to `shift` pixels; (N, C, H, W)."""
    if not shift:
        return images
    count, channels, height, width = images.shape
    # Black is the smallest value of the normalised images, not 0.
    padded = F.pad(images, (shift,) * 4, value=float(images.min()))
    top, left = torch.randint(2 * shift + 1, (2, count), generator=generator)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    index = torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return padded[index[0], index[1], rows, columns]


def _recipe_hash(model: nn.Module, data: TaskData, recipe: Recipe) -> str:
    digest = hashlib.sha256()
    # The printed tree names layers and their settings; forward passes are told apart by the cache name of their module.
    digest.update(f"{model}{asdict(recipe)}{data.mean}{data.std}".encode())
    digest.update(data.train.images.tobytes())
    digest.update(data.train.labels.tobytes())
    return digest.hexdigest()[:16]
