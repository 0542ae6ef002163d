"""Batches of inputs: one tensor, or several as the arguments of a model, with the same methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Signature:
    """How a module is called with tensors: as arguments by position or keyword, inside of dicts and lists, beside constants.

    Attributes:
        structure: of its arguments, (args, kwargs).
        constants: leaves of the arguments that are no tensors; None where a tensor goes.
        tensors: which leaves are tensors.
    """

    structure: pytree.TreeSpec
    constants: tuple[Any, ...]
    tensors: tuple[bool, ...]

    @classmethod
    def of(cls, args: Any, kwargs: Any) -> Signature:
        """Return the signature of a call."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        constants = tuple(None if is_tensor else leaf for leaf, is_tensor in zip(leaves, tensors, strict=True))
        return cls(structure, constants, tensors)

    def arguments(self, given: Sequence[Any]) -> tuple[Any, Any]:
        """Return args and kwargs with these tensors."""
        found = iter(given)
        pairs = zip(self.constants, self.tensors, strict=True)
        args, kwargs = pytree.tree_unflatten([next(found) if is_tensor else leaf for leaf, is_tensor in pairs], self.structure)
        return args, kwargs

    @property
    def count(self) -> int:
        """The number of tensors."""
        return sum(self.tensors)

    @property
    def plain(self) -> bool:
        """Whether the arguments are tensors by position, and nothing else."""
        return self == Signature.of(tuple(torch.zeros(0) for _ in range(self.count)), {})

    def document(self) -> dict[str, Any]:
        """Return the signature as JSON values."""
        structure = pytree.treespec_dumps(self.structure)
        return {"structure": structure, "constants": list(self.constants), "tensors": list(self.tensors)}

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Signature:
        """Return the signature that `document` wrote."""
        structure = pytree.treespec_loads(document["structure"])
        return cls(structure, tuple(document["constants"]), tuple(document["tensors"]))


