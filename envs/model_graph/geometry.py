"""The shapes, parameters and memory of a traced network, as functions of the widths of its groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from secateur.cost_models.core import NetworkGeometry
from secateur.envs.model_graph.channel_flow import ChannelFlow
from secateur.envs.model_graph.plan import ChannelGroup
from secateur.envs.model_graph.product_rules import PRODUCTS
from secateur.envs.model_graph.products import count_products
from secateur.envs.model_graph.shadows import narrow
from secateur.envs.model_graph.trace import (
    Trace,
    TracedLayer,
    argument,
    arguments,
    is_pointwise,
    op_name,
    run_with,
    schema_of,
    shape_of,
)


def network_geometry(trace: Trace, flow: ChannelFlow, groups: Sequence[ChannelGroup], group_of: np.ndarray) -> NetworkGeometry:
    """Return the geometry of the network: every shape as a function of the widths of the groups.

    Args:
        trace, flow: the graph and the identities of its channels.
        groups: the prunable groups.
        group_of: (elements,) index of each union-find element's group; -1: no group.
    """
    multiplicity = {(s.tensor, s.axis, g): s.positions.shape[1] for g, group in enumerate(groups) for s in group.slices}
    layers = trace.layers
    units = np.array([group.units for group in groups], dtype=np.int64)
    in_per_unit, out_per_unit = _channels_per_unit(layers, multiplicity, len(groups))
    owned = {layer.weight for layer in layers} | {layer.bias for layer in layers}
    others = [name for name in sorted(trace.parameters) if name not in owned]
    other_per_unit = np.zeros(len(groups))
    for (tensor, axis, g), count in multiplicity.items():
        if tensor in trace.parameters and tensor not in owned:
            size = trace.tensor_shapes[tensor]
            other_per_unit[g] += count * math.prod(size) / size[axis]
    memory = _Memory(trace)
    buffer_per_unit = np.zeros((len(groups), len(memory.buffers)))
    for index, buffer in enumerate(memory.buffers):
        buffer_per_unit[:, index] = _elements(flow, buffer, group_of, len(groups)) / np.maximum(units, 1)
    dense_elements = np.array([buffer.elements for buffer in memory.buffers], dtype=float)
    live, step_layer = memory.live_table()
    products, uncounted = count_products(trace)
    macs_per_unit = sum((_product_shares(flow, *item, group_of, len(groups)) for item in products.items()), np.zeros(len(groups)))
    macs_per_unit /= np.maximum(units, 1)
    return NetworkGeometry(
        layers=tuple(layer.shape for layer in layers),
        group_names=tuple(group.name for group in groups),
        group_units=units,
        in_fixed=np.array([layer.shape.in_channels for layer in layers]) - units @ in_per_unit,
        in_per_unit=in_per_unit,
        out_fixed=np.array([layer.shape.out_channels for layer in layers]) - units @ out_per_unit,
        out_per_unit=out_per_unit,
        other_fixed=float(sum(math.prod(trace.tensor_shapes[name]) for name in others) - units @ other_per_unit),
        other_per_unit=other_per_unit,
        fixed_macs=float(sum(products.values()) - units @ macs_per_unit),
        macs_per_unit=macs_per_unit,
        buffer_fixed=dense_elements - units @ buffer_per_unit,
        buffer_per_unit=buffer_per_unit,
        buffer_readers=tuple(buffer.quantized_readers(layers) for buffer in memory.buffers),
        live=live,
        step_layer=step_layer,
        uncounted=uncounted,
    )


def _channels_per_unit(
    layers: Sequence[TracedLayer], multiplicity: Mapping[tuple[str, int, int], int], groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the input and output channels of each layer per unit of each group, (groups, layers) each.

    Args:
        layers: the layers.
        multiplicity: {(tensor, axis, group): positions per unit}.
        groups: number of groups.
    """
    out_per_unit = np.zeros((groups, len(layers)))
    in_per_unit = np.zeros_like(out_per_unit)
    for index, layer in enumerate(layers):
        shape = layer.shape
        for g in range(groups):
            out = multiplicity.get((layer.weight, layer.out_axis, g), 0)
            out_per_unit[g, index] = out
            if shape.depthwise:
                in_per_unit[g, index] = out * shape.in_channels / shape.out_channels
            else:
                conv_groups = 1 if layer.transposed else shape.conv_groups
                in_per_unit[g, index] = multiplicity.get((layer.weight, layer.in_axis, g), 0) * conv_groups
    return in_per_unit, out_per_unit


