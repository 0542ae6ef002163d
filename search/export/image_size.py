"""The sizes of inputs that exported files take: any number of samples, and images of any size where the network allows it.

Height and width are free if an output has positions, as in segmentation, detection and super-resolution. Networks that return one
vector per image keep the size of their data, and with it the graph that runtimes execute fastest.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from secateur.envs.tasks.core import tensors_of
from secateur.search.profiling.runtimes import open_session

MULTIPLES = (1, 2, 4, 8, 16, 32)
"""Sizes may have to be multiples of a number: where features are halved and doubled again."""

TOLERANCE = 1e-3
"""Largest difference of an output at another size, by the largest value."""

IMAGE = 4
"""Number of axes of a batch of images."""

Sample = tuple[tuple[Tensor, ...], list[Tensor]]
"""Inputs and the network's outputs."""


@dataclass(frozen=True)
class FreeSize:
    """That a network runs on images of other sizes.

    Attributes:
        multiple: of which height and width must be multiples.
        samples: inputs of other sizes, with outputs.
    """

    multiple: int
    samples: list[Sample]


@torch.no_grad()
def free_size(network: nn.Module, example: Sequence[Tensor]) -> FreeSize | None:
    """Return which other sizes the network itself runs at; None: no others, or its outputs have no positions.

    Args:
        network: in eval mode.
        example: its positional arguments.
    """
    one = tuple(x[:1] for x in example)
    images = [x for x in one if x.dim() == IMAGE]
    if not images or all(x.dim() <= 2 for x in tensors_of(network(*one))):
        return None
    smallest = min(min(x.shape[2:]) for x in images)
    for multiple in MULTIPLES:
        if 2 * multiple > smallest or any(size % multiple for x in images for size in x.shape[2:]):
            return None
        changes = (lambda h, w, k=multiple: (h + k, w + k)), (lambda h, w: (2 * h, w)), (lambda h, w: (h, 2 * w))
        with contextlib.suppress(Exception):  # the user's forward may be made for one size
            inputs = [tuple(_resized(x, change) for x in one) for change in changes]
            return FreeSize(multiple, [(tensors, tensors_of(network(*tensors))) for tensors in inputs])
    return None


def _resized(x: Tensor, change: Callable[[int, int], tuple[int, int]]) -> Tensor:
    """Return random values in the shape of an input with another height and width; zeros for integers."""
    shape = (*x.shape[:2], *change(*x.shape[2:])) if x.dim() == IMAGE else x.shape
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) if x.is_floating_point() else x.new_zeros(shape)


def free_batch(network: nn.Module, example: Sequence[Tensor]) -> Any:
    """Return `dynamic_shapes` for torch's exporters: the first axis of every input is free, and the same for all."""
    return _shapes(network, [{} for _ in example])


def free_axes(network: nn.Module, example: Sequence[Tensor], multiple: int) -> Any:
    """Return `dynamic_shapes` with free height and width besides; see `FreeSize`."""
    auto, dim = torch.export.Dim.AUTO, torch.export.Dim
    axes = [
        {2: auto, 3: auto} if multiple == 1 else {2: multiple * dim(f"h{index}"), 3: multiple * dim(f"w{index}")}
        for index in range(len(example))
    ]
    return _shapes(network, [free if x.dim() == IMAGE else {} for x, free in zip(example, axes, strict=True)])


def _shapes(network: nn.Module, choice: list[dict[int, Any]]) -> Any:
    batch = torch.export.Dim("batch")
    axes = tuple({0: batch, **free} for free in choice)
    first = next(iter(inspect.signature(network.forward).parameters.values()))
    return (axes,) if first.kind is first.VAR_POSITIONAL else axes  # forward(*inputs) has one parameter


def agrees(model: onnx.ModelProto, samples: Sequence[Sample]) -> bool:
    """Return whether a file computes at other sizes what the network computes: traced sizes could have become constants."""
    try:
        session = open_session(model.SerializeToString())
        pairs = [
            pair for inputs, outputs in samples for pair in zip(session.run(*(x.numpy() for x in inputs)), outputs, strict=True)
        ]
    except Exception:  # ONNX Runtime's exceptions have no common base; a large model cannot be serialized
        return False
    return all(
        found.shape == tuple(wanted.shape) and np.abs(found - wanted.numpy()).max() <= TOLERANCE * float(wanted.abs().max())
        for found, wanted in pairs
    )


def name_axes(model: onnx.ModelProto) -> None:
    """Give the free axes names that people read, in place: batch, height and width; h and w in 8*h and 8*w."""
    names: dict[str, str] = {}
    for index, given in enumerate(model.graph.input):
        for axis, dim in enumerate(given.type.tensor_type.shape.dim):
            if match := re.fullmatch(r"(\d+\*)?(\w+)", dim.dim_param):
                name = "batch" if axis == 0 else ("hw" if match[1] else ("height", "width"))[axis - 2]
                names.setdefault(match[2], name + (str(index) if index and axis else ""))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"[A-Za-z_]\w*", lambda symbol: names.get(symbol[0], symbol[0]), dim.dim_param)


def tensor_shapes(path: Any) -> dict[str, list[dict[str, Any]]]:
    """Return {"inputs": [{name, shape}], "outputs": ...} of an ONNX file; a free axis has a name in place of a size."""
    graph = onnx.load(path, load_external_data=False).graph

    def described(values: Any) -> list[dict[str, Any]]:
        dims = [(value.name, value.type.tensor_type.shape.dim) for value in values]
        return [{"name": name, "shape": [dim.dim_param or dim.dim_value for dim in axes]} for name, axes in dims]

    return {"inputs": described(graph.input), "outputs": described(graph.output)}


def size_sentence(shapes: dict[str, list[dict[str, Any]]]) -> str:
    """Return which sizes of images an ONNX file takes, in one sentence; "" if its outputs have no positions.

    Args:
        shapes: see `tensor_shapes`.
    """
    images = [entry["shape"] for entry in shapes["inputs"] if len(entry["shape"]) == IMAGE]
    if not images or all(len(entry["shape"]) <= 2 for entry in shapes["outputs"]):
        return ""
    height, width = images[0][2:]
    if isinstance(height, int) or isinstance(width, int):
        return f"It takes images of {height} x {width} only: the network itself or torch.onnx fixes their size."
    multiple = height.partition("*")[0] if "*" in height else ""
    return f"Height and width are free{f', in multiples of {multiple}' if multiple else ''}."
