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
from secateur.envs.devices import move_network
from secateur.envs.inputs import Arguments, Inputs, Signature, call_model, tensors_of_inputs
from secateur.envs.metric import Metric
from secateur.envs.tasks.core import Batch, Metrics, Model, Stop, Task, all_samples, relative_error, tensors_of
from secateur.envs.tasks.functions import FunctionTask


class Parts(nn.Module):
    """Some submodules of a model under their own names, each called with its own tensors, as often as the whole calls it.

    Args:
        whole: the model.
        signatures: {path of a submodule: how it is called, one signature for each call in a batch}.
    """

    def __init__(self, whole: nn.Module, signatures: Mapping[str, tuple[Signature, ...]]):
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
        """Return {path: outputs}; a list of outputs for a part that is called several times.

        Args:
            tensors: of all parts, one part after the other, and of each part one call after the other.
        """
        outputs: dict[str, Any] = {}
        start = 0
        for path, signatures in self.signatures.items():
            found = []
            for signature in signatures:
                args, kwargs = signature.arguments(tensors[start : start + signature.count])
                found.append(self.get_submodule(path)(*args, **kwargs))
                start += signature.count
            outputs[path] = found if len(found) > 1 else found[0]
        return outputs


class _OnePart(nn.Module):
    """One part of a module that runs all of them together, such as an exported file; the others get zeros."""

    def __init__(self, run: Model, signatures: Mapping[str, tuple[Signature, ...]], path: str, example: Inputs):
        super().__init__()
        self.run, self.path, self.calls = run, path, len(signatures[path])
        self.places = _places(signatures, tensors_of_inputs(example))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        number = self._call_like(own)
        tensors: list[Tensor] = []
        for (path, index), examples in self.places.items():
            here = (path, index) == (self.path, number)
            tensors += own if here else [x.new_zeros(len(own[0]), *x.shape[1:]) for x in examples]
        found = self.run(*tensors)[self.path]
        return found[number] if self.calls > 1 else found

    def _call_like(self, own: Sequence[Tensor]) -> int:
        """Return the number of the call whose tensors have these shapes; 0 if none has: sizes may be free."""
        shapes = [x.shape[1:] for x in own]
        calls = range(self.calls)
        return next((n for n in calls if [x.shape[1:] for x in self.places[self.path, n]] == shapes), 0)


def _places(
    signatures: Mapping[str, tuple[Signature, ...]], tensors: Sequence[Tensor]
) -> dict[tuple[str, int], Sequence[Tensor]]:
    """Return {(path, number of the call): its tensors}, in the order of all tensors."""
    found, start = {}, 0
    for path, calls in signatures.items():
        for number, signature in enumerate(calls):
            found[path, number] = tensors[start : start + signature.count]
            start += signature.count
    return found


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
        """Return what the parts get inside the dense whole, batch by batch; targets are the numbers of the whole's samples."""
        start = 0
        for inputs, _ in self.task.batches(split, size):
            found = capture(self.whole, self.parts.signatures, inputs)[1]
            one_each = len(found) == len(inputs)  # a head for regions gets several samples of each image
            numbers = torch.arange(start, start + len(inputs)) if one_each else torch.full((len(found),), -1)
            yield Batch(found, numbers.to(tensors_of_inputs(found)[0].device))
            start += len(inputs)

    def evaluate(self, model: Model, split: str, stop: Stop | None = None) -> Metrics:
        """Return the scores of the whole with these parts in it."""
        with self.inserted(model) as whole:
            return self.task.evaluate(whole, split, stop)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Return the loss of the whole with these parts in it, a scalar with gradients for the parts only.

        Without one, `sampled_loss` of the parts' outputs takes its place.

        Args:
            model: other `Parts`.
            batch: calibration samples, from `batches`.
        """
        assert isinstance(model, Parts), "files have no gradients"
        if isinstance(self.task, FunctionTask) and self.task.training_loss is None:
            return sampled_loss(call_model(model, batch.inputs), int(batch.targets[0]))
        inputs, targets = all_samples(self.task, "calibration")
        if targets is None or int(batch.targets.min()) < 0:
            raise InputError(
                "The training loss of the whole needs targets, one tensor per batch, and parts whose samples are those of the "
                "whole. Choose an importance that needs no loss, such as `second_order`."
            )
        own = {id(parameter) for parameter in model.parameters()}
        with self.inserted(model) as whole:
            others = [p for p in whole.parameters() if p.requires_grad and id(p) not in own]
            try:
                for parameter in others:
                    parameter.requires_grad_(False)
                return self.task.loss(whole, Batch(inputs[batch.targets], targets[batch.targets]))
            finally:
                for parameter in others:
                    parameter.requires_grad_(True)

    def on(self, device: torch.device) -> PartTask:
        """Return the task with the whole model on a device; see `Task.on`."""
        whole = move_network(self.whole, device)
        return PartTask(self.task.on(device), whole, Parts(whole, self.parts.signatures).eval())

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
        InputError: if there is no such submodule, one is inside another, or the whole never calls it.
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


def sampled_loss(outputs: Any, seed: int) -> Tensor:
    """Return a loss for outputs without targets: its squared gradient estimates how much the relative squared error would grow.

    The error itself has no gradient at the dense model, where it is zero. To second order in a change d of the weights it is the
    mean of (J d)^2 / variance over the outputs, with their Jacobian J; for standard normal numbers e, the expectation of
    (sum of e J d / deviation)^2 is the sum of these squares. This is the Fisher information of a normal distribution around the
    outputs, with one sample per batch.

    Args:
        outputs: a tree of tensors (samples, ...).
        seed: of the normal numbers.
    """
    generator, tensors = torch.Generator().manual_seed(seed), tensors_of(outputs)
    terms = []
    for y in tensors:
        noise = torch.randn(y.shape, generator=generator).to(y.device)
        deviation = y.detach().var(correction=0).clamp_min(1e-12).sqrt()
        terms.append((noise * y).sum() / (deviation * (y.numel() * len(tensors)) ** 0.5))
    return torch.stack(terms).sum()


@torch.no_grad()
def capture(
    whole: nn.Module, paths: Sequence[str] | Mapping[str, tuple[Signature, ...]], inputs: Inputs
) -> tuple[dict[str, tuple[Signature, ...]], Inputs]:
    """Return how the parts are called inside the whole, and their tensors one after the other.

    Args:
        whole: the model.
        paths: of the parts; with the signatures of another batch, the calls must be as many.
        inputs: a batch of the whole.
    Raises:
        InputError: if a part is not called, or as often as in the other batch, or if its tensors do not have the same first axis.
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
        if not found:
            raise InputError(f"`model.part: {path}`: the model never calls it. Name a part that its forward pass uses.")
        if isinstance(paths, Mapping) and len(found) != len(paths[path]):
            raise InputError(
                f"`model.part: {path}`: the model calls it {len(paths[path])} times for one batch and {len(found)} times for "
                "another; the number of calls must not depend on the data."
            )
        signatures[path] = tuple(Signature.of(*call) for call in found)
        tensors += [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
    lengths = {len(x) if x.dim() else 0 for x in tensors}
    if len(lengths) != 1:
        shown = ", ".join(map(str, sorted(lengths)))
        raise InputError(
            f"`model.part: {', '.join(paths)}`: the first axes of the inputs differ ({shown}); they must be the samples of the "
            "batch. A part with another first axis, such as a head for regions, can be named alone."
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
