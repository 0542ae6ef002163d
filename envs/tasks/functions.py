"""A task from Python functions and a loader: the user's own metric, or none."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.cost_models.core import InputError
from secateur.envs.devices import CPU, called_from_anywhere, move, move_tree
from secateur.envs.inputs import (
    Arguments,
    Inputs,
    Signature,
    arguments_of,
    bound_arguments,
    call_model,
    concatenate,
    leaves_like,
    map_inputs,
    signature_of,
    tensors_of_inputs,
)
from secateur.envs.memory import run_model
from secateur.envs.metric import DIVERGENCE, Metric
from secateur.envs.tasks.core import Batch, Metrics, Model, Stop, kl_divergence, relative_error, tensors_of

Evaluate = Callable[[Any], float]
"""Scores a model: takes a module in eval mode and returns one number."""

Loss = Callable[[nn.Module, Batch], Tensor]
"""Training loss of a model on a batch."""


def output_divergence(reference: Any, outputs: Any) -> Tensor:
    """Return how far outputs are from the dense model's, (samples,).

    KL divergence in nats for one tensor of class scores (samples, classes), else the relative squared error of all tensors.
    """
    tensors = tensors_of(reference)
    if len(tensors) == 1 and tensors[0].dim() == 2 and tensors[0].shape[1] > 1:
        return kl_divergence(tensors[0], tensors_of(outputs)[0])
    return relative_error(reference, outputs)


@dataclass(frozen=True)
class FunctionTask:
    """A task that scores models with functions; a `secateur.envs.tasks.core.Task`.

    Attributes:
        metric: what the functions return.
        given: batches of the calibration loader; targets are None if the loader has none.
        evaluate_validation: scores models in the search.
        evaluate_test: scores finalists; None: `evaluate_validation` does.
        training_loss: loss of a model on a batch (inputs, targets); None: there is none.
        compare: divergence of two outputs, per sample.
        device: where the models are. The functions need not know it: inputs that they pass are moved there, outputs back.
    """

    metric: Metric
    given: tuple[Batch, ...]
    evaluate_validation: Evaluate
    evaluate_test: Evaluate | None = None
    training_loss: Loss | None = None
    compare: Callable[[Any, Any], Tensor] = output_divergence
    device: torch.device = CPU

    def with_dense(self, model: nn.Module) -> FunctionTask:
        """Return the task for a dense model with other weights: scores by divergence compare with its outputs."""
        own = {"evaluate_validation": self.evaluate_validation, "evaluate_test": self.evaluate_test}
        renewed: dict[str, Any] = {name: one.of_model(model) for name, one in own.items() if isinstance(one, DenseOutputs)}
        return replace(self, **renewed)

    @property
    def source(self) -> str:
        """One sentence about the data."""
        samples = f"Python objects: {self.samples('calibration')} calibration samples"
        if self.evaluate_test is None:
            return f"{samples}; `evaluate` gives the validation scores and the test scores, because there is no function `test`."
        return f"{samples}; `evaluate` gives the validation scores, `test` the test scores."

    def samples(self, split: str) -> int:
        """Return the number of calibration samples; of the other splits only the functions know it: 0."""
        return sum(len(batch.inputs) for batch in self.given) if split == "calibration" else 0

    def batches(self, split: str, size: int | None = None) -> Iterator[Batch]:
        """Return the calibration batches for every split: the functions keep their data to themselves."""
        return iter(self.given)

    def evaluate(self, model: Model, split: str, stop: Stop | None = None) -> Metrics:
        """Return the score that the split's function gives.

        Raises:
            InputError: if the function fails, or returns anything but a finite number.
        """
        name, function = "evaluate", self.evaluate_validation
        if split == "test" and self.evaluate_test is not None:
            name, function = "test", self.evaluate_test
        try:
            with torch.no_grad(), called_from_anywhere(model, self.device):
                score = function(model)
        except (Exception, SystemExit) as error:  # the user's function runs arbitrary code
            kind = type(model).__name__
            raise InputError(f"`{name}` failed for a {kind}: {type(error).__name__}: {error}") from error
        return Metrics(_number(score, name), 0)

    def loss(self, model: Model, batch: Batch) -> Tensor:
        """Return the training loss of a batch.

        Raises:
            InputError: if there is none, the function fails, or returns anything but one number with gradients.
        """
        if self.training_loss is None:
            raise InputError("A training loss is needed: pass `loss`, a function of the model and a batch (inputs, targets).")
        try:
            loss = self.training_loss(model, batch)  # type: ignore[arg-type]
        except (Exception, SystemExit) as error:  # the user's function runs arbitrary code
            raise InputError(f"`loss` failed for a {type(model).__name__}: {type(error).__name__}: {error}") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise InputError(f"`loss` must return one number with gradients, but returned {_shown(loss)}.")
        return loss.sum()

    def on(self, device: torch.device) -> FunctionTask:
        """Return the task for models on a device; see `Task.on`."""
        given = tuple(
            Batch(map_inputs(lambda x: move(x, device), inputs), move_tree(targets, device)) for inputs, targets in self.given
        )
        return replace(self, given=given, device=device)

    def divergence(self, reference: Any, outputs: Any) -> Tensor:
        """Return how far outputs are from a reference model's, (samples,)."""
        return self.compare(reference, outputs)

    def parts_of(self, model: nn.Module) -> tuple[str, ...]:
        """Return (): the whole model is compressed, unless `part` names submodules."""
        return ()

    def agreement(self, reference: Any, outputs: Any) -> None:
        """Return None: nothing is known of the outputs' meaning."""

    def check(self, outputs: Any) -> None:
        """Raise InputError unless the outputs hold a tensor."""
        if not tensors_of(outputs):
            raise InputError(
                f"The model must return tensors, or a tuple, list or dict of them, but returns {type(outputs).__name__}."
            )