def bound_arguments(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a call's args and kwargs in one form: by position as far as the parameters are given without a gap.

    Args:
        model: a module, or what runs like one.
        args, kwargs: of the call.
    Raises:
        TypeError: if the forward does not take them.
    """
    bound = inspect.signature(getattr(model, "forward", model)).bind(*args, **kwargs)
    return bound.args, bound.kwargs


@dataclass(frozen=True, eq=False)
class Arguments:
    """Several tensors that go into a model together; the first axis of each is the samples.

    It is cut like a tensor: `len`, slices and `split` concern the samples.

    Attributes:
        tensors: positional arguments, or what `signature` makes arguments of.
        signature: how the model is called; None: with the tensors by position.
    """

    tensors: tuple[Tensor, ...]
    signature: Signature | None = None

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, samples: Any) -> Arguments:
        return self.map(lambda x: x[samples])

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def split(self, size: int) -> tuple[Arguments, ...]:
        """Return consecutive batches of at most `size` samples."""
        return tuple(self[start : start + size] for start in range(0, len(self), size))

    def map(self, function: Callable[[Tensor], Tensor]) -> Arguments:
        """Return `function` of every tensor."""
        return replace(self, tensors=tuple(map(function, self.tensors)))

    def call(self, model: Callable[..., Any]) -> Any:
        """Return the model's outputs."""
        if self.signature is None:
            return model(*self.tensors)
        args, kwargs = self.signature.arguments(self.tensors)
        return model(*args, **kwargs)


class ImageList(Arguments):
    """One tensor of images that goes into a model as a list of single images, as detectors take them."""

    def call(self, model: Callable[..., Any]) -> Any:
        """Return the model's outputs."""
        return model(list(self.tensors[0]))


Inputs = Tensor | Arguments
"""A batch of inputs."""


def call_model(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Return the model's outputs for a batch of inputs."""
    return inputs.call(model) if isinstance(inputs, Arguments) else model(inputs)


def map_inputs(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Return the batch with `function` of every tensor."""
    return inputs.map(function) if isinstance(inputs, Arguments) else function(inputs)


def tensors_of_inputs(inputs: Inputs) -> list[Tensor]:
    """Return the tensors of a batch, in the order of the arguments."""
    return list(inputs) if isinstance(inputs, Arguments) else [inputs]


def concatenate(batches: Sequence[Inputs]) -> Inputs:
    """Return one batch of all samples; all tensors of an argument must have the same shape but for the first axis."""
    columns = zip(*map(tensors_of_inputs, batches), strict=True)
    tensors = tuple(torch.cat(column) for column in columns)
    return replace(batches[0], tensors=tensors) if isinstance(batches[0], Arguments) else tensors[0]


def samples_like(inputs: Inputs, count: int) -> tuple[Tensor, ...]:
    """Return `count` samples of zeros with the shapes and types of a batch, as positional arguments."""
    return tuple(x.new_zeros(count, *x.shape[1:]) for x in tensors_of_inputs(inputs))


def describe_inputs(inputs: Inputs) -> list[dict[str, Any]]:
    """Return shape without the first axis, and type, of every tensor, as JSON values."""
    return [{"shape": list(x.shape[1:]), "dtype": str(x.dtype).removeprefix("torch.")} for x in tensors_of_inputs(inputs)]


def inputs_of(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the description of the inputs in the entry `model` of policy.json; version 0.1 wrote the shape of one image."""
    return model.get("inputs", [{"shape": model["input"], "dtype": "float32"}])


def described_inputs(model: Mapping[str, Any]) -> Inputs:
    """Return one sample of zeros as the entry `model` of policy.json describes it."""
    entries = inputs_of(model)
    tensors = tuple(torch.zeros(1, *entry["shape"], dtype=getattr(torch, entry["dtype"])) for entry in entries)
    if model.get("call"):
        return Arguments(tensors, Signature.read(model["call"]))
    return tensors[0] if len(tensors) == 1 else Arguments(tensors)


def signature_of(inputs: Inputs) -> Signature | None:
    """Return how a model is called with these inputs; None: with their tensors by position."""
    return inputs.signature if isinstance(inputs, Arguments) else None


def leaves_like(given: Any, like: Any) -> list[Any]:
    """Return the tensors of a tree at the places where another tree has them; of dicts only the other's keys count."""
    if isinstance(like, Mapping):
        if not isinstance(given, Mapping) or not set(like) <= set(given):
            return [given]
        return [leaf for name, value in like.items() for leaf in leaves_like(given[name], value)]
    if isinstance(like, tuple | list):
        if not isinstance(given, tuple | list) or len(given) != len(like):
            return list(given) if isinstance(given, tuple | list) else [given]
        return [leaf for value, other in zip(given, like, strict=True) for leaf in leaves_like(value, other)]
    return [given] if isinstance(like, Tensor) else []


def arguments_of(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return args and kwargs of the call with these inputs."""
    signature = signature_of(inputs)
    return (tuple(tensors_of_inputs(inputs)), {}) if signature is None else signature.arguments(tensors_of_inputs(inputs))


class Positional(nn.Module):
    """A module that takes the tensors of its inputs by position, as exporters need it.

    It has the parameters, buffers and submodules of the module itself, under the same names.

    Args:
        model: the module; shared, not copied.
        signature: how it is called.
    """

    def __init__(self, model: nn.Module, signature: Signature):
        super().__init__()
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self.training = model.training
        self.called = (model, signature)  # in a tuple, so that the model is no submodule

    def forward(self, *tensors: Tensor) -> Any:
        """Return the module's outputs."""
        model, signature = self.called
        args, kwargs = signature.arguments(tensors)
        return model.forward(*args, **kwargs)  # not __call__: exporters know the modules below the root only


def positional(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Return the module as one that takes the tensors of these inputs by position; the module itself if it does."""
    signature = signature_of(inputs)
    return model if signature is None else Positional(model, signature)
