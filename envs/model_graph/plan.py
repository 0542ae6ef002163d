"""The structure of a network: coupled channels, their positions in the tensors, and channels that cannot be removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.cost_models.core import NetworkGeometry


@dataclass(frozen=True)
class TensorSlice:
    """The positions of a group's units in one parameter or buffer.

    Attributes:
        tensor: name as in `state_dict()`, e.g. "layer1.0.conv1.weight".
        axis: axis of the tensor.
        positions: (units, multiplicity) integer; row u lists the positions of unit u on that axis.
    """

    tensor: str
    axis: int
    positions: np.ndarray


@dataclass(frozen=True)
class WrittenSize:
    """An attribute of a module with a number of channels that the forward pass uses, e.g. `x.split(self.width, dim=1)`.

    Attributes:
        module: path of the module.
        name: name of the attribute, an integer, or a list or tuple of integers.
        per_unit: what each unit of the group contributes to its value.
        entry: which entry of a list or tuple; None: the attribute is an integer.
    """

    module: str
    name: str
    per_unit: int
    entry: int | None = None


@dataclass(frozen=True)
class ViewSize:
    """A number of channels in the sizes of a view, which the forward pass computes from other numbers than those of the group.

    Attributes:
        module: path of the module whose forward pass contains the view.
        sizes: all sizes that the view requests in the dense network; -1: free.
        axis: which of them changes with the units of the group.
        per_unit: what each unit of the group contributes to it.
    """

    module: str
    sizes: tuple[int, ...]
    axis: int
    per_unit: int


@dataclass(frozen=True)
class ChannelGroup:
    """Coupled channels: each unit can only be removed from all of its tensors together.

    Attributes:
        name: name of the first layer, in execution order, that produces the channels; with "#2" and so on if that layer has
            several groups.
        units: number of units of the dense group.
        slices: all positions of the units.
        producers: names of the conv/linear layers whose outputs belong to the group, in execution order.
        consumers: names of the conv/linear layers that read the group's channels.
        sizes: attributes that change with the number of units.
        views: views that change with the number of units.
    """

    name: str
    units: int
    slices: tuple[TensorSlice, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    sizes: tuple[WrittenSize, ...] = ()
    views: tuple[ViewSize, ...] = ()


@dataclass(frozen=True)
class FrozenChannels:
    """Output channels of a layer that are never removed, and the reason."""

    layer: str
    channels: int
    reason: str


@dataclass(frozen=True)
class Operation:
    """The effect of one operator on the channels of its inputs; spatial sizes are not recorded.

    Attributes:
        kind: "layer": a convolution or linear layer; "batch_norm"; "function": an elementwise function; "add"; "mul";
            "cat": concatenation along the channels; "pad": padding with `before` and `after` channels of zeros; "flatten":
            every channel becomes one channel for each of its pixels (depth, height, width).
        inputs: indices of earlier operations; -1: an unknown value, which only layers and batch norms may read.
        name: name of the layer, the batch norm, or the function ("aten.relu.default").
        arguments: (name, value) pairs; for a function, all arguments except its input.
    """

    kind: str
    inputs: tuple[int, ...]
    name: str = ""
    arguments: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class ModelGraph:
    """The structure of a network as the search needs it; it has no tensors and can be pickled.

    Attributes:
        geometry: layers, widths, memory (see `NetworkGeometry`); `geometry.group_names[i] == groups[i].name`.
        groups: prunable groups, ordered by first producer in execution order.
        frozen: channels that are never removed, by layer.
        batch_norms: (layer name, batch-norm name) of each batch norm that is the only reader of its layer: they can be folded.
        seconds: duration of the analysis.
        operations: operators in execution order, with their effect on the channels; unknown operators are left out.
    """

    geometry: NetworkGeometry
    groups: tuple[ChannelGroup, ...]
    frozen: tuple[FrozenChannels, ...]
    batch_norms: tuple[tuple[str, str], ...]
    seconds: float
    operations: tuple[Operation, ...] = ()