def _number(score: Any, name: str) -> float:
    """Return the score as a float."""
    try:
        if isinstance(score, str | bytes):
            raise TypeError("text is no score, even if it holds digits")
        value = float(score)
    except (TypeError, ValueError):
        raise InputError(f"`{name}` must return one number, but returned {_shown(score)}.") from None
    if not math.isfinite(value):
        raise InputError(f"`{name}` returned {value}, which is no score. Check the model and the data of `{name}`.")
    return value


def _shown(value: Any) -> str:
    """Return a value in a few words."""
    if not isinstance(value, Tensor) or (value.numel() == 1 and not value.requires_grad):
        return f"{type(value).__name__} {value!r:.60}"
    return f"a tensor of shape {tuple(value.shape)}"


@dataclass(frozen=True)
class DenseOutputs:
    """Scores a model by the mean divergence of its outputs from the dense model's; picklable.

    Attributes:
        batches: inputs, each with the dense model's outputs.
        compare: divergence of two outputs, per sample.
    """

    batches: tuple[tuple[Inputs, Any], ...]
    compare: Callable[[Any, Any], Tensor]

    @classmethod
    def of(cls, model: Model, batches: Iterable[Inputs], compare: Callable[[Any, Any], Tensor]) -> DenseOutputs:
        """Return the score that compares with the outputs of `model`."""
        with torch.no_grad():
            return cls(tuple((batch, call_model(model, batch)) for batch in batches), compare)

    def of_model(self, model: Model) -> DenseOutputs:
        """Return the same score against another model's outputs."""
        return self.of(model, (inputs for inputs, _ in self.batches), self.compare)

    def __call__(self, model: Model) -> float:
        """Return the mean divergence."""
        found = [self.compare(outputs, run_model(model, inputs)) for inputs, outputs in self.batches]
        return float(torch.cat(found).double().mean())


# ------------------------------------------------------------------------------------------------------ from user's objects


def example_inputs(model: nn.Module, inputs: Any) -> Inputs:
    """Return the example inputs as a batch of one sample.

    Args:
        model: they are for.
        inputs: a tensor, a tuple of positional arguments, or a dict of arguments by name. An argument is a tensor, a dict or list
            of tensors, or a constant; the first axis of each tensor is the batch.
    Raises:
        InputError: if they are something else.
    """
    leaves = pytree.tree_leaves(inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor | int | float | str | None)]
    if not tensors or others:
        problem = f", but hold {type(others[0]).__name__}" if others else ""
        raise InputError(
            "`inputs` must be a tensor, a tuple of tensors, or a dict of tensors by name of the parameter; arguments may also be "
            f"dicts and lists of tensors, numbers and texts{problem}."
        )
    if any(x.dim() < 2 or not len(x) for x in tensors):
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise InputError(
            f"The first axis of every input must be the batch, with at least one sample, but the shapes are {shapes}."
        )
    args, kwargs = _call_of(model, inputs)
    signature = Signature.of(args, kwargs)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]  # in the order of the call
    if not signature.plain:
        return Arguments(tuple(tensors), signature)[:1]
    batch: Inputs = tensors[0] if len(tensors) == 1 else Arguments(tuple(tensors))
    return batch[:1]


