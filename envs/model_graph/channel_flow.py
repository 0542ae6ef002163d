"""Coupled channels: channel identities are propagated through the exported graph.

Every position on every axis of every parameter and buffer is one element of a union-find: the element of a
convolution's weight, axis 0, position j *is* the identity of its output channel j. Each activation has a shadow: an integer
tensor of the same shape that holds the channel of each of its entries. Operators that only move data are executed on the
shadows; operators that combine channels merge the identities; a layer that reads channel x at its input i merges
(weight, axis 1, i) with x. A class of the union-find is therefore a list of (tensor, axis, position): all positions that
must be removed together.

Negative entries are constants: they belong to no channel, and their width cannot change. Channels that are combined with a
constant are frozen. Channels that enter an operator that mixes channels, or an unknown operator, are frozen too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from secateur.envs.model_graph.identities import Identities
from secateur.envs.model_graph.shadows import Shadow, along, as_axis, concatenate, filled, first_entries, narrow
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

Result = Tensor | Shadow | list[Tensor] | list[Shadow]
"""The result of a rule: one shadow, or a list of them for operators with several results."""


class ChannelFlow:
    """The identities of a traced model, from one walk through its graph.

    Attributes:
        identities: the union-find.
        shadows: node -> `Shadow`, or a list of them for operators with several results.
        splits: for each operator that cuts channels into parts of different sizes, the identities in each part.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.identities = Identities(dict(trace.tensor_shapes))
        self.shadows: dict[Node, Shadow | list[Shadow]] = {}
        self.splits: list[list[np.ndarray]] = []
        for node, name in trace.tensors.items():
            self.shadows[node] = self._tensor_shadow(name)
        for node in trace.inputs:
            self.shadows[node] = self._constant(node, "the model's input")
        for node in trace.nodes:
            self.shadows[node] = self._visit(node)
        for node in trace.outputs:
            self._freeze([node], "model output")

    # Shadows ---------------------------------------------------------------------------------------------------------

    def _tensor_shadow(self, name: str) -> Shadow:
        shape = self.trace.tensor_shapes[name]
        axes = [axis for axis, size in enumerate(shape) if size > 1]
        if not axes:
            return (torch.full(shape, self.identities.constant("a scalar")),)
        return tuple(along(self.identities.of(name, axis), axis, shape) for axis in axes)

    def _constant(self, node: Node, origin: str) -> Shadow | list[Shadow]:
        entry = self.identities.constant(origin)
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            return [(filled(entry, x.shape),) for x in value]
        return (filled(entry, value.shape if isinstance(value, Tensor) else ()),)

    def _shadow(self, node: Node) -> Shadow:
        """Return the shadow of an operand with one result.

        Raises:
            TypeError: if it has several results.
        """
        found = self._shadows(node)
        if isinstance(found, list):
            raise TypeError(f"{op_name(node)} has several results.")
        return found

    def _shadows(self, node: Node) -> Shadow | list[Shadow]:
        """Return the shadows of a value; values that are never visited (lifted constants, for example) have no channels."""
        if node not in self.shadows:
            self.shadows[node] = self._constant(node, "a tensor that is neither a parameter nor a buffer")
        return self.shadows[node]

    def _single(self, node: Node) -> Tensor:
        """Return the one tensor of an activation's shadow. A parameter with several axes is taken as a constant."""
        shadow = self._shadow(node)
        if len(shadow) == 1:
            return shadow[0]
        self._freeze([node], "is used as a whole")
        return filled(self.identities.constant("a parameter that is used as a whole"), shadow[0].shape)

    def _roots(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.identities.find(ids.numpy()))

    def _compact(self, ids: Tensor) -> Tensor:
        """Return the representatives, with stride 0 along every axis on which they are equal."""
        shape, ids = ids.shape, self._roots(narrow(ids))
        signs = torch.where(ids < 0, -1, ids)
        for axis in range(ids.dim()):
            if signs.size(axis) > 1 and bool((signs == signs.narrow(axis, 0, 1)).all()):
                ids, signs = ids.narrow(axis, 0, 1), signs.narrow(axis, 0, 1)
        return ids.expand(shape)

    def _channel_axes(self, ids: Tensor) -> list[int]:
        """Return the axes along which the entries belong to different classes."""
        compact = narrow(self._compact(ids))
        return [axis for axis, size in enumerate(compact.shape) if size > 1]

    def _freeze(self, nodes: Sequence[Node], reason: str) -> None:
        for node in nodes:
            for ids in pytree.tree_leaves(self._shadows(node)):
                self.identities.freeze(narrow(ids), reason)

    def _unify(self, ids: Tensor, axes: Sequence[int]) -> Tensor:
        """Merge all entries along these axes; return the shadow with size 1 on them."""
        for axis in axes:
            first = ids.narrow(axis, 0, 1)
            rest = narrow(ids)
            if rest.size(axis) > 1:
                self.identities.merge(narrow(first).expand_as(rest).numpy(), rest.numpy())
            ids = first
        return ids

    def _couple_parts(self, ids: Tensor, axis: int, parts: int) -> None:
        """Merge entry i of every equal part of an axis with entry i of the first part."""
        ids = narrow(ids)
        if ids.size(axis) > 1:
            self._unify(ids.unflatten(axis, (parts, -1)), [axis])

    # Operators -------------------------------------------------------------------------------------------------------

    def _visit(self, node: Node) -> Shadow | list[Shadow]:
        name = op_name(node)
        if name == "getitem":
            shadows = self._shadows(argument(node, 0))
            return shadows[argument(node, 1)] if isinstance(shadows, list) else (shadows[0],)
        if schema_of(node) is None or node.meta.get("val") is None:
            return self._unknown(node)
        if node in self.trace.layer_index:
            rule: Rule = ChannelFlow._layer
        elif name in RULES:
            rule = RULES[name]
        elif is_pointwise(node):
            rule = ChannelFlow._pointwise
        elif is_movement(node):
            rule = ChannelFlow._execute
        else:
            return self._unknown(node)
        try:
            found = rule(self, node)
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError):
            # The rule does not cover this use of the operator. It is handled like an operator without a rule, which is safe.
            return self._unknown(node)
        if isinstance(found, list):
            return [self._compact_shadow(part) for part in found]
        return self._compact_shadow(found)

    def _compact_shadow(self, found: Tensor | Shadow) -> Shadow:
        return tuple(self._compact(ids) for ids in ((found,) if isinstance(found, Tensor) else found))

    def _unknown(self, node: Node) -> Shadow | list[Shadow]:
        name = op_name(node)
        why = (
            "whose weight is computed in the forward pass"
            if node in self.trace.computed
            else "which mixes channels or is not known"
        )
        self._freeze(node.all_input_nodes, f"enters {name}, {why}")
        return self._constant(node, f"the result of {name}")

    def _creation(self, node: Node) -> Shadow | list[Shadow]:
        return self._constant(node, f"{op_name(node)} of constant width")

    def _layer(self, node: Node) -> Tensor:
        layer = self.trace.layers[self.trace.layer_index[node]]
        given, ids = arguments(node), self.identities
        x = self._single(given["input"])
        axis = x.dim() - 1 if layer.shape.kind == "linear" else x.dim() + 1 - len(shape_of(given["weight"]))
        channels = self._unify(x, [d for d in range(x.dim()) if d != axis]).reshape(-1).numpy()
        outputs = self._layer_outputs(layer, channels)
        if given["bias"] is not None:
            bias = self.shadows.get(given["bias"], ())
            name = self.trace.tensors.get(given["bias"])  # calls of a shared weight may have biases of their own
            if name is not None:
                ids.merge(ids.of(name, 0), outputs)
            elif isinstance(bias, tuple) and bias:
                outputs = self._meet([(torch.from_numpy(outputs),), bias], outputs.shape)[0].numpy()
        return along(outputs, axis, shape_of(node))

    def _layer_outputs(self, layer: TracedLayer, channels: np.ndarray) -> np.ndarray:
        """Merge the positions on the weight's input axis with the channels that it reads; return its output channels."""
        ids, shape = self.identities, layer.shape
        outputs, inputs = ids.of(layer.weight, layer.out_axis), ids.of(layer.weight, layer.in_axis)
        if layer.transposed and shape.conv_groups > 1:
            for found in (channels, outputs, inputs):
                ids.freeze(found, "belongs to a transposed convolution with groups")
            return np.tile(outputs, shape.conv_groups)
        if shape.depthwise:
            ids.merge(outputs, np.repeat(channels, shape.out_channels // shape.in_channels))
            return outputs
        ids.merge(np.tile(inputs, shape.conv_groups), channels)
        parts = outputs.reshape(shape.conv_groups, -1)
        # The number of a convolution's groups does not change, so all groups lose the same channels.
        ids.merge(parts, np.broadcast_to(parts[0], parts.shape))
        return outputs

    def _pointwise(self, node: Node) -> Shadow | list[Shadow]:
        operands = [self._shadow(x) for x in node.all_input_nodes]
        if not operands:
            return self._creation(node)
        return self._meet(operands, shape_of(node))

    def _meet(self, operands: Sequence[Shadow], shape: Sequence[int]) -> Shadow:
        """Merge the identities of operands that are broadcast against each other; return those of the result."""
        activations = [shadow[0] for shadow in operands if len(shadow) == 1]
        several = [shadow for shadow in operands if len(shadow) > 1]
        carrying = [ids for ids in activations if bool((narrow(ids) >= 0).any())]
        if len(several) == 1 and not carrying:  # one parameter alone: a later operator combines it with channels
            return tuple(ids.expand(shape) for ids in several[0])
        activations += [self._matching_axis(shadow, carrying) for shadow in several]
        aligned = [ids.reshape((1,) * (len(shape) - ids.dim()) + tuple(ids.shape)) for ids in activations]
        axes = [set(self._channel_axes(ids)) for ids in aligned]
        kept = []
        for i, ids in enumerate(aligned):
            broadcast = {d for d, size in enumerate(shape) if ids.size(d) == 1 and size > 1}
            others = {axis for j, found in enumerate(axes) if j != i for axis in found}
            if broadcast & others:
                # One entry is combined with many channels, so the result has no channel of its own for it.
                self.identities.freeze(narrow(ids), "is broadcast over other channels")
            else:
                kept.append(ids.expand(shape))
        if not kept:
            return (filled(self.identities.constant("an outer product"), shape),)
        return (self._merge_entries(kept),)

    def _merge_entries(self, operands: Sequence[Tensor]) -> Tensor:
        """Merge shadows of equal shape entry by entry."""
        carrying = [ids for ids in operands if self._channel_axes(ids)]
        # If no operand has channels, no width depends on these entries.
        operands = carrying + [ids for ids in operands if not any(ids is c for c in carrying)]
        flat = [d for d in range(operands[0].dim()) if all(ids.stride(d) == 0 for ids in operands)]
        shape, small = operands[0].shape, list(operands)
        for axis in flat:
            small = [ids.narrow(axis, 0, 1) for ids in small]
        result = small[0].numpy()
        for ids in small[1:]:
            if carrying:
                self.identities.merge(result, ids.numpy())
            elif (result >= 0).any() and (ids >= 0).any():
                self.identities.merge(result, ids.numpy())
            result = np.where(result >= 0, result, ids.numpy())
        return torch.from_numpy(np.ascontiguousarray(result)).expand(shape)

    def _matching_axis(self, shadow: Shadow, carrying: Sequence[Tensor]) -> Tensor:
        """Return the shadow of the parameter's axis that is combined with channels; a scalar if there is none."""
        best, most = torch.tensor(self.identities.constant("a parameter without channels")), 1
        for ids in shadow:
            for axis, other in itertools.product(self._channel_axes(ids), carrying):
                position = axis - ids.dim() + other.dim()  # shapes are aligned at the last axis
                if position in self._channel_axes(other):
                    count = len(self._roots(first_entries(other, position)).unique())
                    if count > most:
                        best, most = ids, count
        return best

    def _batch_norm(self, node: Node) -> Shadow:
        given = arguments(node)
        operands = [self._shadow(given["input"])]
        rank = len(shape_of(node))
        for name in ("weight", "bias", "running_mean", "running_var"):
            if given.get(name) is not None:
                operands.append(tuple(as_axis(ids, 1, rank) for ids in self._shadow(given[name])))
        return self._meet(operands, shape_of(node))

    def _group_norm(self, node: Node) -> Shadow:
        if 1 in self._channel_axes(self._single(arguments(node)["input"])):
            self._freeze([arguments(node)["input"]], f"{op_name(node)} takes statistics over channels")
        return self._batch_norm(node)

    def _layer_norm(self, node: Node) -> Shadow:
        given = arguments(node)
        x = self._single(given["input"])
        if any(axis >= x.dim() - len(given["normalized_shape"]) for axis in self._channel_axes(x)):
            self._freeze([given["input"]], f"{op_name(node)} takes statistics over channels")
        operands = [self._shadow(given[name]) for name in ("input", "weight", "bias") if given.get(name) is not None]
        return self._meet(operands, shape_of(node))

    def _prelu(self, node: Node) -> Shadow:
        x, weight = argument(node, 0), argument(node, 1)
        slopes = tuple(as_axis(ids, 1, len(shape_of(node))) for ids in self._shadow(weight))
        return self._meet([self._shadow(x), slopes], shape_of(node))

    def _softmax(self, node: Node) -> Tensor:
        x = self._single(argument(node, 0))
        if arguments(node)["dim"] % x.dim() in self._channel_axes(x):
            self._freeze([argument(node, 0)], f"{op_name(node)} runs over channels")
        return x

    def _reduce(self, node: Node) -> Tensor:
        given = arguments(node)
        x = self._single(given["self"])
        dims = given.get("dim")
        dims = range(x.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        axes = sorted(axis % x.dim() for axis in dims)
        if set(axes) & set(self._channel_axes(x)):
            raise ValueError(f"{op_name(node)} mixes channels.")
        for axis in axes:
            x = x.narrow(axis, 0, 1)
        if not given.get("keepdim"):
            x = x.squeeze(tuple(axes))
        return x.expand(shape_of(node))

    def _spatial(self, node: Node) -> Tensor | list[Tensor]:
        """Pooling, resizing and reflection: every output entry belongs to the channel of the inputs around it."""
        x = self._single(argument(node, 0))
        rank = next(int(c) for c in op_name(node) if c in "123")
        x = self._unify(x, range(x.dim() - rank, x.dim()))
        value = node.meta["val"]
        return x.expand(value.shape) if isinstance(value, Tensor) else [x.expand(v.shape) for v in value]

    def _pad(self, node: Node) -> Tensor:
        given = arguments(node)
        x = self._single(given["self"])
        widths = given["pad"]
        channels = self._channel_axes(x)
        entry = self.identities.constant(f"zero padding of constant width ({op_name(node)})")
        for i in range(len(widths) // 2):
            axis, (before, after) = x.dim() - 1 - i, widths[2 * i : 2 * i + 2]
            if axis not in channels:
                x = x.narrow(axis, 0, 1).expand([*x.shape[:axis], x.size(axis) + before + after, *x.shape[axis + 1 :]])
            elif before < 0 or after < 0 or given.get("mode", "constant") != "constant":
                raise ValueError(f"{op_name(node)} cuts or fills the channel axis.")
            elif before or after:
                sides = [filled(entry, [*x.shape[:axis], width, *x.shape[axis + 1 :]]) for width in (before, after)]
                x = concatenate([sides[0], x, sides[1]], axis)
        return x

    def _cat(self, node: Node) -> Tensor:
        given = arguments(node)
        nodes, axis = given["tensors"], given["dim"] % len(shape_of(node))
        return self._join([self._shadow(x) for x in nodes if shape_of(x) != (0,)], axis)

    def _stack(self, node: Node) -> Tensor:
        given = arguments(node)
        axis = given["dim"] % len(shape_of(node))
        return self._join([tuple(ids.unsqueeze(axis) for ids in self._shadow(x)) for x in given["tensors"]], axis)

    def _join(self, operands: Sequence[Shadow], axis: int) -> Tensor:
        carrying = [shadow[0] for shadow in operands if len(shadow) == 1]
        singles = []
        for shadow in operands:
            ids = shadow[0] if len(shadow) == 1 else self._matching_axis(shadow, carrying)
            singles.append(ids.expand(shadow[0].shape))
        if any(set(self._channel_axes(ids)) - {axis} for ids in singles):
            # The axis is not the channels' axis: all operands must keep the same channels.
            self._merge_entries([self._unify(ids, [axis]) for ids in singles])
        return concatenate(singles, axis)

    def _split(self, node: Node) -> list[Tensor]:
        given = arguments(node)
        x = self._single(argument(node, 0))
        axis = given["dim"] % x.dim()
        sizes = [value.shape[axis] for value in node.meta["val"]]
        if axis in self._channel_axes(x):
            if len(set(sizes)) == 1:
                self._couple_parts(x, axis, len(sizes))
            else:
                self.splits.append([narrow(part).numpy() for part in x.split(sizes, axis)])
        return list(x.split(sizes, axis))

    def _slice(self, node: Node) -> Shadow | list[Tensor]:
        given = arguments(node)
        size = shape_of(argument(node, 0))
        axis = given["dim"] % len(size)
        start, end, _ = slice(given["start"], given["end"]).indices(size[axis])
        part = math.gcd(start, end, size[axis])
        for ids in self._shadow(argument(node, 0)):
            if axis in self._channel_axes(ids) and (start, end, given["step"]) != (0, size[axis], 1):
                if given["step"] == 1 and part > 1:
                    self._couple_parts(ids, axis, size[axis] // part)
                else:
                    self.identities.freeze(narrow(ids), f"{op_name(node)} picks channels at constant positions")
        return self._execute(node)

    def _pick(self, node: Node) -> Shadow | list[Tensor]:
        given = arguments(node)
        for ids in self._shadow(argument(node, 0)):
            axes = given.get("dim", given.get("dims", 0))
            axes = axes if isinstance(axes, (list, tuple)) else [axes]
            if {axis % ids.dim() for axis in axes} & set(self._channel_axes(ids)):
                self.identities.freeze(narrow(ids), f"{op_name(node)} picks channels at constant positions")
            elif op_name(node) in ("flip", "roll"):
                return self._shadow(argument(node, 0))
        return self._execute(node)

    def _reshape(self, node: Node) -> Shadow:
        """Execute a view; if it splits the channel axis, couple the parts index by index (channel shuffle)."""
        shape = shape_of(node)
        found = []
        for ids in self._shadow(argument(node, 0)):
            out = self._compact(ids.reshape(shape))
            axes = self._channel_axes(out)
            if len(axes) > 1:
                self._unify(out, axes[:-1])
            found.append(out)
        return tuple(found)

    def _channel_shuffle(self, node: Node) -> Tensor:
        x, parts = self._single(argument(node, 0)), argument(node, 1)
        self._couple_parts(x, 1, parts)
        return x.unflatten(1, (parts, -1)).transpose(1, 2).flatten(1, 2)

    def _glu(self, node: Node) -> Shadow:
        x = self._single(argument(node, 0))
        axis = arguments(node)["dim"] % x.dim()
        return self._meet([(part,) for part in x.chunk(2, axis)], shape_of(node))

    def _execute(self, node: Node) -> Shadow | list[Tensor]:
        """Execute an operator that only moves data on the shadows."""
        first, *rest = node.all_input_nodes
        others = {x: self._shadow(x)[0] for x in rest}
        results = [run_with(node, {first: ids, **others}) for ids in self._shadow(first)]
        return list(results[0]) if isinstance(results[0], (tuple, list)) else tuple(results)


def is_movement(node: Node) -> bool:
    """Return whether the operator only rearranges its input: a view, according to its schema, or one of `_MOVEMENTS`."""
    returns = schema_of(node).returns
    if op_name(node) == "as_strided":  # its strides refer to the activation, not to the shadow
        return False
    aliases = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return aliases or op_name(node) in _MOVEMENTS


Rule = Callable[[ChannelFlow, Node], Result]

_MOVEMENTS = ("repeat", "tile", "repeat_interleave", "pixel_shuffle", "pixel_unshuffle", "lift_fresh_copy")
_CREATIONS = "zeros ones full empty arange linspace eye rand randn scalar_tensor new_zeros new_ones new_full new_empty"
_REDUCTIONS = "mean sum amax amin prod var std logsumexp linalg_vector_norm"
_POOLINGS = "max_pool avg_pool adaptive_max_pool adaptive_avg_pool reflection_pad replication_pad upsample_nearest"
_UPSAMPLINGS = "_upsample_nearest_exact2d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d"

RULES: dict[str, Rule] = {
    "batch_norm": ChannelFlow._batch_norm,
    "instance_norm": ChannelFlow._batch_norm,
    "group_norm": ChannelFlow._group_norm,
    "layer_norm": ChannelFlow._layer_norm,
    "rms_norm": ChannelFlow._layer_norm,
    "prelu": ChannelFlow._prelu,
    "pad": ChannelFlow._pad,
    "constant_pad_nd": ChannelFlow._pad,
    "cat": ChannelFlow._cat,
    "concat": ChannelFlow._cat,
    "stack": ChannelFlow._stack,
    "slice": ChannelFlow._slice,
    "channel_shuffle": ChannelFlow._channel_shuffle,
    "glu": ChannelFlow._glu,
    **dict.fromkeys(("softmax", "log_softmax", "cumsum"), ChannelFlow._softmax),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), ChannelFlow._split),
    **dict.fromkeys(("select", "unbind", "flip", "roll", "narrow"), ChannelFlow._pick),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"), ChannelFlow._reshape),
    **dict.fromkeys(_CREATIONS.split(), ChannelFlow._creation),
    **dict.fromkeys(_REDUCTIONS.split(), ChannelFlow._reduce),
    **dict.fromkeys([f"{name}{rank}d" for name in _POOLINGS.split() for rank in (1, 2, 3)], ChannelFlow._spatial),
    **dict.fromkeys(_UPSAMPLINGS.split(), ChannelFlow._spatial),
}
"""Operators with their own rule, by plain name; all others are pointwise, movements of data, or unknown."""
