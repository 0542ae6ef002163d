"""The frozen plan of a network: which channels must go together, where they sit in the tensors, and what cannot go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.cost_models.core import NetworkGeometry


@dataclass(frozen=True)
class TensorSlice:
    """Where the units of a group sit in one parameter or buffer.

    Attributes:
        tensor: name as in `state_dict()`, e.g. "layer1.0.conv1.weight".
        axis: the axis that the units live on.
        positions: (units, multiplicity) integer; row u lists what unit u occupies on that axis.
    """

    tensor: str
    axis: int
    positions: np.ndarray


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together, unit by unit, across all their tensors.

    Attributes:
        name: the first layer that produces them (execution order), with "#2" and so on when that layer has several groups.
        units: how many units the dense group has.
        slices: every place the units occupy.
        producers: names of the conv/linear layers whose outputs belong to the group, execution order.
        consumers: names of the conv/linear layers that read them.
    """

    name: str
    units: int
    slices: tuple[TensorSlice, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class FrozenChannels:
    """Output channels of a layer that are never removed, and why."""

    layer: str
    channels: int
    reason: str


@dataclass(frozen=True)
class Operation:
    """What one operator does to the channels of its inputs. Spatial size, where there is one, is left out of it.

    Attributes:
        kind: "layer": a convolution or linear layer; "batch_norm"; "function": entry by entry; "add"; "mul";
            "cat": along the channels; "pad": with `before` and `after` channels of zeros; "flatten": every channel
            becomes `height` x `width` of them.
        inputs: indices of earlier operations; -1: something unknown, which only layers and batch norms may read.
        name: of the layer, the batch norm, or the function ("aten.relu.default").
        arguments: (name, value) pairs; of a function all but its input.
    """

    kind: str
    inputs: tuple[int, ...]
    name: str = ""
    arguments: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class ModelGraph:
    """Everything the search needs to know about a network's structure; no tensors, picklable.

    Attributes:
        geometry: layers, widths, memory (see `NetworkGeometry`); `geometry.group_names[i] == groups[i].name`.
        groups: prunable groups, by first producer in execution order.
        frozen: what is excluded, by layer.
        batch_norms: (layer name, batch-norm name) where the batch norm is the layer's only reader: they can be folded.
        seconds: how long the analysis took.
        operations: what happens to the channels, in execution order; operators that mix or hide them are left out.
    """

    geometry: NetworkGeometry
    groups: tuple[ChannelGroup, ...]
    frozen: tuple[FrozenChannels, ...]
    batch_norms: tuple[tuple[str, str], ...]
    seconds: float
    operations: tuple[Operation, ...] = ()