def _call_of(model: nn.Module, inputs: Any) -> tuple[Any, Any]:
    """Return args and kwargs of the call that example inputs describe."""
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    if not isinstance(args, tuple | list):
        args = (args,)
    try:
        return bound_arguments(model, tuple(args), kwargs)
    except TypeError as error:
        raise InputError(
            f"`inputs` does not suit {type(model).__name__}.forward{inspect.signature(model.forward)}: {error}. Pass a dict of "
            "arguments by name, or a tuple of positional arguments; for a forward that takes a dict, a tuple that holds the dict."
        ) from None


def read_loader(loader: Iterable[Any], example: Inputs, samples: int, names: Sequence[str] = ()) -> tuple[Batch, ...]:
    """Return the first batches of a loader, `samples` samples at most; an endless loader is read no further.

    Args:
        loader: yields inputs, or tuples or lists that begin with the inputs, the rest being targets. A dict may hold inputs
            by name, together with targets.
        example: one sample of the inputs, with the right shapes.
        samples: number of samples.
        names: of the model's parameters.
    Raises:
        InputError: if the loader is empty, or yields something else.
    """
    batches: list[Batch] = []
    left = samples
    try:
        iterator = iter(loader)
    except TypeError:
        raise InputError(f"`calibration` must be a loader or a list of batches, but is {type(loader).__name__}.") from None
    for item in _items(iterator):
        batch = _batch_of(item, example, names)
        batches.append(Batch(batch.inputs[:left], batch.targets if len(batch.inputs) <= left else _first(batch.targets, left)))
        left -= len(batches[-1].inputs)
        if left <= 0:
            break
    if not batches:
        raise InputError("`calibration` yields no batch. If it is a generator that was read before, pass a list.")
    return tuple(batches)


def _items(iterator: Iterator[Any]) -> Iterator[Any]:
    """Yield the items of the user's loader.

    Raises:
        InputError: if the loader fails.
    """
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except (Exception, SystemExit) as error:  # the user's data set runs arbitrary code
            raise InputError(f"`calibration` failed: {type(error).__name__}: {error}") from error
        yield item


def _batch_of(item: Any, example: Inputs, names: Sequence[str]) -> Batch:
    """Return an item of a loader as a batch: the first way to read it that gives tensors like the example's."""
    wanted, signature = tensors_of_inputs(example), signature_of(example)
    readings = list(_readings(item, example, names))
    for tensors, targets in readings:
        if _alike(tensors, wanted):
            given = tuple(x.detach().to(like.dtype) for x, like in zip(tensors, wanted, strict=True))
            inputs: Inputs = Arguments(given, signature) if isinstance(example, Arguments) else given[0]
            return Batch(inputs, targets)
    found = readings[0][0]
    shown = ", ".join(f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__ for x in found) or "nothing"
    needed = ", ".join(f"(N, {', '.join(map(str, x.shape[1:]))}) {x.dtype}" for x in wanted)
    raise InputError(f"`calibration` must yield inputs like the example, {needed}, but yields {shown}.")


def _readings(item: Any, example: Inputs, names: Sequence[str]) -> Iterator[tuple[list[Any], Any]]:
    """Yield (inputs, targets) of the ways to read an item of a loader."""
    args, kwargs = arguments_of(example)
    likes = tuple(one for one in (*args, *kwargs.values()) if _has_tensors(one))  # constants are not in the loader
    by_name = {name: one for name, one in (*zip(names, args, strict=False), *kwargs.items()) if _has_tensors(one)}
    parts = tuple(item) if isinstance(item, tuple | list) else (item,)
    yield leaves_like(parts[: len(likes)], likes), _one(parts[len(likes) :])
    if parts:
        yield leaves_like(parts[0], likes), _one(parts[1:])  # ((x1, x2), y)
    if parts and isinstance(parts[0], Mapping):
        for like in (by_name, *[one for one in likes if isinstance(one, Mapping)]):
            left = {name: value for name, value in parts[0].items() if name not in like}
            yield leaves_like(parts[0], like), _one(parts[1:]) if parts[1:] else (left or None)
        yield list(parts[0].values())[: len(likes)], _one(tuple(parts[0].values())[len(likes) :])


