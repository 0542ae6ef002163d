"""Batches of inputs: one tensor, or several as the positional arguments of a model, with the same methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Arguments:
    """Several tensors that go into a model together; the first axis of each is the samples.

    It is cut like a tensor: `len`, slices and `split` concern the samples.

    Attributes:
        tensors: positional arguments.
    """

    tensors: tuple[Tensor, ...]

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
        return model(*self.tensors)


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
    return tensors[0] if len(tensors) == 1 else Arguments(tensors)