_COPIES = ("clone", "contiguous", "to", "_to_copy", "type_as", "zeros_like", "ones_like", "full_like", "empty_like")
"""Elementwise operators whose result is new memory, in another layout or type."""


@dataclass
class _Buffer:
    """A piece of memory for activations; operators that work in place reuse it.

    Attributes:
        node: the node that fills it first.
        part: index of the result, for operators with several results.
        elements: number of elements.
        birth, death: first and last step that needs it.
        contents: for each value that is stored in it, in order, the layers that read the value (-1 for other operators).
        holders: nodes whose values are stored in it.
        fixed: whether it may not be overwritten (the model's inputs).
    """

    node: Node
    part: int
    elements: int
    birth: int
    death: int
    contents: list[list[int]] = field(default_factory=lambda: [[]])
    holders: list[Node] = field(default_factory=list)
    fixed: bool = False

    def quantized_readers(self, layers: Sequence[TracedLayer]) -> tuple[int, ...]:
        """Return the quantizable layers that read the buffer; () if other operators read it too."""
        *earlier, last = self.contents
        if any(earlier) or -1 in last or not all(layers[reader].shape.quantizable for reader in last):
            return ()
        return tuple(sorted(set(last)))


class _Memory:
    """The buffers of a network's activations and the steps at which they are needed, from one walk through the graph.

    Views share their input's buffer. A pointwise operator or a batch norm works in place on an operand that is not needed
    afterwards. Workspace inside operators (im2col, attention scores of a fused kernel) is not counted.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.buffers: list[_Buffer] = []
        self.step_layer: list[int] = []
        self._held: dict[Node, list[int]] = {node: [] for node in trace.tensors}  # node -> its buffers
        self._order = {node: i for i, node in enumerate(trace.nodes)}
        for node in trace.inputs:
            self._allocate(node, step=0, fixed=True)
        for node in trace.nodes:
            self._visit(node)
        for node in trace.outputs:
            for index in self._held.get(node, []):
                self._read(index, -1, len(self.step_layer) - 1)

    def live_table(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (live, step_layer) without the steps of other operators whose live buffers equal those of the step before."""
        steps = np.arange(len(self.step_layer))[:, None]
        live = (steps >= [b.birth for b in self.buffers]) & (steps <= [b.death for b in self.buffers])
        layers = np.array(self.step_layer, dtype=np.int64)
        repeats = np.zeros(len(layers), dtype=bool)
        repeats[1:] = (live[1:] == live[:-1]).all(axis=1) & (layers[1:] < 0)
        return live[~repeats], layers[~repeats]

    def _visit(self, node: Node) -> None:
        inputs = node.all_input_nodes
        if op_name(node) == "getitem":
            held = self._held.get(inputs[0], [])
            several = len(held) > 1
            self._hold(node, [held[argument(node, 1)]] if several else held)
            return
        if self._is_alias(node):
            self._hold(node, self._held.get(inputs[0], []))
            return
        step, layer = len(self.step_layer), self.trace.layer_index.get(node, -1)
        self.step_layer.append(layer)
        target = self._in_place_target(node)
        for operand in inputs:
            for index in self._held.get(operand, []):
                if index != target:
                    self._read(index, layer, step)
        if target is None:
            self._allocate(node, step)
        else:
            self.buffers[target].contents.append([])
            self.buffers[target].death = step
            self._hold(node, [target])

    def _hold(self, node: Node, indices: list[int]) -> None:
        self._held[node] = indices
        for index in indices:
            self.buffers[index].holders.append(node)

    def _read(self, index: int, layer: int, step: int) -> None:
        self.buffers[index].contents[-1].append(layer)
        self.buffers[index].death = step

    def _allocate(self, node: Node, step: int, fixed: bool = False) -> None:
        first = len(self.buffers)
        for part, value in enumerate(x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)):
            self.buffers.append(_Buffer(node, part, value.numel(), step, step, fixed=fixed))
        self._hold(node, list(range(first, len(self.buffers))))

    def _is_alias(self, node: Node) -> bool:
        """Return whether the result is a view of the first operand, or dropout, which has no effect in eval mode."""
        schema = schema_of(node)
        if schema is None:
            return False
        if "dropout" in schema.name:
            return True
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
            return False
        return _shares_memory(node)

    def _in_place_target(self, node: Node) -> int | None:
        schema = schema_of(node)
        if schema is None or len(pytree.tree_leaves(node.meta.get("val"))) != 1:
            return None
        writes = any(r.alias_info is not None and r.alias_info.is_write for r in schema.returns)
        elementwise = op_name(node) == "batch_norm" or is_pointwise(node)
        if not (writes or (elementwise and op_name(node) not in _COPIES)):
            return None
        for operand in node.all_input_nodes:
            for index in self._held.get(operand, []):
                if writes or self._is_free(index, node):
                    return index
            if writes:
                return None
        return None

    def _is_free(self, index: int, node: Node) -> bool:
        """Return whether a buffer has the size and type of the node's result and is not needed afterwards."""
        buffer = self.buffers[index]
        same_type = pytree.tree_leaves(buffer.node.meta["val"])[buffer.part].dtype == node.meta["val"].dtype
        if buffer.fixed or not same_type or buffer.elements != math.prod(shape_of(node)):
            return False
        return all(self._order.get(user, math.inf) <= self._order[node] for x in buffer.holders for user in x.users)


