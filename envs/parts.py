"""Parts of a model: only some submodules are analyzed, compressed and exported; the whole is scored.

Some models cannot be traced as a whole, for example detectors, whose boxes depend on values. Their backbones and heads can.
`Parts` is a module that holds these submodules alone, under their own names, and takes their inputs as plain tensors: the engine
compresses it like any model. `PartTask` gives it the inputs that the parts have inside the whole, and scores the whole with the
parts put in.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.cost_models.core import InputError
from secateur.envs.inputs import Arguments, Inputs, Signature, call_model, tensors_of_inputs
from secateur.envs.metric import Metric
from secateur.envs.tasks.core import Batch, Metrics, Model, Stop, Task, relative_error


class Parts(nn.Module):
    """Some submodules of a model under their own names, each called with its own tensors.

    Args:
        whole: the model.
        signatures: {path of a submodule: how it is called}.
    """

    def __init__(self, whole: nn.Module, signatures: Mapping[str, Signature]):
        super().__init__()
        self.signatures = dict(signatures)
        for path in signatures:
            *parents, name = path.split(".")
            home: nn.Module = self
            for parent in parents:
                if parent not in home._modules:
                    home.add_module(parent, nn.Module())
                home = home.get_submodule(parent)
            home.add_module(name, whole.get_submodule(path))

    def forward(self, *tensors: Tensor) -> dict[str, Any]:
        """Return {path: outputs}.

        Args:
            tensors: of all parts, one part after the other.
        """
        outputs, start = {}, 0
        for path, signature in self.signatures.items():
            args, kwargs = signature.arguments(tensors[start : start + signature.count])
            outputs[path] = self.get_submodule(path)(*args, **kwargs)
            start += signature.count
        return outputs


class _OnePart(nn.Module):
    """One part of a module that runs all of them together, such as an exported file; the others get zeros."""

    def __init__(self, run: Model, signatures: Mapping[str, Signature], path: str, example: Inputs):
        super().__init__()
        self.run, self.signatures, self.path, self.example = run, signatures, path, example

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        tensors, start = [], 0
        for path, signature in self.signatures.items():
            shapes = tensors_of_inputs(self.example)[start : start + signature.count]
            tensors += own if path == self.path else [x.new_zeros(len(own[0]), *x.shape[1:]) for x in shapes]
            start += signature.count
        return self.run(*tensors)[self.path]


@dataclass(frozen=True, eq=False)
class PartTask:
    """The task of a whole model, for its `Parts`; a `secateur.envs.tasks.core.Task`.

    Attributes:
        task: of the whole.
        whole: the dense model, with the dense parts in it.
        parts: the dense parts.
    """

    task: Task
    whole: nn.Module
    parts: Parts

    @property
    def metric(self) -> Metric:
        """That of the whole's task."""
        return self.task.metric

    @property
    def source(self) -> str:
        """One sentence about the data."""
        return self.task.source

    def samples(self, split: str) -> int:
        """Return the number of samples of a split."""
        return self.task.samples(split)

    def batches(self, split: str, size: int | None = None) -> Iterator[Batch]:
        """Return what the parts get inside the dense whole, batch by batch; there are no targets."""
        for inputs, _ in self.task.batches(split, size):
            yield Batch(capture(self.whole, self.parts.signatures, inputs)[1])

    def evaluate(self, model: Model, split: str, stop: Stop | None = None) -> Metrics:
        """Return the scores of the whole with these parts in it."""
        with self.inserted(model) as whole:
            return self.task.evaluate(whole, split, stop)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Raise InputError: the loss of the whole cannot be computed from the inputs of its parts.

        Raises:
            InputError: always.
        """
        raise InputError("A training loss is not available for parts of a model. Choose an importance that needs none.")

    def check(self, outputs: Any) -> None:
        """Accept all outputs: those of the whole were checked."""

    def parts_of(self, model: nn.Module) -> tuple[str, ...]:
        """Return (): parts have no parts of their own."""
        return ()

    def agreement(self, reference: Any, outputs: Any) -> None:
        """Return None: nothing is known of the outputs' meaning."""

    def divergence(self, reference: Any, outputs: Any) -> Tensor:
        """Return the relative squared error of the parts' outputs, (samples,)."""
        return relative_error(reference, outputs)

    @contextmanager
    def inserted(self, model: Model) -> Iterator[nn.Module]:
        """Give the whole with other parts in it, for a while.

        Args:
            model: other `Parts`, or whatever runs like them.
        """
        signatures = self.parts.signatures
        if isinstance(model, Parts):
            replacements: dict[str, nn.Module] = {path: model.get_submodule(path) for path in signatures}
        else:
            example = next(iter(self.batches("test"))).inputs
            replacements = {path: _OnePart(model, signatures, path, example) for path in signatures}
        try:
            for path, part in replacements.items():
                self.whole.set_submodule(path, part)
            yield self.whole
        finally:
            for path in signatures:
                self.whole.set_submodule(path, self.parts.get_submodule(path))


