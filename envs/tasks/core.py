"""A task: what a model is for. It gives inputs, scores models with a metric, and compares outputs; nothing else knows labels.

To add a task, implement `Task`, or subclass `SupervisedTask` or `PerSampleTask` (envs/tasks/supervised.py).

A *batch of inputs* is a tensor, or several of them as the arguments of the model (`secateur.envs.inputs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from secateur.cost_models.core import InputError
from secateur.envs.inputs import Inputs, call_model, concatenate, tensors_of_inputs
from secateur.envs.memory import run_model
from secateur.envs.metric import Metric

Model = Callable[..., Any]
"""An nn.Module, or whatever runs like one, for example an exported file in its runtime."""

Stop = Callable[[np.ndarray, int, int], bool]
"""Asked after each batch whether the rest can be left out: (contributions so far, batches so far, batches in all)."""

SPLITS = ("calibration", "validation", "test", "train")


class Batch(NamedTuple):
    """Some samples of a split: the inputs, and the targets that the task compares outputs with (None: there are none)."""

    inputs: Inputs
    targets: Any = None


@dataclass(frozen=True)
class Metrics:
    """What a model scored on a split.

    Attributes:
        score: the task's metric.
        samples: number of samples behind it.
        contributions: (samples,) one number per sample whose mean is the score, in the same order for every model; None: the
            metric is no mean over samples. Paired comparisons of two models need them.
        others: further metrics, for information.
        stopped: whether the samples are the first ones only.
    """

    score: float
    samples: int
    contributions: np.ndarray | None = None
    others: Mapping[str, float] = field(default_factory=dict)
    stopped: bool = False


class Task(Protocol):
    """What the search needs to know of a task. Picklable: it travels to the workers."""

    @property
    def metric(self) -> Metric:
        """What models are scored with."""
        ...

    @property
    def source(self) -> str:
        """One sentence that says which data are in which split."""
        ...

    def samples(self, split: str) -> int:
        """Return the number of samples of a split; 0: there is no such split."""
        ...

    def batches(self, split: str, size: int | None = None) -> Iterator[Batch]:
        """Return the batches of a split, in the same order every time.

        Args:
            split: one of `SPLITS`.
            size: samples per batch; None: the task's own choice for evaluation.
        """
        ...

    def evaluate(self, model: Model, split: str, stop: Stop | None = None) -> Metrics:
        """Return the scores of a model in eval mode; it is called without gradients and is not changed.

        Args:
            model: takes the inputs of `batches`.
            split: "validation" or "test".
            stop: tasks whose metric is a mean over samples ask it after every batch; others ignore it.
        """
        ...

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Return the training loss of a batch, a scalar with gradients."""
        ...

    def on(self, device: torch.device) -> Self:
        """Return the task with its batches on a device, for models that are there."""
        ...

    def check(self, outputs: Any) -> None:
        """Raise InputError unless data and outputs suit the task; called once, with the dense model's outputs for one sample."""
        ...

    def parts_of(self, model: nn.Module) -> tuple[str, ...]:
        """Return the submodules to compress if the configuration names none; () means the whole model."""
        ...

    def agreement(self, reference: Any, outputs: Any) -> np.ndarray | None:
        """Return the share of equal answers of each sample, (samples,); None: the outputs are no choices among answers."""
        ...

    def divergence(self, reference: Any, outputs: Any) -> Tensor:
        """Return how far outputs are from a reference model's, (samples,), 0 = equal; no targets are needed."""
        ...


# ---------------------------------------------------------------------------------------------- inputs and outputs as trees


def all_samples(task: Task, split: str) -> tuple[Inputs, Tensor | None]:
    """Return all inputs of a split in one batch, and their targets if these are tensors."""
    batches = list(task.batches(split))
    targets = [batch.targets for batch in batches]
    together = torch.cat(targets) if all(isinstance(target, Tensor) for target in targets) else None
    return concatenate([batch.inputs for batch in batches]), together


@torch.inference_mode()
def first_outputs(model: nn.Module, example: Inputs, hint: str) -> Any:
    """Return the dense model's outputs for one sample.

    Args:
        model: the dense model.
        example: one sample.
        hint: last sentence of the error, what to check.
    Raises:
        InputError: if the model does not run.
    """
    try:
        return call_model(model, example)
    except (Exception, SystemExit) as error:  # the user's forward runs arbitrary code
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors_of_inputs(example))
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"{type(model).__name__} does not run on inputs of shape {shapes}: {type(error).__name__}: {reason} {hint}"
        ) from error


@torch.inference_mode()
def check_finite(model: Model, inputs: Sequence[Inputs]) -> None:
    """Check the outputs of the dense network.

    Args:
        model: the dense network.
        inputs: batches of inputs.
    Raises:
        InputError: if an output is NaN or infinite.
    """
    broken = 0
    for batch in inputs:
        outputs = tensors_of(run_model(model, batch))
        finite = [x.isfinite().flatten(1).all(1) for x in outputs if len(x) == len(batch)]
        broken += int((~torch.stack(finite).all(0)).sum()) if finite else 0
    if broken:
        raise InputError(
            f"The network gives NaN or infinite outputs for {broken} of {sum(map(len, inputs))} samples before any "
            "compression. Check its weights, and whether `data.mean` and `data.std` are those of its training."
        )


def first_inputs(task: Task, split: str, most: int) -> list[Inputs]:
    """Return the inputs of the first batches of a split: at least `most` samples where it has them, cut to `most`."""
    found: list[Inputs] = []
    for batch in task.batches(split):
        left = most - sum(map(len, found))
        if left <= 0:
            break
        found.append(batch.inputs[:left])
    return found


def tensors_of(tree: Any) -> list[Tensor]:
    """Return every floating-point tensor of a tree of outputs or inputs, in a fixed order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return the tree with `function` of every floating-point tensor; everything else is kept."""

    def mapped(leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(mapped, tree)


def relative_error(reference: Any, outputs: Any) -> Tensor:
    """Return the squared error by the reference's variance over the batch, (samples,): the mean over all tensors of the outputs.

    Args:
        reference: outputs of the dense model; a tree of tensors (samples, ...).
        outputs: the same tree of another model.
    """
    errors = [
        (found.float() - wanted.float()).square().flatten(1).mean(1) / wanted.float().var(correction=0).clamp_min(1e-12)
        for wanted, found in zip(tensors_of(reference), tensors_of(outputs), strict=True)
    ]
    return torch.stack(errors).mean(0)


def kl_divergence(reference: Tensor, outputs: Tensor) -> Tensor:
    """Return KL(reference || outputs) of class scores (samples, classes, ...) in nats, the mean over positions, (samples,)."""
    wanted, found = (F.log_softmax(scores.float(), dim=1) for scores in (reference, outputs))
    return (wanted.exp() * (wanted - found)).sum(1).reshape(len(wanted), -1).mean(1)