def _shares_memory(node: Node) -> bool:
    """Return whether a view shares its operand's memory, from a run on an empty tensor with the same strides."""
    source = node.all_input_nodes[0].meta["val"]
    if not isinstance(source, Tensor):
        return True
    stand_in = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta")
    values = {x: x.meta["val"] for x in node.all_input_nodes} | {node.all_input_nodes[0]: stand_in}
    try:
        results = pytree.tree_leaves(run_with(node, values))
    except RuntimeError:
        return True
    return all(x.untyped_storage()._cdata == stand_in.untyped_storage()._cdata for x in results)


def _elements(flow: ChannelFlow, buffer: _Buffer, group_of: np.ndarray, groups: int) -> np.ndarray:
    """Return the number of elements of a buffer that belong to each group, (groups,)."""
    found = flow.shadows[buffer.node]
    ids = (found[buffer.part] if isinstance(found, list) else found)[0]
    return buffer.elements * _shares(ids, group_of, groups)


def _shares(ids: Tensor, group_of: np.ndarray, groups: int) -> np.ndarray:
    """Return the share of an activation's entries that belong to each group, (groups,)."""
    entries = narrow(ids).numpy().ravel()
    owners = group_of[entries[entries >= 0]]
    return np.bincount(owners[owners >= 0], minlength=groups) / max(entries.size, 1)


def _product_shares(flow: ChannelFlow, node: Node, macs: float, group_of: np.ndarray, groups: int) -> np.ndarray:
    """Return the multiply-accumulates of a product that belong to each group, (groups,)."""

    def shares(x: Node) -> np.ndarray:
        found = flow.shadows.get(x)
        return _shares(found[0], group_of, groups) if isinstance(found, tuple) and len(found) == 1 else np.zeros(groups)

    result = shares(node)
    if (
        op_name(node) == "scaled_dot_product_attention"
    ):  # two products: the width of the queries is summed, that of the values stays
        queries, values = arguments(node)["query"], arguments(node)["value"]
        summed, kept = shape_of(queries)[-1], shape_of(values)[-1]
        return macs * (summed * shares(queries) + kept * result) / (summed + kept)
    if result.any() or op_name(node) not in PRODUCTS:
        return macs * result
    operands = [shares(x) for x in node.all_input_nodes]  # the products are summed over channels that all operands have
    return macs * max(operands, key=np.sum)