def take_parts(task: Task, whole: nn.Module, paths: Sequence[str]) -> tuple[PartTask, Parts]:
    """Return the parts of a model as a model, and the task for it.

    Args:
        task: of the whole.
        whole: the model, in eval mode; its submodules are shared, not copied.
        paths: of the submodules.
    Raises:
        InputError: if there is no such submodule, one is inside another, or the whole does not call it once per batch.
    """
    known = dict(whole.named_modules())
    for path in paths:
        if path not in known or not path:
            names = ", ".join(name for name, _ in whole.named_children())
            raise InputError(f"`model.part: {path}` is no submodule of {type(whole).__name__}. It has {names}.")
        if others := [other for other in paths if other != path and f"{path}.".startswith(f"{other}.")]:
            raise InputError(f"`model.part`: {path} is inside {others[0]}. Name one of them.")
    first = next(iter(task.batches("validation"))).inputs
    signatures, _ = capture(whole, paths, first)
    parts = Parts(whole, signatures).eval()
    return PartTask(task, whole, parts), parts


@torch.no_grad()
def capture(whole: nn.Module, paths: Sequence[str] | Mapping[str, Any], inputs: Inputs) -> tuple[dict[str, Signature], Inputs]:
    """Return how the parts are called inside the whole, and their tensors one after the other.

    Raises:
        InputError: if a part is not called exactly once, or its tensors do not have the samples as their first axis.
    """
    calls: dict[str, list[tuple[Any, Any]]] = {path: [] for path in paths}

    def hook(path: str) -> Any:
        return lambda module, args, kwargs: calls[path].append((args, kwargs))

    hooks = [whole.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True) for path in paths]
    try:
        call_model(whole, inputs)
    finally:
        for handle in hooks:
            handle.remove()
    tensors: list[Tensor] = []
    signatures = {}
    for path, found in calls.items():
        if len(found) != 1:
            times = "never calls it" if not found else f"calls it {len(found)} times"
            raise InputError(f"`model.part: {path}`: the model {times} for one batch; a part must be called once.")
        signatures[path] = Signature.of(*found[0])
        tensors += [leaf for leaf in pytree.tree_leaves(found[0]) if isinstance(leaf, Tensor)]
    lengths = {len(x) if x.dim() else 0 for x in tensors}
    if len(lengths) != 1:
        shown = ", ".join(map(str, sorted(lengths)))
        raise InputError(
            f"`model.part: {', '.join(paths)}`: the first axes of its inputs differ ({shown}); they must be the "
            "samples of the batch."
        )
    clones = tuple(x.detach().clone() for x in tensors)
    return signatures, clones[0] if len(clones) == 1 else Arguments(clones)


def parts_of(task: Task, whole: nn.Module) -> nn.Module:
    """Return the parts of another model of the same kind; the model itself, if the task is not about parts."""
    return Parts(whole, task.parts.signatures).eval() if isinstance(task, PartTask) else whole


def part_names(task: Task) -> list[str]:
    """Return the paths of the parts; none, if the task is about a whole model."""
    return list(task.parts.signatures) if isinstance(task, PartTask) else []


def whole_with(task: Task, network: nn.Module) -> nn.Module:
    """Return a copy of the whole model with these parts in it; a model that is no `Parts` is the whole itself."""
    if not isinstance(task, PartTask):
        return network
    with task.inserted(network) as whole:
        return copy.deepcopy(whole)