def _has_tensors(tree: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(tree))


def _one(rest: tuple[Any, ...]) -> Any:
    return rest[0] if len(rest) == 1 else (rest or None)


def _alike(tensors: Sequence[Any], wanted: Sequence[Tensor]) -> bool:
    """Return whether these are tensors with the shapes of the wanted ones but for the first axis."""
    return len(tensors) == len(wanted) and all(
        isinstance(x, Tensor) and x.shape[1:] == like.shape[1:] and x.is_floating_point() == like.is_floating_point() and len(x)
        for x, like in zip(tensors, wanted, strict=True)
    )


def _first(targets: Any, count: int) -> Any:
    return targets[:count] if isinstance(targets, Tensor) else None


def check_divergence(compare: Callable[[Any, Any], Tensor], outputs: Any) -> None:
    """Check the user's divergence on the dense model's outputs for one sample.

    Raises:
        InputError: if it fails, or does not return one finite number per sample.
    """
    try:
        found = compare(outputs, outputs)
    except (Exception, SystemExit) as error:  # the user's function runs arbitrary code
        raise InputError(f"`divergence` failed on the dense model's outputs: {type(error).__name__}: {error}") from error
    if not isinstance(found, Tensor) or found.shape != (1,) or not found.isfinite().all():
        raise InputError(f"`divergence` must return one finite number per sample, shape (1,) here, but returned {_shown(found)}.")


def divergence_task(
    model: nn.Module, given: Sequence[Batch], compare: Callable[[Any, Any], Tensor], loss: Loss | None = None
) -> FunctionTask:
    """Return the task of staying close to the dense model; half of the samples are calibration, a quarter validation and test.

    Raises:
        InputError: if there are fewer than four samples.
    """
    inputs = concatenate([batch.inputs for batch in given])
    count, size = len(inputs), max(len(batch.inputs) for batch in given)
    if count < 4:
        raise InputError(f"Without `evaluate`, `calibration` must hold at least 4 samples, but it holds {count}.")
    half, quarter = count // 2, count // 4

    parts = inputs[:half].split(size)
    targets: Sequence[Any] = [None] * len(parts)
    if all(isinstance(batch.targets, Tensor) and len(batch.targets) == len(batch.inputs) for batch in given):
        targets = torch.cat([batch.targets for batch in given])[:half].split(size)
    calibration = tuple(map(Batch, parts, targets))
    validation, test = (
        DenseOutputs.of(model, part.split(size), compare) for part in (inputs[half : half + quarter], inputs[half + quarter :])
    )
    return FunctionTask(DIVERGENCE, calibration, validation, test, loss, compare)


def check_functions(task: FunctionTask, model: nn.Module) -> None:
    """Check the functions on the dense model, before the search.

    Raises:
        InputError: if a function fails, returns no number, changes the model, or scores noise better than the model.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = {}
    for split, name in (("validation", "evaluate"), ("test", "test")):
        scores[split] = task.evaluate(model, split).score
        model.eval()
        after = model.state_dict()
        changed = [key for key, tensor in before.items() if not torch.equal(after[key], tensor)]
        if changed:
            raise InputError(
                f"`{name}` changes the model: `{changed[0]}` differs after the call. It must leave the model as it is."
            )
    noise = noise_score(task, model)
    dense = scores["validation"]
    if noise is not None and task.metric.drop(noise, dense) < 0:
        better = "higher" if task.metric.higher_is_better else "lower"
        raise InputError(
            f"A model with random weights scores {task.metric.text(noise)} {task.metric.label}, the given one "
            f"{task.metric.text(dense)}, but the metric says that {better} is better. Check `higher_is_better` of `metric`, and "
            "the weights of the model."
        )


def noise_score(task: FunctionTask, model: nn.Module) -> float | None:
    """Return the score of the model with its weights in random order; None if it cannot be scored."""
    noisy, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for parameter in noisy.parameters():
        flat = parameter.data.flatten()
        parameter.data = flat[torch.randperm(len(flat), generator=generator)].view_as(parameter)
    try:
        return task.evaluate(noisy, "validation").score
    except InputError:  # random outputs may break what the user's function does with them
        return None
